"""Plan and model -> folded model: on a copy, in place, or in place with a way back.

A layer keeps its Parameter objects and gets new numbers; a BatchNorm object becomes an ``nn.Identity``, or what else is
left of it, wherever the model holds it. Each fold is whole before the next begins, so whatever happens the model
computes what it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

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
    shift_before_normalising,
)
from lit_bnfold.folding.census import Census
from lit_bnfold.folding.computed import Undo, bake, computed_tensors
from lit_bnfold.folding.copying import copy_model, stand_in
from lit_bnfold.folding.graph import Call, FoldingError, Layer, Obstacle
from lit_bnfold.folding.kinds import KINDS, NORMALISING, Kinds, LayerKind, Rest
from lit_bnfold.folding.plan import DIRECTIONS, Fold, FoldingPlan, Part
from lit_bnfold.folding.transparent import UNTOUCHED
from lit_bnfold.folding.turn import TURN

_Model = TypeVar("_Model", bound=nn.Module)


def apply_plan(plan: FoldingPlan, model: _Model, *, inplace: bool = False, kinds: Kinds = KINDS) -> _Model:
    """Fold a model by a plan.

    Args:
        plan: A plan that was made for this model or for one of the same structure.
        model: The model.
        inplace: Whether to fold ``model`` itself instead of a copy. Beside the model this needs memory for one layer at
            a time, in float64.
        kinds: What counts as a layer and as a BatchNorm.

    Returns:
        The folded model.

    Raises:
        FoldingError: If the plan does not fit the model; then the model is as it was.
    """
    with TURN:
        _check_fit(plan, model, kinds)
        _check_obstacles(plan, model, kinds)
        return fold_model(plan, model, inplace=inplace, kinds=kinds)


def fold_model(plan: FoldingPlan, model: _Model, *, inplace: bool, kinds: Kinds) -> _Model:
    """Fold a model by a plan that was made for it just now, and so needs no check; see ``apply_plan``."""
    # Inside `torch.inference_mode()` the new parameters would be such as can never be trained again.
    with torch.inference_mode(False):
        if not inplace:
            model = copy_model(model, _numbers_to_be_replaced(plan, model, kinds))
        modules = dict(model.named_modules())
        for fold in plan.folds:
            _fold(fold, modules, kinds)
    return model


def _numbers_to_be_replaced(plan: FoldingPlan, model: nn.Module, kinds: Kinds) -> dict[int, Any]:
    """Parameters that a copy may share the numbers of, because a fold gives it new ones."""
    modules, replaced = dict(model.named_modules()), []
    for part in (part for fold in plan.folds for part in fold.parts):
        kind = kinds.layer(modules[part.layer], part.function)
        assert kind is not None
        own = modules[part.layer]._parameters
        replaced += [own.get(key) for key in ("weight", "bias") if key in kind.arguments]
    return {id(tensor): stand_in(tensor) for tensor in replaced if tensor is not None}


@contextmanager
def folded_in_place(plan: FoldingPlan, model: nn.Module) -> Iterator[None]:
    """Fold a model for as long as the context lasts; afterwards its own numbers and modules are back, bit for bit.

    Args:
        plan: A plan that was made for this model.
        model: The model.

    Raises:
        FoldingError: If the plan does not fit the model; then the model is as it was.
    """
    _check_fit(plan, model, KINDS)
    _check_obstacles(plan, model, KINDS)
    modules = dict(model.named_modules())
    undos: list[Undo] = []
    try:
        for fold in plan.folds:
            undos.extend(_fold(fold, modules, KINDS))
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
    _check_fit(plan, model, KINDS)
    modules = dict(model.named_modules())
    for fold in plan.folds:
        for part in fold.parts:
            layer, kind = modules[part.layer], KINDS.layer(modules[part.layer], part.function)
            assert kind is not None
            make_ordinary(layer, kind)
        erase(modules[fold.batchnorm], fold, KINDS)


def make_ordinary(layer: Any, kind: LayerKind) -> Undo:
    """Give a layer the parameters that a fold puts its numbers into, without changing what it does.

    Args:
        layer: The layer; it is changed in place.
        kind: Its kind.

    Returns:
        A function that takes away again what was added.
    """
    undo = bake(layer) if computed_tensors(layer) else _no_change
    weight, bias = layer.weight, getattr(layer, "bias", None)
    like = layer.running_mean if kind is NORMALISING and weight is None else weight
    trainable = weight is not None and weight.requires_grad
    added: dict[str, nn.Parameter | None] = {}
    if weight is None:
        added["weight"] = nn.Parameter(torch.ones_like(like), requires_grad=False)
    if kind.has_bias and bias is None:
        added["bias"] = nn.Parameter(like.new_zeros(kind.channels(layer)[1]), requires_grad=trainable)
    before = {name: layer._parameters[name] for name in added if name in layer._parameters}
    layer._parameters.update(added)
    affine = vars(layer).get("affine")
    if affine is not None:
        layer.affine = True

    def remove() -> None:
        for name in added.keys() - before.keys():
            del layer._parameters[name]
        layer._parameters.update(before)
        if affine is not None:
            layer.affine = affine
        undo()

    return remove


def _no_change() -> None:
    """The way back to what did not change."""


def _check_obstacles(plan: FoldingPlan, model: nn.Module, kinds: Kinds) -> None:
    modules, census = dict(model.named_modules()), Census(model, kinds)
    for fold in plan.folds:
        obstacle = census.batchnorms[modules[fold.batchnorm]].obstacle
        for part in fold.parts:
            module, kind = modules[part.layer], kinds.layer(modules[part.layer], part.function)
            assert kind is not None
            layer = census.layer(module, part.function)
            if layer.computed and not part.baked:
                obstacle = obstacle or ("computed-weight", f"`{part.layer}` computes its weight at every call")
            obstacle = obstacle or layer.obstacle or _obstacle_of_call(fold, part, module, kind, layer)
        if obstacle is not None:
            raise FoldingError(f"The plan folds `{fold.batchnorm}`, which has to stay in this model: {obstacle[1]}.")


def _obstacle_of_call(fold: Fold, part: Part, module: nn.Module, kind: LayerKind, layer: Layer) -> Obstacle | None:
    """What a run of this model would show of its layer; how one with a forward of its own is called, only a run can."""
    if not kind.runs_torchs_forward(module):
        return None
    call = _call_of(module)
    if fold.direction == "forward" and layer.pads_with_zeros(call):
        return "zero-padding", f"`{part.layer}` pads its input with zeros"
    is_beside = fold.direction == "parallel" or part.residual
    if is_beside and not (layer.has_centre_tap(call) and layer.in_channels == layer.out_channels):
        return "no-layer", f"no element of what `{part.layer}` makes lies on that of its input"
    return None


def _call_of(module: Any) -> Call:
    """How torch's forward calls the function of a layer; what pads in another way than with zeros does so before."""
    pads = getattr(module, "padding_mode", "zeros") == "zeros"
    names = ["stride", "dilation", *(["padding"] if pads else [])]
    given = {name: getattr(module, name) for name in names if hasattr(module, name)}
    kwargs = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Call(index=0, kind="layer", name="", frame=0, owner=None, args=(), kwargs=kwargs, inputs=())


