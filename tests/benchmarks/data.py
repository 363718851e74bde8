"""How long it takes to make examples of words, and how much memory, against the notebook's two loops.

Run it with ``python tests/benchmarks/data.py``. Both begin with the words in memory and shuffled: the loops with the
words of the three splits, ours with the text of the file and the numbers of its words. The words of the larger files
are drawn with replacement from the bundled ones. What is held is what the module keeps once its splits are built,
without the text of the file; the peak is what a process that does nothing else has at most above what it had before, on
Linux alone.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import Row, collecting, in_turn, median_ratio, medians, show
from torch import Tensor

from lit_bnfold import NamesDataModule
from lit_bnfold.names.data import bundled_words, read_words

PAIRS = 11
LARGE_PAIRS = 3
Splits = list[tuple[Tensor, Tensor]]


def notebook_splits(split_words: list[list[str]], stoi: dict[str, int]) -> Splits:
    """The notebook's way: a loop over words, in it a loop over characters, and lists that become tensors."""
    splits = []
    for words in split_words:
        contexts, targets = [], []
        for word in words:
            context = [0] * 3
            for character in word + ".":
                contexts.append(context)
                targets.append(stoi[character])
                context = [*context[1:], stoi[character]]
        splits.append((torch.tensor(contexts), torch.tensor(targets)))
    return splits


class Shuffled(NamesDataModule):
    """The names, whose words are shuffled once and stay so."""

    split_numbers: dict[str, Tensor]

    def _split_numbers(self) -> dict[str, Tensor]:
        return self.split_numbers


def against_the_notebook(path: Path, count: int, spent: list[float]) -> Iterator[Row]:
    """Build the splits of a file in both ways; adds to a list the seconds that ours takes for an example."""
    data, words = Shuffled(str(path)), read_words(path).split("\n")
    data.split_numbers = NamesDataModule(str(path))._split_numbers()
    split_words = [[words[number] for number in numbers] for numbers in data.split_numbers.values()]
    stoi = data.stoi

    def build() -> None:
        data.__dict__.pop("splits", None)
        _ = data.splits

    # With the garbage collector on, as in a notebook: the lists of the loops keep it busy.
    pairs = in_turn([lambda: notebook_splits(split_words, stoi), build], count, collecting)
    theirs, ours = medians(pairs)
    examples = sum(map(len, data.splits.values()))
    spent.append(ours / examples)
    measured = f"{1e3 * ours:.1f} ms; the loops {1e3 * theirs:.0f} ms; {count} pairs"
    yield Row(f"splits of {examples:,} examples, times faster than the loops", ">= 80", measured, median_ratio(pairs))
    expected = notebook_splits(split_words, stoi)
    equal = all(
        ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        for examples, pair in zip(data.splits.values(), expected, strict=True)
        for ours, theirs in zip(examples[:], pair, strict=True)
    )
    yield Row("  every context and target equal, bit by bit", "", "yes" if equal else "NO")


def memory(name: str) -> int:
    """Bytes of memory that this process has (``VmRSS``), or has had at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> int:
    """Give back what is free, and let the peak begin anew; bytes of memory that are left."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return memory("VmRSS")


def build_alone(path: str) -> None:
    """Build the splits of a file in a process that has built those of a few words; print what that took."""
    torch.set_num_threads(1)
    _ = NamesDataModule().splits
    before, start = forget_peak(), time.process_time()
    data = NamesDataModule(path)
    _ = data.splits
    spent, most = time.process_time() - start, memory("VmHWM") - before
    storages = {t.untyped_storage() for part in data.splits.values() for t in (part.windows, part.starts)}
    tensors = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    text = sum(sys.getsizeof(value) for value in vars(data).values() if isinstance(value, str))
    print(sum(map(len, data.splits.values())), spent, most, tensors + text - Path(path).stat().st_size)


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    of_an_example: list[float] = []
    yield from against_the_notebook(bundled_words(), PAIRS, of_an_example)
    words = read_words(bundled_words()).split("\n")
    spent: dict[int, float] = {}
    most: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "words.txt"
        for times in (10, 100):
            path.write_text("\n".join(random.Random(0).choices(words, k=times * len(words))), encoding="utf-8")
            command = [sys.executable, __file__, str(path)]
            runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(LARGE_PAIRS)]
            found = medians([tuple(map(float, run.stdout.split())) for run in runs])
            examples, spent[times], most[times], held = found
            name = f"{times * len(words):,} words, {examples:,.0f} examples"
            yield Row(f"{name}, from the file", "", f"{spent[times]:.2f} s; median of {LARGE_PAIRS}")
            yield Row("  bytes per example held beyond the file", "<= 8", f"{held / 1e6:.1f} MB", held / examples)
            yield Row("  bytes per example at the peak", "", f"{most[times] / 1e6:.0f} MB", most[times] / examples)
        # Python's own shuffle takes most of it, and longer for each word where they do not fit into the cache.
        yield Row("ten times the words, times the time from the file", "", "", spent[100] / spent[10])
        yield Row("ten times the words, times the peak", "<= 11", "", most[100] / most[10])
        yield from against_the_notebook(path, LARGE_PAIRS, of_an_example)
        small, large = of_an_example
        yield Row("  an example of 100 times the words, times the time of one", "<= 1.1", "", large / small)


if __name__ == "__main__":
    if sys.argv[1:]:
        build_alone(sys.argv[1])
    else:
        show(rows())
