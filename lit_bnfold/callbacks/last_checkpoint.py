"""One checkpoint that is always there and always whole: that of the latest step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lit_bnfold.checkpoint import whole_file


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a training goes on as if it had never stopped.

    It is written when training starts, every so many steps, and when training ends. An interrupted step is not saved:
    its update may be done in part. So an interruption costs the steps since the last save and nothing else.

    Args:
        every_n_train_steps: Optimizer steps between two saves.

    Raises:
        ValueError: If that is below 1.

    Attributes:
        last_model_path: The file, empty before the first save.
    """

    def __init__(self, every_n_train_steps: int = 1_000) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps: expected at least 1, got {every_n_train_steps}.")
        self.every_n_train_steps = every_n_train_steps
        self.last_model_path = ""
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where this training starts."""
        self._save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every so many steps."""
        if trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        with whole_file(path, trainer) as part:
            trainer.save_checkpoint(part, weights_only=False)
        self.last_model_path, self._saved_step = str(path), trainer.global_step
