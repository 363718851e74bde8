"""The value graph: what one run of a model did, as plain records.

A *value* is what one tensor held between two writes. A *call* is one operation that read and made values. A *frame* is
one call of a module. None of the records holds a tensor, so a graph costs little and outlives the run it describes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any, Literal

Obstacle = tuple[str, str]
"""Why a BatchNorm has to stay: a stable code for programs, and a sentence for people."""


RETURNED = "is returned by the model"
GIVEN = "is given to code outside of any module, as where a step calls `self.forward(x)` and not `self(x)`"

IN_PLACE_SUMS = ("aten.add_.Tensor", "aten.sub_.Tensor")

_STRIDE_READERS = {
    *("aten.view.default", "aten.view.dtype", "aten.view_as_complex.default"),
    *("aten.as_strided.default", "aten._reshape_alias.default"),
}


class FoldingError(Exception):
    """A model cannot be folded, or a plan does not fit it.

    Example:
        >>> import torch
        >>> from lit_bnfold.folding import Fold, FoldingPlan, Part
        >>> FoldingPlan((Fold("bn", (Part("fc"),)),)).apply(torch.nn.Linear(3, 5))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lit_bnfold.folding.graph.FoldingError: The plan folds the BatchNorm `bn`; the model has nothing of that name...
    """


def one_line(error: BaseException) -> str:
    """What an error says, in one line and without its full stop, for the middle of a sentence.

    Args:
        error: The error.
    """
    return " ".join(str(error).split()).rstrip(".")


def named(error: BaseException) -> str:
    """The same behind the name of its class, without which many say little, such as a KeyError.

    Args:
        error: The error.
    """
    return ": ".join(filter(None, [type(error).__name__, one_line(error)]))


@dataclass(slots=True)
class Value:
    """What one tensor held between two writes.

    Attributes:
        index: Its place in ``ValueGraph.values``.
        shape: Sizes, in elements.
        stride: Strides, in elements.
        dtype: For example ``torch.float32``.
        storage: A number that values share exactly when they share memory; 0 where the run did not follow that.
        maker: Index of the call that made it; None for what came from outside: inputs, parameters, constants.
        users: Indices of the calls that read it, in order, one entry per call.
        name: The parameter's or buffer's name, None for everything else.
        constant: True where nothing that could differ between two runs went into it.
        fate: What became of it after the run, as words for a reason; None if it was dropped.
    """

    index: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any
    storage: int
    maker: int | None = None
    users: list[int] = field(default_factory=list)
    name: str | None = None
    constant: bool = False
    fate: str | None = None


@dataclass(frozen=True, slots=True)
class Ref:
    """Stands in the recorded arguments of a call where a tensor stood."""

    value: int


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, default: Any = None) -> Any:
    """An argument of a call.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        place: Its place among the positional ones.
        name: Its name.
        default: What it is if it was not given.
    """
    return args[place] if place < len(args) else kwargs.get(name, default)


@dataclass(slots=True)
class Call:
    """One operation of the run.

    Attributes:
        index: Its place in ``ValueGraph.calls``.
        kind: ``layer`` and ``batchnorm`` for the operation of a weight layer and of a BatchNorm, ``operation`` for
            every other tensor operation, ``opaque`` for a reader that is no operation (a hook, Python code).
        name: What was called, for example ``aten.view.default`` or ``linear``.
        frame: Index of the module call it happened in.
        owner: Name of the layer or the BatchNorm, None for the other kinds.
        args: Positional arguments, with a ``Ref`` for each tensor.
        kwargs: Keyword arguments, likewise.
        inputs: Values read, in the order of the arguments.
        outputs: Values made.
        draws: Whether it draws random numbers, or could.
        computed: Of a layer's call, the values of those of its tensors that are computed at every call.
    """

    index: int
    kind: Literal["layer", "batchnorm", "operation", "opaque"]
    name: str
    frame: int
    owner: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    draws: bool = False
    computed: tuple[int, ...] = ()

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument of the operation.

        Args:
            place: Its place among the positional ones.
            name: Its name.
            default: What it is if it was not given.
        """
        return argument(self.args, self.kwargs, place, name, default)


@dataclass(frozen=True, slots=True)
class Frame:
    """One call of a module: its name as in ``named_modules()``, and the frame it was called from."""

    module: str | None
    parent: int | None


