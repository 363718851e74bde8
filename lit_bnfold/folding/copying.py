"""Copies of models: whole ones to be folded, and twins around the same numbers to be watched."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import DataLoader, Dataset

from lit_bnfold.folding.graph import FoldingError, named
from lit_bnfold.folding.kinds import own_tensors
from lit_bnfold.folding.tensors import WITHOUT_TENSORS, holds_no_tensor, tensors_in

_Model = TypeVar("_Model", bound=nn.Module)

_CONTAINERS = (dict, OrderedDict, list, set)

# For its hooks and the like, every module has a dozen of dicts, which it shares with nobody and which are mostly empty.
_DICTS_OF_EACH = {key for key, value in vars(nn.Module()).items() if type(value) in _CONTAINERS}

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

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
        # Those that were made in inference mode have no gradients.
        other = nn.Parameter(other, tensor.requires_grad and not tensor.is_inference())
    vars(other).update(vars(tensor))
    return other


def copy_model(model: _Model, memo: dict[int, Any] | None = None) -> _Model:
    """Copy a model, but for its data sets; a tensor that its last run left with a gradient history is copied without.

    Args:
        model: The model.
        memo: What to take instead of a copy, by the ``id`` of the original.

    Raises:
        FoldingError: If it cannot be copied.
    """
    modules, memo = _inside_first(model), memo or {}
    held = _held(modules)
    # Data is not part of a model.
    known: dict[int, Any] = {id(value): value for value in held if isinstance(value, (Dataset, DataLoader))}
    # Tensors with a history, and sparse ones, which Python cannot copy.
    parts = [value for value in held if id(value) not in known]
    odd = (each for each in tensors_in(parts) if not each.is_leaf or each.layout in _COMPRESSED)
    known |= {id(tensor): tensor.detach().clone() for tensor in odd} | memo
    ordinary = {kind for kind in set(map(type, modules)) if _is_ordinary(kind)}
    # There is one of each module of Python, and Python does not copy it.
    others = [value for module in modules if type(module) not in ordinary for value in vars(module).values()]
    known |= {id(value): value for value in others if type(value) is ModuleType}
    try:
        copied = _deepcopy(model, [module for module in modules if type(module) in ordinary], known)
    except Exception as error:
        raise FoldingError(f"The model cannot be copied: {named(error)}.") from error
    # A class that copies itself in a way of its own may forget the mode.
    originals = {} if ordinary.issuperset(map(type, modules)) else dict(model.named_modules())
    for name, module in copied.named_modules() if originals else ():
        if name in originals:
            module.training = originals[name].training
    if not _parts(modules).isdisjoint(_parts(_inside_first(copied)) - {id(other) for other in memo.values()}):
        raise FoldingError("The model cannot be copied: its copy holds parts of the model itself.")
    return copied


def _parts(modules: Iterable[nn.Module]) -> set[int]:
    """The identities of what a copy must not share with its original."""
    parts = set[int]()
    for module in modules:
        parts.add(id(module))
        parts.update(map(id, module._parameters.values()))
    parts.discard(id(None))
    return parts


def _held(modules: Iterable[nn.Module]) -> list[Any]:
    """What may hold a tensor, of all that modules hold."""
    return [
        value
        for module in modules
        for key, value in vars(module).items()
        if not ((key in _DICTS_OF_EACH and not value) or holds_no_tensor(value))
    ]


def _deepcopy(model: _Model, ordinary: Sequence[nn.Module], memo: dict[int, Any]) -> _Model:
    """What ``copy.deepcopy`` gives, and faster: nearly all that an ordinary module holds needs no search."""
    new = [module for module in ordinary if id(module) not in memo]
    for module in new:
        memo[id(module)] = type(module).__new__(type(module))
    for module in new:
        copied = vars(memo[id(module)])
        state = module.__getstate__() if hasattr(module, "__getstate__") else vars(module)
        for key, value in state.items():
            if type(value) in WITHOUT_TENSORS:
                copied[key] = value
            elif key in _DICTS_OF_EACH and not value:
                copied[key] = type(value)()
            else:
                copied[key] = _copy_of(value, memo)
    return copy.deepcopy(model, memo)


def _copy_of(value: Any, memo: dict[int, Any]) -> Any:
    kind: Any = type(value)
    if id(value) in memo:
        return memo[id(value)]
    if kind in _CONTAINERS and not value:
        copied = memo[id(value)] = kind()
    elif kind is dict and {str}.issuperset(map(type, value)):
        copied = memo[id(value)] = {}
        for key, each in value.items():
            copied[key] = each if type(each) in WITHOUT_TENSORS else _copy_of(each, memo)
    else:
        copied = value if holds_no_tensor(value) else copy.deepcopy(value, memo)
    return copied


def _inside_first(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, so that whoever copies itself in a way of its own finds those inside it whole."""
    found: list[nn.Module] = []
    _enter_inside_first(model, set(), found)
    return found


def _enter_inside_first(module: nn.Module, seen: set[nn.Module], found: list[nn.Module]) -> None:
    seen.add(module)
    for inner in module._modules.values():
        if inner is not None and inner not in seen:
            _enter_inside_first(inner, seen, found)
    found.append(module)


def _is_ordinary(kind: type) -> bool:
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
