"""From the value graph to the plan: the search for the layers that can take a BatchNorm.

Pure: reads the graph and touches no model. The question asked of every BatchNorm is: if its affine map were applied
elsewhere, to the outputs of the layers before it or to the inputs of those after it, would any value change that
anybody else can see? The walk finds the layers, and everything met on the way is checked for whoever else can see it.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch

from lit_bnfold.folding.graph import GIVEN, IN_PLACE_SUMS, RETURNED, Call, Layer, Obstacle, Ref, Value, ValueGraph
from lit_bnfold.folding.plan import Fold, FoldingPlan, Kept, Part
from lit_bnfold.folding.transparent import (
    RULES,
    UNTOUCHED,
    VIEWS,
    Channels,
    NotTransparent,
    adds_nothing,
    ambiguous_reshape,
)

# Three digits, or what leaves a narrow dtype one.
_MOST_GAIN, _MOST_LOSS = 1e3, 0.1

# Measured, the errors of a whole block grow by a third of that at most, so that a folded model's stay below four times
# those of the unfolded one.
_MOST_RESIDUAL_GAIN = 8.0

_FEW = 8

# A BatchNorm beside another one that stays: once that one is folded, this one may be as well.
_NEIGHBOURS = ("behind-batchnorm", "before-batchnorm")


def make_plan(graph: ValueGraph) -> FoldingPlan:
    """Decide about every BatchNorm of a recorded model.

    Args:
        graph: What one run of the model did.

    Returns:
        The plan.
    """
    # The labels of channels are Python's business, whatever device is the default at the moment.
    is_on_cpu = torch.get_default_device().type == "cpu"
    with nullcontext() if is_on_cpu else torch.device("cpu"):
        return _plan_of(graph)


def _plan_of(graph: ValueGraph) -> FoldingPlan:
    folded: dict[str, Fold] = {}
    stays: dict[str, list[Obstacle]] = {}
    takers: set[str] = set()  # BatchNorms that stay and have taken another one
    pending = _in_order_of_the_run(graph)
    while pending:
        before = len(folded)
        for name in pending:
            fold, stays[name] = _search(graph, name, folded, frozenset())
            if fold is not None:
                folded[name] = fold
        if len(folded) == before:
            # What stays now is a layer itself, to its neighbours.
            _fold_into_each_other(graph, folded, stays, takers)
        has_moved = len(folded) > before
        pending = [name for name in stays if has_moved and name not in takers and _may_move(name, folded, stays)]
    for name in takers:
        # What was said of it may speak of a neighbour that it has taken since; and what has taken one stays.
        _, obstacles = _search(graph, name, folded, frozenset())
        stays[name] = obstacles or [("behind-batchnorm", "it has taken another BatchNorm, and stays for that")]
    kept = (Kept(name, *_reason(stays[name])) for name in graph.batchnorms if name not in folded)
    return FoldingPlan(tuple(folded.values()), tuple(kept))


def _may_move(name: str, folded: dict[str, Fold], stays: dict[str, list[Obstacle]]) -> bool:
    """Whether a BatchNorm stays for no other reason than that one beside it does."""
    return name not in folded and any(code in _NEIGHBOURS for code, _ in stays[name])


def _can_take(graph: ValueGraph, batchnorm: str) -> bool:
    return batchnorm in graph.layers and graph.layers[batchnorm].obstacle is None


def _fold_into_each_other(
    graph: ValueGraph, folded: dict[str, Fold], stays: dict[str, list[Obstacle]], takers: set[str]
) -> None:
    for name in [name for name in stays if _may_move(name, folded, stays)]:
        if name not in takers:
            others = frozenset(other for other in stays if other not in {name, *folded} and _can_take(graph, other))
            fold, obstacles = _search(graph, name, folded, others)
            if fold is None:
                stays[name] = obstacles
            else:
                folded[name] = fold
                takers.update(others.intersection(fold.layers))


def _in_order_of_the_run(graph: ValueGraph) -> list[str]:
    called = [name for name in graph.calls_of if name in graph.batchnorms]
    return called + [name for name in graph.batchnorms if name not in graph.calls_of]


def _search(
    graph: ValueGraph, name: str, folded: dict[str, Fold], others: frozenset[str]
) -> tuple[Fold | None, list[Obstacle]]:
    """The first fold that is possible, or the obstacles to each."""
    obstacles = []
    for search in (_Backward, _Forward, _Parallel, _Residual):
        try:
            return search(graph, name, folded, others).fold(), []
        except _StaysError as stay:
            obstacles.append(stay.obstacle)
    return None, obstacles


def _reason(obstacles: list[Obstacle]) -> tuple[str, str]:
    """The sentence and the code for a BatchNorm that stays."""
    last, residual = obstacles[-1]
    if last == "rounding":  # Nothing else is in the way.
        return residual, last
    (code, backward), (code_forward, forward) = obstacles[0], obstacles[min(1, len(obstacles) - 1)]
    if code == "no-layer" and code_forward in ("zero-padding", "before-batchnorm"):
        code = code_forward  # There is something behind it, if nothing before.
    return backward if forward == backward else f"{backward}; and {forward}", code


def _note(gain: float, dtype: torch.dtype) -> str | None:
    """A warning for a fold behind which rounding errors come out so much larger that few digits are left."""
    if gain <= min(_MOST_GAIN, _MOST_LOSS / torch.finfo(dtype).eps):
        return None
    if math.isinf(gain):
        return (
            "a channel of it has no variance and no bias: what comes out of that are rounding errors of its layer alone"
        )
    digits = round(-math.log10(torch.finfo(dtype).eps))
    lost = min(round(math.log10(gain)), digits)
    name = str(dtype).removeprefix("torch.")
    return (
        f"behind it, a rounding error of its layer is up to {gain:.1e} times larger, so that {name} loses {lost} of "
        f"its {digits} digits: its variance is very small or its weight very large"
    )


class _StaysError(Exception):
    """A BatchNorm has to stay."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.obstacle: Obstacle = (code, reason)


