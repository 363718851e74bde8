"""The arithmetic of folding: tensors in, tensors out.

In eval mode a BatchNorm is ``y = scale * x + shift`` per channel (Ioffe and Szegedy, 2015, algorithm 2), with
``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``. Everything here is computed in
float64 and rounded once, to the dtype the layer had.

A weight has one axis of outputs and one of inputs, and what comes behind them is the kernel. Convolutions hold them as
(out, in / groups, ...); transposed convolutions as (in, out / groups, ...), and an Embedding like one of these with a
single group.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers that are widened to float64 at a time, half a MiB of them.
_BLOCK = 2**16


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


def rounding_gain(mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: Tensor) -> Tensor:
    """How many times larger a rounding error of a layer is behind a BatchNorm.

    Larger as such, by the scale; or larger in units of the output, where mean and bias nearly cancel out.

    Args:
        mean: Mean of each channel, (C,).
        var: Variance of each channel, (C,).
        weight: Factor of each channel, (C,).
        bias: Offset of each channel, (C,).
        eps: What is added to the variance of each channel under the root, (C,).

    Returns:
        A factor for each channel, (C,), of at least 1.

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> rounding_gain(mean=zero, var=one / 2**20, weight=one, bias=zero, eps=zero)
        tensor([1024.])
    """
    scale = weight.abs() * (var + eps).rsqrt()
    before = scale * (mean.abs() + var.sqrt())
    # A channel whose weight and bias are zero gives zeros, and loses nothing.
    cancelled = torch.where(before > 0, before / (scale * var.sqrt() + bias.abs()), 0.0)
    return torch.maximum(scale, cancelled).clamp(min=1.0)


def squares_around(mean: Tensor, var: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """Mean square of what a BatchNorm normalises, and of that once it is scaled.

    Where a layer takes over the scaling of what is added to its output, its output and the rounding error of it are as
    large as the former, and not as the latter.

    Args:
        mean: Mean of each channel, (C,).
        var: Variance of each channel, (C,).
        weight: Factor of each channel, (C,).
        eps: What is added to the variance of each channel under the root, (C,).

    Returns:
        Both, (2, C).

    Example:
        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> squares_around(mean=one, var=one, weight=3 * one, eps=zero)
        tensor([[ 2.],
                [18.]])
    """
    square = mean.square() + var
    return torch.stack([square, square * weight.square() / (var + eps)])


def fold_into_outputs(
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    transposed: bool = False,
    groups: int = 1,
    residual: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Follow a layer by ``scale * y + shift``: ``W' = scale * W`` over output channels, ``b' = scale * b + shift``.

    Where ``residual * x`` is added to ``W x + b`` first, and will be, the tap that reads the same place as it takes
    ``residual * (scale - 1)`` besides: ``scale * (W x + r x) = (scale * W + r * (scale - 1)) x + r x``.

    Args:
        weight: Weight of the layer, (out, in / groups, ...), or (in, out / groups, ...) if ``transposed``.
        bias: Bias of the layer, (out,); None counts as zeros.
        scale: Factor of each output channel, (out,), float64.
        shift: Offset of each output channel, (out,), float64.
        transposed: Whether the weight begins with its input channels.
        groups: Number of groups of channels that do not see each other.
        residual: How often the input is added to the output; if at all, the kernel has odd sizes, and as many channels
            come out as go in.

    Returns:
        The new weight, of the shape, dtype and memory layout of ``weight``, and the new bias (out,).

    Example:
        >>> fold_into_outputs(torch.ones(2, 1), None, torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
        (tensor([[2.],
                [3.]]), tensor([0., 1.]))
    """
    spread = _over_second_axis(scale, weight, groups) if transposed else _over_first_axis(scale, weight)
    folded_bias = shift if bias is None else scale * bias.double() + shift
    folded_weight = _times(weight, spread)
    if residual:
        taps = _centre_taps(weight)
        folded_weight[taps] = round_like(scale * weight[taps].double() + residual * (scale - 1.0), weight)
    return folded_weight, round_like(folded_bias, weight if bias is None else bias)


