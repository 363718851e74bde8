"""The arithmetic of folding: tensors in, tensors out.

In eval mode a BatchNorm is ``y = scale * x + shift`` per channel (Ioffe and Szegedy, 2015, algorithm 2), with
``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``. Everything here is computed in
float64 and rounded once, to the dtype the layer had.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scale_and_shift(
    running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Scale and shift of a BatchNorm in eval mode.

    Args:
        running_mean: Mean of each channel, (C,).
        running_var: Variance of each channel, (C,).
        weight: Factor of each channel, (C,); None counts as ones.
        bias: Offset of each channel, (C,); None counts as zeros.
        eps: What is added to the variance under the root.

    Returns:
        ``(scale, shift)``, both (C,) in float64.

    Example:
        >>> mean, var = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.25])
        >>> scale_and_shift(mean, var, None, None, eps=0.0)
        (tensor([0.5000, 2.0000], dtype=torch.float64), tensor([-0.5000, -4.0000], dtype=torch.float64))
    """
    scale = (running_var.double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.double()
    shift = -running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return scale, shift


def fold_into_outputs(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Follow a Linear by ``scale * y + shift``: ``W' = scale * W`` over output channels, ``b' = scale * b + shift``.

    Args:
        weight: Weight of the layer, (out, in).
        bias: Bias of the layer, (out,); None counts as zeros.
        scale: Factor of each output channel, (out,), float64.
        shift: Offset of each output channel, (out,), float64.

    Returns:
        The new weight (out, in) and the new bias (out,), in the dtype and the memory layout of ``weight``.

    Example:
        >>> fold_into_outputs(torch.ones(2, 1), None, torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
        (tensor([[2.],
                [3.]]), tensor([0., 1.]))
    """
    folded_weight = weight.double() * scale.unsqueeze(1)
    folded_bias = shift if bias is None else scale * bias.double() + shift
    return round_like(folded_weight, weight), round_like(folded_bias, weight if bias is None else bias)


def round_like(exact: Tensor, like: Tensor) -> Tensor:
    """Round float64 numbers once to the dtype of ``like``; what would be subnormal there becomes zero.

    Subnormal numbers carry few digits and are computed many times slower on most processors.

    Args:
        exact: Numbers of any shape, float64.
        like: The tensor whose dtype is wanted and, where the shapes agree, whose memory layout.

    Returns:
        A new tensor of the shape of ``exact``.
    """
    rounded = torch.empty_like(like) if exact.shape == like.shape else like.new_empty(exact.shape)
    rounded.copy_(exact.masked_fill(exact.abs() < torch.finfo(like.dtype).tiny, 0.0))
    return rounded
