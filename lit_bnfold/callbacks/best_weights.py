"""The weights of the best checkpoint of a training, for as long as they are folded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer

from lit_bnfold.callbacks.validation import module_put_back
from lit_bnfold.folding import FoldingError
from lit_bnfold.reading import check_is_undamaged


class Best(NamedTuple):
    """What tells a best checkpoint from another, and from what was written in its place later.

    Attributes:
        path: Where it is, empty if there is none.
        written: When it was written, in nanoseconds; None if that is no file.
    """

    path: str
    written: int | None


def best_of(trainer: Trainer) -> Best:
    """The best checkpoint that there is.

    Args:
        trainer: The Trainer, whose checkpoint callback knows.
    """
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    return Best(path, Path(path).stat().st_mtime_ns if Path(path).is_file() else None)


def best_score(trainer: Trainer) -> tuple[str, float] | None:
    """What the checkpoint callback monitors and its best value; None if it monitors nothing.

    Args:
        trainer: The Trainer.
    """
    saved = trainer.checkpoint_callback
    monitor, score = getattr(saved, "monitor", None), getattr(saved, "best_model_score", None)
    return None if monitor is None or score is None else (monitor, float(score))


@contextmanager
def best_weights(
    trainer: Trainer, pl_module: LightningModule, best: Best, before: Best, unless: Callable[[], bool]
) -> Iterator[int | None]:
    """Put the weights of the best checkpoint into a module for a while; afterwards it has its own back.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        best: The best checkpoint that there is.
        before: The best checkpoint that there was when training began.
        unless: Whether the module keeps at the end what it then has.

    Yields:
        The epoch that the checkpoint was made in; None if it does not say.

    Raises:
        FoldingError: If the checkpoint was there before and holds what could run any code when it is read.
        ValueError: If the checkpoint is damaged.
    """
    last = copy.deepcopy(pl_module.state_dict())
    checkpoint = _read(trainer, best, before)
    try:
        with module_put_back(trainer, pl_module, unless=unless):
            pl_module.on_load_checkpoint(checkpoint)
            pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)
            epoch = checkpoint.get("epoch")
            del checkpoint  # as large as the module, and its optimizer's state as well
            yield epoch
    finally:
        if not unless():
            pl_module.load_state_dict(last, strict=pl_module.strict_loading)


def _read(trainer: Trainer, best: Best, before: Best) -> dict[str, Any]:
    """Read the best checkpoint, with whatever objects its module keeps in it if this very training wrote it.

    A training that goes on from a checkpoint takes from there the name of the best one, which can be any file.
    """
    if best.written is not None:
        check_is_undamaged(Path(best.path))
    try:
        checkpoint: dict[str, Any] = trainer.strategy.load_checkpoint(best.path, weights_only=best == before)
    except UnpicklingError as error:
        raise FoldingError(
            f"The best checkpoint, {best.path}, was there before this training, and holds more than tensors and plain "
            "values, which can run any code when it is read. If you trust it, fold it with `lit-bnfold fold "
            "--weights_only false`, or `fold_checkpoint(..., weights_only=False)`."
        ) from error
    return checkpoint
