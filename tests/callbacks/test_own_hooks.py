"""What modules do in their own validation hooks, and how they save: when a fit ends, all is as it was without us."""

from __future__ import annotations

import copy
import os
import random
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.serialization import save as save_as_imported
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from lit_bnfold import BatchNormFolding, load_folded
from lit_bnfold.checkpoint import FoldedLoading
from lit_bnfold.folding import FoldingError, FoldingPlan
from trainers import files_in, quiet_trainer

Randomised = Callable[[nn.Module], nn.Module]


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def examples() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(32, 4, generator=generator), torch.randint(3, (32,), generator=generator))


def fitted(module: LightningModule, tmp_path: Path, *, validation: Any = None, **kwargs: Any) -> Any:
    trainer = quiet_trainer(tmp_path, **kwargs)
    trainer.fit(module, DataLoader(examples(), batch_size=8), validation or DataLoader(examples(), batch_size=8))
    return trainer


# What is saved --------------------------------------------------------------------------------------------------------


class Partly(Tiny):
    """Keeps an encoder that never changes, and that its class makes anew, out of its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).requires_grad_(False)
            nn.init.normal_(self.encoder[1].running_mean)
            nn.init.uniform_(self.encoder[1].running_var, 0.5, 3.0)

    def forward(self, inputs: Tensor) -> Tensor:
        self.encoder.eval()
        return self.net(self.encoder(inputs))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if not name.startswith("encoder.")}


class PartlyByHook(Partly):
    """Does so when it saves."""

    state_dict = Tiny.state_dict

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: each for name, each in state.items() if not name.startswith("encoder.")}


@pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the checkpoint")
@pytest.mark.parametrize("kind", [Partly, PartlyByHook])
def test_what_a_module_leaves_out_of_its_checkpoints_stays_and_the_rest_is_folded(
    kind: type[Tiny], tmp_path: Path, randomised: Randomised
) -> None:
    folding, module = BatchNormFolding(), kind()
    randomised(module.net)
    fitted(module, tmp_path, callbacks=[folding])
    assert folding.plan is not None
    assert [fold.batchnorm for fold in folding.plan.folds] == ["net.1"]
    assert [(kept.batchnorm, kept.code) for kept in folding.plan.kept] == [("encoder.1", "not-saved")]
    loaded, inputs = load_folded(kind, tmp_path / "folded.ckpt"), torch.randn(7, 4)
    torch.testing.assert_close(loaded(inputs), module.eval()(inputs), rtol=1e-5, atol=1e-5)


class StartingAnew(Tiny):
    """Writes under other names, and begins with a fresh last layer wherever it is loaded."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"m.{name}": each for name, each in checkpoint["state_dict"].items()}
        checkpoint["extra"] = {"version": 1}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {name.removeprefix("m."): each for name, each in checkpoint["state_dict"].items()}
        checkpoint["state_dict"] = state
        state["net.3.bias"].zero_()
        checkpoint["extra"].pop("version")


def test_to_look_whether_a_checkpoint_is_whole_changes_neither_it_nor_the_module(
    tmp_path: Path, randomised: Randomised
) -> None:
    module = randomised(StartingAnew())
    fitted(module, tmp_path, callbacks=[BatchNormFolding()])
    assert module.net[3].bias.abs().min() > 0
    saved = torch.load(tmp_path / "folded.ckpt", weights_only=True)
    assert saved["extra"] == {"version": 1}
    assert torch.equal(saved["state_dict"]["m.net.3.bias"], module.net[3].bias)


