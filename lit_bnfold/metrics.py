"""The metric that compares the outputs of two versions of a model: the folded one and the original."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

# Numbers that are compared at a time on a CPU, so that their float64 copies stay in its cache.
_PIECE = 1 << 17


class OutputError(Metric):
    """The largest difference between the outputs of the folded model and those of the original.

    Over all elements ``i`` of all outputs seen, on all ranks:

        max_abs = max_i |folded_i - original_i|
        max_rel = max_abs / max_i |original_i|, over the finite elements of the original; 0 / 0 is 0

    All of it in float64, or in float32 on a device without float64. NaN and infinity agree with themselves; against
    anything else their difference is infinite.

    Args:
        **kwargs: Arguments of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> error = OutputError()
        >>> error.update(folded=torch.tensor([1.0, -4.5]), original=torch.tensor([1.0, -4.0]))
        >>> {key: value.item() for key, value in error.compute().items()}
        {'max_abs': 0.5, 'max_rel': 0.125}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    difference: Tensor
    scale: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The states must be able to follow a model to an Apple GPU, which has no float64.
        zero = torch.zeros((), dtype=torch.float32 if torch.backends.mps.is_available() else torch.float64)
        self.add_state("difference", zero, dist_reduce_fx="max")
        self.add_state("scale", zero.clone(), dist_reduce_fx="max")

    def update(self, folded: Tensor, original: Tensor) -> None:
        """Take in the outputs of both models for one batch.

        Args:
            folded: Output of the folded model, of any shape.
            original: Output of the original model for the same input, of the same shape.

        Raises:
            ValueError: If the shapes differ.
        """
        _require_one_shape(folded, original)
        if folded.numel() == 0:
            return
        size = _PIECE if folded.device.type == "cpu" else folded.numel()
        pieces = [*zip(folded.reshape(-1).split(size), original.reshape(-1).split(size), strict=True)]
        difference, scale = map(torch.stack, zip(*itertools.starmap(_difference_and_scale, pieces), strict=True))
        if not bool((difference.sum() + scale.sum()).isfinite()):
            exact = itertools.starmap(_finite_difference_and_scale, pieces)
            difference, scale = map(torch.stack, zip(*exact, strict=True))
        self.difference = torch.maximum(self.difference, difference.max().to(self.difference))
        self.scale = torch.maximum(self.scale, scale.max().to(self.scale))

    def compute(self) -> dict[str, Tensor]:
        """Return ``max_abs``, in the unit of the outputs, and ``max_rel``, without one; both of shape ()."""
        relative = torch.where(self.difference == 0, self.difference, self.difference / self.scale)
        return {"max_abs": self.difference, "max_rel": relative}


def _difference_and_scale(folded: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """The largest difference of two tensors of shape (N,), and the largest element of one; both of shape ()."""
    folded, original = _widened(folded), _widened(original)
    return (folded - original).abs().max(), original.abs().max()


def _finite_difference_and_scale(folded: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """The same where not every element is finite, which takes several times as long."""
    folded, original = _widened(folded), _widened(original)
    agree = (folded == original) | (folded.isnan() & original.isnan())
    # What is still NaN here has NaN on one side only.
    difference = (folded - original).abs().masked_fill(agree, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return difference.max(), original.abs().masked_fill(~original.isfinite(), 0.0).max()


def _require_one_shape(folded: Tensor, original: Tensor) -> None:
    if folded.shape != original.shape:
        shapes = f"{tuple(folded.shape)} from the folded model and {tuple(original.shape)} from the original"
        raise ValueError(f"Expected two outputs of the same shape, got {shapes}.")


def _widened(tensor: Tensor) -> Tensor:
    """Convert a tensor of any shape and dtype to the widest floating or complex dtype of its device."""
    widest = torch.float32 if tensor.device.type == "mps" else torch.float64
    return tensor.detach().to(torch.promote_types(tensor.dtype, widest))