def _check_fit(plan: FoldingPlan, model: nn.Module, kinds: Kinds) -> None:
    misfit = next(_misfits(plan, dict(model.named_modules()), kinds), None)
    if misfit is not None:
        raise FoldingError(f"{misfit}. Make a plan for this very model, with `plan_folding`.")


def _misfits(plan: FoldingPlan, modules: Mapping[str, nn.Module], kinds: Kinds) -> Iterator[str]:
    """What of a plan does not fit a model, as sentences without their full stop."""
    gone = set[str]()
    for fold in plan.folds:
        if (again := gone.intersection({fold.batchnorm, *fold.layers})) or fold.batchnorm in fold.layers:
            name = next(iter(again), fold.batchnorm)
            yield f"The plan folds the BatchNorm `{name}`, and wants it again for `{fold.batchnorm}`"
        gone.add(fold.batchnorm)
        if fold.direction not in DIRECTIONS or not fold.parts or len(set(fold.layers)) < len(fold.layers):
            expected = f"one of {', '.join(DIRECTIONS)} and at least one layer, each once"
            found = f"{fold.direction!r} and {list(fold.layers)}"
            yield f"The plan folds the BatchNorm `{fold.batchnorm}`: expected {expected}, got {found}"
        batchnorm = modules.get(fold.batchnorm)
        if batchnorm is None or kinds.batchnorm(batchnorm) is None:
            found = "nothing" if batchnorm is None else type(batchnorm).__name__
            yield f"The plan folds the BatchNorm `{fold.batchnorm}`; the model has {found} of that name"
        else:
            for part in fold.parts:
                yield from _misfits_of_part(fold, part, kinds.num_features(batchnorm), modules, kinds)