class LoadingItself(Tiny):
    """Saves its network once more and loads that."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["net"] = self.net.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.net.load_state_dict(checkpoint["net"])


def test_a_module_that_loads_its_network_itself_meets_it_folded(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding()
    trainer = fitted(randomised(LoadingItself()), tmp_path, callbacks=[folding])
    loaded, inputs = load_folded(LoadingItself, tmp_path / "folded.ckpt"), torch.randn(7, 4)
    assert folding.folded_module is not None
    assert torch.equal(loaded(inputs), folding.folded_module(inputs))
    trainer.validate(module := LoadingItself(), DataLoader(examples()), ckpt_path=tmp_path / "folded.ckpt")
    assert torch.equal(module(inputs), folding.folded_module(inputs))


class Building(Tiny):
    """Builds its network when it is loaded."""

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.net = Tiny().net


class BuildingAPart(Tiny):
    """Builds one of its networks when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.build()

    def build(self) -> None:
        self.head = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.build()


class Drawing(Tiny):
    """Draws numbers when it is saved and loaded, and wants nothing but weights there."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.drawn = torch.rand(3), random.random()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.drawn = torch.rand(3), random.random()
        assert checkpoint["state_dict"].keys() <= Tiny().state_dict().keys()


class Mixed(FoldedLoading, LoadingItself):
    pass


@pytest.mark.parametrize("kind", [Building, BuildingAPart, Drawing, Mixed])
def test_a_module_that_does_more_when_it_is_loaded_is_loaded_folded(
    kind: type[Tiny], tmp_path: Path, randomised: Randomised
) -> None:
    folding, drawn = BatchNormFolding(), []
    for callbacks in ([], [folding]):
        torch.manual_seed(1)
        random.seed(1)
        fitted(randomised(kind()), tmp_path, callbacks=callbacks)
        drawn.append((torch.rand(1), random.random()))
    assert drawn[0] == drawn[1]
    inputs = torch.randn(7, 4)
    assert folding.folded_module is not None
    expected = folding.folded_module(inputs)
    loaded = load_folded(kind, tmp_path / "folded.ckpt")
    assert torch.equal(loaded(inputs), expected)
    saved: dict[str, Any] = {"state_dict": loaded.state_dict()}
    loaded.on_save_checkpoint(saved)
    assert FoldingPlan.from_dict(saved["batchnorm_folding"]) == folding.plan
    if kind is Mixed:
        assert torch.equal(Mixed.load_from_checkpoint(tmp_path / "folded.ckpt").eval()(inputs), expected)


class Changing(Tiny):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.0.weight"] = torch.zeros(5, 4)


class MixedChanging(FoldedLoading, Changing):
    pass


class Forgetting(Tiny):
    """Saves its network, and begins anew wherever it is loaded."""

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        fresh = {name: torch.zeros_like(tensor) for name, tensor in state_dict.items()}
        return super().load_state_dict(fresh, *args, **kwargs)


class WithLock(Tiny):
    """Cannot be copied, and writes under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {f"m.{name}": tensor for name, tensor in super().state_dict(*args, **kwargs).items()}


def test_of_a_module_that_cannot_be_copied_nobody_can_tell(tmp_path: Path, randomised: Randomised) -> None:
    with pytest.warns(UserWarning, match="cannot be copied"):
        fitted(randomised(WithLock()), tmp_path, callbacks=[BatchNormFolding()])
    assert "folded.ckpt" in files_in(tmp_path)


class Halved(Tiny):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: tensor.half() for name, tensor in checkpoint["state_dict"].items()}


class Averaged(Tiny):
    """Saves other weights than its own, those of the structure that it was made with."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = Tiny().state_dict()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Halved, "its folded.ckpt would not hold `net.0.weight` as it is folded"),
        (Changing, "its folded.ckpt would not hold `net.0.weight` as it is folded"),
        (MixedChanging, "its folded.ckpt would not hold `net.0.weight` as it is folded"),
        (Forgetting, "its folded.ckpt would not hold `net.0.weight` as it is folded"),
        (Averaged, "its folded.ckpt could not be loaded again: RuntimeError: Error"),
    ],
)
def test_a_module_that_saves_something_else_is_a_mismatch(
    kind: type[Tiny], sentence: str, tmp_path: Path, randomised: Randomised
) -> None:
    with pytest.raises(FoldingError, match=sentence):
        fitted(randomised(kind()), tmp_path / "raises", callbacks=[BatchNormFolding()])
    folding, module = BatchNormFolding(on_mismatch="warn"), randomised(kind())
    with pytest.warns(UserWarning, match=sentence):
        fitted(module, tmp_path / "warns", callbacks=[folding])
    assert folding.report["mismatch"].startswith(sentence)
    assert folding.folded_module is None
    assert isinstance(module.net[1], nn.BatchNorm1d)
    assert files_in(tmp_path) == set()


class Renaming(Tiny):
    """Writes its weights under other names, and takes them back."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name.removeprefix("net."): tensor for name, tensor in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        return super().load_state_dict({f"net.{name}": each for name, each in state_dict.items()}, *args, **kwargs)


