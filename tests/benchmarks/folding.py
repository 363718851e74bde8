"""How long folding takes, against `torch.fx`, over the length of a chain, and how much memory it needs in place.

Run it with ``python tests/benchmarks/folding.py``; it prints its table with hardware, versions and the number of runs.
Only ratios of interleaved pairs are worth comparing between machines.

Where the time goes, of 147 ms for a ResNet-50 on two images of 32 x 32 pixels: one call of the model 25 ms, recording
it 25, the second run 8, three copies of the structure 14, facts about the modules 8, and new weights in float64 69, of
which 47 only map the memory that they are written to. ``fuse`` runs nothing, and so proves nothing; what it takes
depends on whether its memory is mapped already. In a new process it is not, and ours takes 1.0 to 1.1 times as much, of
which the garbage collector has a third. Copying and recording were made a third cheaper, and the second run computes no
layer whose output there was room to keep; what is left above ``fuse`` are the two runs. Watching by itself, with hooks
and modes that note nothing, adds 7 ms to the 11 that a call of an EfficientNet-B0 takes, of which there are two; the
rest is spread so evenly over copies, facts, calls and values that no part of it comes to a tenth.
"""

from __future__ import annotations

import copy
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import networks
import torch
from measuring import Row, collecting, in_turn, median_ratio, medians, seconds, show
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from lit_bnfold.folding import fold_batchnorm, plan_folding
from lit_bnfold.folding.kinds import KINDS
from lit_bnfold.folding.search import make_plan
from lit_bnfold.folding.trial import run_as_it_is

PAIRS = 11
NETWORKS = 24  # with weights and statistics of their own, in which errors are measured
MODELS = {
    "ResNet-50": networks.resnet50,
    "MobileNetV3": networks.mobilenet_v3,
    "EfficientNet-B0": networks.efficientnet_b0,
}

# What whoever folds a model does: once, in a process of its own, with the garbage collector on.
ONCE = """
import time, torch, networks
from lit_bnfold.folding import fold_batchnorm
from torch.fx.experimental.optimization import fuse
torch.set_num_threads(1)
model, x = networks.{make}(), networks.images(2, 32)
with torch.no_grad():
    model(x)
start = time.process_time()
{call}
print(time.process_time() - start)
"""


def against_fx(name: str, make: Callable[[], nn.Module]) -> Iterator[Row]:
    model = make()
    for size in (32, 64):
        x = networks.images(2, size)
        functions: list[Callable[[], object]] = [partial(fold_batchnorm, model, (x,)), partial(fuse, model)]
        pairs = in_turn(functions, PAIRS)
        ours, theirs = (f"{1e3 * time:.0f} ms" for time in medians(pairs))
        measured = f"{ours}; torch.fx fuse {theirs}; {PAIRS} pairs"
        yield Row(f"{name}, folded on {tuple(x.shape)}", "<= 1.0", measured, median_ratio(pairs))
        # `fuse` leaves cycles behind; where they are collected, its next call finds memory that is mapped already.
        collected = median_ratio(in_turn(functions, PAIRS, collecting))
        yield Row("  the same with the garbage collector on", "", "", collected)
        recorded = statistics.median(seconds(partial(recorded_plan, model, x)) for _ in range(PAIRS))
        yield Row("  of which the run that is recorded", "", f"{1e3 * recorded:.0f} ms")
        forward = statistics.median(seconds(partial(model, x)) for _ in range(PAIRS))
        yield Row("  one call of the model alone", "", f"{1e3 * forward:.0f} ms")
    calls = [partial(once, call, make) for call in ("fold_batchnorm(model, (x,))", "fuse(model)")]
    pairs = in_turn(calls, PAIRS, lambda call: call())
    ours, theirs = (f"{1e3 * time:.0f} ms" for time in medians(pairs))
    yield Row("  once, in a new process", "", f"{ours}; torch.fx fuse {theirs}; {PAIRS} pairs", median_ratio(pairs))
    folded, fused = fold_batchnorm(model, (x,)), fuse(model)
    every = networks.batchnorms(model)
    counts = f"{every - networks.batchnorms(folded)} of {every}; fuse {every - networks.batchnorms(fused)}"
    yield Row("  BatchNorms folded", "", counts)


def once(call: str, make: Callable[[], nn.Module]) -> float:
    """The time of a call that is the first of its kind in a process."""
    code = ONCE.format(make=make.__name__, call=call)
    ran = [sys.executable, "-c", code]
    return float(subprocess.run(ran, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout)


def recorded_plan(model: nn.Module, x: Tensor) -> object:
    return make_plan(run_as_it_is(model, (x,), {}, KINDS).graph)


def digits() -> Iterator[Row]:
    found: dict[str, list[tuple[float, float]]] = {"unfolded": [], "torch.fx fuse": [], "folded": []}
    for _ in range(NETWORKS):
        model, x = networks.randomised(networks.resnet50()), networks.images(8, 64)
        for name, folded in zip(found, (model, fuse(model), fold_batchnorm(model, (x,))), strict=True):
            found[name].append(errors(folded, model, x))
    for name, several in found.items():
        largest, rms = medians(several)
        yield Row(f"ResNet-50, error in float32, {name}", "", f"{largest:.1e} ({rms:.2e} rms), {NETWORKS} networks")
    # One element of each network decides on the largest, so that it is a matter of chance within some percent.
    for place, kind in enumerate(("largest", "rms")):
        ratios = [
            ours[place] / theirs[place] for ours, theirs in zip(found["folded"], found["torch.fx fuse"], strict=True)
        ]
        smaller = sum(ratio < 1 for ratio in ratios)
        measured = f"smaller in {smaller} of {NETWORKS}"
        yield Row(f"  {kind}, folded against fuse", "<= 1.0", measured, statistics.geometric_mean(ratios))


def errors(folded: nn.Module, model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Of float32 outputs, against the unfolded model in float64: the largest, by the largest output, and rms."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        error = folded(x).double() - exact
    largest, rms = error.abs().max() / exact.abs().max(), error.square().mean().sqrt() / exact.square().mean().sqrt()
    return float(largest), float(rms)


def chains() -> Iterator[Row]:
    of_a_layer = {}
    for length in (100, 1000, 5000):
        of_a_layer[length] = statistics.median(in_place(length) for _ in range(3)) / length
        yield Row(f"chain of {length:,} layers", "", f"{1e3 * of_a_layer[length]:.2f} ms a layer, median of 3")
    yield Row("  a layer of 1,000, against one of 100", "<= 1.1", "", of_a_layer[1000] / of_a_layer[100])


def in_place(length: int) -> float:
    layers = [layer for _ in range(length) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 8)
    return seconds(partial(fold_batchnorm, model, (x,), inplace=True))


def memory() -> Iterator[Row]:
    width, depth = 4096, 12
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=False), nn.BatchNorm1d(width))]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, width)
    plan = plan_folding(model, (x,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan.apply(model, inplace=True)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    one = 8 * width * width / 2**20
    name = f"{depth * width * width / 1e6:.0f}M parameters, in place, memory above the peak before"
    yield Row(name, "<= 1.0", f"{peak:.0f} MiB; one layer in float64 {one:.0f} MiB", peak / one)


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield from memory()  # first, while the peak is still low
    for name, make in MODELS.items():
        yield from against_fx(name, make)
    yield from digits()
    yield from chains()


if __name__ == "__main__":
    show(rows())
