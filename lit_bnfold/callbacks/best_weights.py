"""The weights of the best checkpoint of a training, for as long as they are folded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_bnfold.callbacks.validation import module_put_back
from lit_bnfold.folding import FoldingError
from lit_bnfold.reading import check_is_undamaged


class BestWeights:
    """Puts the weights of the checkpoint callback's best model into the module.

    Args:
        trainer: The Trainer, when its training begins.
    """

    def __init__(self, trainer: Trainer) -> None:
        # The best checkpoint that there was before.
        self._found = _last_written(self.path(trainer))

    @staticmethod
    def path(trainer: Trainer) -> str:
        """Where the best checkpoint is, empty if there is none.

        Args:
            trainer: The Trainer.
        """
        return getattr(trainer.checkpoint_callback, "best_model_path", "")

    @staticmethod
    def score(trainer: Trainer) -> tuple[str, float] | None:
        """What the checkpoint callback monitors and its best value; None if it monitors nothing.

        Args:
            trainer: The Trainer.
        """
        saved = trainer.checkpoint_callback
        monitor, score = getattr(saved, "monitor", None), getattr(saved, "best_model_score", None)
        return None if monitor is None or score is None else (monitor, float(score))

    @contextmanager
    def loaded(self, trainer: Trainer, pl_module: LightningModule, stay: Callable[[], bool]) -> Iterator[None]:
        """Put them into the module for a while.

        Args:
            trainer: The Trainer.
            pl_module: The module; it has its own weights back afterwards.
            stay: Whether it keeps what it then has instead.

        Raises:
            FoldingError: If the checkpoint is from elsewhere, and could run any code when it is read.
            ValueError: If the checkpoint is damaged.
        """
        last = copy.deepcopy(pl_module.state_dict())
        checkpoint = self._read(trainer)
        try:
            with module_put_back(trainer, pl_module, unless=stay):
                pl_module.on_load_checkpoint(checkpoint)
                pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
                del checkpoint  # as large as the module, and its optimizer's state as well
                yield
        finally:
            if not stay():
                pl_module.load_state_dict(last, strict=pl_module.strict_loading)

    def _read(self, trainer: Trainer) -> dict[str, Any]:
        """Read the best checkpoint, with whatever objects its module keeps in it if this very training wrote it.

        A training that goes on from a checkpoint takes from there the name of the best one, which can be any file.
        """
        path = self.path(trainer)
        is_own = _last_written(path) != self._found
        if Path(path).is_file():
            check_is_undamaged(Path(path))
        try:
            checkpoint: dict[str, Any] = trainer.strategy.load_checkpoint(path, weights_only=not is_own)
        except UnpicklingError as error:
            raise FoldingError(
                f"The best checkpoint, {path}, was there before this training, and holds more than tensors and plain "
                "values, which can run any code when it is read. If you trust it, fold it with `lit-bnfold fold "
                "--weights_only false`, or `fold_checkpoint(..., weights_only=False)`."
            ) from error
        return checkpoint


def _last_written(path: str) -> tuple[str, int | None]:
    """What tells one checkpoint from another, and from what was written in its place: its path and its time."""
    return path, Path(path).stat().st_mtime_ns if Path(path).is_file() else None