def test_a_module_that_saves_under_other_names_is_folded(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding()
    fitted(randomised(Renaming()), tmp_path, callbacks=[folding])
    inputs = torch.randn(7, 4)
    assert torch.equal(load_folded(Renaming, tmp_path / "folded.ckpt")(inputs), folding.folded_module(inputs))


class KeepingItself(Tiny):
    """Saves its newest weights by itself, in many ways, and tells a log of it."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.directory = directory

    def on_validation_epoch_end(self) -> None:
        state = self.state_dict()
        torch.save(state, self.directory / "torch.pt")
        save_as_imported(state, str(self.directory / "imported.pt"))
        with (self.directory / "file.pt").open("wb") as file:
            torch.save(state, file)
        self.trainer.save_checkpoint(self.directory / "own.ckpt")
        self.trainer.strategy.checkpoint_io.save_checkpoint(state, self.directory / "io.pt")
        (self.directory / "removed.pt").unlink(missing_ok=True)
        for name in ("removed.pt", "written.pt"):
            torch.save(state, self.directory / name)
        (self.directory / "written.pt").replace(self.directory / "renamed.pt")
        with (self.directory / "log.txt").open("a") as log:
            log.write("validated\n")


@pytest.mark.parametrize("options", [{}, {"weights": "best"}, {"reestimate_batches": 2}])
def test_what_a_module_keeps_by_itself_is_what_training_has_left(
    options: dict[str, Any], tmp_path: Path, randomised: Randomised
) -> None:
    found = {}
    for name, callbacks in {"without": [], "with": [BatchNormFolding(**options)]}.items():
        directory = tmp_path / name
        directory.mkdir()
        torch.manual_seed(1)
        saver = ModelCheckpoint(tmp_path / f"saved_{name}", monitor="val/loss", mode="max")
        fitted(randomised(KeepingItself(directory)), tmp_path, callbacks=[saver, *callbacks], enable_checkpointing=True)
        paths = sorted(path for path in directory.iterdir() if path.name != "log.txt")
        found[name] = {path.name: torch.load(path, weights_only=True) for path in paths}
        lines = (directory / "log.txt").read_text().splitlines()
        assert len(lines) == {"without": 3, "with": 6 if "reestimate_batches" in options else 5}[name]
    assert len(found["with"]) == 7
    assert found["with"].keys() == found["without"].keys()
    for name, expected in found["without"].items():
        saved = found["with"][name]
        for state in (saved, expected):
            state.pop("callbacks", None)
        assert str(saved) == str(expected)
    assert vars(torch.serialization)["_open_zipfile_writer"].__module__ == "torch.serialization"


class KeepingLater(Tiny):
    def on_validation_epoch_end(self) -> None:
        self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/best.ckpt")


def test_what_another_thread_would_write_is_written_at_once(tmp_path: Path, randomised: Randomised) -> None:
    plugin = AsyncCheckpointIO()
    module = randomised(KeepingLater())
    trainer = fitted(module, tmp_path, callbacks=[BatchNormFolding()], plugins=[plugin])
    assert trainer.strategy.checkpoint_io is plugin
    plugin.teardown()
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["state_dict"].keys() == module.state_dict().keys()


class NamingByTime(Tiny):
    saved = 0

    def on_validation_epoch_end(self) -> None:
        type(self).saved += 1
        self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/{self.saved}.ckpt")


def test_a_new_checkpoint_of_the_folded_module_says_so(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding()
    fitted(randomised(NamingByTime()), tmp_path, callbacks=[folding], num_sanity_val_steps=0)
    assert NamingByTime.saved == 4
    state = [torch.load(tmp_path / f"{number}.ckpt", weights_only=True) for number in (1, 2, 3, 4)]
    assert ["batchnorm_folding" in each for each in state] == [False, False, False, True]
    assert folding.folded_module is not None
    inputs = torch.randn(7, 4)
    assert torch.equal(load_folded(NamingByTime, tmp_path / "4.ckpt")(inputs), folding.folded_module(inputs))


class Elsewhere(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        super().save_checkpoint(checkpoint, f"{path}.encrypted", storage_options)


def test_a_plugin_that_writes_under_another_name_is_named(tmp_path: Path) -> None:
    folding = BatchNormFolding(on_mismatch="warn")
    with pytest.warns(UserWarning, match=r"end: FileNotFoundError: .*Elsewhere.* wrote no.*\. Nothing was written\."):
        trainer = fitted(Tiny(), tmp_path, callbacks=[folding], plugins=[Elsewhere()])
    assert (folding.plan, folding.report, folding.folded_module) == (None, None, None)
    assert not [key for key in trainer.callback_metrics if key.startswith("folding/")]


def test_what_fails_behind_the_folded_checkpoint_leaves_that_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lit_bnfold.callbacks.batchnorm_folding.write_html", fails)
    with pytest.warns(UserWarning, match=r"OSError: disk full\. Its folded\.ckpt is written\."):
        fitted(Tiny(), tmp_path, callbacks=[BatchNormFolding(on_mismatch="warn")])
    assert files_in(tmp_path) == {"folded.ckpt"}


# What validation hooks do ---------------------------------------------------------------------------------------------


class Annealed(Tiny):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        weight = [1.0, 2.0][self.current_epoch]
        self.log("val/loss", weight * F.cross_entropy(self(batch[0]), batch[1]))


@pytest.mark.parametrize("weights", ["last", "best"])
def test_the_validations_have_the_epoch_in_which_the_weights_were_validated(
    weights: Any, tmp_path: Path, randomised: Randomised
) -> None:
    folding, saving = BatchNormFolding(weights=weights), ModelCheckpoint(tmp_path, monitor="val/loss")
    trainer = fitted(
        randomised(Annealed()), tmp_path, callbacks=[folding, saving], enable_checkpointing=True, num_sanity_val_steps=0
    )
    noted = saving.best_model_score if weights == "best" else trainer.callback_metrics["val/loss"]
    assert folding.report["validation"]["original"]["val/loss"] == pytest.approx(float(noted), rel=1e-6)
    assert trainer.current_epoch == 2


class Swapping(Tiny):
    """Validates with the mean of its weights, in its own hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.shadow = copy.deepcopy(self.net).requires_grad_(False)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        with torch.no_grad():
            for mean, own in zip(self.shadow.parameters(), self.net.parameters(), strict=True):
                mean.lerp_(own, 0.5)

    def on_validation_epoch_start(self) -> None:
        self.backup = copy.deepcopy(self.net.state_dict())
        self.net.load_state_dict(self.shadow.state_dict())

    def on_validation_epoch_end(self) -> None:
        self.net.load_state_dict(self.backup)


class SwappingByData(Tiny):
    """The same with a copy of each parameter, as exponential averages outside of Lightning do it."""

    takes = staticmethod(lambda own, other: own.data.copy_(other))

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5, bias=False), *self.net[1:])
        self.shadow = [torch.zeros_like(own) for own in self.net.parameters()]

    def on_before_zero_grad(self, optimizer: Any) -> None:
        for mean, own in zip(self.shadow, self.net.parameters(), strict=True):
            mean.lerp_(own.detach(), 0.5)

    def on_validation_epoch_start(self) -> None:
        self.backup = [own.detach().clone() for own in self.net.parameters()]
        # A folded layer has a bias, for which there is no mean: they do not go together any longer.
        for own, mean in zip(self.net.parameters(), self.shadow, strict=False):
            self.takes(own, mean)

    def on_validation_epoch_end(self) -> None:
        for own, before in zip(self.net.parameters(), self.backup, strict=True):
            self.takes(own, before)


