"""How long folding takes, against `torch.fx`, over the length of a chain, and how much memory it needs in place.

Run it with ``python tests/benchmarks/folding.py``; it prints its tables with hardware, versions and the number of runs.
Only ratios of interleaved pairs are worth comparing between machines.
"""

from __future__ import annotations

import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from lit_bnfold.folding import fold_batchnorm, plan_folding

PAIRS = 7


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


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def against_fx() -> Iterator[tuple[str, str]]:
    model, x = resnet50(), torch.randn(1, 3, 64, 64)
    pairs = [(seconds(lambda: fold_batchnorm(model, (x,))), seconds(lambda: fuse(model))) for _ in range(PAIRS + 1)][1:]
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    yield "ResNet-50, folding", f"{statistics.median(ours for ours, _ in pairs):.2f} s"
    yield "ResNet-50, torch.fx fuse", f"{statistics.median(theirs for _, theirs in pairs):.2f} s"
    yield f"median ratio of {PAIRS} pairs", f"{ratio:.2f}"


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


def main() -> None:
    torch.set_num_threads(1)
    table = Table("what", "measured", title=f"{platform.machine()}, torch {torch.__version__}, one thread")
    for part in (memory, against_fx, chains):  # memory first, while the peak is still low
        for row in part():
            table.add_row(*row)
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