class _Term(NamedTuple):
    """One of several values that are added: with its sign, and the call that adds it."""

    value: Value
    sign: float
    reader: Call


class _Search:
    """What the searches have in common.

    Args:
        graph: What the run did.
        name: Name of the BatchNorm.
        folded: The BatchNorms that are folded already.
        others: BatchNorms that stay, and count as layers.
    """

    direction: str
    # Whether a sum may be written into its first term; but not into what is left of a BatchNorm, which is its input.
    follows_sums = False

    def __init__(self, graph: ValueGraph, name: str, folded: dict[str, Fold], others: frozenset[str]) -> None:
        self.graph = graph
        self.name = name
        self.folded = folded
        self.others = others
        self.calls = graph.calls_of.get(name, [])
        self.maps: dict[int, Channels] = {}
        self.layers: dict[str, None] = {}
        self._written = False
        self._contiguous = False

    def fold(self) -> Fold:
        """The fold.

        Raises:
            _StaysError: If there is none.
        """
        self._check_batchnorm()
        self._walk()
        if not self.layers:
            raise _StaysError("no-layer", "nothing reads its output")
        self._check_reshapes()
        in_order = sorted(self.layers, key=lambda layer: self.graph.calls_of[layer][0].index)
        parts = tuple(self._part(layer) for layer in in_order)
        self._check_erasure()
        self._check_other_paths()
        facts = self.graph.batchnorms[self.name]
        note = _note(facts.gain, self.graph.values[self.calls[0].inputs[0]].dtype)
        return Fold(self.name, parts, self.direction, note, facts.eps, self._written, self._contiguous)

    def _walk(self) -> None:
        raise NotImplementedError

    def _part_of_call(self, name: str, layer: Layer, call: Call) -> Part:
        raise NotImplementedError

    def _check_batchnorm(self) -> None:
        facts = self.graph.batchnorms[self.name]
        if facts.obstacle is not None:
            raise _StaysError(*facts.obstacle)
        for tensor in facts.parameters:
            value = self.graph.named_values[tensor]
            others = [call for call in self.graph.users(value) if call.kind != "batchnorm"]
            if any(self.graph.frames[call.frame].module == self.name for call in others):
                what = f"{self._named(value)} otherwise than by `batch_norm`"
                raise _StaysError("own-forward", f"its class has a forward of its own, which reads {what}")
            self._check_readers(value, [call for call in self.graph.users(value) if call.kind == "batchnorm"])
        if not self.calls:
            raise _StaysError("not-reached", "the run did not reach it")

    def _check_readers(self, parameter: Value, readers: Iterable[Call]) -> None:
        """A parameter that would change or go may be read by certain calls alone."""
        known = {call.index for call in readers}
        for call in self.graph.users(parameter):
            if call.index not in known:
                raise _StaysError(
                    "parameter-read", f"{self._named(parameter)} is also read by {self.graph.where(call)}"
                )
        if parameter.fate in (RETURNED, GIVEN):
            raise _StaysError("kept-alive", f"{self._named(parameter)} {parameter.fate}")
        self._check_memory(parameter, self._named(parameter))

    def _check_computed(self, name: str, layer: Layer) -> None:
        """What a layer computes at every call must come from its own parameters alone, and go into its calls alone."""
        calls = self.graph.calls_of[name]
        results = {value for call in calls for value in call.computed}
        values, makers = self.graph.origins(results)
        originals = {self.graph.named_values[tensor].index for tensor in layer.originals}
        readers = [*calls, *(self.graph.calls[index] for index in makers)]
        for maker in readers[len(calls) :]:
            if maker.kind != "operation" or maker.draws:
                raise _StaysError("computed-weight", f"the weight of `{name}` is computed by {self.graph.where(maker)}")
        for value in (self.graph.values[index] for index in values):
            if value.maker is None and value.index not in originals and not value.constant:
                raise _StaysError("computed-weight", f"the weight of `{name}` is computed from {self._named(value)}")
            if value.maker is not None and value.index not in results and value.fate is not None:
                raise _StaysError("computed-weight", f"the weight of `{name}` is computed from what {value.fate}")
            if not (value.maker is None and value.constant):
                self._check_readers(value, readers)

    def _check_memory(self, value: Value, named: str) -> None:
        writers = self.graph.writers.get(value.storage)
        if writers and not (self.follows_sums and value.storage in self.graph.summed_up):
            raise _StaysError("written", f"{named} is written in place by {self.graph.where(writers[0])}")
        if value.storage in self.graph.aliased:
            raise _StaysError("aliased", f"{named} {self.graph.aliased[value.storage]}")

    def _check_elements(self, value: Value) -> None:
        """Of a value without elements, such as an empty cache, nobody has seen what becomes of them next time."""
        if 0 in value.shape:
            raise _StaysError("not-transparent", f"{self._named(value)} was seen without any elements")

    def _check_hidden(self, value: Value) -> None:
        """Nobody may see a value but those who were seen reading it."""
        if value.fate is not None:
            raise _StaysError("kept-alive", f"{self._named(value)} {value.fate}")
        self._check_elements(value)
        self._check_memory(value, self._named(value))

    def _is_passed(self, call: Call) -> bool:
        """Whether a call is that of a BatchNorm which is folded and passes on what it is given."""
        fold = self.folded.get(call.owner or "") if call.kind == "batchnorm" else None
        return fold is not None and fold.direction != "parallel"

    def _is_layer(self, call: Call) -> bool:
        """Whether a call is that of a layer, or of a BatchNorm that counts as one."""
        return call.kind == "layer" or (call.kind == "batchnorm" and call.owner in self.others)

    def _start(self, value: Value) -> Channels:
        facts = self.graph.batchnorms[self.name]
        return Channels.along(facts.channel_axis, facts.num_features, len(value.shape))

    def _part(self, name: str) -> Part:
        layer = self.graph.layers[name]
        if layer.obstacle is not None:
            raise _StaysError(*layer.obstacle)
        for tensor in layer.parameters:
            self._check_readers(self.graph.named_values[tensor], self.graph.calls_of[name])
        if layer.computed:
            self._check_computed(name, layer)
        parts = {self._part_of_call(name, layer, call) for call in self.graph.calls_of[name]}
        if len(parts) > 1:
            raise _StaysError("two-maps", f"`{name}` is called several times and asked for different maps")
        return replace(parts.pop(), baked=bool(layer.computed), function=layer.function)

    def _part_along(self, name: str, channels: Channels | None, axis: int, size: int) -> Part:
        if channels is None:
            raise _StaysError("other-call", f"`{name}` is also called without this BatchNorm")
        along = channels.along_axis(axis, size)
        if along is None or set(along) == {UNTOUCHED}:
            raise _StaysError("channel-axis", f"its channels do not lie on those of `{name}`")
        is_whole = along == tuple(range(self.graph.batchnorms[self.name].num_features))
        return Part(name, None if is_whole else along, channels.shift)

    def _check_reshapes(self) -> None:
        makers = [self.graph.maker(self.graph.values[index]) for index in self.maps]
        calls = {call.index: call for call in makers if call is not None and call.name in RULES}
        between = [call for _, call in sorted(calls.items()) if not self.maps.keys().isdisjoint(call.inputs)]
        ambiguous = ambiguous_reshape(self.graph, between, self.maps)
        if ambiguous is not None:
            call, reason = ambiguous
            raise _StaysError("not-transparent", f"{self.graph.where(call)} {reason}")

    def _check_erasure(self) -> None:
        """Without the BatchNorm its output is its input: that must not show either."""
        for call in self.calls:
            before, after = self.graph.values[call.inputs[0]], self.graph.values[call.outputs[0]]
            if after.storage in self.graph.writers and any(map(self._is_shared, self.maps)):
                writer = self.graph.where(self.graph.writers[after.storage][0])
                raise _StaysError("written", f"its output is written in place by {writer}")
            is_laid_out_anew = _is_laid_out_anew(before, after)
            if after.stride == _contiguous(after.shape):
                shows = self.graph.is_viewed_after(call) or after.storage in self.graph.writers
                self._contiguous |= is_laid_out_anew or self._may_be_odd(before, counts_unknown=shows)
            elif is_laid_out_anew and self.graph.is_reinterpreted(after):
                raise _StaysError("layout", "it lays its output out anew in memory, and a later `view` relies on that")
            if before.dtype != after.dtype:
                raise _StaysError("layout", f"it turns {before.dtype} into {after.dtype}")

    def _may_be_odd(self, value: Value, counts_unknown: bool) -> bool:
        """Whether next time a value may lie in memory otherwise than axis after axis, as it does this time.

        Args:
            value: The value.
            counts_unknown: Whether it may be because of what comes from outside, or what an operation makes that may
                give its output the layout of its input.
        """
        pending, seen = [value], set[int]()
        while pending:
            maker = self.graph.maker(pending.pop())
            if maker is None or not (maker.kind == "layer" or maker.name in RULES):
                if counts_unknown:
                    return True
                continue
            if maker.index in seen:
                continue
            seen.add(maker.index)
            # A view is followed up to what it shows; all else between the BatchNorm and its layers alone, unless
            # what is unknown counts.
            is_view = maker.kind == "layer" or maker.name in VIEWS
            others = maker.inputs if counts_unknown else [index for index in maker.inputs if index in self.maps]
            inputs = maker.inputs[:1] if is_view else others
            sources = [self.graph.values[index] for index in inputs]
            is_odd = any(source.stride != _contiguous(source.shape) for source in sources)
            # What is made of a sequence may be laid out like that. Images stay in one of two layouts.
            is_sequence = any(len(source.shape) == 3 for source in sources)
            if maker.kind == "layer":
                if is_sequence and self.graph.layers[maker.owner or ""].kernel:
                    if is_odd:
                        return True
                    pending += sources
            elif (is_odd and (is_view or is_sequence)) or VIEWS.get(maker.name) == "some":
                return True
            else:
                pending += sources
        return False

    def _is_shared(self, index: int) -> bool:
        """Whether others share the memory of a value met on the way, or autograd forbids writing into it."""
        value = self.graph.values[index]
        maker = self.graph.maker(value)
        return len(value.users) > 1 or (maker is not None and len(maker.outputs) > 1)

    def _check_other_paths(self) -> None:
        """Where a tensor became a Python value, the run showed one path of several through the modules then running."""
        calls = [*self.calls, *(call for layer in self.layers for call in self.graph.calls_of[layer])]
        _, makers = self.graph.origins(value for call in calls for value in call.computed)
        involved = [*calls, *(self.graph.calls[index] for index in makers)]
        around = [self.graph.modules_around(call.frame) for call in involved]
        common = set(around[0]).intersection(*around[1:])
        innermost = [module for module in around[0] if module in common][-1]
        # What is around all of it leaves out all of it or nothing, unless it takes several calls for that.
        is_spread = self._is_spread(calls, innermost)
        for modules in around:
            for module in modules if is_spread else modules[modules.index(innermost) :]:
                if module in self.graph.forked:
                    place = f"`{module}`" if module else "the model"
                    raise _StaysError(
                        "python-value", f"{self.graph.forked[module]}, and {place} may take another path next time"
                    )

    def _is_spread(self, calls: Sequence[Call], module: str | None) -> bool:
        """Whether a call of a module around all of these calls does not hold some of each owner."""
        owners: dict[int, set[str | None]] = defaultdict(set)
        for call in calls:
            owners[self.graph.frame_of(module, call.frame)].add(call.owner)
        return any(len(each) < len({self.name, *self.layers}) for each in owners.values())

    def _check_unwritten_between(self, value: Value, calls: Iterable[Call]) -> None:
        """What two calls read at different times must be the same both times."""
        times = [call.index for call in calls]
        for writer in self.graph.writers.get(value.storage, ()):
            if min(times) < writer.index < max(times):
                raise _StaysError(
                    "written",
                    f"{self._named(value)} is written in place by {self.graph.where(writer)} after it was read",
                )
        if value.storage in self.graph.aliased:
            raise _StaysError("aliased", f"{self._named(value)} {self.graph.aliased[value.storage]}")

    def _named(self, value: Value) -> str:
        call = self.graph.maker(value)
        if call is None:
            return f"`{value.name}`" if value.name else "an input"
        if call.owner is not None:
            return f"the output of `{call.owner}`"
        return f"what {self.graph.where(call)} gave"

    def _reads_same_place(self, call: Call, value: int) -> bool:
        """Whether the layer of a call could add a map of a value to what it makes of it: it reads that, and only then.

        Each element of its output needs a tap on the element of the same place and channel.
        """
        layer, batchnorm = self.graph.layers[call.owner or ""], self.graph.batchnorms[self.name]
        before, after = self.graph.values[call.inputs[0]], self.graph.values[call.outputs[0]]
        return (
            call.inputs[0] == value
            and len(self.graph.calls_of[call.owner or ""]) == 1
            and (before.shape, before.dtype) == (after.shape, after.dtype)
            and (layer.channel_axis - batchnorm.channel_axis) % len(before.shape) == 0
            and layer.in_channels == layer.out_channels == batchnorm.num_features
            and layer.has_centre_tap(call)
        )

    def _terms(self, term: _Term, *, in_place: bool) -> Iterator[_Term]:
        """What a term is the sum of, where nobody else can see the sum, from the left; itself, where it is none.

        A sum that is written into its first term counts if ``in_place``.
        """
        pending = [term]
        while pending:
            term = pending.pop()
            maker = self._maker_of(term)
            if maker is None:
                yield term
            elif _is_sum(self.graph, maker) and (in_place or not _writes(maker)):
                for index in reversed(maker.inputs):
                    pending.append(_Term(self.graph.values[index], term.sign * _sign(maker, index), maker))
            elif self._is_passed(maker) or _is_sum_with_nothing(maker):
                pending.append(_Term(self.graph.values[maker.inputs[0]], term.sign, maker))
            else:
                yield term

    def _maker_of(self, term: _Term) -> Call | None:
        """The call that made a term, if nobody but the sum sees that."""
        value = term.value
        is_alone = value.users == [term.reader.index] and value.fate is None
        return self.graph.maker(value) if is_alone and value.storage not in self.graph.aliased else None

    def _seen_by(self, value: Value, call: Call) -> _StaysError:
        return _StaysError("other-reader", f"{self._named(value)} is also read by {self.graph.where(call)}")