class SwappingMemory(SwappingByData):
    takes = staticmethod(lambda own, other: setattr(own, "data", other.clone().expand_as(own)))


class FailingWhileSwapped(Swapping):
    """Its validation fails as soon as no callback of a fit can hear of it."""

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        if type(self.trainer.profiler).__name__ == "PassThroughProfiler" and self.trainer.current_epoch == 1:
            self.runs = getattr(self, "runs", 0) + 1
            if self.runs > 4:
                raise RuntimeError("Error of its own")
        return super().validation_step(batch, batch_idx)


class LookingAtItsBatchNorm(Tiny):
    def on_validation_epoch_end(self) -> None:
        self.log("norm", self.net[1].running_mean.norm())


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (Swapping, "RuntimeError: Error"),
        (SwappingByData, "RuntimeError: The size of tensor"),
        (SwappingMemory, "RuntimeError: .*expand"),
        (FailingWhileSwapped, "RuntimeError: Error of its own"),
        (LookingAtItsBatchNorm, "AttributeError: .*running_mean"),
    ],
)
def test_hooks_that_cannot_run_on_a_folded_module_leave_the_fit_as_it_was(
    kind: type[Tiny], sentence: str, tmp_path: Path, randomised: Randomised
) -> None:
    torch.manual_seed(0)
    alone, module = randomised(kind()), randomised(kind())
    module.load_state_dict(alone.state_dict())
    fitted(alone, tmp_path / "alone", num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=f"BatchNormFolding did not come to its end: {sentence}"):
        fitted(module, tmp_path / "with", callbacks=[BatchNormFolding(on_mismatch="warn")], num_sanity_val_steps=0)
    state = module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in alone.state_dict().items())
    assert files_in(tmp_path) == set()


