"""What monitoring costs a step of the notebook's recipe.

Run it with ``python tests/benchmarks/monitoring.py``. Within one training all versions take turns of some steps, first
where nothing is written, then where all of them are; each turn is compared with the unmonitored one of its round. A
ratio is that of a step's time with and without. Only such ratios are worth comparing between machines.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ThroughputMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from measuring import Row, show

from lit_bnfold import BatchNormMLP, HistogramMonitor, NamesDataModule, UpdateRatioMonitor
from lit_bnfold.callbacks.monitor import OnWrittenSteps, skip_idle_hooks
from lit_bnfold.callbacks.speed import SpeedMonitor

ROUNDS, STEPS = 1_500, 4  # where nothing is written
WRITTEN_ROUNDS, WRITTEN_STEPS = 30, 20
NEVER = 10**9

# Steps between two that are written. TensorBoard draws 1,000 points of a curve; that is one in 200 steps of the recipe.
LOSS_EVERY, RATIOS_EVERY, HISTOGRAMS_EVERY = 200, 1_000, HistogramMonitor().every_n_steps

PLAIN = "no monitoring, no logger"
LOSS = "loss and log10 loss"
ALL = "all of them"
INTERVALS = {
    LOSS: LOSS_EVERY,
    "UpdateRatioMonitor": RATIOS_EVERY,
    "SpeedMonitor": LOSS_EVERY,
    "LearningRateMonitor, on written steps alone": LOSS_EVERY,
    "HistogramMonitor": HISTOGRAMS_EVERY,
}


def learning_rate() -> list[Callback]:
    """As the command line has it."""
    callback = LearningRateMonitor()
    skip_idle_hooks(callback)
    return [callback, OnWrittenSteps(callback)]


def versions(histograms_every: int) -> dict[str, list[Callback]]:
    """The callbacks of each version; all but the plain ones write the loss as well."""

    def monitors() -> list[list[Callback]]:
        return [[UpdateRatioMonitor()], [SpeedMonitor()], learning_rate(), [HistogramMonitor(histograms_every)]]

    return {
        PLAIN: [],
        "the same once more": [],
        "an empty callback": [Callback()],
        LOSS: [],
        **dict(zip(list(INTERVALS)[1:], monitors(), strict=True)),
        "LearningRateMonitor": [LearningRateMonitor()],
        "ThroughputMonitor": [ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]))],
        ALL: [callback for callbacks in monitors() for callback in callbacks],
    }


class Turns(Callback):
    """Lets the versions take turns and notes the processor time of each, in seconds."""

    def __init__(self, versions: dict[str, list[Callback]], steps: int, log_every_n_steps: int) -> None:
        self.versions, self.steps, self.log_every_n_steps = versions, steps, log_every_n_steps
        self.times: dict[str, list[float]] = {name: [] for name in versions}
        self.done = 0
        self.name: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loggers = trainer.loggers
        trainer.callbacks = [self]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Always last in the line, so that a turn holds all hooks of its callbacks and of no others.
        if self.done % self.steps == 0:
            self.turn(trainer, pl_module)
        self.done += 1

    def turn(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = time.process_time()
        if self.name is not None:
            self.times[self.name].append(now - self.start)
        # The rounds differ in their order, so that nobody always follows the same one.
        number, place = divmod(self.done // self.steps, len(self.versions))
        names = list(self.versions)
        self.name = names[(place * (1, 3, 5, 7)[number % 4] + number) % len(names)]
        trainer.callbacks = [*self.versions[self.name], self]
        # Monitors share their counting with those beside them; the first round does not count.
        for callback in self.versions[self.name] if number == 0 else ():
            callback.on_train_start(trainer, pl_module)
        plain = self.name in (PLAIN, "the same once more")
        trainer.loggers = [] if plain else self.loggers
        trainer.log_every_n_steps = 0 if plain else self.log_every_n_steps
        self.start = time.process_time()


def measure(steps: int, log_every_n_steps: int, rounds: int) -> dict[str, list[float]]:
    """Train in turns; returns the microseconds a step by version, one number for each round."""
    turns = Turns(versions(log_every_n_steps), steps, log_every_n_steps)
    seed_everything(42, verbose=False)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            accelerator="cpu",
            logger=TensorBoardLogger(directory),
            callbacks=[turns, *(each for several in turns.versions.values() for each in several)],
            max_steps=steps * len(turns.versions) * (rounds + 1) + 1,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(BatchNormMLP(), NamesDataModule())
    # Without the first round, which warms up.
    return {name: [1e6 * time / steps for time in times[1:]] for name, times in turns.times.items()}


def median_difference(times: list[float], plain: list[float]) -> tuple[float, float]:
    """The median of the pairs' differences and its standard error, which the middle half of them tells."""
    differences = [time - other for time, other in zip(times, plain, strict=True)]
    low, middle, high = statistics.quantiles(differences, n=4)
    return middle, 1.25 * (high - low) / 1.35 / len(differences) ** 0.5


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    between = measure(STEPS, NEVER, ROUNDS)
    written = measure(WRITTEN_STEPS, 1, WRITTEN_ROUNDS)
    step = statistics.median(between[PLAIN])
    yield Row("a step without monitoring", "", f"{step:.0f} us; {ROUNDS:,} and {WRITTEN_ROUNDS} pairs")
    writing = 0.0
    for name in list(between)[1:]:
        extra, error = median_difference(between[name], between[PLAIN])
        # The loss is written wherever something is written; what a monitor writes comes on top.
        more, more_error = median_difference(written[name], written[LOSS if name in list(INTERVALS)[1:] else PLAIN])
        more -= extra
        every = INTERVALS.get(name)
        writing += more / every if every else 0
        when = f" every {every:,} steps" if every else " where it is written"
        measured = f"{extra:.1f} +- {error:.1f} us more, and {more:.0f} +- {more_error:.0f} us{when}"
        yield Row(name, "", measured, 1 + (extra + (more / every if every else 0)) / step)
    yield Row("all of them, each on its own steps", "<= 1.03", "", 1 + (extra + writing) / step)


if __name__ == "__main__":
    show(rows())
