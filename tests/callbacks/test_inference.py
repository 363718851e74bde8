"""What a folded module saves: the numbers, that measuring leaves no trace, and why something is not measured."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

import lit_bnfold.callbacks.inference as inference
from lit_bnfold.callbacks.export import ExampleCall
from lit_bnfold.callbacks.inference import Inference, measure_inference, runnable_copy

CALLS = [ExampleCall((torch.ones(6, 4),), {})]
ONE_PROCESS: Any = SimpleNamespace(world_size=1)


class Network(LightningModule):
    """Two layers, the second of which may be without its BatchNorm."""

    def __init__(self, *, is_folded: bool) -> None:
        super().__init__()
        norm: nn.Module = nn.Identity() if is_folded else nn.BatchNorm1d(5)
        self.net = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh())
        self.register_buffer("runs", torch.zeros(1))
        self.seen: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.runs += 1
        self.seen.append(len(inputs))
        random.random()
        return self.net(inputs) + torch.rand(1)


def measured(original: LightningModule | None, folded: LightningModule | None, **changes: Any) -> Inference:
    arguments = {"trainer": ONE_PROCESS, "calls": CALLS, "validation_seconds": 1.0} | changes
    return measure_inference(original=original, folded=folded, **arguments)


def both() -> tuple[Network, Network]:
    return Network(is_folded=False).eval(), Network(is_folded=True).eval()


def test_size_operations_and_latency_are_those_of_the_two_modules() -> None:
    made = measured(*both(), validation_seconds=20.0)
    # 4 x 5 weights and 5 biases; the BatchNorm has twice 5 numbers, twice 5 statistics and a count of 8 bytes.
    assert made["size"] == {
        "original": {"parameters": 35, "buffers": 12, "bytes": 4 * (35 + 11) + 8},
        "folded": {"parameters": 25, "buffers": 1, "bytes": 4 * 26},
    }
    assert made["operations"]["original"] - made["operations"]["folded"] >= 1
    assert [each["batch_size"] for each in made["latency"]] == [1, 1024]
    for each in made["latency"]:
        assert each["runs"] >= 3
        assert all(0 < seconds < 10 for seconds in each["seconds"].values())
    assert made["not_measured"] == []
    assert made["setup"]["device"] == "cpu"
    assert made["setup"]["threads"] == 1
    assert made["setup"]["hardware"]


def test_a_shared_parameter_counts_once() -> None:
    tied = Network(is_folded=True)
    tied.other = tied.net[0]
    assert measured(tied, Network(is_folded=True))["size"]["original"]["parameters"] == 25


def test_measuring_leaves_no_trace() -> None:
    module, folded = both()
    original = runnable_copy(module)
    assert original is not None
    before = (torch.get_rng_state(), random.getstate())
    made = measured(original, folded)
    assert made["latency"]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    for each in (module, folded):
        assert (each.runs.item(), each.seen) == (0, [])


class Interrupted(Network):
    def forward(self, inputs: Tensor) -> Tensor:
        super().forward(inputs)
        raise KeyboardInterrupt


def test_an_interrupted_measurement_leaves_no_trace_in_the_random_numbers() -> None:
    original, folded = Interrupted(is_folded=True), Network(is_folded=True)
    before = (torch.get_rng_state(), random.getstate())
    with pytest.raises(KeyboardInterrupt):
        measured(original, folded)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_runnable_copy_shares_its_parameters_alone_and_keeps_the_trainer() -> None:
    module = Network(is_folded=False)
    module.trainer = trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    copied = runnable_copy(module, trainer)
    assert copied is not None
    assert module.trainer is trainer
    assert not copied.training
    assert module.training
    with pytest.raises(RuntimeError, match="not attached"):
        copied.trainer.strategy  # noqa: B018
    pairs = zip(module.parameters(), copied.parameters(), strict=True)
    assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    pairs = zip(module.buffers(), copied.buffers(), strict=True)
    assert all(a.data_ptr() != b.data_ptr() for a, b in pairs)


class Comparing(Network):
    """Takes no single example."""

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) == 1:
            raise ValueError("one is not enough.")
        return self.net(inputs)


class Hungry(Network):
    """Makes 4 MiB of every example."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.new_zeros(len(inputs), 2**20)


class WithLock(Network):
    """Cannot be copied."""

    def __init__(self) -> None:
        super().__init__(is_folded=True)
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"folded": WithLock()}, "operations and latency: the folded module cannot be copied"),
        ({"calls": []}, "operations and latency: validation does not call the module itself"),
        (
            {"calls": [ExampleCall((torch.ones(6, 4), torch.ones(5)), {})]},
            "operations and latency: its arguments do not share",
        ),
        ({"calls": [ExampleCall((3,), {})]}, "operations and latency: its arguments do not share one batch axis"),
        ({"trainer": SimpleNamespace(world_size=2)}, "operations and latency: one of several processes"),
        ({"original": None}, "size, operations and latency: the module cannot be copied"),
        ({"original": Comparing(is_folded=False)}, "operations and latency: ValueError: one is not enough"),
        ({"original": Hungry(is_folded=False)}, "batch of 1,024: one run may take 4.0 GiB"),
    ],
)
def test_what_is_not_measured_has_a_reason(changes: dict[str, Any], reason: str) -> None:
    original, folded = both()
    made = measured(**{"original": original, "folded": folded} | changes)
    # On a busy machine the small batch may take too long as well.
    (sentence,) = (each for each in made["not_measured"] if each.startswith(reason))
    assert not sentence.endswith(".")
    assert 1024 not in [each["batch_size"] for each in made["latency"]]


class Wide(Network):
    """Has a weight of 2 MiB, which it transposes."""

    def __init__(self) -> None:
        super().__init__(is_folded=True)
        self.net = nn.Linear(4, 2**17)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net.weight.t()[:, :3] + inputs[0, 0]


def test_what_is_only_looked_at_in_another_way_takes_no_memory() -> None:
    assert measured(Wide(), Wide())["not_measured"] == []


class Slow(Network):
    """Works out how long it takes by a clock that only runs forward with each example."""

    now = 0.0

    def forward(self, inputs: Tensor) -> Tensor:
        Slow.now += 1e-3 * len(inputs)
        return inputs


@pytest.mark.parametrize(
    ("validation", "latencies", "largest"), [(0.0, 0, 8), (0.2, 1, 8), (1.0, 1, 8), (10.0, 1, 64), (1000.0, 1, 64)]
)
def test_a_module_that_takes_long_is_run_for_a_short_while_only(
    validation: float, latencies: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "time", SimpleNamespace(perf_counter=lambda: Slow.now))
    module = Slow(is_folded=True)
    start = Slow.now
    made = measured(module, Slow(is_folded=True), validation_seconds=validation)
    assert len(made["latency"]) == latencies
    assert Slow.now - start <= max(0.04, min(0.05 * validation, 2.0)) + 2e-3 * largest
    assert "too long for the" in made["not_measured"][0]
