"""What torch's functions and operations do that their arguments and their outputs do not show.

A *function* is what Python calls, such as ``torch.flatten`` or ``Tensor.tolist``, and what a torch function mode sees.
An *operation* is what it becomes below, such as ``aten.view.default``, and what a torch dispatch mode sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_bnfold.folding.graph import plain_name
from lit_bnfold.folding.tensors import tensors_in

RECURRENT = {torch.gru, torch.lstm, torch.rnn_tanh, torch.rnn_relu}
"""Below, these are hundreds of operations, of which none lets a BatchNorm pass."""

# Through these, Python gets hold of numbers or of memory without an operation that a dispatch mode could see.
_ESCAPES = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.__deepcopy__,
    Tensor.__format__,
    Tensor.__repr__,
    Tensor.__reduce_ex__,
    Tensor.untyped_storage,
    Tensor.storage,
    Tensor.data_ptr,
    Tensor.apply_,
    Tensor.map_,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.data.__set__,  # type: ignore[attr-defined]
}

# These read the numbers of tensors that lie in lists, without an operation either.
_TENSORS_OF_LISTS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor, Tensor.new}

# These read all that they are given, to know the shape of what they make.
_TENSORS_OF_A_SIZE_READ = {
    torch.sparse_coo_tensor,
    torch.sparse_csr_tensor,
    torch.sparse_csc_tensor,
    torch.sparse_bsr_tensor,
    torch.sparse_bsc_tensor,
    torch.sparse_compressed_tensor,
    torch.tensor_split,
    Tensor.tensor_split,
}

# Torch's operations that tell Python something of the numbers in their tensors, be it by a shape, and have no tag.
_REVEALING = {
    "_nnz", "_values", "_indices", "values", "indices", "crow_indices", "col_indices", "ccol_indices", "row_indices",
    "q_scale", "q_zero_point", "_nested_tensor_from_mask_left_aligned", "_pack_padded_sequence",
    "_pad_packed_sequence",
}  # fmt: skip

# These read the shape of a tensor, and none of its numbers.
_READING_SHAPES = {
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_empty", "new_zeros", "new_ones", "new_full",
}  # fmt: skip

# What a BatchNorm may be made of, by torch or by hand: nothing in here depends on whether a number is above another.
_ARITHMETIC = {
    "add", "add_", "addcdiv", "addcmul", "addcmul_", "alias", "as_strided", "clone", "copy_", "detach", "div", "div_",
    "empty", "empty_like", "expand", "full_like", "lift_fresh", "mean", "mul", "mul_", "nan_to_num", "neg", "new_empty",
    "new_ones", "new_zeros", "ones", "ones_like", "permute", "pow", "reciprocal", "repeat", "rsqrt", "rsub",
    "scalar_tensor", "select", "slice", "sqrt", "square", "squeeze", "sub", "sub_", "sum", "t", "transpose",
    "unsqueeze", "view", "zeros", "zeros_like", "_reshape_alias", "_to_copy", "_unsafe_view",
    "cudnn_batch_norm", "miopen_batch_norm", "native_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
}  # fmt: skip

# Namespaces of operations whose shapes depend on shapes alone, unless they say so.
_TORCHS = {"aten", "prim", "prims", "quantized", "profiler"}

_FLATTENING = {torch.flatten, Tensor.flatten}
_UNFLATTENING = {torch.unflatten, Tensor.unflatten}
_RESHAPING = {torch.reshape, Tensor.reshape}
_INTERLEAVING = {torch.repeat_interleave, Tensor.repeat_interleave}


def is_foreign(function: Callable[..., Any]) -> bool:
    """Whether a function that takes part in torch's function protocol was written elsewhere, in Python.

    Args:
        function: The function.
    """
    return isinstance(function, FunctionType) and function.__module__.partition(".")[0] != "torch"


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function in words for a reason.

    Args:
        function: The function.
    """
    name: str = getattr(function, "__name__", "Python code")
    # An attribute is got and set by functions of its descriptor.
    return function.__self__.__name__ if name in ("__get__", "__set__") else name  # type: ignore[attr-defined]


def lets_numbers_out(function: Callable[..., Any]) -> bool:
    """Whether a function gives Python the numbers of a tensor, or could; no operation below shows it.

    Args:
        function: The function.
    """
    return function in _ESCAPES or is_foreign(function)


