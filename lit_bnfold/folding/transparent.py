"""The operations that let a per-channel affine map pass, and where the channels are on their other side.

A BatchNorm maps channel ``c`` of a value by ``scale[c] * x + shift[c]``. ``Channels`` says which elements of a value
belong to which channel. Every operation in the table moves, drops, joins or averages elements in such a way that
mapping its inputs and mapping its outputs is the same thing. Each rule works both ways: ``up`` tells what a map of an
output asks of the inputs, ``down`` what a map of the inputs does to the outputs. A plan walks up and checks itself on
the way down.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lit_bnfold.folding.graph import IN_PLACE_SUMS, Call, Ref, ValueGraph, plain_name

UNTOUCHED = -1
"""The label of elements that no map reaches."""

# A view may mix the channels with so many other elements that following each of them is not worth its memory.
_MOST_LABELS = 2**22


class NotTransparent(Exception):  # noqa: N818 (an answer, not an error)
    """An operation does not let a map pass; the argument is a reason to put behind the operation's name."""


@dataclass(frozen=True, eq=False)
class Channels:
    """Which elements of a value are mapped by which channel of a BatchNorm.

    Attributes:
        labels: The channel of each element, -1 for elements that are not mapped. It has the rank of the value and size
            1 along every axis on which nothing depends, so (1, C, 1, 1) stands for channels on axis 1 of an image.
        shift: The share of the shift that this value takes: at ``a + b`` both sides are scaled, and one is shifted.
    """

    labels: Tensor
    shift: float = 1.0

    @staticmethod
    def along(axis: int, size: int, rank: int) -> Channels:
        """Channels 0 to ``size - 1`` along one axis of a value with ``rank`` axes."""
        shape = [1] * rank
        shape[axis] = size
        return Channels(torch.arange(size).view(shape))

    @property
    def touches(self) -> bool:
        """Whether any element is mapped at all."""
        return bool((self.labels != UNTOUCHED).any())

    def same_as(self, other: Channels) -> bool:
        """Whether both map the same elements in the same way."""
        return self.shift == other.shift and torch.equal(self.labels, other.labels)

    def with_labels(self, labels: Tensor) -> Channels:
        """The same share of the shift on other elements."""
        return replace(self, labels=_compact(labels))

    def merged_with(self, other: Channels) -> Channels:
        """Both maps at once.

        Raises:
            NotTransparent: If they disagree on an element.
        """
        if self.shift != other.shift:
            raise NotTransparent("is asked for two different maps")
        ours, theirs = torch.broadcast_tensors(self.labels, other.labels)
        if bool(((ours != theirs) & (ours != UNTOUCHED) & (theirs != UNTOUCHED)).any()):
            raise NotTransparent("is asked for two different maps")
        return self.with_labels(torch.where(ours == UNTOUCHED, theirs, ours))

    def along_axis(self, axis: int, size: int) -> tuple[int, ...] | None:
        """The channel of each position of one axis; None if something depends on another axis too."""
        labels = self.labels.movedim(axis, -1)
        if labels.numel() != labels.shape[-1]:
            return None
        return tuple(labels.reshape(-1).expand(size).tolist())


@dataclass(frozen=True)
class Rule:
    """How a map passes one operation.

    Attributes:
        up: From the map of one output (given with its position) to the maps of the inputs, as (value index, map).
        down: From the maps of the inputs (by value index, missing where there is none) to those of the outputs.
    """

    up: Callable[[ValueGraph, Call, int, Channels], list[tuple[int, Channels]]]
    down: Callable[[ValueGraph, Call, dict[int, Channels]], list[Channels]]


def _compact(labels: Tensor) -> Tensor:
    """Shrink to size 1 every axis on which nothing depends, so that equal maps have equal labels."""
    for axis, size in enumerate(labels.shape):
        if size > 1 and bool((labels == (first := labels.narrow(axis, 0, 1))).all()):
            labels = first
    return labels


# One input, one output, every element of the output is one of the input's: a movement of the labels both ways.

_Move = Callable[[ValueGraph, Call, Tensor], Tensor]


def _moving(up: _Move, down: _Move) -> Rule:
    def move_up(graph: ValueGraph, call: Call, output: int, channels: Channels) -> list[tuple[int, Channels]]:
        return [(call.inputs[0], channels.with_labels(up(graph, call, channels.labels)))]

    def move_down(graph: ValueGraph, call: Call, maps: dict[int, Channels]) -> list[Channels]:
        channels = maps[call.inputs[0]]
        return [channels.with_labels(down(graph, call, channels.labels))]

    return Rule(move_up, move_down)