class _Backward(_Search):
    """Into the layers before the BatchNorm: up from its inputs to outputs of layers, then down over what was met."""

    direction = "backward"
    follows_sums = True

    def _walk(self) -> None:
        self._walk_up()
        for index, channels in self.maps.items():
            value = self.graph.values[index]
            self._check_hidden(value)
            for call in self.graph.users(value):
                self._check_user(value, channels, call)

    def _walk_up(self) -> None:
        pending: list[int] = []
        for call in self.calls:
            value = self.graph.values[call.inputs[0]]
            self._ask(value.index, self._start(value), pending)
        while pending:
            value = self.graph.values[pending.pop()]
            self._check_quickly(value)
            for index, channels in self._asked_by(value):
                self._ask(index, channels, pending)

    def _ask(self, index: int, channels: Channels, pending: list[int]) -> None:
        known = self.maps.get(index)
        if known is not None:
            try:
                channels = known.merged_with(channels)
            except NotTransparent as reason:
                raise _StaysError("two-maps", f"{self._named(self.graph.values[index])} {reason}") from None
            if channels.same_as(known):
                return
        self.maps[index] = channels
        pending.append(index)

    def _asked_by(self, value: Value) -> list[tuple[int, Channels]]:
        call, channels = self.graph.maker(value), self.maps[value.index]
        if call is None:
            raise _StaysError("no-layer", f"it normalises {self._named(value)}, which no layer made")
        if self._is_layer(call):
            assert call.owner is not None
            self.layers[call.owner] = None
            return []
        if self._is_passed(call):
            return [(call.inputs[0], channels)]
        if call.kind == "batchnorm":
            if self._gives_zeros(call) and channels.shift == 0.0:
                return []  # Scaled, they are the same.
            fate = "is folded beside a layer" if call.owner in self.folded else "stays"
            raise _StaysError("behind-batchnorm", f"it normalises what the BatchNorm `{call.owner}` gave, which {fate}")
        if call.name not in RULES:
            what = "outside of any layer" if call.name in _OF_LAYERS else "which is no layer"
            raise _StaysError("no-layer", f"it normalises what {self.graph.where(call)} made, {what}")
        try:
            asked = RULES[call.name].up(self.graph, call, call.outputs.index(value.index), channels)
        except NotTransparent as reason:
            raise _StaysError("not-transparent", f"{self.graph.where(call)} before it {reason}") from None
        return self._shifting_no_zeros(call, asked) if call.name in _SUMS and len(asked) == 2 else asked

    def _gives_zeros(self, call: Call | None) -> bool:
        """Whether a call is that of a BatchNorm which is folded into a layer beside it."""
        fold = self.folded.get(call.owner or "") if call is not None and call.kind == "batchnorm" else None
        return fold is not None and fold.direction == "parallel"

    def _shifting_no_zeros(self, call: Call, asked: list[tuple[int, Channels]]) -> list[tuple[int, Channels]]:
        """Have the second term of a sum shifted where the first one will be nothing."""
        (first, shifted), (second, unshifted) = asked
        if not self._gives_zeros(self.graph.maker(self.graph.values[first])):
            return asked
        shift = shifted.shift * _sign(call, second)
        return [(first, replace(shifted, shift=0.0)), (second, replace(unshifted, shift=shift))]

    def _check_quickly(self, value: Value) -> None:
        """Leave early, so that a long chain of sums is not walked again from each of its members.

        All users are looked at in the end; here a few will do, for a value may have as many as there are layers.
        """
        for call in (self.graph.calls[index] for index in value.users[:_FEW]):
            if not self._is_passed(call) and call.owner != self.name and call.name not in RULES:
                raise self._seen_by(value, call)

    def _check_user(self, value: Value, channels: Channels, call: Call) -> None:
        if call.owner == self.name:
            return
        if self._is_passed(call):
            outputs = [channels]
        else:
            try:
                maps = {index: self.maps[index] for index in call.inputs if index in self.maps}
                outputs = RULES[call.name].down(self.graph, call, maps)
            except (NotTransparent, KeyError):
                raise self._seen_by(value, call) from None
        for index, output in zip(call.outputs, outputs, strict=True):
            asked, made = self.maps.get(index), self.graph.values[index]
            is_seen = made.users or made.fate is not None  # of a split, not every part needs to be
            if is_seen:
                self._check_elements(made)
            if is_seen and output.touches and (asked is None or not asked.same_as(output)):
                raise self._seen_by(value, call)

    def _part_of_call(self, name: str, layer: Layer, call: Call) -> Part:
        return self._part_along(name, self.maps.get(call.outputs[0]), layer.channel_axis, layer.out_channels)