def _misfits_of_part(
    fold: Fold, part: Part, num_features: int, modules: Mapping[str, nn.Module], kinds: Kinds
) -> Iterator[str]:
    layer = modules.get(part.layer)
    kind = kinds.layer(layer, part.function)
    if layer is None or kind is None:
        found = "nothing" if layer is None else type(layer).__name__
        yield f"The plan folds into the layer `{part.layer}`; the model has {found} of that name"
        return
    direction = "parallel" if part.residual else fold.direction
    if not _is_possible(direction, kind):
        yield f"The plan folds {direction} into `{part.layer}`, which takes it backward alone"
    side, name = (0, kind.in_channels) if fold.direction == "forward" else (1, kind.out_channels)
    channels = range(num_features) if part.channels is None else part.channels
    has = kind.channels(layer)[side]
    if len(channels) != has:
        yield f"The plan wants {len(channels)} {name or 'channels'} of `{part.layer}`, which has {has}"
    if not set(channels) <= {UNTOUCHED, *range(num_features)}:
        yield f"The plan names channels of `{fold.batchnorm}` beyond its {num_features}"


def _is_possible(direction: str, kind: LayerKind) -> bool:
    return direction == "backward" or (not kind.transposed and (direction == "forward" or kind is not NORMALISING))


def _fold(fold: Fold, modules: dict[str, Any], kinds: Kinds) -> list[Undo]:
    """Fold one BatchNorm, and tell how to undo it."""
    batchnorm = modules[fold.batchnorm]
    kind = kinds.batchnorm(batchnorm)
    assert kind is not None
    undos: list[Undo] = []
    with torch.no_grad():
        scale, shift = scale_and_shift(*kind.numbers(batchnorm, fold.eps))
        try:
            for part in fold.parts:
                layer = modules[part.layer]
                layer_kind = kinds.layer(layer, part.function)
                assert layer_kind is not None
                undos.append(make_ordinary(layer, layer_kind))
                numbers = folded_numbers(fold.direction, part, layer, layer_kind, scale, shift)
                undos.extend(_set_data(layer._parameters[key], new) for key, new in numbers.items())
            undos.append(erase(batchnorm, fold, kinds))
        except BaseException:
            _undo_all(undos)
            raise
    return undos


def _undo_all(undos: list[Undo]) -> None:
    for undo in reversed(undos):
        undo()


def folded_numbers(
    direction: str, part: Part, layer: Any, kind: LayerKind, scale: Tensor, shift: Tensor
) -> dict[str, Tensor]:
    """The new numbers of a layer.

    Args:
        direction: Where the layer takes the BatchNorm from.
        part: What the layer takes of it.
        layer: The layer, or anything that has its attributes.
        kind: Its kind.
        scale: Scale of the BatchNorm, (C,), float64.
        shift: Shift of the BatchNorm, (C,), float64.

    Returns:
        By attribute, rounded once to the dtype of the old ones.
    """
    weight, groups = layer.weight, kind.groups(layer)
    scale, shift = _by_channel(part, scale.to(weight.device), shift.to(weight.device))
    if not kind.has_bias:
        return {"weight": fold_into_rows(weight, scale, shift)}
    if kind is NORMALISING:
        # Behind its normalisation, a BatchNorm is a layer with one input for each output.
        weight, groups = weight.unsqueeze(1), len(weight)  # (C,) -> (C, 1)
        if direction == "forward":
            shift = shift_before_normalising(scale, shift, layer.running_mean, layer.running_var, layer.eps)
    if direction == "backward":
        weight, bias = fold_into_outputs(
            weight, layer.bias, scale, shift, transposed=kind.transposed, groups=groups, residual=part.residual
        )
    elif direction == "forward":
        weight, bias = fold_into_inputs(weight, layer.bias, scale, shift, groups=groups)
    else:
        weight, bias = add_identity(weight, layer.bias, part.shift * scale, shift)
    # A `view` of the same shape would not keep the strides.
    return {"weight": weight.squeeze(1) if kind is NORMALISING else weight, "bias": bias}