def _shapes(graph: ValueGraph, call: Call) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return graph.values[call.inputs[0]].shape, graph.values[call.outputs[0]].shape


def _permutation(graph: ValueGraph, call: Call) -> list[int]:
    rank = len(graph.values[call.inputs[0]].shape)
    order = list(range(rank))
    if call.name == "aten.permute.default":
        return [axis % rank for axis in call.argument(1, "dims")]
    if call.name == "aten.t.default":
        return order[::-1]
    first, second = call.argument(1, "dim0"), call.argument(2, "dim1")
    order[first], order[second] = order[second], order[first]
    return order


def _unpermute(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    order = _permutation(graph, call)
    return labels.permute([order.index(axis) for axis in range(len(order))])


def _view_down(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    before, after = _shapes(graph, call)
    moved = _reshape_labels(labels, before, after)
    _check_short_axes(graph, call, labels, moved)
    return moved


def _view_up(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    before, after = _shapes(graph, call)
    moved = _reshape_labels(labels, after, before)
    _check_short_axes(graph, call, moved, labels)
    return moved


def _reshape_labels(labels: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """Move labels through a reshape, expanding them only within the axes that are split or joined."""
    expanded, reshaped = list(labels.shape), [1] * len(after)
    for old_axes, new_axes in _corresponding_axes(before, after):
        if any(labels.shape[axis] > 1 for axis in old_axes):
            for axis in old_axes:
                expanded[axis] = before[axis]
            for axis in new_axes:
                reshaped[axis] = after[axis]
    if math.prod(expanded) > _MOST_LABELS:
        raise NotTransparent("mixes the channels with too many other elements")
    return _compact(labels.expand(expanded).reshape(reshaped))


def _corresponding_axes(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of axes that a reshape turns into each other; axes of size 1 belong to none."""
    if math.prod(before) == 0:
        raise NotTransparent("was seen without any elements")
    old = [axis for axis, size in enumerate(before) if size > 1]
    new = [axis for axis, size in enumerate(after) if size > 1]
    groups = []
    while old:
        old_axes, new_axes = [old.pop(0)], [new.pop(0)]
        while (left := math.prod(before[a] for a in old_axes)) != (right := math.prod(after[a] for a in new_axes)):
            if left < right:
                old_axes.append(old.pop(0))
            else:
                new_axes.append(new.pop(0))
        groups.append((old_axes, new_axes))
    return groups


def _check_short_axes(graph: ValueGraph, call: Call, labels: Tensor, moved: Tensor) -> None:
    """Refuse a reshape that makes axes of size 1 vanish beside the channels, or between them.

    With one example in the batch, ``view(C, -1)`` looks like a harmless removal of the batch axis; with two it mixes
    the examples with the channels. So does ``view(-1, C)`` with the steps of a sequence behind the channels, once there
    are two of them. Only longer axes could tell, or the call itself.
    """
    if max(labels.shape, default=1) == 1:
        return
    before, after = _shapes(graph, call)
    left, between, right = _short_axes(labels, before)
    moved_left, moved_between, moved_right = _short_axes(moved, after)
    left_is_known = left <= moved_left or _joins_before_channels(call, labels, moved)
    right_is_known = right <= moved_right or _is_average(graph, call, labels)
    if not (left_is_known and between <= moved_between and right_is_known):
        raise NotTransparent("removes an axis of size 1, and does not show what it would do with a longer one")


def _joins_before_channels(call: Call, labels: Tensor, moved: Tensor) -> bool:
    """Whether whatever an axis of size 1 may grow to goes to an axis before the channels."""
    if "flattened" in call.kwargs:
        return bool(call.kwargs["flattened"][1] < _first_axis(labels))
    sizes = call.argument(1, "size", ())
    return -1 in sizes and sizes.index(-1) < _first_axis(moved)


def _is_average(graph: ValueGraph, call: Call, labels: Tensor) -> bool:
    """Whether every axis of size 1 behind the channels is what an average left of a longer one, and so never grows."""
    maker = graph.maker(graph.values[call.inputs[0]])
    return (
        maker is not None
        and maker.name.startswith(("aten.mean.dim", "aten._adaptive_avg_pool"))
        and 1 not in graph.values[maker.inputs[0]].shape[_last_axis(labels) :]
    )


def _short_axes(labels: Tensor, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """How many axes of size 1 a value has before, between and after those that its channels lie on."""
    first, last = _first_axis(labels), _last_axis(labels)
    return shape[:first].count(1), shape[first:last].count(1), shape[last:].count(1)


def _first_axis(labels: Tensor) -> int:
    return next(axis for axis, size in enumerate(labels.shape) if size > 1)


def _last_axis(labels: Tensor) -> int:
    return max(axis for axis, size in enumerate(labels.shape) if size > 1)


def _check_squeezes(graph: ValueGraph, call: Call) -> None:
    """Of an axis that is longer here nothing is taken, and where it has size 1 those behind it take its place."""
    if call.name == "aten.squeeze.dim":
        before, _ = _shapes(graph, call)
        if before and before[call.argument(1, "dim", 0)] != 1:
            raise NotTransparent("drops an axis where that has size 1, which it has not here")


def _squeeze_up(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    _check_squeezes(graph, call)
    # Squeezing and unsqueezing only remove and insert axes of size 1; labels have that size there as well.
    before, after = _shapes(graph, call)
    return labels.reshape(_with_ones(before, labels, after))


def _squeeze_down(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    _check_squeezes(graph, call)
    before, after = _shapes(graph, call)
    return labels.reshape(_with_ones(after, labels, before))


def _with_ones(shape: tuple[int, ...], labels: Tensor, labelled: tuple[int, ...]) -> list[int]:
    if 0 in shape:
        raise NotTransparent("was seen without any elements")
    sizes = [size for size, full in zip(labels.shape, labelled, strict=True) if full > 1]
    return [1 if full == 1 else sizes.pop(0) for full in shape]


def _same(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    return labels


def _cast(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    for index in (*call.inputs, *call.outputs):
        if not graph.values[index].dtype.is_floating_point:
            raise NotTransparent("turns into or from numbers that are not real floating-point ones")
    return labels


# One axis, some positions of it: slices, selections, splits.


def _axis_picked(graph: ValueGraph, call: Call) -> int:
    position = 2 if call.name.startswith("aten.split") else 1
    name = "dimension" if call.name == "aten.unfold.default" else "dim"
    axis: int = call.argument(position, name, 0)
    rank = len(graph.values[call.inputs[0]].shape)
    if rank == 0:
        raise NotTransparent("takes a nested tensor apart")
    return axis % rank


def _positions_picked(graph: ValueGraph, call: Call) -> Sequence[Tensor]:
    """The positions of the axis that each output takes."""
    axis = _axis_picked(graph, call)
    every = torch.arange(graph.values[call.inputs[0]].shape[axis])
    if call.name == "aten.select.int":
        return [every[call.argument(2, "index")].reshape(1)]
    if call.name == "aten.unbind.int":
        return every.split(1)
    if call.name == "aten.slice.Tensor":
        return [every[slice(call.argument(2, "start"), call.argument(3, "end"), call.argument(4, "step", 1))]]
    return every.split([graph.values[index].shape[axis] for index in call.outputs])


def _removes_axis(call: Call) -> bool:
    return call.name in ("aten.select.int", "aten.unbind.int")


def _is_only_reader(graph: ValueGraph, call: Call, output: int) -> bool:
    others = [index for position, index in enumerate(call.outputs) if position != output]
    return len(graph.values[call.inputs[0]].users) == 1 and not any(graph.values[index].users for index in others)


def _pick_up(graph: ValueGraph, call: Call, output: int, channels: Channels) -> list[tuple[int, Channels]]:
    axis = _axis_picked(graph, call)
    labels = channels.labels.unsqueeze(axis) if _removes_axis(call) else channels.labels
    # Where nothing else is read, mapping the positions that were not picked as well changes nothing and asks for less.
    if labels.shape[axis] > 1 or not _is_only_reader(graph, call, output):
        shape = list(labels.shape)
        shape[axis] = graph.values[call.inputs[0]].shape[axis]
        positions = _positions_picked(graph, call)[output]
        source = labels.expand(*shape[:axis], len(positions), *shape[axis + 1 :])
        labels = torch.full(shape, UNTOUCHED).index_copy(axis, positions, source)
    return [(call.inputs[0], channels.with_labels(labels))]


def _pick_down(graph: ValueGraph, call: Call, maps: dict[int, Channels]) -> list[Channels]:
    channels, axis = maps[call.inputs[0]], _axis_picked(graph, call)
    if channels.labels.shape[axis] == 1:
        picked = [channels.labels] * len(call.outputs)
    else:
        picked = [channels.labels.index_select(axis, positions) for positions in _positions_picked(graph, call)]
    return [channels.with_labels(labels.squeeze(axis) if _removes_axis(call) else labels) for labels in picked]


# Positions of axes without channels, picked by tensors of their numbers.


def _axes_indexed(graph: ValueGraph, call: Call) -> tuple[list[int], int, int]:
    """The axes of the input that indices pick from, and from where to where those lie that take their place."""
    indices = call.argument(1, "indices")
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    values = [graph.values[indices[axis].value] for axis in axes]
    if any(value.dtype in (torch.bool, torch.uint8) for value in values):
        if len(values) > 1:
            raise NotTransparent("picks by a mask and by other indices")
        # What it picks comes in one axis, in place of all those that the mask lies on.
        return list(range(axes[0], axes[0] + len(values[0].shape))), axes[0], axes[0] + 1
    are_neighbours = axes[-1] - axes[0] < len(axes)
    first = axes[0] if are_neighbours else 0
    return axes, first, first + max(len(value.shape) for value in values)


def _index_up(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    axes, first, last = _axes_indexed(graph, call)
    shape = list(_unless_mixed(labels, list(range(first, last)), "picks among").shape)
    del shape[first:last]
    for axis in axes:
        shape.insert(axis, 1)
    return labels.reshape(shape)


def _index_down(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    axes, first, last = _axes_indexed(graph, call)
    labels = _unless_mixed(labels, axes, "picks among")
    shape = [size for axis, size in enumerate(labels.shape) if axis not in axes]
    shape[first:first] = [1] * (last - first)
    return labels.reshape(shape)


def _gathered(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    before, after = _shapes(graph, call)
    if any(size > 1 and before[axis] != after[axis] for axis, size in enumerate(labels.shape)):
        raise NotTransparent("takes some of the channels alone")
    return _unless_mixed(labels, [_axis_picked(graph, call)], "picks among")


# Several inputs.


def _joined(graph: ValueGraph, call: Call) -> list[int]:
    joined = [ref.value for ref in call.args[0]]
    if len({len(graph.values[index].shape) for index in joined}) > 1:
        raise NotTransparent("joins tensors of different ranks")
    if any(0 in graph.values[index].shape for index in joined):
        raise NotTransparent("joins a part without elements, which may have some next time")
    return joined


def _axis_joined(graph: ValueGraph, call: Call) -> int:
    axis: int = call.argument(1, "dim", 0)
    return axis % len(graph.values[call.outputs[0]].shape)


def _join_up(graph: ValueGraph, call: Call, output: int, channels: Channels) -> list[tuple[int, Channels]]:
    axis, parts, start = _axis_joined(graph, call), [], 0
    stacks = call.name == "aten.stack.default"
    for index in _joined(graph, call):
        size = 1 if stacks else graph.values[index].shape[axis]
        labels = channels.labels if channels.labels.shape[axis] == 1 else channels.labels.narrow(axis, start, size)
        part = channels.with_labels(labels.squeeze(axis) if stacks else labels)
        if part.touches:
            parts.append((index, part))
        start += size
    return parts


def _join_down(graph: ValueGraph, call: Call, maps: dict[int, Channels]) -> list[Channels]:
    axis = _axis_joined(graph, call)
    stacks = call.name == "aten.stack.default"
    if len({channels.shift for channels in maps.values()}) > 1:
        raise NotTransparent("joins two different maps")
    parts = []
    for index in _joined(graph, call):
        rank = len(graph.values[call.outputs[0]].shape)
        labels = maps[index].labels if index in maps else torch.full([1] * (rank - stacks), UNTOUCHED)
        labels = labels.unsqueeze(axis) if stacks else labels
        sizes = [-1] * rank
        sizes[axis] = 1 if stacks else graph.values[index].shape[axis]
        parts.append(labels.expand(sizes))
    # Away from the joined axis the labels may differ in how far they are expanded.
    shape = [max(sizes) for sizes in zip(*(part.shape for part in parts), strict=True)]
    aligned = [part.expand(*shape[:axis], part.shape[axis], *shape[axis + 1 :]) for part in parts]
    return [next(iter(maps.values())).with_labels(torch.cat(aligned, axis))]


def adds_nothing(call: Call) -> bool:
    """Whether a sum or a difference is one with the int 0 behind it; ``sum`` begins with ``0 + x``, which is one.

    A float of 0 is more likely to be something else the next time.
    """
    return type(call.args[1]) is int and call.args[1] == 0


def _terms(graph: ValueGraph, call: Call) -> list[int]:
    terms = [argument.value for argument in call.args if isinstance(argument, Ref)]
    if len(terms) != 2 or terms[0] == terms[1]:
        raise NotTransparent("adds something else than two different tensors")
    return terms


def _add_up(graph: ValueGraph, call: Call, output: int, channels: Channels) -> list[tuple[int, Channels]]:
    if adds_nothing(call):
        return [(call.inputs[0], channels)]
    after = graph.values[call.outputs[0]].shape
    first, second = (
        (index, channels.with_labels(_expanded_up(channels.labels, graph.values[index].shape, after)))
        for index in _terms(graph, call)
    )
    return [first, (second[0], replace(second[1], shift=0.0))]


def _add_down(graph: ValueGraph, call: Call, maps: dict[int, Channels]) -> list[Channels]:
    if adds_nothing(call):
        return [maps[call.inputs[0]]]
    after = graph.values[call.outputs[0]].shape
    first, second = (
        index in maps and maps[index].with_labels(_expanded_down(maps[index].labels, graph.values[index].shape, after))
        for index in _terms(graph, call)
    )
    if not first or not second or not torch.equal(first.labels, second.labels):
        raise NotTransparent("adds something that is not scaled in the same way")
    if second.shift and call.kwargs.get("alpha", 1) != 1:
        raise NotTransparent("adds a multiple, which may be another one next time")
    factor = -1.0 if call.name.startswith("aten.sub") else 1.0
    return [replace(first, shift=first.shift + factor * second.shift)]


# Averages over axes without channels.


def _axes_averaged(graph: ValueGraph, call: Call) -> list[int]:
    rank = len(graph.values[call.inputs[0]].shape)
    axes = call.argument(1, "dim")
    return [axis % rank for axis in axes] if axes else list(range(rank))


def _mean_up(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    if not call.argument(2, "keepdim", False):
        for axis in sorted(_axes_averaged(graph, call)):
            labels = labels.unsqueeze(axis)
    return _unless_mixed(labels, _axes_averaged(graph, call))


def _mean_down(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    axes = _axes_averaged(graph, call)
    labels = _unless_mixed(labels, axes)
    return labels if call.argument(2, "keepdim", False) else labels.squeeze(axes)


def _unless_mixed(labels: Tensor, axes: list[int], what_it_does: str = "averages over") -> Tensor:
    if any(labels.shape[axis] > 1 for axis in axes):
        raise NotTransparent(f"{what_it_does} the channels")
    return labels


# Each output is an average, or a copy, of inputs of the same channel; the axes of an image are the last ones.


def _spatial(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    rank = labels.dim()
    spatial = int(next(letter for letter in plain_name(call.name) if letter.isdigit()))
    return _unless_mixed(labels, list(range(rank - spatial, rank)))


def _circular(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    # Padding comes as two numbers for each of the last axes.
    padded = len(call.args[1]) // 2
    return _unless_mixed(labels, list(range(labels.dim() - padded, labels.dim())), "pads")


def _pooled(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    padding, counts_padding = call.argument(3, "padding", 0), call.argument(5, "count_include_pad", True)
    if counts_padding and any(padding if isinstance(padding, tuple) else (padding,)):
        raise NotTransparent("counts zeros of its padding in")
    if call.argument(6, "divisor_override") is not None:
        raise NotTransparent("divides by something else than the number of elements")
    return _spatial(graph, call, labels)


# Channels that come several times, or in another order.


def _repeated(labels: Tensor, axis: int, times: int) -> Tensor:
    """Each position of an axis several times in a row."""
    return labels if labels.shape[axis] == 1 else labels.repeat_interleave(times, axis)


def _once(labels: Tensor, axis: int, times: int) -> Tensor:
    """Each position once of an axis, counted from the end, where each comes several times in a row."""
    if labels.shape[axis] == 1:
        return labels
    labels = labels.unflatten(axis, (-1, times))
    if bool((labels != labels.narrow(axis, 0, 1)).any()):
        raise NotTransparent("spreads channels over places")
    return labels.select(axis, 0)


def _pixels_of_channel(call: Call) -> int:
    """How many pixels beside each other come of as many channels, or the other way round."""
    factor: int = call.argument(1, "downscale_factor" if "unshuffle" in call.name else "upscale_factor")
    return factor * factor


def _channel_of_each_pixel(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    return _repeated(_unless_mixed(labels, [-2, -1], "spreads"), -3, _pixels_of_channel(call))


def _channel_of_all_pixels(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    return _once(_unless_mixed(labels, [-2, -1], "spreads"), -3, _pixels_of_channel(call))


def _pixels_of_window(call: Call) -> int:
    if any(call.argument(3, "padding")):
        raise NotTransparent("pads with zeros")
    return math.prod(call.argument(1, "kernel_size"))


def _columns_up(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    return _once(_unless_mixed(labels, [-1], "takes windows of"), -2, _pixels_of_window(call)).unsqueeze(-1)


def _columns_down(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    return _repeated(_unless_mixed(labels, [-2, -1], "takes windows of").squeeze(-1), -2, _pixels_of_window(call))


def _interleave_up(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    _, times, axis = call.args
    return _once(labels, axis, times)


def _interleave_down(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    _, times, axis = call.args
    return _repeated(labels, axis, times)


def _groups_swapped(graph: ValueGraph, call: Call, labels: Tensor, *, up: bool) -> Tensor:
    groups = call.argument(1, "groups")
    if labels.shape[1] == 1:
        return labels
    return labels.unflatten(1, (-1, groups) if up else (groups, -1)).transpose(1, 2).flatten(1, 2)


def _rotated(graph: ValueGraph, call: Call, labels: Tensor, sign: int) -> Tensor:
    return labels.rot90(sign * call.argument(1, "k", 1), call.argument(2, "dims", (0, 1)))


def _rolled(graph: ValueGraph, call: Call, labels: Tensor, sign: int) -> Tensor:
    shifts, axes = call.argument(1, "shifts"), call.argument(2, "dims", ())
    if not axes:
        raise NotTransparent("rolls over all axes at once")
    return labels.roll([sign * shift for shift in shifts], axes)


def _flipped(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    return labels.flip(call.argument(1, "dims"))


# Windows, or a repetition, along axes without channels.


def _windows_up(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    return _unless_mixed(labels, [_axis_picked(graph, call), -1], "takes windows of").squeeze(-1)


def _windows_down(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    return _unless_mixed(labels, [_axis_picked(graph, call)], "takes windows of").unsqueeze(-1)


def _expand_up(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    return _expanded_up(labels, *_shapes(graph, call))


def _expanded_up(labels: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    new = len(after) - len(before)
    repeated = [axis for axis, size in enumerate(after) if axis < new or before[axis - new] != size]
    return _unless_mixed(labels, repeated, "repeats").reshape(labels.shape[new:])


def _expand_down(graph: ValueGraph, call: Call, labels: Tensor) -> Tensor:
    return _expanded_down(labels, *_shapes(graph, call))


def _expanded_down(labels: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    new = len(after) - len(before)
    repeated = [axis for axis, size in enumerate(before) if after[new + axis] != size]
    return _unless_mixed(labels, repeated, "repeats").reshape([1] * new + list(labels.shape))


_EXPAND = _moving(_expand_up, _expand_down)
_GATHER = _moving(_gathered, _gathered)
_IDENTITY = _moving(_same, _same)
_INDEX = _moving(_index_up, _index_down)
_VIEW = _moving(_view_up, _view_down)
_PERMUTE = _moving(_unpermute, lambda graph, call, labels: labels.permute(_permutation(graph, call)))
_SQUEEZE = _moving(_squeeze_up, _squeeze_down)
_PICK = Rule(_pick_up, _pick_down)
_WINDOWS = _moving(_windows_up, _windows_down)
_JOIN = Rule(_join_up, _join_down)
_ADD = Rule(_add_up, _add_down)

_SPATIAL_NAMES = (
    "aten._adaptive_avg_pool2d.default",
    "aten._adaptive_avg_pool3d.default",
    *(f"aten.{kind}_pad{n}d.default" for kind in ("reflection", "replication") for n in (1, 2, 3)),
    *(f"aten.{kind}{n}d.default" for kind in ("upsample_nearest", "_upsample_nearest_exact") for n in (1, 2, 3)),
    "aten.upsample_linear1d.default",
    "aten.upsample_bilinear2d.default",
    "aten.upsample_bicubic2d.default",
    "aten.upsample_trilinear3d.default",
)

RULES: dict[str, Rule] = {
    "aten.alias.default": _IDENTITY,
    "aten.clone.default": _IDENTITY,
    "aten.detach.default": _IDENTITY,
    "aten.lift_fresh.default": _IDENTITY,
    "aten._to_copy.default": _moving(_cast, _cast),
    "reshape": _VIEW,
    "aten.view.default": _VIEW,
    "aten._unsafe_view.default": _VIEW,
    "aten._reshape_alias.default": _VIEW,
    "aten.permute.default": _PERMUTE,
    "aten.t.default": _PERMUTE,
    "aten.transpose.int": _PERMUTE,
    "aten.squeeze.default": _SQUEEZE,
    "aten.squeeze.dim": _SQUEEZE,
    "aten.squeeze.dims": _SQUEEZE,
    "aten.unsqueeze.default": _SQUEEZE,
    "aten.select.int": _PICK,
    "aten.slice.Tensor": _PICK,
    "aten.split.Tensor": _PICK,
    "aten.split_with_sizes.default": _PICK,
    "aten.unbind.int": _PICK,
    "aten.cat.default": _JOIN,
    "aten.stack.default": _JOIN,
    "aten.add.Tensor": _ADD,
    "aten.sub.Tensor": _ADD,
    **dict.fromkeys(IN_PLACE_SUMS, _ADD),
    "aten.mean.dim": _moving(_mean_up, _mean_down),
    "aten.expand.default": _EXPAND,
    "aten.repeat.default": _EXPAND,
    "aten.index.Tensor": _INDEX,
    "aten.index_select.default": _GATHER,
    "aten.gather.default": _GATHER,
    "aten.flip.default": _moving(_flipped, _flipped),
    "aten.roll.default": _moving(partial(_rolled, sign=-1), partial(_rolled, sign=1)),
    "aten.rot90.default": _moving(partial(_rotated, sign=-1), partial(_rotated, sign=1)),
    "aten.pixel_shuffle.default": _moving(_channel_of_each_pixel, _channel_of_all_pixels),
    "aten.pixel_unshuffle.default": _moving(_channel_of_all_pixels, _channel_of_each_pixel),
    "aten.channel_shuffle.default": _moving(partial(_groups_swapped, up=True), partial(_groups_swapped, up=False)),
    "aten.im2col.default": _moving(_columns_up, _columns_down),
    "aten.unfold.default": _WINDOWS,
    "repeat_interleave": _moving(_interleave_up, _interleave_down),
    "aten.avg_pool2d.default": _moving(_pooled, _pooled),
    "aten.avg_pool3d.default": _moving(_pooled, _pooled),
    "circular_pad": _moving(_circular, _circular),
    **dict.fromkeys(_SPATIAL_NAMES, _moving(_spatial, _spatial)),
}
"""The table: the name of each transparent operation, with its rule."""


VIEWS = {
    **dict.fromkeys([name for name, rule in RULES.items() if rule in (_VIEW, _SQUEEZE, _PERMUTE)], "all"),
    **dict.fromkeys([name for name, rule in RULES.items() if rule is _PICK], "some"),
    "aten.expand.default": "some",
    "aten.unfold.default": "some",
}
"""The operations whose output may be the memory of their input, all of it, or some of it or some of it repeatedly."""


def ambiguous_reshape(
    graph: ValueGraph, calls: Sequence[Call], maps: Mapping[int, Channels]
) -> tuple[Call, str] | None:
    """Find a reshape that might mix the channels with something else where other axes are longer or shorter.

    With as many examples as channels, ``view(N, C, -1)`` on what ``transpose(0, 1)`` gave looks like the harmless
    joining of axes behind the channels; with as many examples as pixels in a row, ``view(H, C, -1)`` looks like it. And
    what a slice picks of an axis that channels share with others depends on how long these are.

    Args:
        graph: What the run did.
        calls: The operations between a BatchNorm and its layers, in the order of the run.
        maps: The map of each value between them.

    Returns:
        Such a call and a reason to put behind its name; None if there is none.
    """
    call = _on_joined_axis(graph, calls, maps)
    if call is not None:
        return call, "has the channels and other axes in one, and where each channel is depends on how long these are"
    reshapes = [call for call in calls if RULES[call.name] is _VIEW]
    if all("flattened" in call.kwargs or "unflattened" in call.kwargs for call in reshapes):
        return None
    others = [call for call in calls if RULES[call.name] not in _KEEPING_ORDER]
    reorders = any(RULES[call.name] in _REORDERING for call in others)
    last = max((call.index for call in others), default=-1)
    for call in reshapes:
        # Alone, it keeps the order in memory, and what comes out has as many channels as the last module asks for.
        is_alone = not reorders and call.index > last
        if _is_ambiguous(_labels(call, maps), _shapes(graph, call), is_alone):
            return call, (
                "might mix the channels with other axes where these are longer or shorter; an example whose axes are "
                "not as long as each other may show that it does not"
            )
    return None


def _labels(call: Call, maps: Mapping[int, Channels]) -> tuple[Tensor, Tensor]:
    """The labels of what a reshape reads, and of what it makes."""
    return maps[call.inputs[0]].labels, maps[call.outputs[0]].labels


def _on_joined_axis(graph: ValueGraph, calls: Sequence[Call], maps: Mapping[int, Channels]) -> Call | None:
    """The first call that takes an axis apart on which channels and others were joined, or joins others around them."""
    are_joined = False
    for call in calls:
        if are_joined and _picks_of_repeated(graph, call, maps):
            return call
        if RULES[call.name] is _VIEW:
            (labels, moved), (before, after) = _labels(call, maps), _shapes(graph, call)
            if _is_between(labels, moved, before, after) or (are_joined and _joins_channels(moved, after, before)):
                return call
            are_joined |= _joins_channels(labels, before, after)
        elif call.name == "repeat_interleave":
            are_joined |= maps[call.inputs[0]].labels.shape[call.args[2]] > 1
        elif RULES[call.name] is _JOIN and _is_around(maps[call.outputs[0]].labels, _axis_joined(graph, call)):
            return call
    return None


def _is_ambiguous(labels: Sequence[Tensor], shapes: tuple[tuple[int, ...], ...], is_alone: bool) -> bool:
    """Whether what a reshape does might come of sizes that are equal by chance."""
    if _regroups(labels[0], *shapes) or any(map(_could_be_swapped_around, labels, shapes)):
        return True
    return not is_alone and any(map(_could_be_another_axis, labels, shapes))


def _picks_of_repeated(graph: ValueGraph, call: Call, maps: Mapping[int, Channels]) -> bool:
    """Whether a call picks of an axis on which a channel comes several times."""
    if RULES[call.name] is not _PICK:
        return False
    rows = maps[call.inputs[0]].labels.movedim(_axis_picked(graph, call), -1).sort(-1).values
    return bool(((rows[..., 1:] == rows[..., :-1]) & (rows[..., 1:] != UNTOUCHED)).any())


def _joins_channels(labels: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether channels and other axes turn into one axis: its first two positions are of one channel or of two then."""
    return any(
        len(new) == 1 and {labels.shape[axis] > 1 for axis in old} == {True, False}
        for old, new in _corresponding_axes(before, after)
    )


def _is_between(labels: Tensor, moved: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether one axis holds channels and others on both sides of them: 2 rows of 3 pixels fit in it, and 3 of 2 do."""
    for old, new in _corresponding_axes(before, after):
        taken, axes = (moved, new) if len(old) == 1 else (labels, old)
        parts = itertools.chain.from_iterable(_parts(taken, axis) for axis in axes)
        runs = [is_channels for is_channels, _ in itertools.groupby(parts)]
        if True in runs and runs.count(False) > 1:
            return True
    return False


def _is_around(labels: Tensor, axis: int) -> bool:
    """Whether an axis by itself holds channels and others on both sides of them."""
    return _parts(labels, axis) == [False, True, False]


def _parts(labels: Tensor, axis: int) -> list[bool]:
    """What is in an axis, from the outermost part to the innermost: channels (True), or others (False)."""
    if labels.shape[axis] == 1:
        return [False]
    row = labels.movedim(axis, -1).reshape(-1, labels.shape[axis])[0]
    runs = row[torch.cat([row.new_ones(1, dtype=torch.bool), row[1:] != row[:-1]])]
    is_outside, is_inside = len(runs) > len(runs.unique()), len(row) > len(runs)
    return [*[False] * is_outside, True, *[False] * is_inside]


def _regroups(labels: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether several axes, and not channels alone, turn into several at once: each may hold pieces of several then."""
    return any(
        len(old) > 1 and len(new) > 1 and any(labels.shape[axis] == 1 for axis in old)
        for old, new in _corresponding_axes(before, after)
    )


def _could_be_swapped_around(labels: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether what is before the channels is as long as what is behind: ``view(L, C, N)`` mixes all on other sizes."""
    if max(labels.shape, default=1) == 1:
        return False
    sides = shape[: _first_axis(labels)], shape[_last_axis(labels) + 1 :]
    left, right = ({*(size for size in side if size > 1), math.prod(side)} - {1} for side in sides)
    return not left.isdisjoint(right)


def _could_be_another_axis(labels: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the channels are as many as another axis is long: ``view(C, N)`` mixes both on other sizes."""
    others = {size for axis, size in enumerate(shape) if labels.shape[axis] == 1}
    return any(size in others for axis, size in enumerate(shape) if labels.shape[axis] > 1)


# Behind the first ones, elements lie in the order in which they lay before; the second ones may change it, and all
# others leave the axes in order.
_KEEPING_ORDER = (_IDENTITY, _VIEW, _SQUEEZE, _ADD, RULES["aten._to_copy.default"])
_REORDERING = (
    _PERMUTE,
    _JOIN,
    *(_EXPAND, _GATHER, _INDEX, _WINDOWS, RULES["repeat_interleave"]),
    *(RULES[f"aten.{name}.default"] for name in ("flip", "roll", "rot90", "channel_shuffle", "im2col")),
    *(RULES[f"aten.{name}.default"] for name in ("pixel_shuffle", "pixel_unshuffle")),
)
