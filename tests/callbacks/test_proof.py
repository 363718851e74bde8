"""The witnesses: what they see, what they measure, and that they measure it against torch's own BatchNorm."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lit_bnfold.folding.rewrite as rewriting
from lit_bnfold.callbacks.proof import GraphWitness, LayerWitness, Witness, output_error
from lit_bnfold.folding import FoldingPlan, plan_folding
from lit_bnfold.folding.rewrite import folded_in_place

Randomised = Callable[[nn.Module], nn.Module]


class Network(LightningModule):
    """Every way in which a layer can take part in a fold: alone, beside another one, and as one side of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.alone_norm = nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5)
        self.left, self.right, self.joined_norm = nn.Linear(5, 2), nn.Linear(5, 3), nn.BatchNorm1d(5)
        self.one, self.other, self.sum_norm = nn.Linear(5, 3), nn.Linear(5, 3), nn.BatchNorm1d(3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.alone_norm(self.alone(inputs)))
        hidden = torch.tanh(self.joined_norm(torch.cat([self.left(hidden), self.right(hidden)], dim=1)))
        return self.sum_norm(self.one(hidden) + self.other(hidden))


LAYERS = {"alone", "left", "right", "one", "other"}


@pytest.fixture
def network(randomised: Randomised) -> Network:
    network = randomised(Network()).double().eval()
    assert isinstance(network, Network)
    return network


def watched(witness: Witness, inputs: Tensor) -> Any:
    """One run that a witness sees, as it would see that of a batch."""
    with witness, torch.no_grad():
        witness.batches.append(inputs)
        witness.watch()
        witness.pl_module(inputs)
    return witness


def number_of_hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


def rows(count: int = 6) -> Tensor:
    return torch.randn(count, 4, dtype=torch.float64)


def measured(
    network: LightningModule, change: Callable[[], object] = lambda: None
) -> tuple[FoldingPlan, Any, Any, Any]:
    """The plan, the witness of the original, that of the folded layers, and the error of the outputs."""
    inputs = rows()
    original = watched(GraphWitness(network), inputs)
    plan = original.plan()
    folded = LayerWitness(network, plan)
    with folded_in_place(plan, network):
        change()
        watched(folded, inputs)
        return plan, original, folded, output_error(plan, original, folded)


def test_the_plan_of_what_was_watched_is_that_of_a_run(network: Network) -> None:
    plan = watched(GraphWitness(network), rows()).plan()
    assert plan == plan_folding(network, (rows(),))
    assert [fold.layers for fold in plan.folds] == [("alone",), ("left", "right"), ("one", "other")]
    assert plan.kept == ()


def test_each_layer_agrees_with_batchnorm_after_it(network: Network) -> None:
    plan, _, folded, outputs = measured(network)
    assert folded.errors.keys() == LAYERS
    for fold in plan.folds:
        error = folded.error_of(fold)
        assert 0 <= error["max_rel"] < 1e-6
        assert error["max_abs"] < 1e-6
    assert outputs is not None
    assert outputs["max_rel"] < 1e-6


@pytest.mark.parametrize("layer", sorted(LAYERS))
def test_a_layer_that_is_off_is_found_and_no_other(layer: str, network: Network) -> None:
    def change() -> None:
        with torch.no_grad():
            network.get_submodule(layer).bias.mul_(1.01)

    plan, _, folded, outputs = measured(network, change)
    errors = {name: float(error.compute()["max_rel"]) for name, error in folded.errors.items()}
    assert {name for name, error in errors.items() if error > 1e-4} == {layer}
    worst = max(plan.folds, key=lambda fold: folded.error_of(fold)["max_rel"])
    assert layer in worst.layers
    assert outputs["max_rel"] > 1e-5


class OfAllSorts(LightningModule):
    """Layers that do more, that compute their weight, that nobody knows; and BatchNorms as layers."""

    class Block(nn.Linear):
        """A layer that holds its own BatchNorm and activation."""

        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o, bias=False)
            self.norm = nn.BatchNorm1d(o)

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.tanh(self.norm(nn.functional.linear(inputs, self.weight, self.bias)))

    class Unknown(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(o, i)), nn.Parameter(torch.randn(o))

        def forward(self, inputs: Tensor) -> Tensor:
            return nn.functional.linear(inputs, self.weight, self.bias)

    def __init__(self) -> None:
        super().__init__()
        self.block = self.Block(4, 5)
        self.computed, self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), nn.BatchNorm1d(5)
        self.first, self.second = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
        self.unknown, self.last = self.Unknown(5, 3), nn.BatchNorm1d(3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.computed(self.block(inputs)))
        hidden = torch.tanh(self.second(self.first(hidden.relu())))
        return self.last(self.unknown(hidden))


def test_layers_of_all_sorts_are_compared_where_they_compute(randomised: Randomised) -> None:
    network: Any = randomised(OfAllSorts()).double().eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    plan, _, folded, outputs = measured(network)
    assert {fold.batchnorm: fold.layers for fold in plan.folds} == {
        "block.norm": ("block",),
        "norm": ("computed",),
        "first": ("second",),
        "last": ("unknown",),
    }
    assert all(folded.error_of(fold)["max_rel"] < 1e-12 for fold in plan.folds)
    assert outputs["max_rel"] < 1e-12
    after = network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("layer", ["block", "computed", "second", "unknown"])