def _by_channel(part: Part, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    shift = shift * part.shift
    if part.channels is None:
        return scale, shift
    channels = torch.tensor(part.channels, device=scale.device)
    untouched = channels == UNTOUCHED
    return scale[channels].masked_fill(untouched, 1.0), shift[channels].masked_fill(untouched, 0.0)


def _set_data(parameter: Any, numbers: Tensor) -> Undo:
    before = parameter.data
    parameter.data = numbers

    def undo() -> None:
        parameter.data = before

    return undo


class _InsteadOfNormalising(TorchFunctionMode):
    """Makes ``batch_norm`` give something else, made of its input."""

    def __init__(self, gives: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._gives = gives

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            return self._gives(args[0] if args else kwargs["input"])
        return func(*args, **(kwargs or {}))


class Zero(nn.Module):
    """What is left of a BatchNorm that was folded into a layer beside it: it adds nothing."""

    def forward(self, input: Tensor) -> Tensor:
        """Zeros for an input of any shape, that share the memory of one."""
        return input.new_zeros(()).expand(input.shape)


class LaidOutZero(Zero):
    """What is left of it where the sum is written into its output, or where its layout in memory matters."""

    def forward(self, input: Tensor) -> Tensor:
        """Zeros for an input of any shape, that can be written."""
        return torch.zeros_like(input, memory_format=_format_of_batch_norm(input))


class LaidOut(nn.Identity):
    """What is left of one that lays its output out anew in memory, for whoever relies on that."""

    def forward(self, input: Tensor) -> Tensor:
        """The input, of any shape, with its axes in memory as ``batch_norm`` leaves them, also those of size 1."""
        if _format_of_batch_norm(input) is not torch.contiguous_format:
            return input
        return input.contiguous().view(input.shape)


def _format_of_batch_norm(input: Tensor) -> torch.memory_format:
    """How ``batch_norm`` lays out what it makes of an input: images keep their channels last, all else comes in order.

    A crop of images with channels last is laid out here in order, and there, by some kernels, with its channels last.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    keeps_last = last is not None and not input.is_contiguous() and input.is_contiguous(memory_format=last)
    return last if last is not None and keeps_last else torch.contiguous_format


# Weakly, for classes may be made while the process runs, and go again.
_rests: WeakValueDictionary[Any, Any] = WeakValueDictionary()


def _rest_of(kind: Any, left: type[nn.Module]) -> Any:
    """A class that runs the forward of a BatchNorm's class, with its normalisation left out."""
    known = _rests.get((kind, left))
    if known is not None:
        return known
    gives = left().forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _InsteadOfNormalising(gives):
            return kind.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _new_rest, (kind, left), vars(self)

    body = {"forward": forward, "__reduce_ex__": reduce, "__module__": kind.__module__}
    _rests[kind, left] = rest = type(kind.__name__, (Rest, kind), body)
    return rest


def _new_rest(kind: Any, left: type[nn.Module]) -> Any:
    rest = _rest_of(kind, left)
    return rest.__new__(rest)


def erase(batchnorm: nn.Module, fold: Fold, kinds: Kinds) -> Undo:
    """Take a BatchNorm's normalisation away where it stands, so that no second reference to it still normalises.

    Args:
        batchnorm: The BatchNorm; it is changed in place.
        fold: Where it is folded to: what was folded ``parallel`` leaves a zero, all others leave their input.
        kinds: What counts as a BatchNorm.

    Returns:
        A function that makes it a BatchNorm again.
    """
    kind: Any = type(batchnorm)
    parameters, buffers = batchnorm._parameters, batchnorm._buffers
    left: type[nn.Module] = LaidOut if fold.contiguous else nn.Identity
    if fold.direction == "parallel":
        left = LaidOutZero if fold.contiguous or fold.written else Zero
    if kinds.only_normalises(batchnorm):
        _become(batchnorm, left, {}, {})
    else:
        # A forward of its own still asks for its tensors, be it to hand them to `batch_norm`.
        _become(batchnorm, _rest_of(kind, left), dict.fromkeys(parameters), dict.fromkeys(buffers))
    return partial(_become, batchnorm, kind, parameters, buffers)


def _become(module: nn.Module, kind: type[nn.Module], parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    # Not by `setattr`, which a class may have refuse this.
    object.__setattr__(module, "__class__", kind)
    vars(module).update(_parameters=parameters, _buffers=buffers)
