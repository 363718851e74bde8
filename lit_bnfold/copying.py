"""Copies of LightningModules, which leave the Trainer behind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lit_bnfold.folding.copying import copy_model, stand_in


def eval_copy(
    pl_module: LightningModule,
    shared: Iterable[nn.Parameter],
    trainer: Trainer | None,
    belongings: Iterable[object] = (),
) -> LightningModule:
    """A copy in eval mode, without a Trainer; what belongs to that, such as loggers and data, is shared.

    Args:
        pl_module: The module.
        shared: Those of its parameters whose memory the copy is built around.
        trainer: The Trainer that the module is attached to, if it is.
        belongings: What else is shared.

    Raises:
        FoldingError: If it cannot be copied, such as a module with a lock.
    """
    memo: dict[int, Any] = {id(parameter): stand_in(parameter) for parameter in shared}
    if trainer is not None:
        belongings = [*belongings, trainer, getattr(trainer, "datamodule", None), *trainer.loggers]
    memo |= {id(each): each for each in belongings}
    pl_module.trainer = None
    try:
        return copy_model(pl_module, memo).eval()
    finally:
        pl_module.trainer = trainer
