"""From the value graph to a folding plan: which BatchNorm goes where, and why the others stay.

Pure: reads the graph and touches no model. The question asked of every BatchNorm is: if its affine map were applied to
the outputs of these layers instead, would any value change that anybody else can see? The walk up finds the layers; the
walk down over everything that was met on the way looks for whoever else can see.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lit_bnfold.folding.graph import Call, FoldingError, Obstacle, Value, ValueGraph
from lit_bnfold.folding.transparent import RULES, Channels, NotTransparent

if TYPE_CHECKING:
    from torch import nn

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class Part:
    """What one layer takes of a BatchNorm.

    Attributes:
        layer: Name of the layer.
        channels: The BatchNorm's channel for each output channel of the layer, -1 where the layer stays as it is;
            None where output channel ``i`` is channel ``i``.
        shift: The share of the shift that this layer takes.
    """

    layer: str
    channels: tuple[int, ...] | None = None
    shift: float = 1.0


@dataclass(frozen=True)
class Fold:
    """A BatchNorm that is folded.

    Attributes:
        batchnorm: Name of the BatchNorm.
        parts: The layers that take it, each with what it takes.
        direction: ``backward`` into layers before the BatchNorm.
    """

    batchnorm: str
    parts: tuple[Part, ...]
    direction: str = "backward"

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that take the BatchNorm."""
        return tuple(part.layer for part in self.parts)


@dataclass(frozen=True)
class Kept:
    """A BatchNorm that stays.

    Attributes:
        batchnorm: Name of the BatchNorm.
        reason: Why it stays, in a sentence.
        code: Why it stays, for programs.
    """

    batchnorm: str
    reason: str
    code: str


@dataclass(frozen=True)
class FoldingPlan:
    """What to do with every BatchNorm of a model; ``folds`` and ``kept`` together name each exactly once.

    Attributes:
        folds: The BatchNorms that are folded, in the order in which they have to be.
        kept: The BatchNorms that stay.
    """

    folds: tuple[Fold, ...] = ()
    kept: tuple[Kept, ...] = ()

    def apply(self, model: nn.Module, inplace: bool = False) -> nn.Module:
        """Fold a model that has the structure of the one this plan was made for.

        Args:
            model: The model to fold.
            inplace: Whether to fold ``model`` itself. Otherwise it is copied and stays as it is.

        Returns:
            The folded model, of the same class.

        Raises:
            FoldingError: If the plan does not fit the model; then the model is as it was.
        """
        from lit_bnfold.folding.rewrite import apply_plan

        return apply_plan(self, model, inplace=inplace)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain dicts, lists, strings and numbers, fit for JSON.

        Example:
            >>> FoldingPlan((Fold("bn", (Part("fc"),)),)).to_dict()["folds"]
            [{'batchnorm': 'bn', 'parts': [{'layer': 'fc', 'channels': None, 'shift': 1.0}], 'direction': 'backward'}]
        """
        folds = [asdict(fold) | {"parts": [_part_to_dict(part) for part in fold.parts]} for fold in self.folds]
        return {"version": MANIFEST_VERSION, "folds": folds, "kept": [asdict(kept) for kept in self.kept]}

    @classmethod
    def from_dict(cls, plan: dict[str, Any]) -> FoldingPlan:
        """The plan that ``to_dict`` made a dict of.

        Args:
            plan: A dict as from ``to_dict``.

        Raises:
            FoldingError: If it is none, or of a version that this package does not know.
        """
        if not isinstance(plan, dict) or plan.get("version") != MANIFEST_VERSION:
            version = plan.get("version") if isinstance(plan, dict) else None
            raise FoldingError(f"Expected a folding plan of version {MANIFEST_VERSION}, got version {version!r}.")
        try:
            folds = tuple(_fold_from_dict(fold) for fold in plan["folds"])
            return cls(folds, tuple(Kept(**kept) for kept in plan["kept"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FoldingError(f"Expected a dict as `FoldingPlan.to_dict` gives it, found {error!r} in it.") from error

    def __str__(self) -> str:
        """The plan as a table for people."""
        rows = [(fold.batchnorm, f"folded {fold.direction} into {', '.join(fold.layers)}") for fold in self.folds]
        rows += [(kept.batchnorm, f"kept: {kept.reason}") for kept in self.kept]
        if not rows:
            return "no BatchNorm"
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {what}" for name, what in rows)


def _part_to_dict(part: Part) -> dict[str, Any]:
    return asdict(part) | {"channels": None if part.channels is None else list(part.channels)}


def _fold_from_dict(fold: dict[str, Any]) -> Fold:
    if fold["direction"] != "backward":
        raise ValueError(f"direction {fold['direction']!r}")
    parts = []
    for part in fold["parts"]:
        channels = part["channels"]
        channels = None if channels is None else tuple(int(channel) for channel in channels)
        parts.append(Part(str(part["layer"]), channels, float(part["shift"])))
    return Fold(str(fold["batchnorm"]), tuple(parts), fold["direction"])


def make_plan(graph: ValueGraph) -> FoldingPlan:
    """Decide about every BatchNorm of a recorded model.

    Args:
        graph: What one run of the model did.

    Returns:
        The plan.
    """
    folded: dict[str, Fold] = {}
    stays: dict[str, Obstacle] = {}
    # A BatchNorm behind another one can be folded once that one is; the rounds end when one of them folds nothing.
    open_names = _in_order_of_the_run(graph)
    while open_names:
        before = len(folded)
        for name in open_names:
            try:
                folded[name] = _Backward(graph, name, folded).fold()
            except _StaysError as stay:
                stays[name] = stay.obstacle
        waits = [name for name in open_names if name not in folded and stays[name][0] == "behind-batchnorm"]
        open_names = waits if len(folded) > before else []
    kept = (Kept(name, stays[name][1], stays[name][0]) for name in graph.batchnorms if name not in folded)
    return FoldingPlan(tuple(folded.values()), tuple(kept))


def _in_order_of_the_run(graph: ValueGraph) -> list[str]:
    called = [name for name in graph.calls_of if name in graph.batchnorms]
    return called + [name for name in graph.batchnorms if name not in graph.calls_of]


class _StaysError(Exception):
    """A BatchNorm has to stay."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.obstacle: Obstacle = (code, reason)


