"""The drawing of a value graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_bnfold.callbacks.tensorboard_graph import draw
from lit_bnfold.folding.graph import ValueGraph
from lit_bnfold.folding.record import Recorder


def recorded(model: nn.Module, *runs: Callable[[], Any]) -> ValueGraph:
    with torch.no_grad(), Recorder(model.eval()) as recorder:
        for run in runs:
            run()
    return recorder.graph


def edges(graph: ValueGraph) -> dict[str, list[str]]:
    nodes = list(draw(graph).node)
    assert len({node.name for node in nodes}) == len(nodes)
    known = {node.name for node in nodes}
    assert all(name.partition(":")[0] in known for node in nodes for name in node.input)
    return {node.name: list(node.input) for node in nodes}


def test_what_a_loss_makes_of_the_output_and_what_leads_to_no_layer_are_left_out() -> None:
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 2), nn.ReLU()), "loss": nn.MSELoss()})
    x = torch.randn(4, 3)

    def step() -> None:
        x.double().detach()
        output = model["net"](x * 2)
        model["loss"](output, torch.zeros(4, 2)).log()

    assert edges(recorded(model, step)) == {
        "input": [],
        "mul": ["input"],
        "net/0/linear": ["mul"],
        "net/1/relu": ["net/0/linear"],
    }


def test_a_box_around_everything_is_left_out() -> None:
    inner = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    inner.register_parameter("offset", nn.Parameter(torch.randn(2)))
    inner.register_forward_hook(lambda module, args, output: output + module.offset)
    model, x = nn.ModuleDict({"net": nn.Sequential(inner)}), torch.randn(4, 3)
    found = edges(recorded(model, lambda: model["net"](x)))
    assert found == {
        "input": [],
        "0/linear": ["input"],
        "1/relu": ["0/linear"],
        "offset": [],
        "add": ["1/relu", "offset"],
    }


class Split(nn.Module):
    """Two layers, one name for a module and for an operation, and a second output that is read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.chunk = nn.Linear(2, 2)
        self.offset = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.linear(x).split(2, dim=1)
        return self.chunk(first) + torch.chunk(second, 1, dim=1)[0] + self.offset


def test_the_second_output_of_an_operation_and_a_parameter_that_is_read_by_itself_are_told_apart() -> None:
    model, x = Split(), torch.randn(3, 4)
    found = edges(recorded(model, lambda: model(x)))
    assert found["chunk/linear"] == ["split"]
    assert ["split:1"] in found.values()
    assert found["offset"] == []
    assert found["add_1"][1] == "offset"


def test_a_module_that_is_called_twice_is_one_box_with_two_operations() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(2, 3)
    assert edges(recorded(model, lambda: model(x))) == {
        "input": [],
        "0/linear": ["input"],
        "1/relu": ["0/linear"],
        "0/linear_1": ["1/relu"],
    }


def test_names_with_a_meaning_for_tensorboard_lose_it() -> None:
    model = nn.Sequential()
    for name in ("a/b", "^c:0", "d e", "<script>"):
        model.add_module(name, nn.Linear(2, 2))
    x = torch.randn(3, 2)
    names = list(edges(recorded(model, lambda: model(x))))
    assert names == ["input", "a_b/linear", "_c_0/linear", "d_e/linear", "_script_/linear"]


def test_a_run_without_layers_gives_an_empty_graph() -> None:
    model, x = nn.ReLU(), torch.randn(3)
    assert edges(recorded(model, lambda: model(x))) == {}