def test_a_layer_of_any_sort_that_is_off_is_found_and_no_other(layer: str, randomised: Randomised) -> None:
    network: Any = randomised(OfAllSorts()).double().eval()

    def change() -> None:
        with torch.no_grad():
            network.get_submodule(layer).weight.mul_(1.01)

    _, _, folded, _ = measured(network, change)
    errors = {name: float(error.compute()["max_rel"]) for name, error in folded.errors.items()}
    assert {name for name, error in errors.items() if error > 1e-4} == {layer}


def test_the_measure_is_the_largest_difference_in_units_of_the_largest_output(network: Network) -> None:
    def change() -> None:
        with torch.no_grad():
            network.alone.bias += torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0])

    inputs = rows()
    original = watched(GraphWitness(network), inputs)
    plan, folded = original.plan(), None
    folded = LayerWitness(network, plan)
    with torch.no_grad():
        largest = network.alone_norm(network.alone(inputs)).abs().max()
    with folded_in_place(plan, network):
        change()
        watched(folded, inputs)
    assert folded.error_of(plan.folds[0]) == pytest.approx({"max_abs": 0.5, "max_rel": 0.5 / float(largest)}, rel=1e-5)


def test_a_layer_that_was_not_called_is_not_proven(network: Network) -> None:
    plan = plan_folding(network, (rows(),))
    folded = LayerWitness(network, plan)
    assert folded.error_of(plan.folds[0]) == {"max_abs": math.inf, "max_rel": math.inf}


def test_nothing_is_left_on_the_module(network: Network) -> None:
    measured(network)
    assert number_of_hooks(network) == 0
    for witness in (GraphWitness(network), LayerWitness(network, plan_folding(network, (rows(),)))):
        with pytest.raises(RuntimeError, match="shapes"):
            watched(witness, rows()[:, :2])
        assert number_of_hooks(network) == 0


def test_only_the_first_batch_of_a_loader_is_watched(network: Network) -> None:
    with GraphWitness(network) as witness, torch.no_grad():
        for loader in range(2):
            for batch in range(3):
                inputs = rows(batch + 2)
                witness.on_validation_batch_start(None, network, inputs, batch, loader)
                network(inputs)
                witness.on_validation_batch_end(None, network, None, inputs, batch, loader)
    assert [len(tensor) for [tensor] in witness.batches] == [2, 2]
    assert len(witness.calls) == 2
    assert len(witness.plan().folds) == 3


def test_outputs_for_other_batches_are_not_compared(network: Network) -> None:
    original = watched(GraphWitness(network), rows())
    plan = original.plan()
    for other in (rows(), rows(3)):
        assert output_error(plan, original, watched(Witness(network), other)) is None
    twice = watched(watched(Witness(network), original.batches[0]), original.batches[0])
    assert output_error(plan, original, twice) is None


def test_a_call_that_holds_only_a_part_of_a_fold_is_not_compared(network: Network) -> None:
    """Between a layer and its BatchNorm the two versions differ, and rightly."""
    inputs = rows()
    plan = plan_folding(network, (inputs,))

    def parts(witness: Witness) -> Witness:
        with witness, torch.no_grad():
            witness.batches.append(inputs)
            witness.watch()
            network.alone_norm(network.alone(inputs))
        return witness

    original = parts(Witness(network))
    with folded_in_place(plan, network):
        folded = parts(Witness(network))
    assert [call.module for call in original.calls] == [network.alone, network.alone_norm]
    assert output_error(plan, original, folded) is None


@pytest.mark.parametrize("other", [lambda outputs: outputs[:, :2], lambda outputs: (outputs, outputs)])
def test_outputs_of_another_shape_or_number_are_no_agreement(other: Callable[[Tensor], Any], network: Network) -> None:
    def change() -> None:
        network.register_forward_hook(lambda module, args, output: other(output))

    assert measured(network, change)[3] == {"max_abs": math.inf, "max_rel": math.inf}


