"""Fits in which the callback stands anywhere, that end in any way, in several processes, under both import names."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import lit_bnfold.callbacks.batchnorm_folding as the_callback
from lit_bnfold import BatchNormFolding, FoldingError, load_folded
from trainers import files_in, quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Swapping scheduler"),
    # A fit that goes on where another one has ended writes to the directory of that one.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*dirpath has changed from"),
    # Who folds a checkpoint does not need the callbacks that wrote it.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]

Randomised = Callable[[nn.Module], nn.Module]


# A tiny fit -----------------------------------------------------------------------------------------------------------


def loader() -> DataLoader[Any]:
    """Twenty examples in batches of eight: the last batch is a smaller one."""
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, torch.arange(20) % 3), batch_size=8)


class Steps:
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        self.mean = MeanMetric()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.mean.update(nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="none"))
        self.log("val/loss", self.mean)

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tiny(Steps, LightningModule):
    pass


class StandaloneTiny(Steps, pytorch_lightning.LightningModule):
    """The same under the other import name, whose classes are not those of `lightning.pytorch`."""


# Where it stands ------------------------------------------------------------------------------------------------------


# Beside each other these two crash, whoever else is there: pruning reorders the parameters that are averaged.
NEIGHBOURS: dict[str, Callable[[], Callback]] = {
    "averaging": lambda: EMAWeightAveraging(decay=0.5),
    "swa": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
    "pruning": lambda: ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.4),
}


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_it_folds_what_the_others_leave_wherever_it_stands(
    name: str, reverse: bool, place: int, tmp_path: Path, randomised: Randomised
) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", monitor="val/loss")
    callbacks: list[Callback] = [NEIGHBOURS[name](), saved][:: -1 if reverse else 1]
    module, folding = randomised(Tiny()), BatchNormFolding()
    callbacks.insert(place, folding)
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
    trainer.fit(module)
    # It comes behind all others, and the list that the Trainer was given is as it was.
    assert [type(each) for each in trainer.callbacks[-2:]] == [ModelCheckpoint, BatchNormFolding]
    assert callbacks[place] is folding
    # Pruning has made its masks permanent by then, and averaging has put its weights in place.
    assert "net.0.weight_mask" not in module.state_dict()
    assert ((module.net[0].weight == 0).sum() > 0) == (name == "pruning")
    folded, inputs = load_folded(Tiny, tmp_path / "folded.ckpt"), torch.randn(7, 4)
    assert not any(isinstance(each, _BatchNorm) for each in folded.modules())
    torch.testing.assert_close(folded(inputs), module.eval()(inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_default_checkpoints_are_what_they_would_be_without_it(enabled: bool, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[BatchNormFolding()], enable_checkpointing=enabled)
    trainer.fit(Tiny())
    assert [type(each) for each in trainer.checkpoint_callbacks] == [ModelCheckpoint] * enabled
    assert len(files_in(tmp_path) - {"folded.ckpt", "folding.html", "folding.json"}) == enabled


def test_a_mismatch_leaves_the_checkpoints_of_the_fit_whole(
    tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(the_callback, "output_error", lambda *_: {"max_abs": 1.0, "max_rel": 1.0})
    module = randomised(Tiny())
    saved = ModelCheckpoint(tmp_path / "saved", save_last=True)
    trainer = quiet_trainer(tmp_path, callbacks=[BatchNormFolding(), saved], enable_checkpointing=True)
    with pytest.raises(FoldingError, match="the output of the folded module is off"):
        trainer.fit(module)
    state = torch.load(saved.last_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(state[key], value) for key, value in module.state_dict().items())
    assert "folded.ckpt" not in files_in(tmp_path)


def test_its_state_is_empty_before_the_end_and_plain_afterwards(tmp_path: Path) -> None:
    folding, before = BatchNormFolding(), []

    class Asking(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before.append(folding.state_dict())
            trainer.save_checkpoint(tmp_path / "before.ckpt")

    trainer = quiet_trainer(tmp_path, callbacks=[folding, Asking()])
    trainer.fit(Tiny())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert before == [{}, {}]
    assert "BatchNormFolding" not in torch.load(tmp_path / "before.ckpt", weights_only=True)["callbacks"]
    kept = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"]["BatchNormFolding"]
    assert kept == folding.report == json.loads(json.dumps(kept))


# How a fit ends -------------------------------------------------------------------------------------------------------


class Ending(Tiny):
    """Its second epoch ends with whatever it is given."""

    def __init__(self, end: Callable[[], None]) -> None:
        super().__init__()
        self.end = end

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch == 1:
            self.end()
        return super().training_step(batch, batch_idx)


def interrupted() -> None:
    raise KeyboardInterrupt


def failed() -> None:
    raise RuntimeError("trouble")


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def finish_the_job(tmp_path: Path, path: str) -> None:
    """What the sentence of an ended fit tells to do."""
    BatchNormFolding().fold_checkpoint(quiet_trainer(tmp_path), Tiny(), path)
    folded, inputs, original = load_folded(Tiny, Path(path).parent / "folded.ckpt"), torch.randn(7, 4), Tiny()
    original.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    torch.testing.assert_close(folded(inputs), original.eval()(inputs), rtol=0, atol=1e-5)


ENDS: dict[str, tuple[Callable[[], None], type[BaseException]]] = {
    "interrupted": (interrupted, SystemExit),
    "failed": (failed, RuntimeError),
    "terminated": (terminated, SIGTERMException),
}


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("saves", [True, False])
def test_a_fit_that_is_ended_says_how_to_fold_what_it_has_left(
    name: str, saves: bool, tmp_path: Path, randomised: Randomised, caplog: pytest.LogCaptureFixture
) -> None:
    end, error = ENDS[name]
    folding, saved = BatchNormFolding(), ModelCheckpoint(tmp_path / "saved", save_last=True)
    callbacks = [folding, saved] if saves else [folding]
    trainer = quiet_trainer(tmp_path, callbacks=callbacks, enable_checkpointing=saves)
    with caplog.at_level(logging.INFO), pytest.raises(error):
        trainer.fit(randomised(Ending(end)))
    assert folding.report is None
    assert files_in(tmp_path) <= {"last.ckpt", "epoch=0-step=3.ckpt"}
    assert ("Nothing was folded. To fold the last checkpoint: lit-bnfold fold --ckpt_path" in caplog.text) == saves
    assert ("Nothing was folded. There is no checkpoint to fold either." in caplog.text) != saves
    if saves:
        assert saved.last_model_path in caplog.text
        finish_the_job(tmp_path, saved.last_model_path)


NOTHING_TO_TRAIN: dict[str, dict[str, Any]] = {
    "no_epochs": {"max_epochs": 0},
    "no_batches": {"limit_train_batches": 0},
    "finished": {"max_epochs": 2, "ckpt_path": "last.ckpt"},
}


@pytest.mark.parametrize("name", NOTHING_TO_TRAIN)
@pytest.mark.filterwarnings("ignore:`Trainer.fit` stopped")
def test_a_fit_with_nothing_to_train_says_that_nothing_was_folded(name: str, tmp_path: Path) -> None:
    arguments = dict(NOTHING_TO_TRAIN[name])
    path = arguments.pop("ckpt_path", None)
    if path is not None:
        path = tmp_path / path
        before = quiet_trainer(tmp_path, callbacks=[])
        before.fit(Tiny())
        before.save_checkpoint(path)
    folding = BatchNormFolding()
    trainer = quiet_trainer(tmp_path, callbacks=[folding], **arguments)
    remedy = "There is no checkpoint to fold either" if path is None else f"--ckpt_path {path}"
    with pytest.warns(UserWarning, match=f"folded nothing: there was no step left to train.*{remedy}"):
        trainer.fit(Tiny(), ckpt_path=path)
    assert folding.report is None
    assert "folded.ckpt" not in files_in(tmp_path)
    if path is not None:
        finish_the_job(tmp_path, str(path))


def test_averages_of_an_endless_fit_get_statistics_of_their_own_on_request(
    tmp_path: Path, randomised: Randomised
) -> None:
    """Lightning recomputes the statistics after the last epoch, which a fit with ``max_epochs=-1`` does not know."""

    class Stopping(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 3

    module, folding = randomised(Tiny()), BatchNormFolding(reestimate_batches=9)
    averaging = StochasticWeightAveraging(0.5, swa_epoch_start=1, annealing_epochs=1)
    averaging._max_epochs = -1
    if averaging.swa_end < 0:
        pytest.skip("older versions of Lightning take such a fit to be over before it begins")
    trainer = quiet_trainer(tmp_path, callbacks=[folding, averaging, Stopping()], max_epochs=-1, min_epochs=1)
    trainer.fit(module)
    report, inputs = folding.report, loader().dataset.tensors[0]
    before = report["reestimated"]["before"]["val/loss"]
    assert abs(before - report["validation"]["original"]["val/loss"]) > 1e-4
    assert report["validation"]["folded"] == pytest.approx(report["validation"]["original"], abs=1e-5)
    # What is folded are the averages, with the statistics of all training examples.
    hidden = module.net[0](inputs)
    own = (module.net[1].running_mean.clone(), module.net[1].running_var.clone())
    assert not torch.allclose(own[0], hidden.mean(0), atol=1e-3)
    module.net[1].running_mean.copy_(hidden.detach().mean(0))
    module.net[1].running_var.copy_(hidden.detach().var(0))
    torch.testing.assert_close(folding.folded_module(inputs), module.eval()(inputs), rtol=0, atol=1e-5)


# Both import names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["last", "best"])
def test_a_trainer_of_the_other_import_name_accepts_it(weights: Any, tmp_path: Path, randomised: Randomised) -> None:
    module, folding = randomised(StandaloneTiny()), BatchNormFolding(weights=weights, reestimate_batches=2)
    saved = pytorch_lightning.callbacks.ModelCheckpoint(tmp_path / "saved", monitor="val/loss")
    loggers = [pytorch_lightning.loggers.CSVLogger(tmp_path), pytorch_lightning.loggers.TensorBoardLogger(tmp_path)]
    trainer = quiet_trainer(
        tmp_path, pytorch_lightning.Trainer, callbacks=[folding, saved], enable_checkpointing=True, logger=loggers
    )
    trainer.fit(module)
    assert folding.report["mismatch"] is None
    assert (folding.report["best_score"] is not None) == (weights == "best")
    assert {key for key in trainer.callback_metrics if key.startswith("folding/")} >= {"folding/folded/val/loss"}
    assert len([*tmp_path.rglob("folding/original/events*"), *tmp_path.rglob("folding/folded/events*")]) == 2
    (path,) = tmp_path.rglob("folded.ckpt")
    folded, inputs = load_folded(StandaloneTiny, path), torch.randn(7, 4)
    assert type(folded) is StandaloneTiny
    assert torch.equal(folded(inputs), folding.folded_module(inputs))
    # A checkpoint that exists, as well.
    again = BatchNormFolding(dirpath=str(tmp_path / "again"))
    idle = quiet_trainer(tmp_path, pytorch_lightning.Trainer)
    again.fold_checkpoint(idle, StandaloneTiny(), saved.best_model_path)
    assert again.report["mismatch"] is None
    assert files_in(tmp_path / "again") == {"folded.ckpt", "folding.html", "folding.json"}


# Several processes ----------------------------------------------------------------------------------------------------


class Head(Tiny):
    """With a frozen BatchNorm at the end, of the kind that distributed fits have, where that can be."""

    kind: type[nn.Module] = nn.BatchNorm1d

    def __init__(self) -> None:
        super().__init__()
        self.head = self.kind(3)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.head.eval()
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs))


class Synchronised(Head):
    """Distributed, torch wants these on an accelerator, and so this one is fitted by one process."""

    kind = nn.SyncBatchNorm


def test_synchronised_batchnorms_are_folded(tmp_path: Path, randomised: Randomised) -> None:
    module, folding = randomised(Synchronised()), BatchNormFolding()
    quiet_trainer(tmp_path, callbacks=[folding]).fit(module)
    assert [fold.batchnorm for fold in folding.plan.folds] == ["net.1", "head"]
    inputs = torch.randn(7, 4)
    torch.testing.assert_close(folding.folded_module(inputs), module.eval()(inputs), rtol=0, atol=1e-5)


class Straying(Tiny):
    """Reads a layer past its BatchNorm in one of the processes only."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.global_rank == 1:
            self.log("raw", self.net[0](batch[0]).square().mean(), sync_dist=False)