def numbers_read(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors whose numbers one of torch's functions reads without an operation that reads them.

    Args:
        function: The function.
        args: Positional arguments of its call.
        kwargs: Keyword arguments of its call.

    Yields:
        The tensors, of any shape.
    """
    if function in _TENSORS_OF_LISTS:
        yield from tensors_in([each for each in (*args, *kwargs.values()) if not isinstance(each, Tensor)])
    elif function in _TENSORS_OF_A_SIZE_READ:
        # What is split is not read.
        yield from tensors_in((args[1:] if "split" in function.__name__ else args, kwargs))


def asked_of_reshape(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    """What a call of ``flatten``, ``unflatten`` or ``reshape`` names of axes or sizes.

    Below, all of these are a view like any other, or a copy and a view.

    Args:
        function: Any function.
        args: Positional arguments of its call.
        kwargs: Keyword arguments of its call.

    Returns:
        The axes that are ``flattened``, the one that is ``unflattened``, or the ``size`` that is asked for; None for
        whatever else it is, and where a size is no plain number.
    """
    if function in _FLATTENING and args:
        rank = max(1, args[0].dim())
        given = {"start_dim": 0, "end_dim": -1} | dict(zip(("start_dim", "end_dim"), args[1:], strict=False)) | kwargs
        numbers, key = list(given.values()), "flattened"
    elif function in _UNFLATTENING and args:
        given = dict(zip(("dim", "sizes"), args[1:], strict=False)) | kwargs
        if not all(type(size) is int for size in given["sizes"]):
            return None
        numbers, key, rank = [given["dim"]], "unflattened", max(1, args[0].dim())
    elif function in _RESHAPING and args:
        sizes = args[1:] or (kwargs.get("shape"),)
        numbers, key, rank = list(sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes), "size", 0
    else:
        return None
    # A size out of a tensor is a Python value of it, which others have to note.
    if not all(type(number) is int for number in numbers):
        return None
    return {key: tuple(number % rank if rank else number for number in numbers)}


def repeats_asked(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, int, int] | None:
    """What a call of ``repeat_interleave`` repeats how often and along which axis.

    Below, this is a copy and a view, which does not show that only one axis has become longer.

    Args:
        function: Any function.
        args: Positional arguments of its call.
        kwargs: Keyword arguments of its call.

    Returns:
        The tensor, the number, and the axis counted from the end; None for whatever else it is.
    """
    if function not in _INTERLEAVING:
        return None
    given = dict(zip(("input", "repeats", "dim"), args, strict=False)) | kwargs
    tensor, repeats, dim = (given.get(name) for name in ("input", "repeats", "dim"))
    if not isinstance(tensor, Tensor) or type(repeats) is not int or type(dim) is not int:
        return None
    return tensor, repeats, dim if dim < 0 else dim - tensor.dim()


_MASKING: dict[Any, Literal["picks", "writes"]] = {
    torch.ops.aten.index.Tensor: "picks",
    torch.ops.aten.index_put_.default: "writes",
}


def is_arithmetic(operation: Any) -> bool:
    """Whether what an operation makes of numbers shows, by a few of them, what it makes of all others.

    Args:
        operation: What a torch dispatch mode was told to run.
    """
    name = str(operation)
    return name.startswith("aten.") and plain_name(name) in _ARITHMETIC


@cache
def is_compound(name: str) -> bool:
    """Whether torch makes an operation out of others, in whatever mode it is.

    Torch has decompositions of other operations too, in Python; those arrive as one operation in the other mode.

    Args:
        name: Its name, such as ``aten::reshape``.
    """
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"))


class Known(NamedTuple):
    """What is known of an operation, whatever it is given.

    Attributes:
        name: Its name, such as ``aten.add_.Tensor``.
        writes: Places and names of the arguments that it writes.
        is_batch_norm: Whether it is one; some of these write their statistics without saying so in their schema.
        training: Place and name of the argument that has to be true for it to write them; None if it has none.
        draws: Whether it draws random numbers, or could.
        reveals_numbers: Whether it tells Python something of the numbers in its tensors, be it by a shape.
        masks: What it does where a mask says, if it is given one as its second argument.
        reads_shapes: Whether it reads nothing but the shapes, dtypes and devices of what it is given.
    """

    name: str
    writes: tuple[tuple[int, str], ...]
    is_batch_norm: bool
    training: tuple[int, str] | None
    draws: bool
    reveals_numbers: bool
    masks: Literal["picks", "writes"] | None
    reads_shapes: bool


@cache
def known_of(operation: Any) -> Known:
    """What is known of an operation, whatever it is given.

    Args:
        operation: What a torch dispatch mode was told to run.

    Example:
        >>> known_of(torch.ops.aten.add_.Tensor).writes
        ((0, 'self'),)
    """
    name, tags = str(operation), getattr(operation, "tags", ())
    schema = getattr(operation, "_schema", None)
    places = [] if schema is None else list(enumerate(schema.arguments))
    is_torchs = name.startswith("aten.")
    reveals_numbers = (
        torch.Tag.data_dependent_output in tags
        or torch.Tag.dynamic_output_shape in tags
        or (is_torchs and plain_name(name) in _REVEALING)
        # Of what others wrote nobody knows what the shapes depend on.
        or getattr(operation, "namespace", "aten") not in _TORCHS
    )
    return Known(
        name=name,
        writes=tuple((place, each.name) for place, each in places if each.is_write),
        is_batch_norm="batch_norm" in name,
        training=next(((place, each.name) for place, each in places if is_torchs and each.name == "training"), None),
        # Torch's own operations say so if they draw random numbers; others could do or read anything.
        draws=not is_torchs or torch.Tag.nondeterministic_seeded in tags,
        reveals_numbers=reveals_numbers and operation not in _MASKING,
        masks=_MASKING.get(operation),
        reads_shapes=is_torchs and plain_name(name) in _READING_SHAPES,
    )


def has_mask(indices: Any) -> bool:
    """Whether there is a mask among indices, so that the shape of what they pick depends on numbers.

    Args:
        indices: Tensors of indices, in any nesting.
    """
    return any(index.dtype in (torch.bool, torch.uint8) for index in tensors_in(indices))