class Restoring(Tiny):
    """Puts back after each validation what it had before, in one of several ways."""

    def __init__(self, restores: Callable[[Any, dict[str, Tensor]], object]) -> None:
        super().__init__()
        self.restores = restores

    def on_validation_start(self) -> None:
        self.backup = {name: tensor.clone() for name, tensor in self.state_dict().items()}

    def on_validation_end(self) -> None:
        self.restores(self, self.backup)


def by_data(module: Any, backup: dict[str, Tensor]) -> None:
    for name, own in module.named_parameters():
        own.data.copy_(backup[name])


def by_memory(module: Any, backup: dict[str, Tensor]) -> None:
    for name, own in module.named_parameters():
        own.data = backup[name]


def by_its_tensors(module: Any, backup: dict[str, Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        tensor.copy_(backup[name])


@pytest.mark.parametrize(
    "restores", [by_data, by_memory, by_its_tensors, lambda module, backup: module.load_state_dict(backup)]
)
def test_a_module_that_restores_its_weights_after_each_validation_is_folded(
    restores: Any, tmp_path: Path, randomised: Randomised
) -> None:
    module, folding = randomised(Restoring(restores)), BatchNormFolding()
    fitted(module, tmp_path, callbacks=[folding])
    inputs = torch.randn(7, 4)
    folded = load_folded(Restoring, tmp_path / "folded.ckpt", restores=restores)
    assert torch.equal(folded(inputs), folding.folded_module(inputs))
    torch.testing.assert_close(folded(inputs), module.eval()(inputs), rtol=0, atol=1e-5)


class Asking(Tiny):
    """Asks its logger where it writes, and tells it a few things."""

    def on_validation_epoch_end(self) -> None:
        experiment = self.logger.experiment
        place = experiment.get_logdir() if hasattr(experiment, "get_logdir") else experiment.log_dir
        assert Path(os.path.join(place, "events")).parent.is_dir()  # noqa: PTH118 (the usual idiom)
        if not self.trainer.sanity_checking:
            experiment.summary["best"] = experiment.config.update({"a": 1}).b


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_an_experiment_answers_what_it_is_asked(kind: Any, tmp_path: Path, randomised: Randomised) -> None:
    module, folding, logger = randomised(Asking()), BatchNormFolding(), kind(tmp_path)
    logger.experiment.summary, logger.experiment.config = {}, type("Config", (), {"update": lambda *_: _[0], "b": 1})()
    fitted(module, tmp_path, callbacks=[folding], logger=logger)
    assert folding.report["mismatch"] is None
    assert set(logger.experiment.summary) == {"best"}


# What a module holds --------------------------------------------------------------------------------------------------


class Holding(Tiny):
    def __init__(self, held: Any) -> None:
        super().__init__()
        if isinstance(held, Tensor):
            self.register_buffer("held", held)
        else:
            self.held = held


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("sparse", [lambda: torch.eye(4).to_sparse(), lambda: torch.eye(4).to_sparse_csr()])
def test_a_sparse_buffer_is_no_obstacle(sparse: Any, tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding()
    fitted(randomised(Holding(sparse())), tmp_path, callbacks=[folding])
    assert folding.report["mismatch"] is None
    assert torch.equal(folding.folded_module.held.to_dense(), torch.eye(4))


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(3), lambda: nn.LazyBatchNorm1d()])
def test_a_lazy_layer_that_was_never_called_is_named(lazy: Any, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"`held\.\w+` is not initialised"):
        fitted(Holding(lazy()), tmp_path, callbacks=[BatchNormFolding(on_mismatch="warn")])


class Writing(Holding):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.held.mul_(2.0)
        super().validation_step(batch, batch_idx)


def test_a_sparse_buffer_that_is_written_is_put_back(tmp_path: Path, randomised: Randomised) -> None:
    module = randomised(Writing(torch.eye(4).to_sparse()))
    fitted(module, tmp_path, callbacks=[BatchNormFolding()], num_sanity_val_steps=0)
    assert module.held.to_dense().trace() == 4 * 2.0**8


class Typed(Dataset[Any]):
    """Has classes for functions."""

    def __init__(self) -> None:
        self.target_transform, self.examples = int, examples()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        return self.examples[index][0], self.target_transform(self.examples[index][1])


def test_a_dataset_that_has_a_class_for_a_function_is_validated(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding()
    fitted(randomised(Tiny()), tmp_path, validation=DataLoader(Typed(), batch_size=8), callbacks=[folding])
    assert folding.report["mismatch"] is None


class Noisy(Dataset[Any]):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.generator, self.examples = torch.Generator().manual_seed(1), examples()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.examples[index]
        return inputs + torch.randn(4, generator=self.generator), target


def test_generators_inside_joined_datasets_are_put_back(tmp_path: Path, randomised: Randomised) -> None:
    noisy, folding = Noisy(), BatchNormFolding()
    fitted(
        randomised(Tiny()), tmp_path, validation=DataLoader(ConcatDataset([noisy]), batch_size=8), callbacks=[folding]
    )
    assert folding.report["output_error"] is not None
    alone = Noisy()
    fitted(Tiny(), tmp_path, validation=DataLoader(ConcatDataset([alone]), batch_size=8))
    assert torch.equal(noisy.generator.get_state(), alone.generator.get_state())


def test_a_dataset_on_the_module_is_not_copied(tmp_path: Path, randomised: Randomised) -> None:
    module, folding = randomised(Holding(examples())), BatchNormFolding()
    fitted(module, tmp_path, callbacks=[folding])
    assert folding.folded_module.held is module.held


def test_a_module_without_batchnorms_that_nothing_can_be_proven_on_ends_its_fit(tmp_path: Path) -> None:
    class Bare(Tiny):
        validation_step = LightningModule.validation_step

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def forward(self, inputs: Tensor, extra: Tensor) -> Tensor:
            return self.net(inputs) + extra

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).square().mean()

    with pytest.warns(UserWarning, match="has nothing to fold"):
        quiet_trainer(tmp_path, callbacks=[BatchNormFolding()]).fit(Bare(), DataLoader(examples(), batch_size=8))


# Where it goes --------------------------------------------------------------------------------------------------------


def test_a_place_on_another_machine_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"writes to a directory of this machine, got s3://bucket/x; give one"):
        fitted(Tiny(), tmp_path, callbacks=[BatchNormFolding(dirpath="s3://bucket/x")])