class InEachProcess(BatchNormFolding):
    """What the callback holds does not come back from the processes, so each looks at it itself."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = {key: value.clone() for key, value in pl_module.state_dict().items()}
        super().on_train_end(trainer, pl_module)
        assert all(torch.equal(before[key], value) for key, value in pl_module.state_dict().items())
        assert self.report == trainer.strategy.broadcast(self.report)
        assert self.report["validation"]["folded"] == pytest.approx(self.report["validation"]["original"], abs=1e-5)
        # A metric object sums over all processes, so the loss is that of the examples, each as often as the sampler
        # gives it: it repeats the first ones until the last batches are of one size.
        copy = trainer.strategy.broadcast(self.folded_module)
        data = loader().dataset.tensors
        count = -(-20 // trainer.world_size) * trainer.world_size
        indices = torch.arange(count) % 20
        with torch.no_grad():
            expected = nn.functional.cross_entropy(copy(data[0][indices]), data[1][indices])
        assert self.report["validation"]["folded"]["val/loss"] == pytest.approx(float(expected), abs=1e-5)
        parameters = nn.utils.parameters_to_vector(self.folded_module.parameters())
        assert torch.equal(parameters, trainer.strategy.broadcast(parameters))


def long(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
@pytest.mark.parametrize(
    ("strategy", "devices"),
    [("ddp_fork", 2), long("ddp_fork", 3), long("ddp_fork", 4), long("ddp_spawn", 2), long("ddp_spawn", 3)],
)
def test_processes_fold_together(strategy: str, devices: int, tmp_path: Path, randomised: Randomised) -> None:
    module = randomised(Head())
    trainer = quiet_trainer(tmp_path, callbacks=[InEachProcess()], strategy=strategy, devices=devices)
    trainer.fit(module)
    assert files_in(tmp_path) == {"folded.ckpt", "folding.html", "folding.json"}
    report = json.loads((tmp_path / "folding.json").read_text())
    assert [fold["batchnorm"] for fold in report["folds"]] == ["net.1", "head"]
    folded, inputs = load_folded(Head, tmp_path / "folded.ckpt"), torch.randn(7, 4)
    torch.testing.assert_close(folded(inputs), module.eval()(inputs), rtol=0, atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_a_batchnorm_that_one_process_bypasses_stays_in_all_of_them(tmp_path: Path, randomised: Randomised) -> None:
    trainer = quiet_trainer(tmp_path, callbacks=[BatchNormFolding()], strategy="ddp_fork", devices=2)
    trainer.fit(randomised(Straying()))
    report = json.loads((tmp_path / "folding.json").read_text())
    assert report["folds"] == []
    assert [(kept["batchnorm"], kept["code"]) for kept in report["kept"]] == [("net.1", "other-call")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
@pytest.mark.filterwarnings("ignore:The folded module does not do what the original does")
def test_what_one_process_finds_wrong_no_process_writes(tmp_path: Path, randomised: Randomised) -> None:
    class StrayingLater(Tiny):
        """Does so on the second batch, when the plan is made."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.global_rank == 1 and batch_idx == 1:
                self.net[0](batch[0])
            else:
                super().validation_step(batch, batch_idx)

    class Agreeing(BatchNormFolding):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_train_end(trainer, pl_module)
            assert "batch 1 of validation loader 0 calls `net.0` 1 times" in self.report["mismatch"]

    folding = Agreeing(on_mismatch="warn")
    trainer = quiet_trainer(tmp_path, callbacks=[folding], strategy="ddp_fork", devices=2)
    trainer.fit(randomised(StrayingLater()))
    assert files_in(tmp_path) == set()


SCRIPT = """
    import importlib.util, sys
    sys.path.insert(0, {folder!r})
    import torch
    import test_fits
    from pathlib import Path

    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = test_fits.quiet_trainer(
        Path({root!r}), callbacks=[test_fits.InEachProcess()], strategy="ddp", devices={devices}
    )
    trainer.fit(test_fits.Head())
"""


@pytest.mark.long
@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("launcher", ["torchrun", "lightning"])
def test_processes_that_a_launcher_starts_fold_together(launcher: str, devices: int, tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    text = SCRIPT.format(folder=str(Path(__file__).parent), root=str(tmp_path / "root"), devices=devices)
    script.write_text(textwrap.dedent(text))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    command = [sys.executable, *(launch if launcher == "torchrun" else []), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "root") == {"folded.ckpt", "folding.html", "folding.json"}
