"""What is shown while a folding is at work: on a terminal, in a log, and beside Lightning's own bars."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_bnfold.callbacks.export as exporting
from lit_bnfold import BatchNormFolding, FoldingError
from lit_bnfold.callbacks.stages import Stages

STAGES = [
    "re-estimating statistics from 2 training batches",
    "validating the original",
    "trying out what can be folded",
    "validating with 1 of 1 folded",
    "writing folded.ckpt",
    "exporting folded.pt2 and running it",
    "measuring how fast both versions are",
]


class Terminal(io.StringIO):
    """A terminal, of which one can see what stands on it."""

    def isatty(self) -> bool:
        return True

    @property
    def line(self) -> str:
        """What is to be seen on the last line."""
        shown = ""
        for part in self.getvalue().rpartition("\n")[2].split("\r"):
            shown = part + shown[len(part) :]
        return shown.rstrip()


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trainer_in(directory: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=directory,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        **quiet,
        **kwargs,
    )


def data() -> Any:
    return DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=8)


def everything(monkeypatch: pytest.MonkeyPatch) -> BatchNormFolding:
    """A callback that goes through every stage; its export fails at once, which is enough to see that it begins."""

    def fail(*args: Any) -> Any:
        raise FoldingError("it takes too long for a test")

    monkeypatch.setattr(exporting, "_export", fail)
    return BatchNormFolding(reestimate_batches=2, export=["torch_export"], on_mismatch="warn")


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The stages in the log."""
    begin = "BatchNorm folding: "
    return [message.removeprefix(begin) for message in caplog.messages if message.startswith(begin)]


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Not a fixture, since pytest puts its own stderr back between those and the test."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


@pytest.mark.filterwarnings("ignore:Exporting the folded module failed")
def test_a_terminal_shows_each_stage_on_one_line_that_is_gone_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = on_a_terminal(monkeypatch)
    shown: list[str] = []
    begin = Stages.begin

    def look(self: Stages, stage: str) -> None:
        begin(self, stage)
        shown.append(terminal.line)

    monkeypatch.setattr(Stages, "begin", look)
    printed: list[str] = []
    monkeypatch.setattr("lit_bnfold.callbacks.batchnorm_folding.print_report", lambda _: printed.append(terminal.line))
    with caplog.at_level(logging.INFO):
        trainer_in(tmp_path, everything(monkeypatch), TQDMProgressBar()).fit(Small(), data(), data())
    assert shown == [f"BatchNorm folding: {stage} ..." for stage in STAGES]
    assert max(map(len, shown)) < 80
    assert printed == [""]
    assert terminal.line == ""
    assert told(caplog) == []


@pytest.mark.filterwarnings("ignore:Exporting the folded module failed")
@pytest.mark.parametrize("bar", ["none", "rich", "no terminal"])
def test_elsewhere_each_stage_is_a_line_of_the_log(
    bar: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bars: list[Callback] = {"none": [], "rich": [RichProgressBar()], "no terminal": [TQDMProgressBar()]}[bar]
    terminal = None if bar == "no terminal" else on_a_terminal(monkeypatch)
    trainer = trainer_in(tmp_path, everything(monkeypatch), *bars, enable_progress_bar=bool(bars))
    with caplog.at_level(logging.INFO):
        trainer.fit(Small(), data(), data())
    assert told(caplog) == STAGES
    assert terminal is None or "BatchNorm folding:" not in terminal.getvalue()


def test_an_error_leaves_no_line_and_no_word_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)

    class Failing(Small):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            if "validating with" in terminal.line:
                raise RuntimeError("out of memory")
            return self.training_step(batch, batch_idx)

    folding = BatchNormFolding()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer_in(tmp_path, folding, TQDMProgressBar()).fit(Failing(), data(), data())
    assert "validating with 1 of 1 folded" in terminal.getvalue()
    assert terminal.line == ""
    folding._stages.begin("something")
    assert terminal.line == ""


def test_lightnings_own_bar_has_the_line_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    terminal = on_a_terminal(monkeypatch)
    seen: list[str] = []

    class Watched(Small):
        def on_validation_start(self) -> None:
            seen.append(terminal.line)

        def val_dataloader(self) -> Any:
            return data()

    module = randomised(Watched())
    trainer = trainer_in(tmp_path, TQDMProgressBar())
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    BatchNormFolding().fold_checkpoint(trainer_in(tmp_path, TQDMProgressBar()), module, tmp_path / "some.ckpt")
    assert seen == ["", ""]
    assert "validating the original" in terminal.getvalue()


@pytest.mark.parametrize("terminal_is_there", [True, False])
def test_the_other_ranks_say_nothing(
    terminal_is_there: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_a_terminal(monkeypatch)
    monkeypatch.setattr(terminal, "isatty", lambda: terminal_is_there)
    stages = Stages()
    for is_first in (True, False):
        trainer: Any = SimpleNamespace(is_global_zero=is_first, progress_bar_callback=TQDMProgressBar())
        with caplog.at_level(logging.INFO), stages.shown(trainer):
            caplog.clear()
            before = terminal.getvalue()
            stages.begin("something")
            said = [*told(caplog), *([terminal.line] if terminal.getvalue() != before else [])]
            assert bool(said) == is_first
