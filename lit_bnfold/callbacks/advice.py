"""How to fold what a training has left, where its end did not come to fold it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer


def how_to_fold(
    trainer: Trainer, pl_module: LightningModule, weights: str, resumed: str | Path | None, *, has_ended: bool = False
) -> str:
    """Say by what command the weights that were asked for are folded, or else the others; not all are saved.

    Args:
        trainer: The Trainer, whose checkpoint callbacks know what they have saved.
        pl_module: The module.
        weights: Which weights were asked for, ``last`` or ``best``.
        resumed: The checkpoint that the training went on from, if it did.
        has_ended: Whether the training had ended when it was resumed: then it saves nothing new.

    Returns:
        A sentence.
    """
    kinds = ("best", "last") if weights == "best" else ("last", "best")
    savers = trainer.checkpoint_callbacks
    found = [(kind, getattr(saver, f"{kind}_model_path", "")) for kind in kinds for saver in savers]
    begun_from = ("last", resumed)
    found = [begun_from, *found] if has_ended and weights == "last" else [*found, begun_from]
    kind, path = next((each for each in found if each[1]), ("", ""))
    if not path:
        return "There is no checkpoint to fold either."
    command = ["lit-bnfold", "fold", "--ckpt_path", str(path)]
    for flag, owner in (("--model", pl_module), ("--data", trainer.datamodule)):  # type: ignore[attr-defined]
        # The command knows the classes of this package.
        if owner is not None and not type(owner).__module__.startswith("lit_bnfold."):
            command += [flag, _import_path(type(owner))]
    return f"To fold the {kind} checkpoint: {shlex.join(command)}"


def _import_path(of_class: type[Any]) -> str:
    module = of_class.__module__
    if module == "__main__":
        # The script that is running, as another process imports it.
        module = Path(getattr(sys.modules[module], "__file__", None) or module).stem
    name = of_class.__qualname__
    # A class inside a function cannot be imported: its user has to put it elsewhere.
    return f"some.module.{of_class.__name__}" if "<locals>" in name else f"{module}.{name}"
