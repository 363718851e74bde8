"""A word on checkpoints that Lightning cannot load."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_bnfold.reading import cannot_be_loaded, explains_itself


class Restoring(Callback):
    """Says in a sentence which checkpoint cannot be loaded, where that ends in an error that says nothing by itself.

    What Lightning reads of a checkpoint has to be there and of the right type, or it ends in a KeyError and the like.

    Attributes:
        is_restoring: Whether the checkpoint is being loaded.
    """

    def __init__(self) -> None:
        self.is_restoring = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The checkpoint is loaded next."""
        self.is_restoring = True

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It is loaded."""
        self.is_restoring = False

    on_train_start = on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the file.

        Raises:
            ValueError: In place of the error.
        """
        is_told = explains_itself(exception) or not isinstance(exception, Exception)
        if self.is_restoring and trainer.ckpt_path is not None and not is_told:
            raise ValueError(cannot_be_loaded(trainer.ckpt_path, exception)) from exception