def test_complex_outputs_are_compared(randomised: Randomised) -> None:
    class Complex(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

        def forward(self, inputs: Tensor) -> Tensor:
            outputs = self.net(inputs)
            return torch.complex(outputs, -outputs)

    module = randomised(Complex()).double().eval()
    assert isinstance(module, Complex)
    plan, _, _, outputs = measured(module)
    assert len(plan.folds) == 1
    assert outputs is not None
    assert outputs["max_rel"] < 1e-6


def test_whole_numbers_are_left_out_and_nested_outputs_are_found(randomised: Randomised) -> None:
    class Nested(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

        def forward(self, inputs: Tensor) -> Any:
            logits = self.net(inputs)
            return {"best": logits.argmax(1), "all": [(logits,)]}

    module, inputs = randomised(Nested()).double().eval(), rows()
    original = watched(GraphWitness(module), inputs)
    plan = original.plan()
    with folded_in_place(plan, module):
        with torch.no_grad():
            module.net[0].bias += 1.0
        folded = watched(Witness(module), inputs)
    assert output_error(plan, original, folded)["max_abs"] == pytest.approx(1.0)


# What roundings do not explain ----------------------------------------------------------------------------------------


def in_dtype(randomised: Randomised, dtype: torch.dtype) -> tuple[Any, Tensor]:
    return randomised(Network()).to(dtype).eval(), torch.randn(6, 4).to(dtype)


def objection(network: Any, inputs: Tensor, change: Callable[[], object], tolerance: float | None = None) -> str | None:
    plan = watched(GraphWitness(network), inputs).plan()
    folded = LayerWitness(network, plan, tolerance)
    with folded_in_place(plan, network):
        change()
        return watched(folded, inputs).objection()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_roundings_are_no_objection(dtype: torch.dtype, randomised: Randomised) -> None:
    assert objection(*in_dtype(randomised, dtype), lambda: None) is None


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1.000001), (torch.float16, 1.002), (torch.bfloat16, 1.01)]
)
def test_numbers_that_are_not_those_of_the_fold_are_an_objection(
    dtype: torch.dtype, factor: float, randomised: Randomised
) -> None:
    network, inputs = in_dtype(randomised, dtype)

    def change() -> None:
        network.right.weight.data = network.right.weight.data * factor

    assert "the folded layer `right` has a `weight` that is off by" in objection(network, inputs, change)
    assert objection(network, inputs, change, tolerance=0.1) is None


@pytest.mark.parametrize("name", ["fold_into_outputs", "fold_into_inputs", "add_identity"])
def test_a_wrong_fold_is_an_objection_in_bfloat16_too(
    name: str, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers are then those of the fold, and it is the fold that is wrong."""
    right = getattr(rewriting, name)

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weight, bias = right(*args, **kwargs)
        return weight * 1.0001, bias

    monkeypatch.setattr(rewriting, name, wrong)

    class Branches(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.behind = nn.Linear(4, 4), nn.BatchNorm1d(4)
            self.ahead, self.second = nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.beside, self.third = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.behind(self.first(inputs)).tanh()
            hidden = self.second(self.ahead(hidden)).tanh()
            return self.third(hidden) + self.beside(hidden)

    network: Any = randomised(Branches()).to(torch.bfloat16).eval()
    layer = {"fold_into_outputs": "first", "fold_into_inputs": "second", "add_identity": "third"}[name]
    found = objection(network, torch.randn(6, 4).bfloat16(), lambda: None)
    assert f"in float64 the folded layer `{layer}` is off by" in found


def test_only_some_examples_are_computed_in_float64(network: Network) -> None:
    sizes = []

    class Counting(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.linear and args[0].dtype is torch.float64:
                sizes.append(len(args[0]))
            return func(*args, **(kwargs or {}))

    network.float()
    inputs = torch.randn(500, 4)
    plan = plan_folding(network, (inputs,))
    folded = LayerWitness(network, plan)
    with folded_in_place(plan, network), Counting():
        watched(folded, inputs)
    assert sizes == [64] * 2 * len(LAYERS)


def test_a_layer_that_holds_another_folded_layer_is_compared_as_well(randomised: Randomised) -> None:
    class Outer(nn.Module):
        """Asks the layer inside before it computes by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(5))
            self.inner = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())

        def forward(self, inputs: Tensor) -> Tensor:
            return nn.functional.linear(self.inner(inputs), self.weight, self.bias)

    class Nested(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(Outer(), nn.BatchNorm1d(5))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.net(inputs)

    network = randomised(Nested()).double().eval()
    assert isinstance(network, Nested)
    plan, _, folded, _ = measured(network)
    assert [fold.layers for fold in plan.folds] == [("net.0.inner.0",), ("net.0",)]
    assert all(folded.error_of(fold)["max_rel"] < 1e-12 for fold in plan.folds)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_garbage_collector_is_left_as_it_was(network: Network, frozen: bool) -> None:
    if frozen:
        gc.freeze()
    try:
        watched(GraphWitness(network), rows())
        assert (gc.get_freeze_count() > 0) == frozen
    finally:
        gc.unfreeze()


def test_what_waits_for_the_garbage_collector_does_not_keep_a_batchnorm(randomised: Randomised) -> None:
    class Littering(Network):
        def forward(self, inputs: Tensor) -> Tensor:
            circle: list[Any] = [self.alone(inputs)]
            circle.append(circle)
            hidden = torch.tanh(self.alone_norm(circle[0]))
            hidden = torch.tanh(self.joined_norm(torch.cat([self.left(hidden), self.right(hidden)], dim=1)))
            return self.sum_norm(self.one(hidden) + self.other(hidden))

    network = randomised(Littering()).double().eval()
    assert isinstance(network, Network)
    gc.disable()  # Else it might come along by itself.
    try:
        assert len(watched(GraphWitness(network), rows()).plan().folds) == 3
    finally:
        gc.enable()
