"""What two processes make of a training, against one: the same loss, and so many steps in a second.

Run it with ``python tests/benchmarks/processes.py`` on a machine with at least two idle cores; it prints its table with
hardware and versions. Every training is a ``lit-bnfold fit`` of its own, two processes with ``--trainer.strategy ddp``,
which is gloo on CPUs. The batch of one process is halved, so that a step sees as many examples in all.

The notebook's recipe stands here in a shorter form of 4,000 steps, with the smaller learning rate for the second half.
By default each process normalises by its own 16 examples of a step, which is another training than one by 32, and a
worse one. With ``AnyDeviceSyncBatchNorm`` both normalise by all 32; a difference that is left is what rounding grows
to.
The steps are too short for two processes: on each they wait for the other one and exchange 16,651 gradients, and with
synchronised BatchNorms they do so twelve more times. The wide variant has hidden layers of 2,048 and batches of 4,096,
which are worth a second process.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import truediv
from pathlib import Path

from measuring import Row, show  # the module beside this one
from recipes import lit_bnfold  # likewise
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SEEDS = (1, 2, 3)
QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")
SYNCHRONISED = ("--trainer.plugins", "lit_bnfold.layer_sync.AnyDeviceSyncBatchNorm")

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


Rounds = list[dict[str, Training]]


def in_rounds(recipe: Sequence[str], versions: Mapping[str, Sequence[str]]) -> Rounds:
    """Train every version of a recipe, one after the other, with each seed; the first one is one process."""
    return [{name: train(seed, *recipe, *arguments) for name, arguments in versions.items()} for seed in SEEDS]


def speed(rounds: Rounds, name: str) -> tuple[float, float]:
    """A version's steps in a second, and their ratio to those of one process."""
    speeds = [each[name].steps_per_second for each in rounds]
    ones = [next(iter(each.values())).steps_per_second for each in rounds]
    return statistics.median(speeds), statistics.median(map(truediv, speeds, ones))


def notebook() -> Iterator[Row]:
    halves = ("--data.batch_size", "16", *TWO)
    versions = {
        "one process, batches of 32": ("--data.batch_size", "32"),
        "two, batches of 16, synchronised": (*halves, *SYNCHRONISED),
        "two, batches of 16": halves,
    }
    rounds = in_rounds(NOTEBOOK, versions)
    losses = {name: [each[name].val_loss for each in rounds] for name in versions}
    means = {name: statistics.mean(each) for name, each in losses.items()}
    one, synchronised, _ = versions
    for name, each in losses.items():
        steps, ratio = speed(rounds, name)
        spread = f"{means[name]:.4f} +- {statistics.stdev(each):.4f}"
        yield Row(f"notebook, {name}", measured=f"val/loss {spread}, {steps:.0f} steps/s", ratio=ratio)
        if name != one:
            distance = abs(means[name] - means[one]) / statistics.stdev(losses[one])
            target = "<= 1.0" if name == synchronised else ""
            yield Row("  its loss from that of one, in standard deviations of that", target, "", distance)


def wide() -> Iterator[Row]:
    versions = {
        "one process, one thread": ("--data.batch_size", "4096"),
        "two processes, one thread each": ("--data.batch_size", "2048", *TWO),
        "one process, two threads": ("--data.batch_size", "4096", "--num_threads", "2"),
    }
    rounds = in_rounds(WIDE, versions)
    for name in versions:
        steps, ratio = speed(rounds, name)
        yield Row(f"wide, {name}", ">= 1" if name.startswith("two") else "", f"{steps:.2f} steps/s", ratio)


def rows() -> Iterator[Row]:
    yield from notebook()
    yield from wide()


def main() -> None:
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"{cores} cores; the load before this begins is {load:.1f}, and should be 0", file=sys.stderr)
    show(rows())


if __name__ == "__main__":
    main()
