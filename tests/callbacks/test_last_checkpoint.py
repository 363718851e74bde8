"""The checkpoint of the latest step: always there, always whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_bnfold.callbacks.last_checkpoint import LastCheckpoint


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(20, 4)), batch_size=4)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watching(Callback):
    """Notes after each step which step is in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append(torch.load(self.path, weights_only=True)["global_step"])


def trainer(root: Path, *callbacks: Callback, **kwargs: Any) -> Trainer:
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    return Trainer(
        accelerator="cpu", default_root_dir=root, callbacks=[*callbacks], **{**silent, "max_steps": 9, **kwargs}
    )


def test_it_is_there_from_the_start_and_never_older_than_agreed(tmp_path: Path) -> None:
    last, watching = LastCheckpoint(every_n_train_steps=4), Watching(tmp_path / "checkpoints" / "last.ckpt")
    assert last.last_model_path == ""
    trainer(tmp_path, last, watching).fit(Tiny())
    assert watching.steps == [0, 0, 0, 0, 4, 4, 4, 4, 8]
    assert torch.load(last.last_model_path, weights_only=True)["global_step"] == 9
    assert last.last_model_path == str(watching.path)
    assert [path.name for path in watching.path.parent.iterdir()] == ["last.ckpt"]


def test_it_lies_with_the_logger(tmp_path: Path) -> None:
    last = LastCheckpoint()
    fitting = trainer(tmp_path, last, logger=CSVLogger(tmp_path, name="table"))
    fitting.fit(Tiny())
    assert Path(last.last_model_path) == tmp_path / "table" / "version_0" / "checkpoints" / "last.ckpt"


def test_a_trial_run_saves_nothing(tmp_path: Path) -> None:
    trainer(tmp_path, LastCheckpoint(), fast_dev_run=True).fit(Tiny())
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_an_interrupted_step_is_not_saved(tmp_path: Path) -> None:
    class Interrupted(Tiny):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 6:
                raise RuntimeError("trouble")

    last = LastCheckpoint(every_n_train_steps=4)
    with pytest.raises(RuntimeError, match="trouble"):
        trainer(tmp_path, last).fit(Interrupted())
    assert torch.load(last.last_model_path, weights_only=True)["global_step"] == 4


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, right = LastCheckpoint(every_n_train_steps=4), torch.save

    def full(checkpoint: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if checkpoint["global_step"] == 8:
            raise OSError("disk full")
        right(checkpoint, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        trainer(tmp_path, last).fit(Tiny())
    assert torch.load(last.last_model_path, weights_only=True)["global_step"] == 4
    assert [path.name for path in Path(last.last_model_path).parent.iterdir()] == ["last.ckpt"]


def test_a_second_fit_saves_anew(tmp_path: Path) -> None:
    last = LastCheckpoint()
    for name in ("one", "other"):
        trainer(tmp_path / name, last).fit(Tiny())
        assert torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 9


def test_a_fit_that_goes_on_elsewhere_saves_where_it_begins(tmp_path: Path) -> None:
    class Failing(Tiny):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            raise RuntimeError("trouble")

    last = LastCheckpoint()
    trainer(tmp_path / "one", last, max_steps=5).fit(Tiny())  # a whole epoch
    other = trainer(tmp_path / "other", last)
    with pytest.raises(RuntimeError, match="trouble"):
        other.fit(Failing(), ckpt_path=last.last_model_path)
    assert last.last_model_path == str(tmp_path / "other" / "checkpoints" / "last.ckpt")
    assert torch.load(last.last_model_path, weights_only=True)["global_step"] == 5


def test_no_steps_between_two_saves_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps: expected at least 1, got 0"):
        LastCheckpoint(every_n_train_steps=0)
    for given in (2.5, True, "5"):
        with pytest.raises(TypeError, match="every_n_train_steps: expected an int, got "):
            LastCheckpoint(every_n_train_steps=given)  # type: ignore[arg-type]


def test_a_step_that_is_validated_is_saved_when_that_is_done(tmp_path: Path) -> None:
    class Validated(Tiny):
        saved: list[int]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.saved.append(torch.load(last.last_model_path, weights_only=True)["global_step"])

        def val_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(torch.randn(4, 4)), batch_size=4)

    last, module = LastCheckpoint(every_n_train_steps=2), Validated()
    module.saved = []
    fitting = trainer(tmp_path, last, val_check_interval=4, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    fitting.fit(module)
    assert module.saved == [2, 6]
    assert torch.load(last.last_model_path, weights_only=True)["global_step"] == 9


def test_whoever_is_interrupted_learns_how_to_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Interrupted(Tiny):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 6:
                raise RuntimeError("trouble")

    last = LastCheckpoint(every_n_train_steps=4)
    with caplog.at_level("INFO"), pytest.raises(RuntimeError, match="trouble"):
        trainer(tmp_path, last).fit(Interrupted())
    assert f"To go on from step 4, repeat the command with --ckpt_path {last.last_model_path}" in caplog.messages
