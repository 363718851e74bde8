"""Folded checkpoints: Lightning checkpoints with the folding plan beside the folded weights.

The state dict of a folded network fits a network that was folded in the same way, and no other. So the plan travels in
the file, under ``"batchnorm_folding"``, and loading gives the new network that structure before any number is loaded.
One more key in the state dict is there for whoever loads the file in the ordinary way: torch's error message names it.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from lit_bnfold.folding import FoldingError, FoldingPlan
from lit_bnfold.folding.kinds import Rest
from lit_bnfold.folding.rewrite import Zero, fold_structure

MANIFEST = "batchnorm_folding"
"""Key of the plan in a folded checkpoint."""

SIGNPOST = "this checkpoint is folded: load it with lit_bnfold.load_folded(ModelClass, path)"
"""Key in the state dict of a folded checkpoint that makes an ordinary, strict load fail and say what to do."""

_Module = TypeVar("_Module", bound=LightningModule)


class FoldedLoading:
    """Mixin for LightningModules: ``load_from_checkpoint`` and ``ckpt_path`` take folded checkpoints as well.

    Example:
        >>> class Network(FoldedLoading, LightningModule):
        ...     pass
    """

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give this module the structure of the checkpoint, if that is folded.

        Args:
            checkpoint: The checkpoint that is being loaded.

        Raises:
            FoldingError: If training is to go on from a folded checkpoint, or its plan does not fit this module.
        """
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if MANIFEST in checkpoint:
            assert isinstance(self, nn.Module)
            _take_structure(self, checkpoint)


def load_folded(model_class: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """Load a folded checkpoint into a module of any class.

    Args:
        model_class: The class that was trained.
        path: A ``folded.ckpt``.
        **kwargs: What ``model_class.load_from_checkpoint`` takes: ``map_location``, and arguments of the class that the
            checkpoint does not hold.

    Returns:
        The folded module, in eval mode.

    Raises:
        FileNotFoundError: If there is no such file.
        FoldingError: If the checkpoint is not folded, or its plan does not fit the class.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"Expected a folded checkpoint at {path}, found no file.")

    # Lightning's own load does everything by its rules and by those of the class; it only meets another structure.
    def on_load_checkpoint(self: _Module, checkpoint: dict[str, Any]) -> None:
        if MANIFEST not in checkpoint:
            raise FoldingError(f"{path} is not folded; {model_class.__name__}.load_from_checkpoint loads it.")
        super(loading, self).on_load_checkpoint(checkpoint)

    bases = (model_class,) if issubclass(model_class, FoldedLoading) else (FoldedLoading, model_class)
    own = {"on_load_checkpoint": on_load_checkpoint, "__module__": model_class.__module__}
    loading: Any = types.new_class(model_class.__name__, bases, exec_body=lambda namespace: namespace.update(own))
    module: _Module = loading.load_from_checkpoint(path, **kwargs)
    module.__class__ = model_class
    return module.eval()


def save_folded(trainer: Trainer, pl_module: LightningModule, plan: FoldingPlan, path: Path) -> None:
    """Save a module that is folded at this moment; the file appears whole or not at all. To be called on all ranks.

    Args:
        trainer: The Trainer of the module.
        pl_module: The folded module.
        plan: The plan by which it was folded.
        path: Where the file goes.
    """
    with _manifest_in_checkpoint(pl_module, plan), whole_file(path, trainer) as part:
        trainer.save_checkpoint(part, weights_only=True)


@contextmanager
def whole_file(path: Path, trainer: Trainer) -> Iterator[Path]:
    """Write beside, then rename, so that the file under its own name is always a whole one.

    Args:
        path: Where the file goes; its directory is made.
        trainer: The Trainer, whose first rank does the renaming.

    Yields:
        The path to write to.
    """
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    own_io = trainer.strategy.checkpoint_io
    try:
        # By name, for the other import name of Lightning has a class of its own.
        if "AsyncCheckpointIO" in {base.__name__ for base in type(own_io).__mro__}:
            # What is written later cannot be renamed now.
            trainer.strategy.checkpoint_io = TorchCheckpointIO()
        yield part
        if trainer.is_global_zero:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            part.replace(path)
    finally:
        trainer.strategy.checkpoint_io = own_io
        if trainer.is_global_zero:
            part.unlink(missing_ok=True)


@contextmanager
def _manifest_in_checkpoint(pl_module: LightningModule, plan: FoldingPlan) -> Iterator[None]:
    own, shadowed = pl_module.on_save_checkpoint, vars(pl_module).get("on_save_checkpoint")

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        own(checkpoint)
        checkpoint[MANIFEST] = plan.to_dict()
        checkpoint["state_dict"][SIGNPOST] = torch.zeros(0)

    pl_module.on_save_checkpoint = on_save_checkpoint  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pl_module.on_save_checkpoint
        if shadowed is not None:
            pl_module.on_save_checkpoint = shadowed  # type: ignore[method-assign]


def _take_structure(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    if _is_being_fitted(module):
        raise FoldingError(
            "Training cannot go on from a folded checkpoint: its BatchNorms are gone. Go on from the checkpoint that "
            "was folded."
        )
    checkpoint["state_dict"].pop(SIGNPOST, None)
    plan = FoldingPlan.from_dict(checkpoint[MANIFEST])
    if not _is_folded(module, plan):
        fold_structure(plan, module)


def _is_being_fitted(module: Any) -> bool:
    # A module without a Trainer raises when it is asked for it.
    with suppress(RuntimeError):
        return bool(module.trainer.state.fn == "fit")
    return False


def _is_folded(module: nn.Module, plan: FoldingPlan) -> bool:
    modules = dict(module.named_modules())
    return all(isinstance(modules.get(fold.batchnorm), (nn.Identity, Zero, Rest)) for fold in plan.folds)