class _Backward:
    """Looks for the layers before one BatchNorm that can take it.

    Args:
        graph: What the run did.
        name: Name of the BatchNorm.
        folded: The BatchNorms that are folded already: they pass everything on as it is.
    """

    def __init__(self, graph: ValueGraph, name: str, folded: dict[str, Fold]) -> None:
        self.graph = graph
        self.name = name
        self.folded = folded
        self.calls = graph.calls_of.get(name, [])
        self.maps: dict[int, Channels] = {}
        self.layers: set[str] = set()

    def fold(self) -> Fold:
        """The fold.

        Raises:
            _StaysError: If there is none.
        """
        self._check_batchnorm()
        self._walk_up()
        for index, channels in self.maps.items():
            self._check_value(self.graph.values[index], channels)
        self._check_outputs()
        parts = tuple(self._part(layer) for layer in sorted(self.layers, key=list(self.graph.layers).index))
        self._check_other_paths()
        return Fold(self.name, parts)

    def _check_batchnorm(self) -> None:
        facts = self.graph.batchnorms[self.name]
        if facts.obstacle is not None:
            raise _StaysError(*facts.obstacle)
        if not self.calls:
            raise _StaysError("not-reached", "the run did not reach it")
        for tensor in facts.parameters:
            self._check_readers(tensor, "batchnorm")

    def _check_readers(self, tensor: str, kind: str, owner: str | None = None) -> None:
        """A parameter that would change or go may be read by its own module alone."""
        value = self.graph.named_values[tensor]
        for call in self.graph.users(value):
            if call.kind != kind or (owner is not None and call.owner != owner):
                raise _StaysError("parameter-read", f"`{tensor}` is also read by {self.graph.where(call)}")
        self._check_memory(value, f"`{tensor}`")

    def _check_memory(self, value: Value, named: str) -> None:
        if value.storage in self.graph.written:
            raise _StaysError("written", f"{named} is written in place by {self.graph.written[value.storage]}")
        if value.storage in self.graph.aliased:
            raise _StaysError("aliased", f"{named} {self.graph.aliased[value.storage]}")

    # Up, from the inputs of the BatchNorm to the outputs of layers.

    def _walk_up(self) -> None:
        pending: list[int] = []
        for call in self.calls:
            value = self.graph.values[call.inputs[0]]
            start = Channels.along(1, self.graph.batchnorms[self.name].num_features, len(value.shape))
            self._ask(value.index, start, pending)
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
        if call.kind == "layer":
            assert call.owner is not None
            self.layers.add(call.owner)
            return []
        if call.kind == "batchnorm" and call.owner in self.folded:
            return [(call.inputs[0], channels)]
        if call.kind == "batchnorm":
            raise _StaysError("behind-batchnorm", f"it normalises what the BatchNorm `{call.owner}` gave, which stays")
        if call.name not in RULES:
            raise _StaysError("no-layer", f"it normalises what {self.graph.where(call)} made, which is no layer")
        try:
            return RULES[call.name].up(self.graph, call, call.outputs.index(value.index), channels)
        except NotTransparent as reason:
            raise _StaysError("not-transparent", f"{self.graph.where(call)} before it {reason}") from None

    # Down, over everything met on the way.

    def _check_quickly(self, value: Value) -> None:
        """Leave early, so that a long chain of sums is not walked again from each of its members."""
        for call in self.graph.users(value):
            passes = call.kind == "batchnorm" and (call.owner == self.name or call.owner in self.folded)
            if not passes and call.name not in RULES:
                raise self._seen_by(value, call)

    def _check_value(self, value: Value, channels: Channels) -> None:
        if value.fate is not None:
            raise _StaysError("kept-alive", f"{self._named(value)} {value.fate}")
        self._check_memory(value, self._named(value))
        for call in self.graph.users(value):
            self._check_user(value, channels, call)

    def _check_user(self, value: Value, channels: Channels, call: Call) -> None:
        if call.kind == "batchnorm" and call.owner == self.name:
            return
        if call.kind == "batchnorm" and call.owner in self.folded:
            outputs = [channels]
        else:
            try:
                maps = {index: self.maps[index] for index in call.inputs if index in self.maps}
                outputs = RULES[call.name].down(self.graph, call, maps)
            except (NotTransparent, KeyError):
                raise self._seen_by(value, call) from None
        for index, output in zip(call.outputs, outputs, strict=True):
            asked = self.maps.get(index)
            if output.touches and (asked is None or not asked.same_as(output)):
                raise self._seen_by(value, call)

    def _check_outputs(self) -> None:
        """Without the BatchNorm its output is its input: that must not show either."""
        for call in self.calls:
            before, after = self.graph.values[call.inputs[0]], self.graph.values[call.outputs[0]]
            if after.storage in self.graph.written and any(self._is_forked(index) for index in self.maps):
                raise _StaysError("written", f"its output is written in place by {self.graph.written[after.storage]}")
            if _layout(before) != _layout(after) and self.graph.is_reinterpreted(after):
                raise _StaysError("layout", "it lays its output out anew in memory, and a later `view` relies on that")

    def _is_forked(self, index: int) -> bool:
        """Whether others share the memory of a value met on the way, or autograd forbids writing into it."""
        value = self.graph.values[index]
        maker = self.graph.maker(value)
        return len(value.users) > 1 or (maker is not None and len(maker.outputs) > 1)

    # The layers.

    def _part(self, name: str) -> Part:
        layer = self.graph.layers[name]
        if layer.obstacle is not None:
            raise _StaysError(*layer.obstacle)
        for tensor in layer.parameters:
            self._check_readers(tensor, "layer", name)
        parts = {self._part_of_call(name, call) for call in self.graph.calls_of[name]}
        if len(parts) > 1:
            raise _StaysError("two-maps", f"`{name}` is called several times and asked for different maps")
        return parts.pop()

    def _part_of_call(self, name: str, call: Call) -> Part:
        layer, channels = self.graph.layers[name], self.maps.get(call.outputs[0])
        if channels is None:
            raise _StaysError("other-call", f"`{name}` is also called where nothing is normalised")
        along = channels.along_axis(layer.channel_axis, layer.out_channels)
        if along is None:
            raise _StaysError("channel-axis", f"its channels do not lie on the output channels of `{name}`")
        return Part(name, None if along == tuple(range(layer.out_channels)) else along, channels.shift)

    def _check_other_paths(self) -> None:
        """Where a tensor became a Python value, the run showed one path of several through the modules then running."""
        involved = [*self.calls, *(call for layer in self.layers for call in self.graph.calls_of[layer])]
        around = [set(self.graph.modules_around(call.frame)) for call in involved]
        common = set.intersection(*around)
        innermost = [m for m in self.graph.modules_around(involved[0].frame) if m in common][-1]
        if innermost in self.graph.forked:
            place = "the code around it" if innermost is None else f"`{innermost}`" if innermost else "the model"
            raise _StaysError(
                "python-value", f"{place} makes a Python value of a tensor and may branch on it next time"
            )

    def _named(self, value: Value) -> str:
        call = self.graph.maker(value)
        if call is None:
            return f"`{value.name}`" if value.name else "an input"
        if call.owner is not None:
            return f"the output of `{call.owner}`"
        return f"what {self.graph.where(call)} gave"

    def _seen_by(self, value: Value, call: Call) -> _StaysError:
        return _StaysError("other-reader", f"{self._named(value)} is also read by {self.graph.where(call)}")


def _layout(value: Value) -> tuple[int, ...]:
    """Strides of the axes on which there is more than one step to take."""
    return tuple(stride for size, stride in zip(value.shape, value.stride, strict=True) if size > 1)
