"""What the network has learned, to be looked at: names that it makes up, and where it puts the letters."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lit_bnfold.callbacks.tensorboard import tensorboard_loggers
from lit_bnfold.names.data import NamesDataModule
from lit_bnfold.names.model import BatchNormMLP
from lit_bnfold.names.sampling import Sampling, sample_names

# What stands before a name, and what that means.
KNOWN, NEW = "* ", "  "
LEGEND = "* is one of the training words"


class SampledNames(Callback):
    """Shows names that the network makes up: as text in TensorBoard at each validation of a fit, and when it predicts.

    Predicted names are printed one per line. On a terminal a star marks the ones that are training words, which are
    remembered rather than made up; what is piped into another program is the names and nothing else. Training is
    the same with it and without it. TensorBoard shows ten of the steps that have texts, and all of them with
    ``--samples_per_plugin=text=0``.

    Args:
        sampling: Which names.

    Example:
        >>> from lit_bnfold import BatchNormMLP
        >>> trainer = Trainer(
        ...     accelerator="cpu", callbacks=[SampledNames(Sampling(number=3, prefix="mar"))], logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False,
        ... )
        >>> names = trainer.predict(BatchNormMLP(), NamesDataModule())  # doctest: +ELLIPSIS
        mar...
        mar...
        mar...
    """

    def __init__(self, sampling: Sampling | None = None) -> None:
        self.sampling = sampling or Sampling()
        self._shown = self._known = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be shown, before anything else starts; let the data know which names are predicted."""
        if stage == "fit":
            _network(pl_module)
        data = NamesDataModule.of(trainer)
        self.sampling.encode_prefix(data.stoi)
        if stage == "predict":
            data.sampling = self.sampling

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write names at this step of the training."""
        loggers = tensorboard_loggers(trainer)
        if not loggers or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        data = NamesDataModule.of(trainer)
        try:
            names = sample_names(_network(pl_module).net, data.stoi, data.block_size, self.sampling)
            text = "\n".join([*(_marked(name, data) for name in names), "", LEGEND])
        except ValueError as error:  # The training has gone wrong, and may end as it would without this.
            text = str(error)
        for logger in loggers:
            # Indented by four, it is shown as it is, whatever characters the words have.
            logger.experiment.add_text(
                "names", "\n".join(f"    {line}" for line in text.split("\n")), trainer.global_step
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._shown = self._known = 0

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print the names of a batch."""
        if not trainer.is_global_zero:
            return
        data = NamesDataModule.of(trainer)
        self._shown += len(outputs)
        self._known += sum(name in data.training_words for name in outputs)
        lines = [_marked(name, data) for name in outputs] if sys.stdout.isatty() else outputs
        print("\n".join(lines), flush=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the mark means, on a terminal."""
        if trainer.is_global_zero and sys.stdout.isatty():
            print(f"\n{LEGEND} ({self._known} of {self._shown})")


class CharacterEmbedding(Callback):
    """Shows the embedding of the characters in TensorBoard's projector when training ends, each under its letter.

    The projector draws points; its button with an A writes the letters.

    Example:
        >>> trainer = Trainer(accelerator="cpu", callbacks=[CharacterEmbedding()], logger=False)
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a module and data that it cannot show, before training begins."""
        if stage == "fit":
            _network(pl_module)
            NamesDataModule.of(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the embedding."""
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_embedding(
                _network(pl_module).net.get_parameter("embedding.weight"),  # (vocab_size, n_embd)
                metadata=[_label(character) for character in NamesDataModule.of(trainer).stoi],
                global_step=trainer.global_step,
                tag="characters",
            )


def _network(pl_module: LightningModule) -> BatchNormMLP:
    if not isinstance(pl_module, BatchNormMLP):
        raise TypeError(
            f"Expected a BatchNormMLP, which makes up names, got {type(pl_module).__name__}; pass one, or leave "
            "SampledNames and CharacterEmbedding out of the callbacks."
        )
    return pl_module


def _marked(name: str, data: NamesDataModule) -> str:
    return (KNOWN if name in data.training_words else NEW) + name


def _label(character: str) -> str:
    """A character as a line of its own, on which a blank would be nothing to see and a line break two lines."""
    return character if character.isprintable() and not character.isspace() else f"U+{ord(character):04X}"
