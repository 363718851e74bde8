"""What two processes make of a training, against one: the same loss, and so many steps in a second.

Run it with ``python tests/benchmarks/processes.py`` on a machine with at least two idle cores; it prints its table with
hardware and versions. Every training is a ``lit-bnfold fit`` of its own, two processes with ``--trainer.strategy ddp``,
which is gloo on CPUs. The batch of one process is halved, so that a step sees as many examples in all.

The notebook's recipe stands here in a shorter form of 4,000 steps, with the smaller learning rate for the second half.
Each process normalises by its own 16 examples of a step, and those of rank 0 make the statistics that are kept, because
SyncBatchNorm needs GPUs. Its steps are too short for two processes: on each they wait for the other one and exchange
16,651 gradients. The wide variant has hidden layers of 2,048 and batches of 4,096, which are worth a second process.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from measuring import Row, show  # the module beside this one
from recipes import lit_bnfold  # likewise
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SEEDS = (1, 2, 3)
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")

NOTEBOOK = ("--trainer.max_steps", "4000", "--trainer.val_check_interval", "4000", "--model.milestones", "[2000]")
WIDE = (
    "--model.n_hidden", "[2048, 2048]", "--trainer.max_steps", "8", "--trainer.val_check_interval", "8",
    "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "1", "--histograms.modules", "[Tanh]",
)  # fmt: skip


@dataclass
class Training:
    """A training's validation loss at its end, and its steps in a second of the clock on the wall."""

    val_loss: float
    steps_per_second: float


def train(seed: int, *arguments: str) -> Training:
    with tempfile.TemporaryDirectory() as root:
        lit_bnfold("fit", "--seed_everything", str(seed), "--trainer.default_root_dir", root, *QUIET, *arguments)
        events = EventAccumulator(str(Path(root, "lightning_logs", "version_0"))).Reload()
        # The first ones warm up.
        speeds = [event.value for event in events.Scalars("train/steps_per_second")][2:]
        return Training(events.Scalars("val/loss")[-1].value, statistics.median(speeds))


def notebook() -> Iterator[Row]:
    """Pairs of one process and of two: name, validation loss, steps in a second, and their ratio to one process."""
    pairs = [
        (train(seed, *NOTEBOOK, "--data.batch_size", "32"), train(seed, *NOTEBOOK, "--data.batch_size", "16", *TWO))
        for seed in SEEDS
    ]
    for name, several in zip(
        ("one process, batches of 32", "two, batches of 16"), zip(*pairs, strict=True), strict=True
    ):
        losses = [each.val_loss for each in several]
        spread = f"{statistics.mean(losses):.4f} +- {statistics.stdev(losses):.4f}"
        speed = statistics.median(each.steps_per_second for each in several)
        ratio = statistics.median(
            each.steps_per_second / one.steps_per_second for each, (one, _) in zip(several, pairs, strict=True)
        )
        yield Row(f"notebook, {name}", measured=f"val/loss {spread}, {speed:.0f} steps/s", ratio=ratio)


def wide() -> Iterator[Row]:
    """Rounds of one process with one thread, of two, and of one with two threads, as in `notebook`."""
    versions = {
        "one process, one thread": ("--data.batch_size", "4096"),
        "two processes, one thread each": ("--data.batch_size", "2048", *TWO),
        "one process, two threads": ("--data.batch_size", "4096", "--num_threads", "2"),
    }
    rounds = [{name: train(seed, *WIDE, *arguments) for name, arguments in versions.items()} for seed in SEEDS]
    for name in versions:
        speed = statistics.median(each[name].steps_per_second for each in rounds)
        ones = [each["one process, one thread"].steps_per_second for each in rounds]
        ratio = statistics.median(each[name].steps_per_second / one for each, one in zip(rounds, ones, strict=True))
        yield Row(f"wide, {name}", ">= 1" if name.startswith("two") else "", f"{speed:.2f} steps/s", ratio)


def rows() -> Iterator[Row]:
    yield from notebook()
    yield from wide()


def main() -> None:
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"{cores} cores; the load before this begins is {load:.1f}, and should be 0", file=sys.stderr)
    show(rows())


if __name__ == "__main__":
    main()
