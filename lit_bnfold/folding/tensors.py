"""Where tensors are found: in whatever holds them, and in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

WITHOUT_TENSORS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, ModuleType}
"""Types of what holds no tensor and may be shared by a copy."""

_TORCHS_FUNCTIONS = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]


def holds_no_tensor(value: Any) -> bool:
    """Whether a value is a plain one, or a tuple of such; it may be shared by a copy.

    Args:
        value: Anything; of other containers this does not say whether there are tensors in them.
    """
    kind = type(value)
    return kind in WITHOUT_TENSORS or (kind is tuple and WITHOUT_TENSORS.issuperset(map(type, value)))


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Find the tensors in nested containers, dataclasses and plain objects, each occurrence once per container.

    Args:
        tree: Anything.

    Yields:
        The tensors, of any shape.

    Example:
        >>> [t.item() for t in tensors_in({"a": torch.tensor(1), "b": [torch.tensor(2), "no tensor"]})]
        [1, 2]
    """
    pending, seen = [tree], set[int]()
    while pending:
        branch = pending.pop()
        if isinstance(branch, Tensor):
            yield branch
        elif id(branch) not in seen and not holds_no_tensor(branch) and not isinstance(branch, nn.Module):
            seen.add(id(branch))
            pending += [each for each in reversed(_branches(branch)) if type(each) not in WITHOUT_TENSORS]


def _branches(tree: Any) -> Sequence[Any]:
    if isinstance(tree, (list, tuple)):
        return tree
    if isinstance(tree, dict):
        return list(tree.values())
    if isinstance(tree, (set, frozenset)):
        return list(tree)
    if isinstance(tree, type):
        return []
    if is_dataclass(tree):
        return [getattr(tree, field.name, None) for field in fields(tree)]
    return list(getattr(tree, "__dict__", {}).values())


def is_plain(tensor: Tensor) -> bool:
    """Whether operations on a tensor are torch's own; a subclass may give them another meaning.

    Args:
        tensor: A tensor of any shape.
    """
    kind = type(tensor)
    if kind is Tensor or kind is nn.Parameter:
        return True
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return function in _TORCHS_FUNCTIONS and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def stride_of(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a tensor, in elements; none for one that has none, such as a sparse one.

    Args:
        tensor: The tensor, of any shape.
    """
    return tensor.stride() if tensor.layout is torch.strided and not tensor.is_nested else ()


def address_of(tensor: Tensor) -> int | None:
    """Where a tensor's storage lies in memory; 0 for an empty one, None where torch does not tell.

    Args:
        tensor: The tensor, of any shape.
    """
    return memory_of(tensor)[1]


def memory_of(tensor: Tensor) -> tuple[torch.UntypedStorage | None, int | None]:
    """The storage of a tensor and where it lies in memory, both None where torch does not tell.

    Args:
        tensor: The tensor, of any shape.
    """
    try:
        storage = tensor.untyped_storage()
        return storage, storage.data_ptr()
    except (NotImplementedError, RuntimeError):
        return None, None