@dataclass(frozen=True, slots=True)
class Layer:
    """What a plan needs to know of a weight layer, or of a BatchNorm that stays and takes others as a layer does.

    Attributes:
        function: Name of the function that it calls, if it is a layer by that alone; None if its class tells.
        in_channels: Length of the channel axis of its input.
        out_channels: Length of the channel axis of its output.
        channel_axis: Which axis that is, counted from the end if negative.
        kernel: Sizes of its kernel; empty for a layer without one.
        takes_inputs: Whether a map of its inputs can be multiplied into its weight.
        parameters: Names of its weight and its bias, as far as they are ordinary parameters; of a BatchNorm also those
            of its statistics.
        computed: Those of ``weight`` and ``bias`` that are computed at every call.
        originals: Names of the parameters and buffers that they may be computed from.
        obstacle: Why nothing may be folded into it, known before the run or shown by its calls; None if nothing is in
            the way.
    """

    function: str | None
    in_channels: int
    out_channels: int
    channel_axis: int
    kernel: tuple[int, ...]
    takes_inputs: bool
    parameters: tuple[str, ...]
    computed: tuple[str, ...]
    originals: tuple[str, ...]
    obstacle: Obstacle | None

    def pads_with_zeros(self, call: Call) -> bool:
        """Whether a call of it added zeros around its input."""
        return any(self._padding(call)) if self.kernel else False

    def has_centre_tap(self, call: Call) -> bool:
        """Whether each element of the output lies on the element of the input that the middle of the kernel reads."""
        if not self.kernel or not self.takes_inputs:
            return self.takes_inputs
        if not all(size % 2 for size in self.kernel):
            return False
        return set(self._per_axis(call, 3, "stride", 1)) == {1} and self._padding(call) == self._centred(call)

    def _centred(self, call: Call) -> tuple[float, ...]:
        """The padding with which each output lies on the input that the middle of the kernel reads."""
        dilation = self._per_axis(call, 5, "dilation", 1)
        return tuple(step * (size - 1) / 2 for step, size in zip(dilation, self.kernel, strict=True))

    def _padding(self, call: Call) -> tuple[float, ...]:
        padding = call.argument(4, "padding", 0)
        if padding == "same":
            return self._centred(call)
        return self._per_axis(call, 4, "padding", 0) if padding != "valid" else (0,) * len(self.kernel)

    def _per_axis(self, call: Call, position: int, name: str, default: int) -> tuple[int, ...]:
        given = call.argument(position, name, default)
        given = given if isinstance(given, tuple) else (given,)
        return given if len(given) > 1 else given * len(self.kernel)


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """What a plan needs to know of a BatchNorm.

    Attributes:
        num_features: Number of channels.
        channel_axis: Axis of its input that they lie on, counted from the end if negative.
        parameters: Names of its parameters and buffers.
        gain: How many times larger a rounding error of a layer is behind it.
        eps: What it adds to its variance, as the run has shown; None where its attributes tell.
        residual_gain: How many times larger rounding errors are where a layer takes over the scaling of what is added
            to its output.
        obstacle: Why it has to stay, known before the run or shown by its calls; None if nothing is in the way.
    """

    num_features: int
    channel_axis: int
    parameters: tuple[str, ...]
    gain: float
    obstacle: Obstacle | None
    eps: float | None = None
    residual_gain: float = 1.0