class _Forward(_Search):
    """Into the layers after the BatchNorm: down from its outputs, until every reader is a layer that can take it."""

    direction = "forward"

    def _walk(self) -> None:
        # In the order of the run, so that a call is looked at when everything that it reads is known.
        readers: list[int] = []
        for call in self.calls:
            value = self.graph.values[call.outputs[0]]
            self._give(value.index, self._start(value), readers)
        last: Call | None = None
        while readers:
            call = self.graph.calls[heapq.heappop(readers)]
            if call is last:
                continue  # It reads several values on the way and was entered once for each.
            last = call
            for index, channels in zip(call.outputs, self._passed_by(call), strict=False):
                self._check_elements(self.graph.values[index])
                if channels.touches:
                    self._give(index, channels, readers)
        for call in self.calls:
            read = self.graph.values[call.inputs[0]]
            self._check_unwritten_between(read, (call,) if last is None else (call, last))

    def _give(self, index: int, channels: Channels, readers: list[int]) -> None:
        self.maps[index] = channels
        value = self.graph.values[index]
        self._check_hidden(value)
        for reader in value.users:
            heapq.heappush(readers, reader)

    def _passed_by(self, call: Call) -> list[Channels]:
        maps = {index: self.maps[index] for index in call.inputs if index in self.maps}
        first = self.graph.values[next(iter(maps))]
        if self._is_layer(call) and set(maps) == {call.inputs[0]}:
            assert call.owner is not None
            self.layers[call.owner] = None
            return []
        if self._is_passed(call) and set(maps) == {call.inputs[0]}:
            return [maps[call.inputs[0]]]
        if call.kind == "batchnorm":
            raise _StaysError("before-batchnorm", f"{self._named(first)} is read by the BatchNorm `{call.owner}`")
        if call.name not in RULES:
            raise _StaysError(
                "no-layer", f"{self._named(first)} is read by {self.graph.where(call)}, which is no layer"
            )
        if torch.finfo(first.dtype).eps < _spacing_of(self.graph.values[call.outputs[0]].dtype):
            reason = "rounds to a narrower dtype, which may hold what is normalised and not what was before"
            raise _StaysError("not-transparent", f"{self.graph.where(call)} after it {reason}")
        try:
            return RULES[call.name].down(self.graph, call, maps)
        except NotTransparent as reason:
            raise _StaysError("not-transparent", f"{self.graph.where(call)} after it {reason}") from None

    def _part_of_call(self, name: str, layer: Layer, call: Call) -> Part:
        if not layer.takes_inputs:
            raise _StaysError("no-layer", f"its output goes into `{name}`, whose inputs cannot be scaled and shifted")
        if layer.pads_with_zeros(call):
            raise _StaysError("zero-padding", f"its output goes into `{name}`, which pads it with zeros")
        return self._part_along(name, self.maps.get(call.inputs[0]), layer.channel_axis, layer.in_channels)