def fold_into_rows(weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Follow an Embedding by ``scale * y + shift``: every output is one row, so ``W' = scale * W + shift`` is all.

    Args:
        weight: Weight of the Embedding, (num_embeddings, out).
        scale: Factor of each output channel, (out,), float64.
        shift: Offset of each output channel, (out,), float64.

    Returns:
        The new weight, of the shape, dtype and memory layout of ``weight``.

    Example:
        >>> fold_into_rows(torch.ones(1, 2), torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
        tensor([[2., 4.]])
    """
    return round_like(weight.double() * scale + shift, weight)


def fold_into_inputs(
    weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor, *, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Precede a layer by ``scale * x + shift``: ``W' = W * scale`` over input channels, ``b' = b + W @ shift``.

    For a convolution the product sums over the kernel as well; so it must not meet zeros that padding put in.

    Args:
        weight: Weight of the layer, (out, in / groups, ...).
        bias: Bias of the layer, (out,); None counts as zeros.
        scale: Factor of each input channel, (in,), float64.
        shift: Offset of each input channel, (in,), float64.
        groups: Number of groups of channels that do not see each other.

    Returns:
        The new weight, of the shape, dtype and memory layout of ``weight``, and the new bias (out,).

    Example:
        >>> fold_into_inputs(torch.ones(1, 2), None, torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0]))
        (tensor([[2., 3.]]), tensor([1.]))
    """
    sums = (weight * _over_second_axis(shift.double(), weight, groups)).flatten(1).sum(1)
    folded_bias = sums if bias is None else bias.double() + sums
    spread = _over_second_axis(scale, weight, groups)
    return _times(weight, spread), round_like(folded_bias, weight if bias is None else bias)


def shift_before_normalising(scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """What ``scale * x + shift`` before a BatchNorm adds to its normalised values, beside scaling them.

    ``(scale * x + shift - mean) / sqrt(var + eps)`` is ``scale * (x - mean) / sqrt(var + eps)`` plus this. So a
    BatchNorm takes the map as a layer with one input for each output would, whose input are its normalised values.

    Args:
        scale: Factor of each channel, (C,), float64.
        shift: Offset of each channel, (C,), float64.
        mean: The BatchNorm's mean of each channel, (C,).
        var: The BatchNorm's variance of each channel, (C,).
        eps: What is added to the variance under the root.

    Returns:
        The offset of each channel, (C,), float64.

    Example:
        >>> one, two = torch.ones(1, dtype=torch.float64), torch.full((1,), 2.0, dtype=torch.float64)
        >>> shift_before_normalising(scale=two, shift=one, mean=two, var=one, eps=0.0)
        tensor([3.], dtype=torch.float64)
    """
    return ((scale - 1.0) * mean.double() + shift) * (var.double() + eps).rsqrt()


def add_identity(weight: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Add ``scale * x + shift`` to what a layer makes of ``x``: ``scale`` goes to the tap that reads the same place.

    This is the identity branch of RepVGG (Ding et al., 2021, section 3.3).

    Args:
        weight: Weight of the layer, (C, C / groups, ...), with a kernel of odd sizes.
        bias: Bias of the layer, (C,); None counts as zeros.
        scale: Factor of each channel, (C,), float64.
        shift: Offset of each channel, (C,), float64.

    Returns:
        The new weight, of the shape, dtype and memory layout of ``weight``, and the new bias (C,).

    Example:
        >>> scale = torch.tensor([2.0, 3.0], dtype=torch.float64)
        >>> add_identity(torch.ones(2, 2), None, scale, torch.tensor([0.0, 1.0]))
        (tensor([[3., 1.],
                [1., 4.]]), tensor([0., 1.]))
    """
    exact = weight.double().clone()
    exact.index_put_(_centre_taps(weight), scale, accumulate=True)
    folded_bias = shift if bias is None else bias.double() + shift
    return round_like(exact, weight), round_like(folded_bias, weight if bias is None else bias)


def _centre_taps(weight: Tensor) -> tuple[Tensor, ...]:
    """Where a weight (C, C / groups, ...) holds what each channel gives to itself at the same place, as an index."""
    channels = torch.arange(weight.shape[0], device=weight.device)
    centre = [channels.new_tensor(size // 2) for size in weight.shape[2:]]
    return (channels, channels % weight.shape[1], *centre)


def _over_first_axis(vector: Tensor, weight: Tensor) -> Tensor:
    """A vector (A,) in a shape that broadcasts over a weight (A, B, ...)."""
    return vector.view(-1, *[1] * (weight.dim() - 1))


def _over_second_axis(vector: Tensor, weight: Tensor, groups: int) -> Tensor:
    """A vector (groups * B,) in a shape that broadcasts over a weight (A, B, ...) with groups on its first axis."""
    rows = vector.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return rows.reshape(weight.shape[0], weight.shape[1], *[1] * (weight.dim() - 2))


def round_like(exact: Tensor, like: Tensor) -> Tensor:
    """Round float64 numbers once to the dtype of ``like``; what would be subnormal there becomes zero.

    Subnormal numbers carry few digits and are computed many times slower on most processors; but not those of float16,
    which stay.

    Args:
        exact: Numbers of any shape, float64.
        like: The tensor whose dtype is wanted and, where the shapes agree, whose memory layout.

    Returns:
        A new tensor of the shape of ``exact``.
    """
    rounded = _empty_like(like) if exact.shape == like.shape else like.new_empty(exact.shape)
    return _flush(rounded.copy_(exact))


def _times(weight: Tensor, factors: Tensor) -> Tensor:
    """A weight (A, ...) times float64 factors (A, ...), some rows at a time, so that the wide numbers stay in cache."""
    product = _empty_like(weight)
    rows = max(1, _BLOCK * len(weight) // max(1, weight.numel()))
    wide = torch.empty_like(weight[:rows], dtype=torch.float64, requires_grad=False)
    for start in range(0, len(weight), rows):
        block = slice(start, start + rows)
        exact = wide[: len(weight) - start].copy_(weight[block]).mul_(factors[block])
        _flush(product[block].copy_(exact))
    return product


def _empty_like(tensor: Tensor) -> Tensor:
    """What ``torch.empty_like`` gives, with the strides of axes of size 1, by which torch tells the memory format."""
    empty = torch.empty_like(tensor, requires_grad=False)
    strides = zip(tensor.shape, tensor.stride(), empty.stride(), strict=True)
    return empty.as_strided(tensor.shape, [old if size == 1 else new for size, old, new in strides])


def _flush(rounded: Tensor) -> Tensor:
    if rounded.dtype is torch.float16:  # Its subnormal numbers begin where weights may well be, and cost no time.
        return rounded
    largest = torch.finfo(rounded.dtype).tiny * (1.0 - torch.finfo(rounded.dtype).eps)
    return torch.hardshrink(rounded, largest, out=rounded)
