"""What a fold must equal: torch's own batch norm, and not our algebra, right where the plan puts each BatchNorm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_bnfold.folding.computed import bake, computed_tensors
from lit_bnfold.folding.kinds import Kinds, LayerKind, Normalisation
from lit_bnfold.folding.plan import Fold, FoldingPlan, Part
from lit_bnfold.folding.transparent import UNTOUCHED

Function = Callable[..., Tensor]


def with_batchnorm(layer: Function, direction: str, numbers: Normalisation, part: Part, channel_axis: int) -> Function:
    """A layer together with the BatchNorm that goes into it.

    Args:
        layer: The layer as a function of its input, of any shape, and whatever else it takes.
        direction: Whether the BatchNorm comes behind the layer (``backward``), before it or beside it.
        numbers: The BatchNorm's.
        part: What the layer takes of the BatchNorm.
        channel_axis: Axis of the layer's input and output that the channels lie on.

    Returns:
        A function of the same arguments.
    """

    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if direction == "backward":
            normalised = _normalised(layer(input, *args, **kwargs), numbers, part, channel_axis)
            if not part.residual:
                return normalised
            # What will be added to it is the input as it is.
            scaled = _normalised(input, numbers, replace(part, shift=0.0), channel_axis)
            return normalised + part.residual * (scaled - input)
        if direction == "forward":
            return layer(_normalised(input, numbers, part, channel_axis), *args, **kwargs)
        # Beside the layer, the whole of it is added, or taken away.
        whole = _normalised(input, numbers, Part(part.layer, part.channels), channel_axis)
        return layer(input, *args, **kwargs) + part.shift * whole

    return run


def moves(
    plan: FoldingPlan, modules: Mapping[str, nn.Module], kinds: Kinds
) -> dict[str, Callable[[Function], Function]]:
    """What a plan makes of each layer that takes part in it.

    Args:
        plan: The plan.
        modules: The modules of the model, by name, before any is folded.
        kinds: What counts as a layer and as a BatchNorm.

    Returns:
        By the name of a layer, a function that puts its BatchNorms behind, before and beside it.
    """
    found: dict[str, Callable[[Function], Function]] = {}
    for fold, part, kind, numbers in steps(plan, modules, kinds):
        move = partial(
            with_batchnorm, direction=fold.direction, numbers=numbers, part=part, channel_axis=kind.channel_axis
        )
        found[part.layer] = _after(found[part.layer], move) if part.layer in found else move
    return found


def steps(
    plan: FoldingPlan, modules: Mapping[str, nn.Module], kinds: Kinds
) -> Iterator[tuple[Fold, Part, LayerKind, Normalisation]]:
    """What a plan does to one layer after the other.

    Args:
        plan: The plan.
        modules: The modules of the model, by name, before any is folded.
        kinds: What counts as a layer and as a BatchNorm.

    Yields:
        A fold, what a layer takes of it, the kind of that layer, and the numbers of the BatchNorm.
    """
    for fold in plan.folds:
        batchnorm = kinds.batchnorm(modules[fold.batchnorm])
        assert batchnorm is not None
        numbers = batchnorm.numbers(modules[fold.batchnorm], fold.eps).each(Tensor.detach)
        for part in fold.parts:
            layer = kinds.layer(modules[part.layer], part.function)
            assert layer is not None
            yield fold, part, layer, numbers


def own_numbers(layer: nn.Module, kind: LayerKind) -> dict[str, Tensor | None]:
    """Weight and bias that a layer has now, by attribute; what it computes at every call is baked for that.

    Args:
        layer: The layer.
        kind: Its kind.
    """
    put_back = bake(layer) if computed_tensors(layer) else None
    try:
        own = {key: layer._parameters.get(key) for key in ("weight", "bias") if key in kind.arguments}
        return {key: None if tensor is None else tensor.detach() for key, tensor in own.items()}
    finally:
        if put_back is not None:
            put_back()


def with_numbers(kind: LayerKind, numbers: Mapping[str, Tensor | None]) -> Callable[[Function], Function]:
    """Make the function of a layer use other numbers than those it is given.

    Args:
        kind: The kind of the layer.
        numbers: Weight and bias, by attribute.

    Returns:
        What makes such a function of the function that the layer calls.
    """

    def move(function: Function) -> Function:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            given = kind.given(args, kwargs) | {**numbers}
            named = [given.pop(name) for name in kind.arguments[: len(args)]]
            return function(*named, *args[len(kind.arguments) :], **given)

        return run

    return move


def _after(
    first: Callable[[Function], Function], second: Callable[[Function], Function]
) -> Callable[[Function], Function]:
    return lambda layer: second(first(layer))


def _normalised(output: Tensor, numbers: Normalisation, part: Part, channel_axis: int) -> Tensor:
    axis = channel_axis % output.dim()
    # In half precision torch's own kernels take wider numbers than the input; in float64 they take no other.
    numbers = numbers.each(lambda tensor: tensor.to(output if output.dtype is torch.float64 else output.device))
    if part.channels is None and part.shift == 1.0 and axis == 1:
        return _laid_out_like(output, numbers.of(output))
    rows = output.movedim(axis, -1)  # (..., C)
    channels = torch.tensor(part.channels or range(rows.shape[-1]), device=output.device)
    numbers = numbers.each(lambda tensor: tensor[channels.clamp(min=0)])
    flat = rows.reshape(-1, rows.shape[-1])  # (..., C) -> (N, C)
    normalised = numbers.of(flat)
    if part.shift != 1.0:
        normalised = normalised - (1.0 - part.shift) * numbers.of(torch.zeros_like(flat))
    normalised = torch.where(channels == UNTOUCHED, flat, normalised).view(rows.shape).movedim(-1, axis)
    return _laid_out_like(output, normalised)


def _laid_out_like(output: Tensor, normalised: Tensor) -> Tensor:
    """The same numbers laid out in memory as the layer does it, on which a later `view` may rely."""
    is_already = normalised.stride() == output.stride()
    return normalised if is_already else torch.empty_like(output).copy_(normalised)