class _Parallel(_Search):
    """Into a layer of the same input whose output it is added to, as in RepVGG; its own output is then nothing."""

    direction = "parallel"

    def _walk(self) -> None:
        if len(self.calls) > 1:
            raise _StaysError("other-call", "it is called several times")
        output = value = self.graph.values[self.calls[0].outputs[0]]
        while _is_sum_with_nothing(reader := self._only_reader(value)):
            value = self.graph.values[reader.outputs[0]]
        if not _is_sum(self.graph, reader):
            raise self._seen_by(value, reader)
        self._written = _writes(reader) and reader.inputs[0] == output.index
        other = next(index for index in reader.inputs if index != value.index)
        layer, sign = self._addend(_Term(self.graph.values[other], _sign(reader, other), reader))
        self._sign = sign * _sign(reader, value.index)
        self._check_unwritten_between(self.graph.values[layer.inputs[0]], (layer, self.calls[0]))
        assert layer.owner is not None
        self.layers[layer.owner] = None

    def _only_reader(self, value: Value) -> Call:
        if value.fate is not None:
            raise _StaysError("kept-alive", f"{self._named(value)} {value.fate}")
        if value.storage in self.graph.aliased:
            raise _StaysError("aliased", f"{self._named(value)} {self.graph.aliased[value.storage]}")
        readers = self.graph.users(value)
        if len(readers) != 1:
            raise self._seen_by(value, readers[-1]) if readers else _StaysError("no-layer", "nothing reads its output")
        return readers[0]

    def _addend(self, term: _Term) -> tuple[Call, float]:
        """The call of a layer that made what it is added to, or a summand of that, if it could take the BatchNorm.

        With it comes the sign with which that goes into the sum.
        """
        meets_batchnorm = False
        for each in self._terms(term, in_place=True):
            # Alone, it was not written in between either: that would have read it, or made a view of it.
            maker = self._maker_of(each)
            if maker is None:
                continue
            if maker.kind == "layer" and self._reads_same_place(maker, self.calls[0].inputs[0]):
                return maker, each.sign
            meets_batchnorm |= maker.kind == "batchnorm"
        if meets_batchnorm:
            raise _StaysError("before-batchnorm", "it is added to what another BatchNorm gave, which stays")
        raise _StaysError("no-layer", "it is not added to the output of a layer of the same input")

    def _part_of_call(self, name: str, layer: Layer, call: Call) -> Part:
        return Part(name, shift=self._sign)


