"""A value graph as TensorBoard's graph: what a module really did with a batch, drawn without running it again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count, takewhile

from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.versions_pb2 import VersionDef

from lit_bnfold.folding.graph import Call, Value, ValueGraph, plain_name

# TensorBoard gives slashes, colons and carets in the name of a node a meaning of its own.
_NOT_IN_NAMES = re.compile(r"[^\w-]")

# The version of the format; TensorBoard reads all later ones alike.
_PRODUCER = 22


def draw(graph: ValueGraph) -> GraphDef:
    """Draw what leads to the layers and BatchNorms of a run, and what their networks make of it.

    A loss or a metric that is computed outside of the networks is left out. Each module is a box, and a layer's weights
    are part of it; there is no box around everything.

    Args:
        graph: What was recorded.

    Returns:
        A node for each operation, and one for each tensor that comes from elsewhere; no node if no layer was called.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lit_bnfold.folding.record import Recorder
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
        >>> x = torch.randn(4, 3)
        >>> with torch.no_grad(), Recorder(model) as recorder:
        ...     _ = model(x)
        >>> [(node.name, list(node.input)) for node in draw(recorder.graph).node]
        [('input', []), ('0/linear', ['input']), ('1/batch_norm', ['0/linear'])]
    """
    return _Drawing(graph).definition


class _Drawing:
    def __init__(self, graph: ValueGraph) -> None:
        self._graph = graph
        calls = self._calls()
        scopes = [_path(frame.module) for frame in graph.frames]
        # A box around everything would only be one more to open.
        self._outer = len(_common([scopes[call.frame] for call in calls]))
        self._scopes = ["/".join(scope[self._outer :]) for scope in scopes]
        # A node must not have the name of a box either.
        self._taken = set(self._scopes)
        self._outputs: dict[int, str] = {}  # the name of each value
        self.definition = GraphDef(versions=VersionDef(producer=_PRODUCER))
        for call in calls:
            self._add(call)

    def _calls(self) -> list[Call]:
        """The calls to be drawn, in the order of the run."""
        calls, outermost = self._graph.calls, self._outermost_frames()
        layers = [call for call in calls if call.kind in ("layer", "batchnorm")]
        _, before = self._graph.origins(index for call in layers for index in call.inputs)
        holding_layers = {outermost[call.frame] for call in layers} - {0}
        after, drawn = set[int](), []
        for call in calls:
            is_layer = call.kind in ("layer", "batchnorm")
            comes_from_layer = not after.isdisjoint(call.inputs) and outermost[call.frame] in holding_layers
            if call.kind != "opaque" and (is_layer or call.index in before or comes_from_layer):
                drawn.append(call)
                after.update(call.outputs if is_layer or comes_from_layer else ())
        return drawn

    def _outermost_frames(self) -> list[int]:
        """For each frame, the one it is in that nobody called from within a module."""
        outermost = [0]
        for index, frame in enumerate(self._graph.frames[1:], start=1):
            outermost.append(outermost[frame.parent] if frame.parent else index)
        return outermost

    def _add(self, call: Call) -> None:
        # Behind its input, a layer and a BatchNorm read their own tensors.
        read = call.inputs if call.kind == "operation" else call.inputs[:1]
        values = self._graph.values
        inputs = [self._outputs.get(index) or self._add_source(values[index]) for index in read]
        scope, kind = self._scopes[call.frame], plain_name(call.name)
        name = self._free_name(f"{scope}/{kind}" if scope else kind)
        made = [values[index] for index in call.outputs]
        self._add_node(name, kind, inputs, made)
        for place, value in enumerate(made):
            self._outputs[value.index] = f"{name}:{place}" if place else name

    def _add_source(self, value: Value) -> str:
        """Add what comes from outside of what is drawn: an input, a parameter that is read by itself, a constant."""
        name = self._free_name("/".join(_path(value.name)[self._outer :]) or "input")
        self._add_node(name, "input" if value.name is None else "parameter", [], [value])
        self._outputs[value.index] = name
        return name

    def _add_node(self, name: str, kind: str, inputs: list[str], made: list[Value]) -> None:
        shapes = [TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in value.shape]) for value in made]
        attributes = {"_output_shapes": AttrValue(list=AttrValue.ListValue(shape=shapes))}
        self.definition.node.append(NodeDef(name=name, op=kind, input=inputs, attr=attributes))

    def _free_name(self, name: str) -> str:
        free = (
            name
            if name not in self._taken
            else next(other for number in count(1) if (other := f"{name}_{number}") not in self._taken)
        )
        self._taken.add(free)
        return free


def _path(name: str | None) -> list[str]:
    """The boxes on the way to a module or a parameter, and its own."""
    return [_NOT_IN_NAMES.sub("_", part) for part in name.split(".")] if name else []


def _common(paths: Sequence[list[str]]) -> list[str]:
    """The beginning that all paths have in common."""
    columns = zip(*paths, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
