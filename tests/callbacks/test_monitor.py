from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.demos.boring_classes import BoringModel

from lit_bnfold import HistogramMonitor, UpdateRatioMonitor
from lit_bnfold.callbacks.monitor import skip_idle_hooks
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


def test_a_callback_whose_idle_hooks_are_skipped_does_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    idle: list[str] = []
    monkeypatch.setattr(Callback, "on_before_zero_grad", lambda self, *args: idle.append(type(self).__name__))
    callbacks = [Counting(), Profiling(), Callback()]
    for callback in callbacks:
        skip_idle_hooks(callback)
        skip_idle_hooks(callback)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        max_steps=3,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    assert [callbacks[0].calls, callbacks[1].calls] == [3, 3]
    assert idle == []
    assert callbacks[0].on_before_zero_grad is None
    assert callbacks[1].on_before_backward is not None


@pytest.mark.parametrize("kind", [UpdateRatioMonitor, HistogramMonitor, SpeedMonitor, LearningRateMonitor])
def test_it_can_be_copied_and_sent_to_another_process(kind: type[Callback]) -> None:
    callback = kind()
    skip_idle_hooks(callback)
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert vars(other) == vars(callback)
        assert other.on_after_backward is None