class _Residual(_Search):
    """Into all layers of a sum, of which one takes over what is added of its own input, as in RepViT."""

    direction = "backward"

    def _walk(self) -> None:
        if len(self.calls) > 1:
            raise _StaysError("other-call", "it is called several times")
        whole = _Term(self.graph.values[self.calls[0].inputs[0]], 1.0, self.calls[0])
        terms = list(self._terms(whole, in_place=False))
        made = [(term, call) for term in terms if (call := self._layer_of(term)) is not None]
        for term, call in made:
            assert call.owner is not None
            self.layers[call.owner] = None
            # The first one takes the whole shift.
            share = 0.0 if self.maps else term.sign
            self.maps[term.value.index] = replace(self._start(term.value), shift=share)
        self._residuals: dict[str | None, float] = defaultdict(float)
        for term in terms:
            if term.value.index not in self.maps:
                self._give_to_its_reader(term, made)
        gain = self.graph.batchnorms[self.name].residual_gain
        if not gain <= _MOST_RESIDUAL_GAIN:
            how = f"be rounded {gain:.1f} times more coarsely" if math.isfinite(gain) else "drown in rounding errors"
            raise _StaysError("rounding", f"what is added before it would {how}")

    def _layer_of(self, term: _Term) -> Call | None:
        """The call of a layer that made a term for this sum alone."""
        maker = self._maker_of(term)
        return maker if maker is not None and maker.kind == "layer" else None

    def _give_to_its_reader(self, term: _Term, made: list[tuple[_Term, Call]]) -> None:
        for output, call in made:
            if self._reads_same_place(call, term.value.index):
                self._check_unwritten_between(term.value, (call, term.reader))
                self._residuals[call.owner] += term.sign * output.sign
                return
        raise _StaysError("no-layer", f"{self._named(term.value)} is added to it, and is no input of a layer beside it")

    def _part_of_call(self, name: str, layer: Layer, call: Call) -> Part:
        part = self._part_along(name, self.maps.get(call.outputs[0]), layer.channel_axis, layer.out_channels)
        return replace(part, residual=self._residuals[name])


