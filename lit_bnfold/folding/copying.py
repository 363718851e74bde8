"""Copies of models: whole ones to be folded, and twins around the same numbers to be watched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lit_bnfold.folding.graph import FoldingError
from lit_bnfold.folding.kinds import own_tensors
from lit_bnfold.folding.record import WITHOUT_TENSORS, tensors_in

_Model = TypeVar("_Model", bound=nn.Module)

_CONTAINERS = (dict, OrderedDict, list, set)

# These only give objects of older versions what they lack.
_USUAL_SETSTATE = (nn.Module.__setstate__, _ConvNd.__setstate__)

# Weakly, for a parametrization makes a class of its own for each module.
_copied_as_usual: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def twin_of(model: _Model) -> _Model:
    """A copy of a model around the memory of its parameters and buffers; running it leaves no trace in the model.

    Args:
        model: The model.

    Raises:
        FoldingError: If it cannot be copied.
    """
    tensors = (tensor for module in model.modules() for tensor in own_tensors(module).values())
    # Stand-ins, so that code which holds on to the model's own tensors, as a closure does, can be told apart.
    return copy_model(model, {id(tensor): stand_in(tensor) for tensor in tensors})


def stand_in(tensor: Tensor) -> Tensor:
    """Another tensor on the same memory, if the tensor is an ordinary one; else the tensor itself."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return tensor
    other = tensor.detach()
    if isinstance(tensor, nn.Parameter):
        other = nn.Parameter(other, tensor.requires_grad)
    vars(other).update(vars(tensor))
    return other


def copy_model(model: _Model, memo: dict[int, Any] | None = None) -> _Model:
    """Copy a model; a tensor that its last run left on it with a gradient history is copied without that.

    Args:
        model: The model.
        memo: What to take instead of a copy, by the ``id`` of the original.

    Raises:
        FoldingError: If it cannot be copied.
    """
    modules, memo = list(_inside_first(model, set())), memo or {}
    passed_on = {id(other) for other in memo.values()}
    held = [value for module in modules for value in vars(module).values() if not _is_bare(value)]
    known = {id(tensor): tensor.detach().clone() for tensor in tensors_in(held) if not tensor.is_leaf} | memo
    try:
        copied = _deepcopy(model, modules, known)
    except Exception as error:
        raise FoldingError(f"The model cannot be copied: {error}") from error
    originals = {} if all(map(_is_ordinary, modules)) else dict(model.named_modules())
    for name, module in copied.named_modules() if originals else ():
        if name in originals:  # A class that copies itself in a way of its own may forget the mode.
            module.training = originals[name].training
    parts = {id(part) for module in modules for part in _parts(module)} - passed_on
    if any(id(part) in parts for module in copied.modules() for part in _parts(module)):
        raise FoldingError("The model cannot be copied: its copy holds parts of the model itself.")
    return copied


def _parts(module: nn.Module) -> list[Any]:
    """What a copy must not share with its original."""
    return [module, *(parameter for parameter in module._parameters.values() if parameter is not None)]


def _deepcopy(model: _Model, modules: Sequence[nn.Module], memo: dict[int, Any]) -> _Model:
    """What ``copy.deepcopy`` gives, and faster: nearly all that a module holds needs no search."""
    ordinary = [module for module in modules if id(module) not in memo and _is_ordinary(module)]
    for module in ordinary:
        memo[id(module)] = type(module).__new__(type(module))
    for module in ordinary:
        copied = vars(memo[id(module)])
        state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module)
        for key, value in state.items():
            copied[key] = _copy_of(value, memo)
    return copy.deepcopy(model, memo)


def _copy_of(value: Any, memo: dict[int, Any]) -> Any:
    kind: Any = type(value)
    if kind in WITHOUT_TENSORS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if not (kind is dict and all(type(key) is str for key in value)) and not (kind in _CONTAINERS and not value):
        return copy.deepcopy(value, memo)
    copied = memo[id(value)] = kind()
    if value:
        copied.update((key, _copy_of(each, memo)) for key, each in value.items())
    return copied


def _inside_first(module: nn.Module, seen: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules of a model, so that whoever copies itself in a way of its own finds those inside it whole."""
    seen.add(module)
    for inner in module._modules.values():
        if inner is not None and inner not in seen:
            yield from _inside_first(inner, seen)
    yield module


def _is_bare(value: Any) -> bool:
    return type(value) in WITHOUT_TENSORS or (type(value) in _CONTAINERS and not value)


def _is_ordinary(module: nn.Module) -> bool:
    kind = type(module)
    if kind not in _copied_as_usual:
        _copied_as_usual[kind] = _is_copied_as_usual(kind)
    return _copied_as_usual[kind]


def _is_copied_as_usual(kind: Any) -> bool:
    """Whether a copy of such a module is a new object with copies of all attributes."""
    return (
        not hasattr(kind, "__deepcopy__")
        and not hasattr(kind, "__getnewargs__")
        and not hasattr(kind, "__getnewargs_ex__")
        and kind.__new__ is object.__new__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and getattr(kind, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)
        and kind.__setstate__ in _USUAL_SETSTATE
        and not any("__slots__" in vars(base) for base in kind.__mro__)
    )
