"""How long folding takes, against `torch.fx`, over the length of a chain, and how much memory it needs in place.

Run it with ``python tests/benchmarks/folding.py``; it prints its tables with hardware, versions and the number of runs.
Only ratios of interleaved pairs are worth comparing between machines.
"""

from __future__ import annotations

import copy
import gc
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from lit_bnfold.folding import fold_batchnorm, plan_folding
from lit_bnfold.folding.kinds import KINDS
from lit_bnfold.folding.search import make_plan
from lit_bnfold.folding.trial import run_as_it_is

PAIRS = 11


class Bottleneck(nn.Module):
    """The block of ResNet-50 (He et al., 2015)."""

    def __init__(self, i: int, m: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(i, m, 1, bias=False), nn.BatchNorm2d(m), nn.ReLU(),
            nn.Conv2d(m, m, 3, stride, 1, bias=False), nn.BatchNorm2d(m), nn.ReLU(),
            nn.Conv2d(m, 4 * m, 1, bias=False), nn.BatchNorm2d(4 * m),
        )  # fmt: skip
        projects = stride > 1 or i != 4 * m
        layers = [nn.Conv2d(i, 4 * m, 1, stride, bias=False), nn.BatchNorm2d(4 * m)] if projects else []
        self.shortcut = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, i, H, W) to images (N, 4 * m, H / stride, W / stride)."""
        return (self.body(x) + self.shortcut(x)).relu()


def resnet50() -> nn.Module:
    blocks, i = [], 64
    for m, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(count):
            blocks.append(Bottleneck(i, m, stride if number == 0 else 1))
            i = 4 * m
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)).eval()


def seconds(function: Callable[[], object], *, collects: bool = False) -> float:
    """Processor time, with the garbage collector off, as ``timeit`` measures, or left as it is."""
    if not collects:
        gc.collect()
        gc.disable()
    try:
        start = time.process_time()
        function()
        return time.process_time() - start
    finally:
        gc.enable()


def errors(folded: nn.Module, model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Of float32 outputs, against the unfolded model in float64: the largest, by the largest output, and rms."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        error = folded(x).double() - exact
    largest, rms = error.abs().max() / exact.abs().max(), error.square().mean().sqrt() / exact.square().mean().sqrt()
    return float(largest), float(rms)


def randomised_resnet50() -> nn.Module:
    model = resnet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


def against_fx() -> Iterator[tuple[str, str]]:
    model = resnet50()
    for size in (32, 64):
        x = torch.randn(2, 3, size, size)
        pairs = pairs_against_fuse(model, x, collects=False)
        ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        planning = statistics.median(
            seconds(lambda x=x: make_plan(run_as_it_is(model, (x,), {}, KINDS).graph))  # type: ignore[misc]
            for _ in range(PAIRS)
        )
        yield f"ResNet-50, folded on {tuple(x.shape)}", f"{1e3 * ours:.0f} ms"
        yield "  of which the run that is recorded", f"{1e3 * planning:.0f} ms"
        yield "  torch.fx fuse", f"{1e3 * theirs:.0f} ms"
        yield f"  median ratio of {PAIRS} pairs", f"{median_ratio(pairs):.2f}"
        # `fuse` leaves cycles behind; where they are collected, its next call finds memory that is mapped already.
        collected = median_ratio(pairs_against_fuse(model, x, collects=True))
        yield "  the same with the garbage collector on", f"{collected:.2f}"
        forward = statistics.median(seconds(lambda x=x: model(x)) for _ in range(PAIRS))  # type: ignore[misc]
        yield "  one call of the model alone", f"{1e3 * forward:.0f} ms"
    x = torch.randn(2, 3, 64, 64)
    yield "BatchNorms folded, by torch.fx fuse", f"{53 - count(fuse(model))}"
    yield "BatchNorms folded", f"{53 - count(fold_batchnorm(model, (x,)))}"
    found: dict[str, list[tuple[float, float]]] = {"unfolded": [], "torch.fx fuse": [], "folded": []}
    for _ in range(PAIRS):
        model, x = randomised_resnet50(), torch.randn(8, 3, 64, 64)
        for name, folded in zip(found, (model, fuse(model), fold_batchnorm(model, (x,))), strict=True):
            found[name].append(errors(folded, model, x))
    for name, several in found.items():
        largest, rms = (statistics.median(values) for values in zip(*several, strict=True))
        yield f"error in float32, {name}", f"{largest:.1e} ({rms:.2e} rms)"


def pairs_against_fuse(model: nn.Module, x: Tensor, *, collects: bool) -> list[tuple[float, float]]:
    pairs = [
        (
            seconds(lambda: fold_batchnorm(model, (x,)), collects=collects),
            seconds(lambda: fuse(model), collects=collects),
        )
        for _ in range(PAIRS + 1)
    ]
    return pairs[1:]


def median_ratio(pairs: list[tuple[float, float]]) -> float:
    return statistics.median(ours / theirs for ours, theirs in pairs)


def count(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def chains() -> Iterator[tuple[str, str]]:
    for length in (100, 1000, 5000):
        layers = [layer for _ in range(length) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())]
        model, x = nn.Sequential(*layers).eval(), torch.randn(2, 8)
        taken = seconds(lambda model=model, x=x: fold_batchnorm(model, (x,), inplace=True))  # type: ignore[misc]
        yield f"chain of {length} layers", f"{1e3 * taken / length:.2f} ms a layer"


def memory() -> Iterator[tuple[str, str]]:
    width, depth = 4096, 12
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=False), nn.BatchNorm1d(width))]
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, width)
    plan = plan_folding(model, (x,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    plan.apply(model, inplace=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    yield f"{depth * width * width / 1e6:.0f}M parameters, one layer in float64", f"{8 * width * width / 2**20:.0f} MiB"
    yield "in place, above the peak before", f"{peak / 1024:.0f} MiB"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    torch.set_num_threads(1)
    table = Table("what", "measured", title=f"{processor()}, torch {torch.__version__}, one thread")
    for part in (memory, against_fx, chains):  # memory first, while the peak is still low
        for row in part():
            table.add_row(*row)
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