def test_a_directory_may_be_given_as_a_url(tmp_path: Path, randomised: Randomised) -> None:
    fitted(randomised(Tiny()), tmp_path, callbacks=[BatchNormFolding(dirpath=f"file://{tmp_path}/here")])
    assert (tmp_path / "here" / "folded.ckpt").is_file()


# What else there is beside parameters ---------------------------------------------------------------------------------


class Counting(Tiny):
    """Counts what it does, in containers of many kinds, and in hooks that its copies share."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"validated": 0})
        self.counts, self.seen = Counter[str](), Recent()
        self.outputs: list[Tensor] = []
        self.net[2].register_forward_hook(lambda module, inputs, output: self.outputs.append(output.detach()))

    def on_validation_epoch_start(self) -> None:
        self.outputs.clear()

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.counts["validated"] += 1
        self.seen.append(batch_idx)
        self.hparams["validated"] += 1
        self.trainer.datamodule.seen.append(batch_idx)
        return super().validation_step(batch, batch_idx)

    def state(self) -> Any:
        sizes = [len(output) for output in self.outputs]
        return dict(self.counts), list(self.seen), dict(self.hparams), list(self.trainer.datamodule.seen), sizes


class Recent(list):  # type: ignore[type-arg]
    """Keeps the last three alone."""

    def append(self, item: Any) -> None:
        super().append(item)
        del self[:-3]

    def extend(self, items: Any) -> None:
        raise NotImplementedError


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def train_dataloader(self) -> Any:
        return DataLoader(examples(), batch_size=8)

    val_dataloader = train_dataloader


def test_counters_of_any_kind_are_put_back(tmp_path: Path, randomised: Randomised) -> None:
    states = []
    for callbacks in ([], [BatchNormFolding()]):
        torch.manual_seed(1)
        module, trainer = randomised(Counting()), quiet_trainer(tmp_path, callbacks=callbacks)
        trainer.fit(module, datamodule=Data())
        states.append(module.state())
    assert states[0] == states[1]


class Registry(OrderedDict):  # type: ignore[type-arg]
    def __setitem__(self, key: Any, value: Any) -> None:
        assert key not in self
        super().__setitem__(key, value)


class Newest(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return reversed(list(super().__iter__()))


def test_containers_that_nobody_has_changed_are_not_touched(tmp_path: Path) -> None:
    module = Tiny()
    module.registry, module.newest = Registry(first=1), Newest([1, 2, 3])
    fitted(module, tmp_path, callbacks=[BatchNormFolding()])
    assert dict(module.registry) == {"first": 1}
    assert [list.__getitem__(module.newest, place) for place in range(3)] == [1, 2, 3]


class InTurn(Tiny):
    """Has two schedules, one after the other, which it moves in its validation."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        parts = [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
        return [optimizer], [torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [1])]

    def on_validation_epoch_end(self) -> None:
        self.lr_schedulers().step()


