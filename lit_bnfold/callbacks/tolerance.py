"""How large an error counts as agreement, where nobody has said so."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer

# Relative to the largest output: some hundred roundings of each dtype.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
# On cuda, float32 convolutions and products may be computed with the ten bits of TF32.
_TF32_TOLERANCE = 1e-2


def default_tolerance(trainer: Trainer, pl_module: LightningModule) -> float:
    """The tolerance for a module as a trainer runs it, in units of the largest output.

    Args:
        trainer: The Trainer, whose precision may be less than that of the parameters.
        pl_module: The module.
    """
    precision = str(trainer.precision)
    if "16" in precision:
        return _TOLERANCES[torch.bfloat16 if "bf16" in precision else torch.float16]
    tolerance = dtype_tolerance(pl_module)
    is_tf32 = pl_module.device.type == "cuda" and torch.float32 in {each.dtype for each in pl_module.parameters()}
    return max(tolerance, _TF32_TOLERANCE) if is_tf32 else tolerance


def dtype_tolerance(pl_module: LightningModule) -> float:
    """The tolerance for a module in the precision of its parameters, in units of the largest output.

    Args:
        pl_module: The module.

    Example:
        >>> from lit_bnfold import BatchNormMLP
        >>> dtype_tolerance(BatchNormMLP())
        0.0001
    """
    dtypes = {parameter.dtype for parameter in pl_module.parameters()} & _TOLERANCES.keys()
    return max((_TOLERANCES[dtype] for dtype in dtypes), default=_TOLERANCES[torch.float32])
