from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lit_bnfold.callbacks import speed
from lit_bnfold.callbacks.speed import SpeedMonitor


class Slow(LightningModule):
    """A training step takes two seconds of its own clock, from step 8 on four, and a validation a thousand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.now = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.now += 2 if self.global_step < 8 else 4
        return self.net(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.now += 100

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def speeds(path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[int, float]:
    module = Slow()
    monkeypatch.setattr(speed, "perf_counter", lambda: module.now)
    trainer = Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(path, name=None, version=""),
        callbacks=[SpeedMonitor()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"log_every_n_steps": 4, "max_steps": 16, **options},
    )
    data = DataLoader(torch.randn(10, 3), batch_size=1)
    trainer.fit(module, data, data)
    events = EventAccumulator(str(path)).Reload()
    if "train/steps_per_second" not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.value for event in events.Scalars("train/steps_per_second")}


# Steps 7 to 10 take 2, 4, 4 and 4 seconds.
EXPECTED = {3: 1 / 2, 7: 1 / 2, 11: pytest.approx(4 / 14), 15: 1 / 4}


def test_the_speed_is_that_of_the_steps_since_it_was_last_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert speeds(tmp_path, monkeypatch, limit_val_batches=0) == EXPECTED


@pytest.mark.parametrize("interval", [1, 3, 4, 10])
def test_validations_do_not_count(interval: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert speeds(tmp_path, monkeypatch, val_check_interval=interval) == EXPECTED


def test_a_step_of_several_batches_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = speeds(tmp_path, monkeypatch, accumulate_grad_batches=2, limit_val_batches=0, max_steps=8)
    assert found == {3: 1 / 4, 7: 1 / 4}


def test_every_step_can_be_written_but_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = speeds(tmp_path, monkeypatch, log_every_n_steps=1, limit_val_batches=0)
    assert found == {step: 1 / 2 if step < 9 else 1 / 4 for step in range(1, 16)}


def test_a_trainer_that_writes_nothing_writes_no_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert speeds(tmp_path, monkeypatch, log_every_n_steps=0, limit_val_batches=0) == {}
