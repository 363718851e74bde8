"""What it takes until a command begins: processor time of fresh processes, against that of the imports they need.

Run it with ``python tests/benchmarks/start.py``. Every process finds its modules compiled, as in an installed package.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from measuring import Row, in_turn, median_ratio, medians, show

PAIRS = 9


def processor_seconds(arguments: list[str]) -> float:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows() -> Iterator[Row]:
    for name, ours, needed in (
        ("import lit_bnfold.folding", ["-c", "import lit_bnfold.folding"], "import torch"),
        ("lit-bnfold --help", ["-m", "lit_bnfold", "--help"], "import torch, lightning"),
        ("lit-bnfold fit --help", ["-m", "lit_bnfold", "fit", "--help"], "import torch, lightning"),
    ):
        processes = [partial(processor_seconds, arguments) for arguments in (ours, ["-c", needed])]
        pairs = in_turn(processes, PAIRS, lambda process: process())
        spent, least = medians(pairs)
        target = "" if "fit" in name else "<= 1.1"
        yield Row(name, target, f"{spent:.2f} s; `{needed}` {least:.2f} s; {PAIRS} pairs", median_ratio(pairs))


if __name__ == "__main__":
    show(rows())