def _spacing_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


# What the function of a layer becomes where it is called with the weight of another module, or of none.
_OF_LAYERS = (
    "aten.convolution.default",
    "aten.addmm.default",
    "aten.mm.default",
    "aten.embedding.default",
)

_SUMS = ("aten.add.Tensor", "aten.sub.Tensor", *IN_PLACE_SUMS)


def _is_sum(graph: ValueGraph, call: Call) -> bool:
    """Whether a call adds or subtracts two different tensors of one shape, each once."""
    is_sum = call.name in _SUMS and not call.kwargs and len(call.args) == 2 and len(call.inputs) == 2
    return is_sum and len({graph.values[index].shape for index in (*call.inputs, *call.outputs)}) == 1


def _is_sum_with_nothing(call: Call) -> bool:
    return call.name == "aten.add.Tensor" and adds_nothing(call)


def _sign(call: Call, value: int) -> float:
    """The sign with which a value goes into a sum."""
    return -1.0 if call.name.startswith("aten.sub") and call.args[1] == Ref(value) else 1.0


def _writes(call: Call) -> bool:
    return call.name in IN_PLACE_SUMS


def _is_laid_out_anew(before: Value, after: Value) -> bool:
    """Whether the strides differ, on an axis of size 1 as well: it may be longer next time.

    Images whose channels come last are left so by torch, except for those of a single pixel, where it cannot tell, and
    for those of a single channel, which come out in the other layout.
    """
    axes = list(range(len(before.shape)))
    if len(axes) in (4, 5) and before.stride == _channels_last(before.shape):
        axes = [axis for axis in axes if before.shape[axis] > 1 or axis == 1]
    return any(before.stride[axis] != after.stride[axis] for axis in axes)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose axes follow each other in memory."""
    return _strides(shape, range(len(shape) - 1, -1, -1))


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of images (N, C, ...) whose channels come last in memory."""
    return _strides(shape, (1, *range(len(shape) - 1, 1, -1), 0))


def _strides(shape: tuple[int, ...], axes: Iterable[int]) -> tuple[int, ...]:
    """The strides of a tensor whose axes lie in memory in a certain order, from the innermost one."""
    strides, step = [0] * len(shape), 1
    for axis in axes:
        strides[axis], step = step, step * max(1, shape[axis])
    return tuple(strides)
