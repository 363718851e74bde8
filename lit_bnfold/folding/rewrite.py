"""Plan and model -> folded model: on a copy, in place, or in place with a way back.

A layer keeps its Parameter objects and gets new numbers; a BatchNorm object becomes an ``nn.Identity``, wherever the
model holds it. Each fold is whole before the next begins, so whatever happens the model computes what it did before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_bnfold.folding.algebra import fold_into_outputs, scale_and_shift
from lit_bnfold.folding.census import Census
from lit_bnfold.folding.graph import FoldingError
from lit_bnfold.folding.plan import Fold, FoldingPlan, Part
from lit_bnfold.folding.transparent import UNTOUCHED

_Undo = Callable[[], None]


def apply_plan(plan: FoldingPlan, model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Fold a model by a plan.

    Args:
        plan: A plan that was made for this model or for one of the same structure.
        model: The model.
        inplace: Whether to fold ``model`` itself instead of a copy. Beside the model this needs memory for one layer at
            a time, in float64.

    Returns:
        The folded model.

    Raises:
        FoldingError: If the plan does not fit the model; then the model is as it was.
    """
    _check_fit(plan, model)
    if not inplace:
        model = copy.deepcopy(model)
    modules = dict(model.named_modules())
    for fold in plan.folds:
        _fold(fold, modules)
    return model


@contextmanager
def folded_in_place(plan: FoldingPlan, model: nn.Module) -> Iterator[None]:
    """Fold a model for as long as the context lasts; afterwards its own numbers and modules are back, bit for bit.

    Args:
        plan: A plan that was made for this model.
        model: The model.

    Raises:
        FoldingError: If the plan does not fit the model; then the model is as it was.
    """
    _check_fit(plan, model)
    modules = dict(model.named_modules())
    undos: list[_Undo] = []
    try:
        for fold in plan.folds:
            undos.extend(_fold(fold, modules))
        yield
    finally:
        for undo in reversed(undos):
            undo()


def fold_structure(plan: FoldingPlan, model: nn.Module) -> None:
    """Give a model the structure that a plan leads to, without any arithmetic: its numbers are about to be loaded.

    Args:
        plan: The plan by which the numbers were folded.
        model: A model as its class builds it; it is changed in place.

    Raises:
        FoldingError: If the plan does not fit the model; then the model is as it was.
    """
    _check_fit(plan, model)
    modules = dict(model.named_modules())
    for fold in plan.folds:
        for part in fold.parts:
            layer = modules[part.layer]
            if layer.bias is None:
                _add_bias(layer, layer.weight.new_zeros(layer.weight.shape[0]))
        _erase(modules[fold.batchnorm])


def _check_fit(plan: FoldingPlan, model: nn.Module) -> None:
    modules, census = dict(model.named_modules()), Census(model)
    for fold in plan.folds:
        batchnorm = modules.get(fold.batchnorm)
        if batchnorm is None or not census.is_batchnorm(batchnorm):
            found = "nothing" if batchnorm is None else type(batchnorm).__name__
            raise FoldingError(f"The plan folds the BatchNorm `{fold.batchnorm}`; the model has {found} of that name.")
        for part in fold.parts:
            layer = modules.get(part.layer)
            kind = census.kind(layer)
            if layer is None or kind is None:
                found = "nothing" if layer is None else type(layer).__name__
                raise FoldingError(f"The plan folds into the layer `{part.layer}`; the model has {found} of that name.")
            out_channels, num_features = getattr(layer, kind.out_channels), int(batchnorm.num_features)
            channels = range(out_channels) if part.channels is None else part.channels
            if len(channels) != out_channels or (part.channels is None and out_channels != num_features):
                wanted = num_features if part.channels is None else len(part.channels)
                raise FoldingError(f"The plan wants {wanted} outputs of `{part.layer}`, which has {out_channels}.")
            if not set(channels) <= {UNTOUCHED, *range(num_features)}:
                raise FoldingError(f"The plan names channels that `{fold.batchnorm}` with {num_features} has not.")


def _fold(fold: Fold, modules: dict[str, Any]) -> list[_Undo]:
    """Fold one BatchNorm, and tell how to undo it."""
    batchnorm = modules[fold.batchnorm]
    with torch.no_grad():
        scale, shift = scale_and_shift(
            batchnorm.running_mean, batchnorm.running_var, batchnorm.weight, batchnorm.bias, batchnorm.eps
        )
        undos: list[_Undo] = []
        for part in fold.parts:
            undos.extend(_fold_part(part, modules[part.layer], scale, shift))
    undos.append(_erase(batchnorm))
    return undos


def _fold_part(part: Part, layer: Any, scale: Tensor, shift: Tensor) -> list[_Undo]:
    scale, shift = _by_output_channel(part, scale.to(layer.weight.device), shift.to(layer.weight.device))
    weight, bias = fold_into_outputs(layer.weight, layer.bias, scale, shift)
    undos = [_set_data(layer.weight, weight)]
    undos.append(_add_bias(layer, bias) if layer.bias is None else _set_data(layer.bias, bias))
    return undos


def _by_output_channel(part: Part, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    shift = shift * part.shift
    if part.channels is None:
        return scale, shift
    channels = torch.tensor(part.channels, device=scale.device)
    untouched = channels == UNTOUCHED
    return scale[channels].masked_fill(untouched, 1.0), shift[channels].masked_fill(untouched, 0.0)


def _set_data(parameter: nn.Parameter, numbers: Tensor) -> _Undo:
    before = parameter.data
    parameter.data = numbers

    def undo() -> None:
        parameter.data = before

    return undo


def _add_bias(layer: Any, bias: Tensor) -> _Undo:
    layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)

    def undo() -> None:
        layer.bias = None

    return undo


def _erase(batchnorm: nn.Module) -> _Undo:
    """Turn a BatchNorm into an Identity where it stands, so that no second reference to it still normalises."""
    kind, parameters, buffers = type(batchnorm), batchnorm._parameters, batchnorm._buffers
    batchnorm.__class__ = nn.Identity
    batchnorm._parameters, batchnorm._buffers = {}, {}

    def undo() -> None:
        batchnorm.__class__ = kind
        batchnorm._parameters, batchnorm._buffers = parameters, buffers

    return undo