def test_schedules_inside_of_others_are_put_back(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [BatchNormFolding()]):
        trainer = fitted(InTurn(), tmp_path, callbacks=callbacks)
        states.append(str(trainer.lr_scheduler_configs[0].scheduler.state_dict()))
    assert states[0] == states[1]


class KeepingTheWriter(Tiny):
    def on_fit_start(self) -> None:
        self.writer = self.logger.experiment

    def on_validation_epoch_end(self) -> None:
        self.writer.add_scalar("mine", 1.0, self.global_step)


def test_a_writer_that_is_kept_as_an_attribute_is_silent_and_no_part_of_the_copy(tmp_path: Path) -> None:
    folding, logger = BatchNormFolding(), TensorBoardLogger(tmp_path)
    module = KeepingTheWriter()
    fitted(module, tmp_path, callbacks=[folding], logger=logger, num_sanity_val_steps=0)
    assert module.writer is logger.experiment
    assert folding.folded_module is not None
    assert folding.folded_module.writer is logger.experiment
    events = EventAccumulator(logger.log_dir).Reload()
    assert len(events.Scalars("mine")) == 2


class AskingARun(Tiny):
    """Asks the run of its logger for all kinds of things."""

    def on_validation_epoch_end(self) -> None:
        run = self.logger.experiment
        assert isinstance(run, Run)
        with run.validate():
            if run.summary.get("best", 9.0) > 0.5 * run.config["weight"]:
                run.summary["best"] = 0.0
            run.log({"product": 2.0 * run.config["weight"], "history": len(run.history)})


