from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger

from lit_bnfold import HistogramMonitor, UpdateRatioMonitor
from lit_bnfold.callbacks.monitor import Monitor, OnWrittenSteps, skip_idle_hooks, steps_to_written
from lit_bnfold.callbacks.speed import SpeedMonitor


class Counting(Callback):
    def __init__(self) -> None:
        self.calls = 0

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.calls += 1


class Profiling(Callback):
    """An own hook that was put on the instance."""

    def __init__(self) -> None:
        self.calls = 0
        self.on_before_backward = self.count  # type: ignore[method-assign]

    def count(self, *args: Any) -> None:
        self.calls += 1


class Noting(Monitor):
    """Notes the steps that it chose: every so many."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.reached: list[int] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reached = []

    def _steps_left(self, trainer: Trainer, step: int) -> int:
        return steps_to_written(trainer, step, self.every)

    def _reach(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self.reached.append(step)


class Writing(DummyLogger):
    """Keeps what is written, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.written.append((step, metrics))


def fit(callbacks: list[Any], steps: int, **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        max_steps=steps,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": DummyLogger(), **options},
    )
    trainer.fit(BoringModel())


def test_a_callback_whose_idle_hooks_are_skipped_does_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    idle: list[str] = []
    monkeypatch.setattr(Callback, "on_before_zero_grad", lambda self, *args: idle.append(type(self).__name__))
    callbacks = [Counting(), Profiling(), Callback()]
    for callback in callbacks:
        skip_idle_hooks(callback)
        skip_idle_hooks(callback)
    fit(callbacks, 3, logger=False)
    assert [callbacks[0].calls, callbacks[1].calls] == [3, 3]
    assert idle == []
    assert callbacks[0].on_before_zero_grad is None
    assert callbacks[1].on_before_backward is not None


def test_monitors_of_one_trainer_are_counted_for_by_the_first_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Callback] = []
    count = Monitor.on_train_batch_start
    monkeypatch.setattr(Monitor, "on_train_batch_start", lambda self, *args: asked.append(self) or count(self, *args))
    monitors = [Noting(3), Noting(4)]
    for expected in (monitors, monitors[::-1]):
        asked.clear()
        fit(expected, 13)
        assert set(asked) == {expected[0]}
        assert [monitor.reached for monitor in monitors] == [[2, 5, 8, 11], [3, 7, 11]]


def test_callback_on_written_steps_writes_what_it_would_write_by_itself() -> None:
    written = []
    for spares in (False, True):
        callback = LearningRateMonitor(logging_interval="step")
        if spares:
            skip_idle_hooks(callback)
        logger = Writing()
        fit([callback, OnWrittenSteps(callback)] if spares else [callback], 13, logger=logger, log_every_n_steps=3)
        written.append([(step, metrics) for step, metrics in logger.written if "epoch" not in metrics])
    assert written[0] == written[1]
    assert [step for step, _ in written[0]] == [2, 5, 8, 11]


@pytest.mark.parametrize("kind", [UpdateRatioMonitor, HistogramMonitor, SpeedMonitor, LearningRateMonitor])
def test_it_can_be_copied_and_sent_to_another_process(kind: type[Callback]) -> None:
    callback = kind()
    skip_idle_hooks(callback)
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert vars(other) == vars(callback)
        assert other.on_after_backward is None
