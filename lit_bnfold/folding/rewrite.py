"""Plan and model -> folded model: on a copy, in place, or in place with a way back.

A layer keeps its Parameter objects and gets new numbers; a BatchNorm object becomes an ``nn.Identity``, wherever the
model holds it. Each fold is whole before the next begins, so whatever happens the model computes what it did before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_bnfold.folding.algebra import (
    add_identity,
    fold_into_inputs,
    fold_into_outputs,
    fold_into_rows,
    scale_and_shift,
)
from lit_bnfold.folding.census import Census, Rest, is_batchnorm, layer_kind, num_features, only_normalises
from lit_bnfold.folding.graph import FoldingError
from lit_bnfold.folding.plan import Fold, FoldingPlan, Part
from lit_bnfold.folding.record import tensors_in
from lit_bnfold.folding.transparent import UNTOUCHED

_Model = TypeVar("_Model", bound=nn.Module)
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
    _check_obstacles(plan, model)
    # Inside `torch.inference_mode()` the new parameters would be such as can never be trained again.
    with torch.inference_mode(False):
        if not inplace:
            model = copy_model(model, _numbers_to_be_replaced(plan, model))
        modules = dict(model.named_modules())
        for fold in plan.folds:
            _fold(fold, modules)
    return model


def _numbers_to_be_replaced(plan: FoldingPlan, model: nn.Module) -> dict[int, Any]:
    """Parameters that a copy may share the numbers of, because a fold gives it new ones."""
    modules = dict(model.named_modules())
    layers = {part.layer: modules[part.layer] for fold in plan.folds for part in fold.parts}
    replaced = [layer._parameters.get(key) for layer in layers.values() for key in ("weight", "bias")]
    return {id(tensor): stand_in(tensor) for tensor in replaced if tensor is not None}


def stand_in(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory, if the tensor is an ordinary one; else the tensor itself."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return tensor
    other = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        other = nn.Parameter(other, tensor.requires_grad)
    vars(other).update(vars(tensor))
    return other


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
    _check_obstacles(plan, model)
    modules = dict(model.named_modules())
    undos: list[_Undo] = []
    try:
        for fold in plan.folds:
            undos.extend(_fold(fold, modules))
        yield
    finally:
        _undo_all(undos)


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
            layer: Any = modules[part.layer]
            kind = layer_kind(layer)
            assert kind is not None
            if kind.has_bias and layer.bias is None:
                _add_bias(layer, layer.weight.new_zeros(getattr(layer, kind.out_channels)))
        _erase(modules[fold.batchnorm], fold.direction)


def disguise(batchnorms: Collection[str], model: nn.Module) -> None:
    """Make BatchNorms look as they will after a fold; each still computes what it did before.

    Args:
        batchnorms: Their names.
        model: The model, in eval mode; it is changed in place.
    """
    modules = dict(model.named_modules())
    for name in batchnorms:
        forward = copy.copy(modules[name]).eval().forward
        _erase(modules[name], "backward")
        modules[name].forward = forward


def copy_model(model: _Model, memo: dict[int, Any] | None = None) -> _Model:
    """Copy a model; a tensor that its last run left on it with a gradient history is copied without that.

    Args:
        model: The model.
        memo: What to take instead of a copy, by the ``id`` of the original.

    Raises:
        FoldingError: If it cannot be copied.
    """
    held = tensors_in([vars(module) for module in model.modules()])
    left = {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}
    try:
        copied = copy.deepcopy(model, left | (memo or {}))
    except Exception as error:
        raise FoldingError(f"The model cannot be copied: {error}") from error
    passed_on = {id(other) for other in (memo or {}).values()}
    parts = {id(part) for part in (*model.modules(), *model.parameters())} - passed_on
    if any(id(part) in parts for part in (*copied.modules(), *copied.parameters())):
        raise FoldingError("The model cannot be copied: its copy holds parts of the model itself.")
    return copied


def _check_obstacles(plan: FoldingPlan, model: nn.Module) -> None:
    modules, census = dict(model.named_modules()), Census(model)
    for fold in plan.folds:
        obstacle = census.batchnorm(modules[fold.batchnorm]).obstacle
        for part in fold.parts:
            layer = modules[part.layer]
            kind = layer_kind(layer)
            assert kind is not None
            obstacle = obstacle or census.layer(layer, kind).obstacle
        if obstacle is not None:
            raise FoldingError(f"The plan folds `{fold.batchnorm}`, which has to stay in this model: {obstacle[1]}.")


def _check_fit(plan: FoldingPlan, model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for fold in plan.folds:
        batchnorm = modules.get(fold.batchnorm)
        if batchnorm is None or not is_batchnorm(batchnorm):
            found = "nothing" if batchnorm is None else type(batchnorm).__name__
            raise FoldingError(f"The plan folds the BatchNorm `{fold.batchnorm}`; the model has {found} of that name.")
        for part in fold.parts:
            layer = modules.get(part.layer)
            kind = layer_kind(layer)
            if layer is None or kind is None:
                found = "nothing" if layer is None else type(layer).__name__
                raise FoldingError(f"The plan folds into the layer `{part.layer}`; the model has {found} of that name.")
            side = kind.in_channels if fold.direction == "forward" else kind.out_channels
            found, features = getattr(layer, side), num_features(batchnorm)
            wanted = features if part.channels is None else len(part.channels)
            if wanted != found:
                raise FoldingError(f"The plan wants {wanted} {side} of `{part.layer}`, which has {found}.")
            channels = range(features) if part.channels is None else part.channels
            if not set(channels) <= {UNTOUCHED, *range(features)}:
                raise FoldingError(f"The plan names channels that `{fold.batchnorm}` with {features} has not.")


def _fold(fold: Fold, modules: dict[str, Any]) -> list[_Undo]:
    """Fold one BatchNorm, and tell how to undo it."""
    batchnorm = modules[fold.batchnorm]
    with torch.no_grad():
        scale, shift = scale_and_shift(
            batchnorm.running_mean,
            batchnorm.running_var,
            batchnorm.weight,
            batchnorm.bias,
            getattr(batchnorm, "eps", 0.0),
        )
        undos: list[_Undo] = []
        try:
            for part in fold.parts:
                _fold_part(fold.direction, part, modules[part.layer], scale, shift, undos)
            undos.append(_erase(batchnorm, fold.direction))
        except BaseException:
            _undo_all(undos)
            raise
    return undos


def _undo_all(undos: list[_Undo]) -> None:
    for undo in reversed(undos):
        undo()


def _fold_part(direction: str, part: Part, layer: Any, scale: Tensor, shift: Tensor, undos: list[_Undo]) -> None:
    kind, groups = layer_kind(layer), getattr(layer, "groups", 1)
    assert kind is not None
    scale, shift = _by_channel(part, scale.to(layer.weight.device), shift.to(layer.weight.device))
    if not kind.has_bias:
        undos.append(_set_data(layer.weight, fold_into_rows(layer.weight, scale, shift)))
        return
    if direction == "backward":
        weight, bias = fold_into_outputs(
            layer.weight, layer.bias, scale, shift, transposed=kind.transposed, groups=groups
        )
    elif direction == "forward":
        weight, bias = fold_into_inputs(layer.weight, layer.bias, scale, shift, groups=groups)
    else:
        weight, bias = add_identity(layer.weight, layer.bias, scale, shift)
    undos.append(_set_data(layer.weight, weight))
    undos.append(_add_bias(layer, bias) if layer.bias is None else _set_data(layer.bias, bias))


def _by_channel(part: Part, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
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


class _WithoutNormalisation(TorchFunctionMode):
    """Makes ``batch_norm`` give back its input."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return args[0] if args else kwargs["input"]
        return func(*args, **(kwargs or {}))


