"""The table of transparent operations: mapping what goes in must be mapping what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_bnfold.folding.graph import IN_PLACE_SUMS, Call, ValueGraph
from lit_bnfold.folding.record import Recorder
from lit_bnfold.folding.transparent import (
    RULES,
    UNTOUCHED,
    Channels,
    NotTransparent,
    _could_be_another_axis,
    _could_be_swapped_around,
)

Operation = Callable[..., Any]

# Shapes of the inputs, and an operation on them. Every output is looked at, with channels on each of its axes in turn.
CASES: dict[str, tuple[list[tuple[int, ...]], Operation]] = {
    "clone": ([(2, 3)], torch.clone),
    "detach": ([(2, 3)], torch.detach),
    "alias": ([(2, 3)], torch.ops.aten.alias),
    "float": ([(2, 3)], lambda x: x.float()),
    "view that joins": ([(2, 3, 4)], lambda x: x.view(6, 4)),
    "view that joins the channels": ([(2, 3, 4)], lambda x: x.view(2, 12)),
    "view that splits": ([(2, 12)], lambda x: x.view(2, 3, 4)),
    "view that splits and joins": ([(2, 3, 4)], lambda x: x.view(4, 6)),
    "view of another kind": ([(6, 4)], lambda x: x.view(4, 6)),
    "view that adds an axis": ([(2, 3)], lambda x: x.view(2, 1, 3)),
    "flatten that drops an axis": ([(2, 1, 3)], lambda x: x.flatten(0, 1)),
    "view of all but the last axis that drops one": ([(2, 1, 3)], lambda x: x.view(-1, 3)),
    "reshape after transpose": ([(2, 3, 4)], lambda x: x.transpose(1, 2).reshape(8, 3)),
    "unsafe view": ([(2, 3, 4)], lambda x: torch.ops.aten._unsafe_view(x, [6, 4])),
    "permute": ([(2, 3, 4)], lambda x: x.permute(2, 0, 1)),
    "permute backwards": ([(2, 3, 4)], lambda x: x.permute(-1, 0, -2)),
    "t": ([(2, 3)], lambda x: x.t()),
    "transpose": ([(2, 3, 4)], lambda x: x.transpose(-1, 0)),
    "squeeze": ([(2, 1, 3, 1)], lambda x: x.squeeze()),
    "squeeze of one axis": ([(2, 1, 3, 1)], lambda x: x.squeeze(-1)),
    "squeeze of no axis": ([(2, 1, 3)], lambda x: x.squeeze(0)),
    "squeeze of two axes": ([(2, 1, 3, 1)], lambda x: x.squeeze((1, 3))),
    "unsqueeze": ([(2, 3)], lambda x: x.unsqueeze(1)),
    "unsqueeze at the end": ([(2, 3)], lambda x: x.unsqueeze(-1)),
    "select": ([(2, 3, 4)], lambda x: x.select(1, 2)),
    "select from the end": ([(2, 3, 4)], lambda x: x[:, -1]),
    "slice": ([(2, 7)], lambda x: x[:, 1:6]),
    "slice of two": ([(3, 2)], lambda x: x[:, 1:]),
    "slice with steps": ([(2, 7)], lambda x: x[:, 1::2]),
    "slice from the end": ([(2, 7)], lambda x: x[:, -3:-1]),
    "slice of the first axis": ([(5, 3)], lambda x: x[1:3]),
    "narrow": ([(2, 7)], lambda x: x.narrow(-1, 2, 3)),
    "split": ([(2, 7)], lambda x: x.split(3, 1)),
    "split with sizes": ([(2, 7)], lambda x: x.split([1, 4, 2], -1)),
    "split of the first axis": ([(4, 3)], lambda x: x.split(2)),
    "chunk": ([(2, 6)], lambda x: x.chunk(3, 1)),
    "unbind": ([(2, 3, 4)], lambda x: x.unbind(1)),
    "unbind of the last axis": ([(2, 3)], lambda x: x.unbind(-1)),
    "cat": ([(2, 3), (2, 4)], lambda a, b: torch.cat([a, b], 1)),
    "cat of the first axis": ([(2, 3), (4, 3)], lambda a, b: torch.cat([a, b])),
    "cat of three": ([(2, 1), (2, 2), (2, 3)], lambda *x: torch.cat(x, -1)),
    "stack": ([(2, 3), (2, 3)], lambda a, b: torch.stack([a, b], 1)),
    "stack at the end": ([(2, 3), (2, 3)], lambda a, b: torch.stack([a, b], -1)),
    "add": ([(2, 3), (2, 3)], torch.add),
    "add with a factor": ([(2, 3), (2, 3)], lambda a, b: torch.add(a, b, alpha=-3)),
    "subtract": ([(2, 3), (2, 3)], torch.sub),
    "subtract with a factor": ([(2, 3), (2, 3)], lambda a, b: torch.sub(a, b, alpha=2)),
    "mean": ([(2, 3, 4)], lambda x: x.mean(1)),
    "mean that keeps the axis": ([(2, 3, 4)], lambda x: x.mean(-1, keepdim=True)),
    "mean over two axes": ([(2, 3, 4)], lambda x: x.mean((0, 2))),
    "add nothing": ([(2, 3)], lambda x: 0 + x),
    "add nothing of a factor": ([(2, 3)], lambda x: torch.add(x, 0, alpha=2)),
    "subtract nothing": ([(2, 3)], lambda x: x - 0),
    "expand": ([(2, 1, 3)], lambda x: x.expand(2, 4, 3)),
    "expand with a new axis": ([(2, 3)], lambda x: x.expand(4, 2, 3)),
    "repeat": ([(2, 3, 4)], lambda x: x.repeat(2, 1, 3)),
    "repeat with a new axis": ([(2, 3)], lambda x: x.repeat(4, 1, 2)),
    "index": ([(4, 3)], lambda x: x[ROW]),
    "index of a middle axis": ([(2, 4, 3)], lambda x: x[:, ROW]),
    "index of the last axis": ([(2, 4)], lambda x: x[..., ROW]),
    "index of neighbours": ([(3, 4, 2)], lambda x: x[THREE, SHORT]),
    "index of neighbours behind": ([(2, 3, 4)], lambda x: x[:, THREE, SHORT]),
    "index of the first and the last": ([(3, 2, 4)], lambda x: x[THREE, :, SHORT]),
    "index of a table": ([(2, 4, 3)], lambda x: x[:, TABLE]),
    "index of two tables": ([(4, 2, 4)], lambda x: x[TABLE, :, TABLE]),
    "index of one row": ([(4, 3)], lambda x: x[ONE]),
    "index of a mask": ([(4, 3)], lambda x: x[MASK_OF_FOUR]),
    "index of a mask behind the channels": ([(2, 3, 4)], lambda x: x[:, :, MASK_OF_FOUR]),
    "index of a mask over two axes": ([(2, 4, 3)], lambda x: x[MASK]),
    "index of a mask over the last axes": ([(3, 2, 4)], lambda x: x[:, MASK]),
    "index_select": ([(2, 4, 3)], lambda x: x.index_select(-2, ROW)),
    "index_select of the first axis": ([(4, 3)], lambda x: x.index_select(0, ROW)),
    "gather": ([(2, 4, 3)], lambda x: x.gather(1, WHOLE)),
    "flip": ([(2, 3, 4)], lambda x: x.flip(1)),
    "flip of two axes": ([(2, 3, 4)], lambda x: x.flip(0, -1)),
    "roll": ([(2, 3, 4)], lambda x: x.roll(2, 1)),
    "roll of two axes": ([(2, 3, 4)], lambda x: x.roll((1, -1), (0, 2))),
    "pixel shuffle": ([(2, 12, 2, 3)], lambda x: F.pixel_shuffle(x, 2)),
    "pixel unshuffle": ([(2, 3, 4, 6)], lambda x: F.pixel_unshuffle(x, 2)),
    "channel shuffle": ([(2, 6, 5)], lambda x: F.channel_shuffle(x, 2)),
    "channel shuffle of three groups": ([(2, 6, 5, 4)], lambda x: F.channel_shuffle(x, 3)),
    "columns": ([(2, 3, 4, 5)], lambda x: F.unfold(x, (2, 3))),
    "columns that are spread": ([(2, 3, 6, 5)], lambda x: F.unfold(x, 2, dilation=2, stride=(1, 2))),
    "windows": ([(2, 3, 7)], lambda x: x.unfold(-1, 3, 2)),
    "windows of a middle axis": ([(2, 7, 3)], lambda x: x.unfold(1, 2, 2)),
    "repeat_interleave": ([(2, 3, 4)], lambda x: x.repeat_interleave(2, 1)),
    "repeat_interleave from the end": ([(2, 3, 4)], lambda x: torch.repeat_interleave(x, repeats=3, dim=-1)),
    "rot90": ([(2, 3, 4, 5)], lambda x: x.rot90(1, (2, 3))),
    "rot90 of the channels": ([(2, 3, 4)], lambda x: x.rot90(-3, (1, 2))),
    "rot90 by half": ([(2, 3, 4)], lambda x: x.rot90(2, (0, -1))),
    "average pooling": ([(2, 3, 4, 5)], lambda x: F.avg_pool2d(x, 2)),
    "average pooling that overlaps": ([(2, 3, 4, 5)], lambda x: F.avg_pool2d(x, 2, 1)),
    "average pooling past the edge": ([(2, 3, 5, 5)], lambda x: F.avg_pool2d(x, 2, ceil_mode=True)),
    "average pooling that leaves padding out": (
        [(2, 3, 4, 4)], lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    ),
    "average pooling past the edge that leaves padding out": (
        [(2, 3, 5, 5)], lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False)
    ),
    "average pooling of a volume": ([(2, 3, 4, 4, 4)], lambda x: F.avg_pool3d(x, 2)),
    "average pooling to a size": ([(2, 3, 4, 5)], lambda x: F.adaptive_avg_pool2d(x, (2, 2))),
    "average pooling of a volume to a size": ([(2, 3, 4, 4, 4)], lambda x: F.adaptive_avg_pool3d(x, 2)),
    "reflection of a sequence": ([(2, 3, 4)], lambda x: F.pad(x, (1, 2), mode="reflect")),
    "reflection of an image": ([(2, 3, 4, 5)], lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect")),
    "reflection of a volume": ([(2, 3, 4, 4, 4)], lambda x: F.pad(x, (1, 1, 0, 1, 1, 0), mode="reflect")),
    "replication of a sequence": ([(2, 3, 4)], lambda x: F.pad(x, (1, 2), mode="replicate")),
    "replication of an image": ([(2, 3, 4, 5)], lambda x: F.pad(x, (1, 2, 0, 1), mode="replicate")),
    "replication of a volume": ([(2, 3, 4, 4, 4)], lambda x: F.pad(x, (1, 1, 0, 1, 1, 0), mode="replicate")),
    "circular padding": ([(2, 3, 4, 5)], lambda x: F.pad(x, (1, 2, 0, 1), mode="circular")),
    "circular padding by keyword": ([(2, 3, 4)], lambda x: F.pad(x, mode="circular", pad=(1, 2))),
    **{
        f"{mode} upsampling of rank {rank}": (
            [(2, 3, *range(2, rank))], lambda x, mode=mode: F.interpolate(x, scale_factor=2, mode=mode)
        )
        for mode, ranks in {
            "nearest": (3, 4, 5), "nearest-exact": (3, 4, 5), "linear": (3,), "bilinear": (4,), "bicubic": (4,),
            "trilinear": (5,),
        }.items()
        for rank in ranks
    },
    "mean over everything": ([(2, 3)], lambda x: torch.ops.aten.mean.dim(x, [], True)),
}  # fmt: skip


ROW = torch.tensor([2, 0, 3, 3, 1, 0])
MASK = torch.tensor([[True, False, True, True], [False, True, True, False]])
MASK_OF_FOUR = MASK[0].clone()
THREE, SHORT, TABLE, ONE = torch.arange(3), ROW[:3].clone(), ROW.view(2, 3).clone(), ROW[0].clone()
WHOLE, PART = ROW[:5].view(1, 5, 1).repeat(2, 1, 3), ROW[1:5].view(2, 2) % 2


def recorded(net: Any, operation: Operation, inputs: list[Tensor]) -> tuple[ValueGraph, Call]:
    with torch.no_grad(), Recorder(model := net(lambda m, *x: operation(*x)).eval()) as recorder:
        model(*inputs)
    return recorder.graph, recorder.graph.calls[-1]


def apply(channels: Channels | None, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    if channels is None:
        return x
    labels = channels.labels
    touched = labels != UNTOUCHED
    scale, shift = scale[labels].where(touched, 1.0), (shift * channels.shift)[labels].where(touched, 0.0)
    return x * scale + shift


@pytest.mark.parametrize("case", CASES)
def test_mapping_the_inputs_is_mapping_the_outputs(net: Any, case: str) -> None:
    shapes, operation = CASES[case]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    graph, call = recorded(net, operation, inputs)
    assert call.name in RULES
    rule, expected = RULES[call.name], listed(operation(*inputs))
    passed = 0
    for position, index in enumerate(call.outputs):
        shape = graph.values[index].shape
        for axis, size in enumerate(shape):
            scale, shift = torch.randn(2, size, dtype=torch.float64)
            asked = Channels.along(axis, size, len(shape))
            asked = asked.with_labels(asked.labels)
            try:
                maps = ask(rule.up(graph, call, position, asked))
            except NotTransparent:
                continue
            mapped = given_to(operation, graph, call, inputs, maps, scale, shift)[position]
            torch.testing.assert_close(
                mapped, apply(asked, expected[position], scale, shift).to(mapped), rtol=0, atol=1e-6
            )
            try:
                found = rule.down(graph, call, maps)[position]
            except NotTransparent:
                assert case in {"view that joins", "view of another kind"} or len(maps) < len(inputs)
                continue
            assert found.same_as(asked), "what comes down is what was asked for"
            passed += 1
    assert passed or case in ("mean over everything", "squeeze of no axis")


@pytest.mark.parametrize("case", CASES)
def test_mapping_some_inputs_is_mapping_the_outputs_so_or_refused(net: Any, case: str) -> None:
    shapes, operation = CASES[case]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    graph, call = recorded(net, operation, inputs)
    expected = listed(operation(*inputs))
    for chosen in range(1, 2 ** len(inputs)):
        for axis in range(len(graph.values[call.inputs[0]].shape)):
            maps = {}
            for position, index in enumerate(call.inputs[: len(inputs)]):
                shape = graph.values[index].shape
                if chosen >> position & 1:
                    channels = Channels.along(axis, shape[axis], len(shape))
                    maps[index] = channels.with_labels(channels.labels)
            scale, shift = torch.randn(2, 24, dtype=torch.float64)
            try:
                found = RULES[call.name].down(graph, call, maps)
            except NotTransparent:
                continue
            mapped = given_to(operation, graph, call, inputs, maps, scale, shift)
            for ours, channels, plain in zip(mapped, found, expected, strict=True):
                torch.testing.assert_close(ours, apply(channels, plain, scale, shift).to(ours), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_arguments_by_keyword_are_the_same_arguments(net: Any, case: str) -> None:
    shapes, operation = CASES[case]
    graph, call = recorded(net, operation, [torch.randn(shape, dtype=torch.float64) for shape in shapes])
    if not call.name.startswith("aten."):
        pytest.skip("the recorder's own name: its arguments are where the recorder puts them")
    rule = RULES[call.name]
    for position, index in enumerate(call.outputs):
        shape = graph.values[index].shape
        for axis, size in enumerate(shape):
            asked = Channels.along(axis, size, len(shape))
            assert answer(rule.up, graph, by_keyword(call), position, asked) == answer(
                rule.up, graph, call, position, asked
            )
    for axis in range(len(graph.values[call.inputs[0]].shape)):
        known = {index: graph.values[index].shape for index in call.inputs[: len(shapes)]}
        maps = {index: Channels.along(axis, shape[axis], len(shape)) for index, shape in known.items()}
        assert answer(rule.down, graph, by_keyword(call), maps) == answer(rule.down, graph, call, maps)


def by_keyword(call: Call) -> Call:
    """The same call, its arguments given by the names that torch has for them."""
    _, name, overload = call.name.split(".")
    names = [argument.name for argument in getattr(getattr(torch.ops.aten, name), overload)._schema.arguments]
    first = 2 if name in ("add", "sub") else 1  # the tensors themselves
    given = dict(zip(names[first:], call.args[first:], strict=False))
    return replace(call, args=call.args[:first], kwargs=call.kwargs | given)


def answer(ask: Callable[..., Any], *question: Any) -> str:
    """What a rule says, as text: maps have no equality of their own."""
    try:
        return repr(ask(*question))
    except NotTransparent as error:
        return str(error)


def given_to(
    operation: Operation,
    graph: ValueGraph,
    call: Call,
    inputs: list[Tensor],
    maps: dict[int, Channels],
    *scales: Tensor,
) -> list[Tensor]:
    """The outputs when the inputs of the last call are mapped; the calls before it only move elements."""
    known = [value.index for value in graph.values if value.maker is None]
    if set(call.inputs) <= set(known):
        mapped = [apply(maps.get(i), x, *scales) for i, x in zip(call.inputs, inputs, strict=False)]
        return listed(operation(*mapped))
    middle = inputs[0].transpose(1, 2).contiguous() if inputs[0].dim() == 3 else inputs[0]
    if tuple(middle.shape) != graph.values[call.inputs[0]].shape or inputs[0].dim() != 3:
        pytest.skip("an older torch does this in several operations, and each of them is another case")
    (index,) = call.inputs
    return listed(apply(maps.get(index), middle, *scales).reshape(graph.values[call.outputs[0]].shape))


def ask(asked: list[tuple[int, Channels]]) -> dict[int, Channels]:
    maps: dict[int, Channels] = {}
    for index, channels in asked:
        maps[index] = maps[index].merged_with(channels) if index in maps else channels
    return maps


def listed(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def test_every_rule_of_the_table_is_tried(net: Any) -> None:
    tried = set()
    for shapes, operation in CASES.values():
        tried.add(recorded(net, operation, [torch.randn(shape, dtype=torch.float64) for shape in shapes])[1].name)
    # What is written has to be made first, a fresh tensor is no output of a layer, and `_reshape_alias` comes from
    # compiled code alone.
    assert set(RULES) - tried == {"aten.lift_fresh.default", "aten._reshape_alias.default", *IN_PLACE_SUMS}
    assert {RULES[name] for name in IN_PLACE_SUMS} == {RULES["aten.add.Tensor"]}


@pytest.mark.parametrize(
    "operation",
    [lambda x: x.to(torch.int64), lambda x: x.roll(1), lambda x: x.repeat(1, 2), lambda x: x + 1, lambda x: x.sum(1),
     lambda x: torch.sub(0, x), lambda x: torch.add(0, x), lambda x: torch.add(0, x, alpha=2),
     lambda x: F.pad(x, (1, 0)), lambda x: x.amax(1), lambda x: x * 2, lambda x: -x, lambda x: x @ x.t(),
     lambda x: x[:, ROW % 3], lambda x: x.index_select(1, ROW % 3), lambda x: x.gather(1, PART),
     lambda x: x.gather(0, PART[:1]), lambda x: x[:, x[0] > -9], lambda x: x[x[:, 0] > -9, ROW[:2] % 2]],
)  # fmt: skip
def test_operations_outside_the_table_or_its_limits_do_not_pass(net: Any, operation: Operation) -> None:
    graph, call = recorded(net, operation, [torch.randn(2, 3, dtype=torch.float64)])
    rank = len(graph.values[call.outputs[0]].shape)
    if call.name in RULES:
        with pytest.raises(NotTransparent):
            RULES[call.name].up(graph, call, 0, Channels.along(rank - 1, 3, rank))


@pytest.mark.parametrize(
    ("shape", "operation", "axis"),
    [((2, 1, 3), lambda x: x.view(2, 3), 1), ((2, 3, 1), lambda x: x.view(-1, 3), 1),
     ((2, 1, 3), lambda x: x.flatten(1), 1), ((1, 3), lambda x: x.view(3, -1), 0)],
)  # fmt: skip
def test_axis_of_one_that_vanishes_beside_the_channels_is_refused_both_ways(
    net: Any, shape: tuple[int, ...], operation: Operation, axis: int
) -> None:
    graph, call = recorded(net, operation, [torch.randn(shape, dtype=torch.float64)])
    rank = len(graph.values[call.outputs[0]].shape)
    with pytest.raises(NotTransparent, match="with a longer one"):
        RULES[call.name].up(graph, call, 0, Channels.along(axis, 3, rank))
    with pytest.raises(NotTransparent, match="with a longer one"):
        RULES[call.name].down(graph, call, {call.inputs[0]: Channels.along(shape.index(3), 3, len(shape))})


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: F.avg_pool2d(x, 3, 1, 1), "counts zeros"),
        (lambda x: F.avg_pool2d(x, 3, 1, (0, 1)), "counts zeros"),
        (lambda x: F.avg_pool2d(x, 3, 2, (1, 0), ceil_mode=True), "counts zeros"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divides by something else"),
    ],
)
def test_average_that_counts_or_divides_by_something_else_is_refused_both_ways(
    operation: Operation, reason: str, net: Any
) -> None:
    graph, call = recorded(net, operation, [torch.randn(2, 3, 4, 4)])
    channels = Channels.along(1, 3, 4)
    for each in (call, by_keyword(call)):
        with pytest.raises(NotTransparent, match=reason):
            RULES[call.name].up(graph, each, 0, channels)
        with pytest.raises(NotTransparent, match=reason):
            RULES[call.name].down(graph, each, {call.inputs[0]: channels})


@pytest.mark.parametrize(
    ("shape", "sizes", "passed"),
    [((2, 1, 3), (2, 4, 3), [0, 2]), ((2, 3), (3, 2, 3), [1, 2]), ((3,), (2, 3), [1]), ((1, 3), (2, 4, 3), [2])],
)
def test_channels_pass_an_expansion_along_the_axes_that_it_does_not_repeat(
    shape: tuple[int, ...], sizes: tuple[int, ...], passed: list[int], net: Any
) -> None:
    graph, call = recorded(net, lambda x: x.expand(sizes), [torch.randn(shape)])
    said = [
        answer(RULES[call.name].up, graph, call, 0, Channels.along(axis, n, len(sizes))) for axis, n in enumerate(sizes)
    ]
    assert [axis for axis, text in enumerate(said) if "repeats" not in text] == passed


def test_single_channel_is_on_every_axis_of_one(net: Any) -> None:
    graph, call = recorded(net, lambda x: x.view(1, 1), [torch.randn(())])
    ((_, asked),) = RULES[call.name].up(graph, call, 0, Channels.along(1, 1, 2))
    assert asked.labels.shape == ()
    (found,) = RULES[call.name].down(graph, call, {call.inputs[0]: asked})
    assert found.same_as(Channels.along(1, 1, 2))


def test_cast_to_whole_numbers_is_refused_both_ways(net: Any) -> None:
    graph, call = recorded(net, lambda x: x.to(torch.int64), [torch.randn(2, 3)])
    with pytest.raises(NotTransparent, match="are not real"):
        RULES[call.name].down(graph, call, {call.inputs[0]: Channels.along(1, 3, 2)})
    with pytest.raises(NotTransparent, match="are not real"):
        RULES[call.name].up(graph, call, 0, Channels.along(1, 3, 2))


@pytest.mark.parametrize(
    ("operation", "output", "whole"),
    [
        (lambda x: x[:, 2].relu(), 0, True),
        pytest.param(
            lambda x: x[:, 2].relu() + x[:, 0],
            0,
            False,
            marks=pytest.mark.skipif(torch.__version__ < "2.13", reason="an older torch picks of an axis in two steps"),
        ),
        (lambda x: x.unbind(1)[2].relu(), 2, True),
        (lambda x: [x.unbind(1)[2].relu(), x.unbind(1)[2]], 2, False),
        (lambda x: [y.relu() for y in x.unbind(1)[1:]], 2, False),
        (lambda x: [y.relu() for y in x.split(1, 1)], 2, False),
        (lambda x: x.split(1, 1)[2].relu(), 2, True),
    ],
)
def test_position_that_is_picked_asks_for_all_of_them_where_nothing_else_is_read(
    operation: Operation, output: int, whole: bool, net: Any
) -> None:
    graph, _ = recorded(net, operation, [torch.randn(2, 3, 4)])
    call = next(call for call in graph.calls if call.name in RULES)
    rank = len(graph.values[call.outputs[output]].shape)
    ((_, asked),) = RULES[call.name].up(graph, call, output, Channels.along(rank - 1, 4, rank))
    if whole:
        assert asked.same_as(Channels.along(2, 4, 3))
    else:
        nothing = [UNTOUCHED] * 4
        assert asked.labels.tolist() == [[nothing, nothing, [0, 1, 2, 3]]]


def test_maps_are_the_same_if_elements_and_share_of_the_shift_are() -> None:
    whole = Channels.along(1, 3, 2)
    assert whole.same_as(Channels(torch.tensor([[0, 1, 2]])))
    assert not whole.same_as(Channels(torch.tensor([[0, 1, UNTOUCHED]])))
    assert not whole.same_as(replace(whole, shift=0.0))


@pytest.mark.parametrize("record", [Channels.along(1, 3, 2), RULES["aten.add.Tensor"]])
def test_maps_and_rules_cannot_be_changed(record: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(record, next(iter(vars(record))), None)


def test_maps_are_compared_by_what_they_map_alone() -> None:
    whole, again = Channels.along(1, 3, 2), Channels.along(1, 3, 2)
    assert whole.same_as(again)
    assert whole != again, "`==` of two tensors is no answer, so there is none"


def test_two_maps_agree_or_are_refused() -> None:
    whole = Channels(torch.tensor([[0, 1, 2]]))
    part = Channels(torch.tensor([[0, UNTOUCHED, 2]]))
    assert whole.merged_with(part).same_as(whole)
    assert part.merged_with(whole).same_as(whole)
    for other in (Channels(torch.tensor([[0, 2, 1]])), Channels(whole.labels, shift=0.0)):
        with pytest.raises(NotTransparent, match="two different maps"):
            whole.merged_with(other)


def test_sums_and_concatenations_of_different_maps_are_refused(net: Any) -> None:
    whole, part = Channels(torch.tensor([[0, 1, 2]])), Channels(torch.tensor([[0, 1, UNTOUCHED]]))
    inputs = [torch.randn(2, 3), torch.randn(2, 3)]
    graph, call = recorded(net, torch.add, inputs)
    a, b = call.inputs
    for maps in ({a: whole, b: part}, {a: whole}, {b: whole}):
        with pytest.raises(NotTransparent, match="not scaled in the same way"):
            RULES[call.name].down(graph, call, maps)
    graph, call = recorded(net, lambda a, b: torch.cat([a, b], 1), inputs)
    a, b = call.inputs
    with pytest.raises(NotTransparent, match="two different maps"):
        RULES[call.name].down(graph, call, {a: whole, b: Channels(whole.labels, shift=0.0)})


def test_channels_along_an_axis_are_a_tuple_only_if_nothing_else_matters() -> None:
    assert Channels.along(1, 3, 3).along_axis(1, 3) == (0, 1, 2)
    assert Channels.along(1, 3, 3).along_axis(-1, 3) is None
    assert Channels(torch.tensor([[4]])).along_axis(1, 3) == (4, 4, 4)


@pytest.mark.parametrize(("most", "refused"), [(23, True), (24, False)])
def test_view_with_too_many_labels_is_refused(
    most: int, refused: bool, net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_bnfold.folding.transparent._MOST_LABELS", most)
    graph, call = recorded(net, lambda x: x.view(4, 6), [torch.randn(6, 4)])
    said = answer(RULES[call.name].up, graph, call, 0, Channels.along(1, 6, 2))
    assert ("too many other elements" in said) == refused


def test_elements_that_a_view_does_not_mix_with_the_channels_are_not_counted(
    net: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_bnfold.folding.transparent._MOST_LABELS", 3)
    graph, call = recorded(net, lambda x: x.view(4, 6, 3), [torch.randn(24, 3)])
    ((_, asked),) = RULES[call.name].up(graph, call, 0, Channels.along(2, 3, 3))
    assert asked.same_as(Channels.along(1, 3, 2))


@pytest.mark.parametrize(
    ("shape", "channel_axes", "expected"),
    [
        ((5, 4, 3), [1], False),
        ((4,), [0], False),
        ((5, 4), [1], False),
        ((4, 5), [0], False),
        ((1, 4, 1, 1), [1], False),
        ((1, 4, 2, 2), [1], False),
        ((7, 2, 5, 2, 3), [1, 3], False),
        ((4, 4), [1], True),
        ((5, 4, 4), [1], True),
        ((3, 4, 3), [1], True),
        ((6, 4, 2, 3), [1], True),
        ((2, 3, 4, 6), [2], True),
        ((7, 2, 3, 3, 5), [1, 3], True),
        # Nothing is mapped, so nothing can be mixed.
        ((4, 4), [], False),
        ((), [], False),
    ],
)
def test_channels_could_be_another_axis_where_lengths_are_equal(
    shape: tuple[int, ...], channel_axes: list[int], expected: bool
) -> None:
    sizes = [size if axis in channel_axes else 1 for axis, size in enumerate(shape)]
    labels = torch.arange(math.prod(sizes)).view(sizes)
    assert (_could_be_another_axis(labels, shape) or _could_be_swapped_around(labels, shape)) is expected
