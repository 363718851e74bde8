"""One checkpoint that is always there and always whole: that of the latest step."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from lit_bnfold.callbacks.monitor import check_every_n_steps
from lit_bnfold.callbacks.validation import validation_follows
from lit_bnfold.writing import whole_file


class LastCheckpoint(Checkpoint):
    """Keeps ``last.ckpt``, from which a training goes on as if it had never stopped.

    It is written when training starts, every so many steps, and when training ends. An interrupted step is not saved:
    its update may be done in part. So an interruption costs the steps since the last save and nothing else: the
    training that goes on from ``last.ckpt`` ends with the same bits, if its data does not depend on the stop.

    After a step that is validated it is written when the validation is done. Lightning would not repeat a validation
    that was interrupted between the two, and so the best checkpoint could be lost. Callbacks that keep the best one
    come before this one in the list, so that what they have learned is in it.

    Args:
        every_n_train_steps: Optimizer steps between two saves.

    Raises:
        TypeError: If that is no int.
        ValueError: If it is below 1.

    Attributes:
        last_model_path: The file, empty before the first save.
    """

    def __init__(self, every_n_train_steps: int = 1_000) -> None:
        check_every_n_steps(every_n_train_steps, "every_n_train_steps")
        self.every_n_train_steps = every_n_train_steps
        self.last_model_path = ""
        self._saved_step = -1
        self._is_due = False
        self._has_ended = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where this training starts."""
        self._saved_step, self._is_due, self._has_ended = -1, False, False
        self._save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every so many steps, unless a validation follows."""
        self._is_due |= trainer.global_step % self.every_n_train_steps == 0
        if self._is_due and not validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what had to wait for the validation."""
        if self._is_due and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)
        self._has_ended = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to go on."""
        if self.last_model_path and not self._has_ended:
            path = shlex.quote(self.last_model_path)
            rank_zero_info(f"To go on from step {self._saved_step}, repeat the command with --ckpt_path {path}")

    def _save(self, trainer: Trainer) -> None:
        self._is_due = False
        if trainer.global_step == self._saved_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        with whole_file(path, trainer) as part:
            trainer.save_checkpoint(part, weights_only=False)
        self.last_model_path, self._saved_step = str(path), trainer.global_step