class Run:
    """Such as those of the services that keep experiments."""

    def __init__(self) -> None:
        self.summary: dict[str, float] = {}
        self.config, self.history = {"weight": 1.0}, [1, 2]
        self.logged: list[Any] = []

    def validate(self) -> Any:
        return nullcontext()

    def log(self, values: Any) -> None:
        self.logged.append(values)


class ServiceLogger(Logger):
    def __init__(self, save_dir: Path) -> None:
        super().__init__()
        self._experiment, self._save_dir = Run(), save_dir

    name, version = "project", "run"

    @property
    def save_dir(self) -> str:
        return str(self._save_dir)

    @property
    def experiment(self) -> Run:
        return self._experiment

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any) -> None:
        pass


def test_a_run_is_asked_and_told_nothing_and_its_directory_is_that_of_its_checkpoints(tmp_path: Path) -> None:
    logger = ServiceLogger(tmp_path)
    fitted(AskingARun(), tmp_path, callbacks=[BatchNormFolding()], logger=logger, num_sanity_val_steps=0)
    assert len(logger.experiment.logged) == 2
    assert files_in(tmp_path / "project" / "run") == {"folded.ckpt", "folding.html", "folding.json"}


class HoldingOn(Tiny):
    """Keeps a function that holds on to its network, as for a compiled one; copies share functions."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = lambda inputs: self.net(inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.fast(inputs)


def test_a_copy_that_would_call_the_module_itself_is_none(tmp_path: Path, randomised: Randomised) -> None:
    folding, module = BatchNormFolding(), randomised(HoldingOn())
    with pytest.warns(UserWarning, match="A copy of the module calls the module itself"):
        fitted(module, tmp_path, callbacks=[folding])
    assert folding.folded_module is None
    assert folding.report is not None
    assert folding.report["inference"]["operations"] == {}
    assert not any(part._forward_pre_hooks for part in module.modules())
    loaded, inputs = load_folded(HoldingOn, tmp_path / "folded.ckpt"), torch.randn(7, 4)
    torch.testing.assert_close(loaded(inputs), module.eval()(inputs), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm1d) for part in loaded.modules())


# Steps that call layers themselves ------------------------------------------------------------------------------------


class Stepping(Tiny):
    """Has its layers called by its steps, past ``__call__``; others may want to read what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        del self.net

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.norm(self.first(inputs)).relu())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.forward(batch[0]), batch[1]))


def test_layers_that_a_step_calls_itself_stay_and_it_says_how_to_fold_them(
    tmp_path: Path, randomised: Randomised
) -> None:
    folding = BatchNormFolding()
    fitted(randomised(Stepping()), tmp_path, callbacks=[folding])
    assert folding.plan is not None
    [kept] = folding.plan.kept
    assert kept.code == "kept-alive"
    assert "is given to code outside of any module, as where a step calls `self.forward(x)` and not" in kept.reason