@cache
def _rest_of(kind: Any) -> Any:
    """A class that runs the forward of a BatchNorm's class, with its normalisation left out."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _WithoutNormalisation():
            return kind.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _new_rest, (kind,), vars(self)

    body = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__}
    return type(kind.__name__, (Rest, kind), body)


def _new_rest(kind: Any) -> Any:
    rest = _rest_of(kind)
    return rest.__new__(rest)


class Zero(nn.Module):
    """What is left of a BatchNorm that was folded into a layer beside it: it adds nothing."""

    def forward(self, input: Tensor) -> Tensor:
        """A zero of shape () for an input of any shape."""
        return input.new_zeros(())


def _erase(batchnorm: nn.Module, direction: str) -> _Undo:
    """Take a BatchNorm's normalisation away where it stands, so that no second reference to it still normalises."""
    kind: Any = type(batchnorm)
    parameters, buffers = batchnorm._parameters, batchnorm._buffers
    if only_normalises(batchnorm):
        batchnorm.__class__ = Zero if direction == "parallel" else nn.Identity
        batchnorm._parameters, batchnorm._buffers = {}, {}
    else:
        # A forward of its own still asks for its tensors, be it to hand them to `batch_norm`.
        batchnorm.__class__ = _rest_of(kind)
        batchnorm._parameters, batchnorm._buffers = dict.fromkeys(parameters), dict.fromkeys(buffers)

    def undo() -> None:
        batchnorm.__class__ = kind
        batchnorm._parameters, batchnorm._buffers = parameters, buffers

    return undo
