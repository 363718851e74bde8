"""What the benchmarks share: a row of their table, functions that are measured in turn, and where that was."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    """One line of the table: what was measured and, where something is asked of it, what the ratio has to be."""

    name: str
    target: str = ""  # ">= 1.8" or "<= 1.1"
    measured: str = ""
    ratio: float | None = None

    @property
    def is_met(self) -> bool | None:
        """Whether the ratio is what it has to be; None where nothing is asked."""
        relation, _, number = self.target.partition(" ")
        if self.ratio is None or relation not in (">=", "<="):
            return None
        return self.ratio >= float(number) if relation == ">=" else self.ratio <= float(number)

    def cells(self) -> tuple[str, str, str, str, str]:
        verdict = {None: "", True: "met", False: "missed"}[self.is_met]
        return self.name, self.target, self.measured, "" if self.ratio is None else f"{self.ratio:.4g}", verdict


HEADER = ("what", "target", "measured", "ratio", "")


def hardware() -> str:
    """The processor, the number of its cores that this process may use, and the GPU if there is one."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join([f"{name}, {cores} cores", *cards])


def versions() -> str:
    """Python, torch and what else is measured here."""
    found = {each.metadata["Name"].lower(): each.version for each in importlib.metadata.distributions()}
    names = [name for name in ("torch", "lightning", "torchmetrics", "onnxruntime") if name in found]
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {found[name]}" for name in names)])


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """The time of one call, on the processor's clock, with the garbage collector off, as ``timeit`` measures."""
    gc.collect()
    gc.disable()
    try:
        start = clock()
        function()
        return clock() - start
    finally:
        gc.enable()


def collecting(function: Callable[[], object]) -> float:
    """The same with the garbage collector on."""
    start = time.process_time()
    function()
    return time.process_time() - start


def in_turn(
    functions: Sequence[Callable[[], object]],
    count: int,
    measure: Callable[[Callable[[], object]], float] = seconds,
) -> list[tuple[float, ...]]:
    """Measure functions in turn, each time in the other order; the first round warms up and does not count.

    Args:
        functions: The functions.
        count: Number of rounds.
        measure: Measures one call.

    Returns:
        For each round one number of each function.
    """
    rounds = []
    for number in range(count + 1):
        order = range(len(functions))[:: 1 if number % 2 else -1]
        found = {place: measure(functions[place]) for place in order}
        rounds.append(tuple(found[place] for place in range(len(functions))))
    return rounds[1:]


def medians(rounds: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def median_ratio(pairs: Iterable[Sequence[float]]) -> float:
    """The median of how much more the first takes than the second."""
    return statistics.median(first / second for first, second in pairs)


def show(rows: Iterable[Row]) -> None:
    """Print the rows on the terminal."""
    table = Table(*HEADER, title=f"{hardware()}; {versions()}")
    for row in rows:
        table.add_row(*row.cells())
    Console().print(table)