@dataclass
class ValueGraph:
    """Everything that one run did, and the facts about the modules it ran.

    Attributes:
        values: Every value, by index.
        calls: Every call, by index, in the order of the run.
        frames: Every module call, by index; the first is the run itself.
        writers: For each storage that was written in place, the calls that did it.
        aliased: Storages that were reached through a tensor whose origin the run does not show, with a sentence.
        forked: Modules that may take another path next time, and of each the words for what would decide that: those
            that were running when a tensor became a Python value, and those that may have been told of it. None stands
            for the run itself.
        layers: The weight layers and BatchNorms that were called, by name.
        batchnorms: Every BatchNorm of the model, by name, in the order of ``named_modules()``.
    """

    values: list[Value] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=lambda: [Frame(None, None)])
    writers: dict[int, list[Call]] = field(default_factory=dict)
    aliased: dict[int, str] = field(default_factory=dict)
    forked: dict[str | None, str] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    batchnorms: dict[str, BatchNorm] = field(default_factory=dict)

    @cached_property
    def calls_of(self) -> dict[str, list[Call]]:
        """The calls of each layer and BatchNorm, by its name."""
        calls: dict[str, list[Call]] = defaultdict(list)
        for call in self.calls:
            if call.owner is not None:
                calls[call.owner].append(call)
        return calls

    @cached_property
    def named_values(self) -> dict[str, Value]:
        """The value of each parameter and buffer as it was before the run, by its name."""
        return {value.name: value for value in self.values if value.name is not None}

    def maker(self, value: Value) -> Call | None:
        """The call that made a value; None for what came from outside the run."""
        return None if value.maker is None else self.calls[value.maker]

    def users(self, value: Value) -> list[Call]:
        """The calls that read a value."""
        return [self.calls[index] for index in value.users]

    @cached_property
    def _storages(self) -> dict[int, list[Value]]:
        storages: dict[int, list[Value]] = defaultdict(list)
        for value in self.values:
            storages[value.storage].append(value)
        return storages

    def is_reinterpreted(self, value: Value) -> bool:
        """Whether somebody looks at the memory of a value in a way that depends on its strides."""
        aliases = self._storages[value.storage]
        return any(call.name in _STRIDE_READERS for alias in aliases for call in self.users(alias))

    @cached_property
    def _last_view(self) -> int:
        return max((call.index for call in self.calls if call.name in _STRIDE_READERS), default=-1)

    def is_viewed_after(self, call: Call) -> bool:
        """Whether anything is looked at, after a call, in a way that depends on its strides."""
        return call.index < self._last_view

    @cached_property
    def summed_up(self) -> set[int]:
        """Storages written by nothing but sums, each of which is all that is made of what was there before."""
        return {storage for storage in self.writers if self._is_summed_up(storage)}

    def _is_summed_up(self, storage: int) -> bool:
        values, writers = self._storages[storage], self.writers[storage]
        return len(values) == len(writers) + 1 and all(
            call.name in IN_PLACE_SUMS
            and (call.inputs[0], call.outputs) == (before.index, (after.index,))
            and before.users == [call.index]
            and before.maker is not None
            and before.fate is None
            for before, after, call in zip(values, values[1:], writers, strict=False)
        )

    def origins(self, values: Iterable[int]) -> tuple[set[int], set[int]]:
        """Everything that went into some values.

        Args:
            values: Their indices.

        Returns:
            Indices of the values, these included, and of the calls that made them.
        """
        pending, found, calls = list(values), set[int](), set[int]()
        while pending:
            value = self.values[pending.pop()]
            if value.index in found:
                continue
            found.add(value.index)
            if value.maker is not None and value.maker not in calls:
                calls.add(value.maker)
                pending.extend(self.calls[value.maker].inputs)
        return found, calls

    def outline(self, erased: Mapping[str, bool], baked: Collection[str] = ()) -> list[Any]:
        """The run without the numbers in its tensors: two runs with equal outlines did the same.

        Args:
            erased: Names of the folded BatchNorms, whose inside does not count; True for those that pass on their input
                once they are folded, False for those that give zeros.
            baked: Names of layers of which it does not count how they compute their weight.
        """
        _, ignored = self.origins(value for name in baked for call in self.calls_of[name] for value in call.computed)
        numbers: dict[int, int] = defaultdict(count().__next__)
        passed_on: dict[int, int] = {}  # what an erased BatchNorm gives is what it was given
        outline: list[Any] = []
        for call in self.calls:
            module = self.frames[call.frame].module
            is_gone = call.kind == "batchnorm" and erased.get(call.owner or "")
            # What is left of one may lay out anew what it was given.
            if is_gone or (module in erased and call.name in ("aten.clone.default", "aten.view.default")):
                passed_on[call.outputs[0]] = passed_on.get(call.inputs[0], call.inputs[0])
            if call.index in ignored or module in erased:
                continue
            read, given = call.inputs, [call.args, call.kwargs]
            if call.owner is not None:
                # Whether it had a weight or a bias is left out: one run of two lends it one.
                read, given = call.inputs[:1], [call.args[3:], call.kwargs | {"weight": None, "bias": None}]
            # Each once: what an erased BatchNorm gives may be read beside what it was given.
            inputs = list(dict.fromkeys(numbers[passed_on.get(index, index)] for index in read))
            outputs = [(numbers[index], self.values[index].shape) for index in call.outputs]
            outline.append((call.kind, call.name, module, inputs, outputs, _scalars(given)))
        return outline

    def where(self, call: Call) -> str:
        """A call and the module it happened in, as words for a reason."""
        module = self.frames[call.frame].module
        place = "" if module is None else " in the model" if module == "" else f" in `{module}`"
        return f"`{plain_name(call.name)}`{place}"

    def modules_around(self, frame: int) -> list[str | None]:
        """The modules that were running in a frame, outermost first; None stands for the run itself."""
        modules: list[str | None] = []
        index: int | None = frame
        while index is not None:
            modules.append(self.frames[index].module)
            index = self.frames[index].parent
        return modules[::-1]

    def frame_of(self, module: str | None, frame: int) -> int:
        """The innermost call of a module that was running in a frame, by its index."""
        index: int | None = frame
        while index is not None and self.frames[index].module != module:
            index = self.frames[index].parent
        assert index is not None
        return index


def _scalars(tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return [_scalars(branch) for branch in tree]
    if isinstance(tree, dict):
        return {key: _scalars(branch) for key, branch in tree.items()}
    return repr(tree) if isinstance(tree, (int, float, complex, str)) else type(tree)


def plain_name(name: str) -> str:
    """The everyday name of an operation: ``aten.add_.Tensor`` is ``add_``."""
    parts = name.split(".")
    plain = parts[1] if len(parts) == 3 else name
    return "item" if plain == "_local_scalar_dense" else plain
