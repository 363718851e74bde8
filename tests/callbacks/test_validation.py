"""The sandboxed runs of validation and of training steps: ordinary numbers, and no trace of it in the Trainer."""

import os
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset
from torchmetrics import CatMetric, MeanMetric, MetricCollection, MetricTracker, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

from lit_bnfold.callbacks.validation import (
    ValidationRun,
    first_training_batch,
    run_training_steps,
    run_validation,
)
from lit_bnfold.folding import FoldingError
from trainers import quiet_trainer

pytestmark = [
    # A shuffled loader is among the situations.
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled"),
    # So are loaders that are missing or empty.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero"),
    # Older versions of torchmetrics warn of a default, also where it is not used.
    pytest.mark.filterwarnings("ignore:The default value for `maximize` will be changed:FutureWarning"),
]


try:
    from lightning.pytorch.callbacks import WeightAveraging
except ImportError:
    # Older versions do not have it; any callback is a neighbour.
    WeightAveraging = Callback


# A tiny fit, of which every situation is a variation -----------------------------------------------------------------


def examples(count: int = 10) -> TensorDataset:
    """Inputs (count, 4) and targets (count,); ten of them in batches of four make the last batch a smaller one."""
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 2)


def loader(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(examples(), batch_size=4, **kwargs)


class Steps:
    """A network with a BatchNorm, fitted to noise, that logs its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2))

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch  # (B, 4), (B,)
        return nn.functional.cross_entropy(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val/loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tiny(Steps, LightningModule):
    pass


class StandaloneTiny(Steps, pytorch_lightning.LightningModule):
    """The same under the other import name, whose classes are not those of `lightning.pytorch`."""


class Probe(Callback):
    """Runs the validation twice at the end of training and compares everything before with everything after."""

    everything: Callable[..., dict[str, object]]

    def __init__(self) -> None:
        self.runs: list[ValidationRun | None] = []
        self.changes: dict[str, tuple[object, object]] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        alive: list[object] = []
        before = Probe.everything(trainer, alive, Probe)
        self.validate(trainer, pl_module)
        after = Probe.everything(trainer, alive, Probe)
        self.changes = {
            name: (before.get(name), after.get(name))
            for name in before.keys() | after.keys()
            if before.get(name) != after.get(name)
        }

    def trace(self, stays: tuple[str, ...] = ()) -> dict[str, tuple[object, object]]:
        """Returns the fields that changed, except for those in `stays` and what is in them."""
        return {name: change for name, change in self.changes.items() if not set(stays) & set(name.split("."))}

    def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.runs = [run_validation(trainer, pl_module) for _ in range(2)]


@pytest.fixture(autouse=True)
def _everything(everything: Callable[..., dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Probe, "everything", staticmethod(everything), raising=False)


@dataclass
class Situation:
    """A fit to validate at the end of.

    Attributes:
        module: Makes the module.
        val: Makes the validation loaders, None to leave them to the module or datamodule.
        train: Makes the training loaders.
        batches: The batches expected of each run, per loader; None where there is nothing to validate on.
        comparable: Whether a fresh Trainer gives the same numbers.
        stays: Fields that may differ after the run, with all that is in them.
        trainer: More arguments of the Trainer.
    """

    module: Callable[[], Any] = Tiny
    val: Callable[[], Any] | None = loader
    train: Callable[[], Any] = loader
    batches: tuple[int, ...] | None = (3,)
    comparable: bool = True
    stays: tuple[str, ...] = ()
    datamodule: LightningDataModule | None = None
    trainer: dict[str, Any] = field(default_factory=dict)


def fit(situation: Situation, tmp_path: Path, probe: Probe) -> LightningModule:
    torch.manual_seed(0)
    module = situation.module()
    arguments = dict(situation.trainer)
    arguments["callbacks"] = [*arguments.get("callbacks", []), probe]
    loaders: dict[str, Any] = {"datamodule": situation.datamodule}
    if situation.datamodule is None:
        loaders = {"train_dataloaders": situation.train(), "val_dataloaders": situation.val and situation.val()}
    quiet_trainer(tmp_path, **{"max_epochs": 1} | arguments).fit(module, **loaders)
    return module


# The situations ------------------------------------------------------------------------------------------------------


class Silent(Tiny):
    """Logs nothing; returns its loss as `returned` says."""

    returned: Callable[[Tensor], Any] = staticmethod(lambda loss: loss)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.returned(self.loss(batch))


class SilentDict(Silent):
    returned = staticmethod(lambda loss: {"loss": loss, "other": None})


class SilentNothing(Silent):
    returned = staticmethod(lambda loss: None)


class LogsInManyWays(Tiny):
    """Logs what does not reach `callback_metrics` in validation, what reaches it twice, and what is no scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.per_class = MulticlassAccuracy(2, average=None)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("val/step", loss, on_step=True, on_epoch=False)
        self.log("val/both", loss, on_step=True, on_epoch=True)
        self.per_class(self.net(batch[0]), batch[1])
        self.log("per_class", self.per_class, logger=False)
        return loss


class CountingLogger(CSVLogger):
    """Counts how often it is told to write to disk."""

    saved = finalized = 0

    def save(self) -> None:
        self.saved += 1
        super().save()

    def finalize(self, status: str) -> None:
        self.finalized += 1
        super().finalize(status)


class Writer(Tiny):
    """Writes past `self.log`, in every hook of a validation."""

    def write(self) -> None:
        for logger in self.loggers:
            assert Path(logger.log_dir).is_relative_to(logger.save_dir)
            assert (logger.name, logger.version) == ("lightning_logs", 0)
            logger.log_metrics({"direct": 1.0}, step=0)
            logger.log_hyperparams({"late": 1})
            logger.save()
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_scalar("experiment", 1.0, 0)
            else:
                assert isinstance(logger, CountingLogger)
                logger.experiment.log_metrics({"experiment": 1.0})
                logger.finalize("success")

    def on_validation_start(self) -> None:
        self.write()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.write()

    def on_validation_epoch_end(self) -> None:
        self.log("val/late", 1.0)
        self.write()

    def on_validation_end(self) -> None:
        self.write()


class Stochastic(Tiny):
    """Draws from every generator there is."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: dict[str, Any] = {
            "torch": torch.Generator(),
            "python": random.Random(0),
            "numpy": numpy.random.default_rng(0),
        }
        self.legacy = numpy.random.RandomState(0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        noises = {
            "torch": torch.rand(()),
            "python": random.random(),
            "numpy": numpy.random.rand(),
            "own_torch": torch.rand((), generator=self.draws["torch"]),
            "own_python": self.draws["python"].random(),
            "own_numpy": self.draws["numpy"].random(),
            "own_legacy": self.legacy.rand(),
        }
        self.log_dict({name: float(noise) for name, noise in noises.items()})


class NoisyExamples(TensorDataset):
    """Adds noise from a generator of its own, and counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__(*examples().tensors)
        self.generator = torch.Generator()
        self.asked = 0

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        inputs, target = super().__getitem__(index)
        return inputs + torch.randn(4, generator=self.generator), target


class WithMetrics(Tiny):
    """Metrics in every place where a module can keep one, some logged and reset by Lightning, some never reset."""

    def __init__(self) -> None:
        super().__init__()
        self.logged = MeanMetric()
        self.never_reset = SumMetric()
        self.collections = nn.ModuleDict(
            {"val": MetricCollection([MulticlassAccuracy(2, average="micro"), MulticlassPrecision(2, average="micro")])}
        )
        self.tracker = MetricTracker(MulticlassAccuracy(2), maximize=True)
        self.unregistered = [CatMetric()]

    def on_validation_start(self) -> None:
        self.tracker.increment()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        logits = self.net(inputs)  # (B, 2)
        self.logged(nn.functional.cross_entropy(logits, targets))
        self.log("logged", self.logged)
        self.collections["val"](logits, targets)
        self.log_dict(self.collections["val"])
        self.tracker.update(logits, targets)
        self.unregistered[0].update(logits.sum(dim=1))
        self.never_reset.update(logits)

    def on_validation_epoch_end(self) -> None:
        self.log("tracked", self.tracker.compute())
        self.log("cat", self.unregistered[0].compute().sum())
        self.log("sum", self.never_reset.compute())


class Careless(Tiny):
    """Changes itself and its Trainer in validation, in all ways that people do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.outputs: list[Tensor] = []
        self.recent: deque[int] = deque(maxlen=2)
        self.table: dict[str, list[int]] = {"seen": []}
        self.indices: set[int] = set()
        self.frozen = nn.Linear(2, 2)
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("last", None)
        self.total: Tensor
        self.last: Tensor | None

    def on_validation_model_eval(self) -> None:
        # BatchNorm stays in training mode and would learn from the validation data.
        self.net.train()

    def on_validation_start(self) -> None:
        assert "train/loss" in self.trainer.callback_metrics or self.trainer.sanity_checking

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.count += 1
        self.made_in_validation = True
        self.outputs.append(batch[0])
        self.recent.append(self.count)
        self.table["seen"].append(self.count)
        self.table[f"new {self.count}"] = []
        self.indices.add(self.count)
        self.total += batch[0].sum()
        self.last = batch[0]
        self.frozen.requires_grad_(False)
        self.net[0].eval()
        self._backward_hooks[self.count] = print
        self.log("count", float(self.count + len(self.outputs) + len(self.table) + len(self.recent)))
        self.log("total", self.total)

    def on_validation_epoch_end(self) -> None:
        self.trainer.should_stop = True
        self.trainer.extra = 1
        scheduler = self.lr_schedulers()
        scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)]


class Manual(Tiny):
    """Optimises by hand and steps a plateau scheduler after each validation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def on_validation_epoch_end(self) -> None:
        self.lr_schedulers().step(self.trainer.callback_metrics["val/loss"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)]


class FindsCallbacks(Tiny):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        assert self.trainer.checkpoint_callback.dirpath is not None
        assert self.trainer.early_stopping_callback.monitor == "val/loss"


class Compiled(Tiny):
    """Counts how often its compiled code runs."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend=self.backend)

    @classmethod
    def backend(cls, graph: Any, _: Any) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            cls.calls += 1
            return graph(*args)

        return counted


class OwnLoaders(Tiny):
    """Makes its loaders itself, at random, and leaves a mark that validation needs."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = torch.zeros(0)

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        assert self.trainer.validating or self.trainer.sanity_checking
        self.chosen = torch.randperm(10)[:8]
        return DataLoader(torch.utils.data.Subset(examples(), self.chosen.tolist()), batch_size=4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.log("chosen", float(self.chosen[0]))


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.moved = 0
        self.generator = torch.Generator()

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return [batch[0] + torch.randn((), generator=self.generator), batch[1]]


class Rotation:
    """Gives all of `items` but one, another one each time."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items
        self.times = 0

    def __iter__(self) -> Iterator[Any]:
        self.times += 1
        yield from [item for index, item in enumerate(self.items) if index != self.times % len(self.items)]


class EpochSampler(RandomSampler):
    """Shuffles by epoch, like a `DistributedSampler`."""

    epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.generator = torch.Generator().manual_seed(epoch)


class Combined(Tiny):
    """Gets one batch from each of two loaders at a time."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch["a"]) + self.loss(batch["b"]), batch_size=len(batch["a"][0]))


def watchers(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a Trainer whose callbacks react to every validation."""
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/loss", save_top_k=-1)
    heard = LambdaCallback(on_validation_start=lambda trainer, _: setattr(trainer, "heard", True))
    return {"callbacks": [EarlyStopping("val/loss"), checkpoint, heard], "enable_checkpointing": True}


def writers(tmp_path: Path, *classes: type) -> dict[str, Any]:
    return {"logger": [make(tmp_path / make.__name__) for make in classes]}


# What the fit asks for only at the first validation stays, so that both runs read the same loaders.
LOADERS = ("_combined_loader", "_max_batches", "_last_val_dl_reload_epoch", "_seen_batches_per_dataloader")
NEVER_VALIDATED = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}

SITUATIONS: dict[str, Callable[[Path], Situation]] = {
    "plain": lambda _: Situation(),
    # Loaders.
    "two_loaders": lambda _: Situation(val=lambda: [loader(), loader()], batches=(3, 3)),
    "combined_loader": lambda _: Situation(
        Combined, val=lambda: CombinedLoader({"a": loader(), "b": loader()}, "max_size_cycle")
    ),
    "sequential_combined_loader": lambda _: Situation(
        val=lambda: CombinedLoader([loader(), loader()], "sequential"), batches=(3, 3)
    ),
    "shuffled": lambda _: Situation(val=lambda: loader(shuffle=True)),
    "shuffled_by_a_generator": lambda _: Situation(val=lambda: loader(shuffle=True, generator=torch.Generator())),
    "shuffled_by_epoch": lambda _: Situation(val=lambda: loader(sampler=EpochSampler(examples()))),
    "persistent_worker": lambda _: Situation(val=lambda: loader(num_workers=1, persistent_workers=True)),
    "any_iterable": lambda _: Situation(val=lambda: Rotation(list(loader())), batches=(2,), comparable=False),
    "batch_sampler": lambda _: Situation(
        val=lambda: DataLoader(examples(), batch_sampler=Rotation([[0, 1], [2], [3, 4]])),
        batches=(2,),
        comparable=False,
    ),
    "noisy_dataset": lambda _: Situation(val=lambda: DataLoader(NoisyExamples(), batch_size=4), comparable=False),
    "datamodule": lambda _: Situation(datamodule=Data(), comparable=False),
    "own_loaders": lambda _: Situation(OwnLoaders, val=None, batches=(2,), comparable=False),
    "own_loaders_each_epoch": lambda _: Situation(
        OwnLoaders, val=None, batches=(2,), comparable=False, trainer={"reload_dataloaders_every_n_epochs": 1}
    ),
    "own_loaders_never_asked": lambda _: Situation(
        OwnLoaders, val=None, batches=(2,), comparable=False, stays=(*LOADERS, "chosen"), trainer=NEVER_VALIDATED
    ),
    "never_validated": lambda _: Situation(stays=LOADERS, trainer=NEVER_VALIDATED),
    "no_loader": lambda _: Situation(val=lambda: None, batches=None),
    "no_batch": lambda _: Situation(val=list, batches=None),
    # Limits and lengths of a fit.
    "no_sanity_check": lambda _: Situation(trainer={"num_sanity_val_steps": 0}),
    "every_second_epoch": lambda _: Situation(trainer={"check_val_every_n_epoch": 2, "max_epochs": 2}),
    "limit_0": lambda _: Situation(batches=None, trainer={"limit_val_batches": 0}),
    "limit_2": lambda _: Situation(batches=(2,), trainer={"limit_val_batches": 2}),
    "fast_dev_run": lambda _: Situation(batches=(1,), trainer={"fast_dev_run": True}),
    "overfit_batches": lambda _: Situation(batches=(1,), trainer={"overfit_batches": 1}),
    "max_steps": lambda _: Situation(trainer={"max_steps": 2, "max_epochs": -1}),
    "max_time": lambda _: Situation(trainer={"max_time": {"seconds": 0.2}, "max_epochs": -1}),
    "accumulation": lambda _: Situation(trainer={"accumulate_grad_batches": 2}),
    # What runs beside it.
    "watchers": lambda path: Situation(FindsCallbacks, comparable=False, trainer=watchers(path)),
    "averaging": lambda _: Situation(trainer={"callbacks": [WeightAveraging()], "max_epochs": 2}),
    "swa": lambda _: Situation(
        trainer={"callbacks": [StochasticWeightAveraging(0.1, swa_epoch_start=1)], "max_epochs": 2}
    ),
    "tqdm": lambda _: Situation(trainer={"callbacks": [TQDMProgressBar()], "enable_progress_bar": True}),
    "rich": lambda _: Situation(trainer={"callbacks": [RichProgressBar()], "enable_progress_bar": True}),
    "profiler": lambda _: Situation(trainer={"profiler": SimpleProfiler()}),
    "tensorboard": lambda path: Situation(Writer, trainer=writers(path, TensorBoardLogger)),
    "csv": lambda path: Situation(Writer, trainer=writers(path, CountingLogger)),
    "both_loggers": lambda path: Situation(Writer, trainer=writers(path, TensorBoardLogger, CountingLogger)),
    # Arithmetic.
    "bf16_mixed": lambda _: Situation(trainer={"precision": "bf16-mixed"}),
    "bf16_true": lambda _: Situation(trainer={"precision": "bf16-true"}),
    "float64": lambda _: Situation(trainer={"precision": "64-true"}),
    # Modules.
    "manual": lambda _: Situation(Manual, comparable=False, trainer={"num_sanity_val_steps": 0}),
    "silent": lambda _: Situation(Silent, comparable=False),
    "silent_dict": lambda _: Situation(SilentDict, comparable=False),
    "silent_nothing": lambda _: Situation(SilentNothing, comparable=False),
    "logs_in_many_ways": lambda _: Situation(LogsInManyWays),
    "stochastic": lambda _: Situation(Stochastic, comparable=False),
    "metrics": lambda _: Situation(WithMetrics, trainer={"num_sanity_val_steps": 0}),
    "metrics_never_validated": lambda _: Situation(WithMetrics, stays=LOADERS, trainer=NEVER_VALIDATED),
    "careless": lambda _: Situation(Careless, comparable=False, trainer={"num_sanity_val_steps": 0}),
    "careless_never_validated": lambda _: Situation(Careless, comparable=False, stays=LOADERS, trainer=NEVER_VALIDATED),
    "compiled": lambda _: Situation(Compiled),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_two_runs_agree_and_leave_no_trace(name: str, tmp_path: Path) -> None:
    situation = SITUATIONS[name](tmp_path)
    probe = Probe()
    module = fit(situation, tmp_path, probe)
    assert probe.trace(situation.stays) == {}
    first, second = probe.runs
    assert first == second
    assert (first and first.batches) == situation.batches
    if first is not None and situation.comparable:
        limits = {"precision", "limit_val_batches", "fast_dev_run", "overfit_batches"} & situation.trainer.keys()
        fresh = quiet_trainer(tmp_path / "fresh", **{name: situation.trainer[name] for name in limits})
        fresh.validate(module, situation.val(), verbose=False)
        scalars = {key: value.item() for key, value in fresh.callback_metrics.items() if value.numel() == 1}
        assert first.metrics == pytest.approx(scalars)


HOOKS = ["on_validation_start", "validation_step", "on_validation_epoch_end", "on_validation_end"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("module", [Careless, Stochastic, WithMetrics, Writer])
def test_a_run_that_raises_leaves_no_trace(
    module: type[Tiny], hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untroubled = getattr(module, hook)

    def troubled(self: LightningModule, *args: Any) -> None:
        untroubled(self, *args)
        raise RuntimeError("trouble")

    class Catching(Probe):
        def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with monkeypatch.context() as context:
                context.setattr(module, hook, troubled)
                with pytest.raises(RuntimeError, match="trouble"):
                    run_validation(trainer, pl_module)

    probe = Catching()
    arguments = {"callbacks": [Callback()], "num_sanity_val_steps": 0}
    fit(
        Situation(module, trainer={**arguments, **writers(tmp_path, TensorBoardLogger, CountingLogger)}),
        tmp_path,
        probe,
    )
    assert probe.trace() == {}


def test_what_is_drawn_between_two_runs_does_not_show(tmp_path: Path) -> None:
    class Drawing(Probe):
        def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for _ in range(2):
                self.runs.append(run_validation(trainer, pl_module))
                torch.rand(1)
                random.random()
                numpy.random.rand()

    probe = Drawing()
    fit(Situation(Stochastic), tmp_path, probe)
    assert probe.runs[0] == probe.runs[1]


def test_the_loaders_of_the_last_validation_serve_again(tmp_path: Path) -> None:
    class Comparing(Probe):
        def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().validate(trainer, pl_module)
            self.last = {key: trainer.callback_metrics[key].item() for key in ("val/loss", "chosen")}

    probe = Comparing()
    fit(Situation(OwnLoaders, val=None, trainer={"reload_dataloaders_every_n_epochs": 1}), tmp_path, probe)
    assert probe.runs[0].metrics == pytest.approx(probe.last)


def test_compiled_code_does_not_run(tmp_path: Path) -> None:
    class Counting(Probe):
        def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert Compiled.calls > 0
            calls = Compiled.calls
            super().validate(trainer, pl_module)
            assert Compiled.calls == calls

    fit(Situation(Compiled), tmp_path, Counting())


def test_metrics_have_the_keys_of_callback_metrics(tmp_path: Path) -> None:
    for loaders, keys in [(1, {"val/loss"}), (2, {"val/loss/dataloader_idx_0", "val/loss/dataloader_idx_1"})]:
        probe = Probe()
        fit(Situation(val=lambda count=loaders: [loader() for _ in range(count)]), tmp_path, probe)
        assert probe.runs[0].metrics.keys() == keys


@pytest.mark.parametrize("module", [Silent, SilentDict])
def test_a_module_that_logs_nothing_has_the_mean_of_its_returned_losses(module: type[Silent], tmp_path: Path) -> None:
    probe = Probe()
    fitted = fit(Situation(module), tmp_path, probe).eval()
    assert probe.runs[0].metrics == pytest.approx({"loss": fitted.loss(examples().tensors).item()})


@pytest.mark.parametrize(
    ("batches", "mean"),
    [
        ([{"a": torch.zeros(3), "b": torch.zeros(5)}, {"a": torch.zeros(1), "b": torch.zeros(5)}], 0.25),
        (["no", "tensor"], 0.5),
    ],
    ids=["of_two_sizes", "of_no_size"],
)
def test_returned_losses_are_weighted_as_logged_ones_are(batches: list[Any], mean: float, tmp_path: Path) -> None:
    class LosesItsIndex(Tiny):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return torch.tensor(float(batch_idx))

    probe = Probe()
    fit(Situation(LosesItsIndex, val=lambda: DataLoader(batches, batch_size=None)), tmp_path, probe)
    assert probe.runs[0].metrics == {"loss": mean}


def test_a_module_that_logs_and_returns_nothing_has_no_metrics(tmp_path: Path) -> None:
    probe = Probe()
    fit(Situation(SilentNothing), tmp_path, probe)
    assert probe.runs == [ValidationRun(metrics={}, batches=(3,))] * 2


def journal(heard: list[str]) -> LambdaCallback:
    """A callback that notes every validation hook that it hears."""
    hooks = [name for name in dir(Callback) if name.startswith("on_validation_")]
    return LambdaCallback(**{hook: lambda *_, name=hook: heard.append(name) for hook in hooks})


def test_measuring_callbacks_hear_the_ordinary_hooks_once_and_nobody_else_does(tmp_path: Path) -> None:
    measured: list[str] = []
    watched: list[str] = []
    measuring = journal(measured)

    class Clearing(Probe):
        def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
            measured.clear()
            watched.clear()
            run_validation(trainer, pl_module, [measuring])

    # The one that measures may be one of the Trainer's own.
    fit(Situation(trainer={"callbacks": [journal(watched), measuring], "limit_val_batches": 2}), tmp_path, Clearing())
    assert watched == []
    batch = ["on_validation_batch_start", "on_validation_batch_end"]
    assert measured == [
        "on_validation_start",
        "on_validation_epoch_start",
        *batch * 2,
        "on_validation_epoch_end",
        "on_validation_end",
    ]


def test_a_loader_that_gives_its_batches_once_shows_in_the_number_of_batches(tmp_path: Path) -> None:
    class OneShot(IterableDataset[Any]):
        def __init__(self) -> None:
            self.rest = iter(list(loader()))

        def __iter__(self) -> Iterator[Any]:
            return self.rest

    probe = Probe()
    fit(Situation(val=lambda: DataLoader(OneShot(), batch_size=None), trainer=NEVER_VALIDATED), tmp_path, probe)
    assert [run.batches for run in probe.runs] == [(3,), (0,)]
    assert probe.runs[1].metrics == {}


def test_the_other_import_name_of_lightning_works(tmp_path: Path) -> None:
    class StandaloneProbe(Probe, pytorch_lightning.Callback):
        pass

    probe = StandaloneProbe()
    trainer = quiet_trainer(tmp_path, pytorch_lightning.Trainer, max_epochs=1, callbacks=[probe])
    trainer.fit(StandaloneTiny(), loader(), loader())
    first, second = probe.runs
    assert first == second
    assert first.metrics == pytest.approx({"val/loss": trainer.callback_metrics["val/loss"].item()})
    assert probe.trace() == {}


@pytest.mark.parametrize("interval", [1, 5])
def test_a_resumed_fit_validates_all_batches(interval: int, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(Tiny(), loader(), loader())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    probe = Probe()
    resumed = quiet_trainer(tmp_path, callbacks=[probe], max_epochs=2, check_val_every_n_epoch=interval)
    resumed.fit(Tiny(), loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert probe.runs[0] == probe.runs[1]
    assert probe.runs[0].batches == (3,)
    assert probe.trace(LOADERS) == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_the_ranks_of_a_distributed_fit_agree_on_the_returned_loss(tmp_path: Path) -> None:
    class AssertingProbe(Probe):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            # Each rank has batch statistics of its own; a validation takes those of the first.
            for buffer in pl_module.buffers():
                torch.distributed.broadcast(buffer, src=0)
            super().on_train_end(trainer, pl_module)
            assert self.trace(LOADERS) == {}
            assert self.runs[0] == self.runs[1]
            # Twelve examples on two ranks; each rank has its own three batches of two.
            data = examples(12).tensors
            assert self.runs[0].batches == (3,)
            with torch.no_grad():
                expected = pl_module.eval().loss(data).item()
            assert self.runs[0].metrics == pytest.approx({"loss": expected})

    def loaders() -> DataLoader[Any]:
        return DataLoader(examples(12), batch_size=2)

    arguments = {"strategy": "ddp_fork", "devices": 2, **NEVER_VALIDATED}
    trainer = quiet_trainer(tmp_path, callbacks=[AssertingProbe()], **{"max_epochs": 1} | arguments)
    trainer.fit(Silent(), loaders(), loaders())


# Training steps that train nothing ------------------------------------------------------------------------------------


class StepProbe(Probe):
    """Runs training steps twice at the end of training, and keeps what the module got to see each time."""

    def __init__(self, batches: int = 9) -> None:
        super().__init__()
        self.batches = batches
        self.steps: list[int] = []
        self.seen: list[list[float]] = []

    def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        flags = {module: module.training for module in pl_module.modules()}
        for _ in range(2):
            seen: list[float] = []
            layers = [module for module in pl_module.modules() if isinstance(module, nn.Linear)]
            hooks = [
                layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach().sum().item()))
                for layer in layers
            ]
            self.steps.append(run_training_steps(trainer, pl_module, self.batches, flags, nullcontext()))
            for hook in hooks:
                hook.remove()
            self.seen.append(seen)


class Hidden(torch.optim.Adam):
    """An optimizer that steps another one in a step of its own, as those that look ahead do."""

    def __init__(self, parameters: Any, inner: torch.optim.Optimizer) -> None:
        super().__init__(parameters, lr=0.1)
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.inner.step()
        return loss


class Unruly(Tiny):
    """Does in its training step whatever a training step can do."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.target = Tiny().net.requires_grad_(False)
        self.mean = MeanMetric()
        self.register_buffer("queue", torch.zeros(3))
        self.count = 0
        self.outputs: list[float] = []
        inner = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.hidden = [Hidden(self.net.parameters(), inner)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        assert all(parameter.grad.abs().sum() > 0 for parameter in self.net.parameters() if parameter.dim() == 2)
        first.step()
        # Whoever logs the norm of its gradients wants them after the step as well.
        self.log("norm", sum(parameter.grad.norm() for parameter in self.net.parameters()))

        def closure() -> Tensor:
            second.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        second.step(closure)
        self.net.zero_grad()
        self.loss(batch).backward()
        self.hidden[0].step()
        self.hidden[0].zero_grad()
        with torch.no_grad():
            for own, other in zip(self.net.parameters(), self.target.parameters(), strict=True):
                other.lerp_(own, 0.5)
            self.target[0].weight.data = self.target[0].weight.data + 1.0
            self.queue.copy_(self.queue.roll(1) + batch[0].sum())
        self.mean.update(loss)
        self.log("mean", self.mean)
        self.log_dict({"loss": loss, "other": loss}, prog_bar=True)
        for logger in self.loggers:
            logger.log_metrics({"direct": 1.0}, step=0)
        self.lr_schedulers().step()
        self.count += 1
        self.outputs.append(loss.item())
        self.trainer.should_stop = self.count > 100
        self.net[1].momentum = 0.5
        self.net.eval()
        self.loss(batch)
        self.net.train()

    def configure_optimizers(self) -> Any:
        first = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)
        second = torch.optim.LBFGS(self.net.parameters(), lr=0.01)
        return [first, second], [torch.optim.lr_scheduler.StepLR(first, step_size=1)]


class WithoutNumber(Tiny):
    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)


class TwoSources(Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch["a"]) + self.loss(batch["b"])


STEPS: dict[str, Callable[[Path], Situation]] = {
    "plain": lambda _: Situation(),
    "manual": lambda _: Situation(Manual, trainer={"num_sanity_val_steps": 0}),
    "unruly": lambda path: Situation(
        Unruly, trainer={**watchers(path), **writers(path, TensorBoardLogger, CountingLogger)}
    ),
    "metrics": lambda _: Situation(WithMetrics, trainer={"num_sanity_val_steps": 0}),
    "compiled": lambda _: Situation(Compiled),
    "without_a_number": lambda _: Situation(WithoutNumber),
    "shuffled": lambda _: Situation(train=lambda: loader(shuffle=True)),
    "shuffled_by_a_generator": lambda _: Situation(train=lambda: loader(shuffle=True, generator=torch.Generator())),
    "shuffled_by_epoch": lambda _: Situation(train=lambda: loader(sampler=EpochSampler(examples()))),
    "persistent_worker": lambda _: Situation(train=lambda: loader(num_workers=1, persistent_workers=True)),
    "any_iterable": lambda _: Situation(train=lambda: Rotation(list(loader())), batches=(2,)),
    "noisy_dataset": lambda _: Situation(train=lambda: DataLoader(NoisyExamples(), batch_size=4)),
    "two_sources": lambda _: Situation(TwoSources, train=lambda: {"a": loader(), "b": loader()}),
    "datamodule": lambda _: Situation(datamodule=Data()),
    "never_validated": lambda _: Situation(trainer=NEVER_VALIDATED),
    "no_validation_loader": lambda _: Situation(val=lambda: None),
    "limit_2": lambda _: Situation(batches=(2,), trainer={"limit_train_batches": 2}),
    "in_the_middle_of_an_epoch": lambda _: Situation(trainer={"max_steps": 2, "max_epochs": -1}),
    "swa": lambda _: Situation(
        trainer={"callbacks": [StochasticWeightAveraging(0.1, swa_epoch_start=1)], "max_epochs": 2}
    ),
    "averaging": lambda _: Situation(trainer={"callbacks": [WeightAveraging()], "max_epochs": 2}),
    "profiler": lambda _: Situation(trainer={"profiler": SimpleProfiler()}),
    "bf16_mixed": lambda _: Situation(trainer={"precision": "bf16-mixed"}),
    "float64": lambda _: Situation(trainer={"precision": "64-true"}),
}


@pytest.mark.parametrize("name", STEPS)
def test_training_steps_train_nothing_and_leave_no_trace(name: str, tmp_path: Path) -> None:
    situation = STEPS[name](tmp_path)
    probe = StepProbe()
    fit(situation, tmp_path, probe)
    assert probe.trace() == {}
    assert probe.steps == list(situation.batches) * 2
    assert probe.seen[0] == probe.seen[1] != []


class Watching(StepProbe):
    """Tells the module that it is watched."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.is_watched = True
        super().on_train_end(trainer, pl_module)


def test_training_steps_run_under_the_other_import_name_of_lightning(tmp_path: Path) -> None:
    class StandaloneProbe(StepProbe, pytorch_lightning.Callback):
        pass

    probe = StandaloneProbe()
    trainer = quiet_trainer(tmp_path, pytorch_lightning.Trainer, max_epochs=1, callbacks=[probe])
    trainer.fit(StandaloneTiny(), loader(), loader())
    assert probe.steps == [3, 3]
    assert probe.trace() == {}


def test_each_training_step_begins_with_the_module_as_it_is(tmp_path: Path) -> None:
    class Drifting(Tiny):
        is_watched = automatic_optimization = False
        count = 0

        def training_step(self, batch: Any, batch_idx: int) -> None:
            if self.is_watched:
                seen.append((self.net[0].weight.sum().item(), self.count, self.net[1].running_mean.sum().item()))
                assert all(parameter.grad is None for parameter in self.parameters())
            with torch.no_grad():
                self.net[0].weight.mul_(2.0)
            self.count += 1
            self.manual_backward(self.loss(batch))

    seen: list[Any] = []
    # A validation would let go of the gradients of the last step.
    fit(Situation(Drifting, val=lambda: None), tmp_path, Watching())
    assert len(seen) == 6
    assert len(set(seen)) == 1


def test_training_steps_get_the_batches_as_the_fit_gives_them(tmp_path: Path) -> None:
    class Transferring(Tiny):
        is_watched = False

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {key: (inputs + 1.0, targets) for key, (inputs, targets) in batch.items()}

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return {key: (inputs * 2.0, targets) for key, (inputs, targets) in batch.items()}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert self.trainer.training
            seen[self.is_watched].append([batch_idx, *(batch[key][0].sum().item() for key in batch)])
            return self.loss(batch["a"])

    seen: dict[bool, list[Any]] = {False: [], True: []}
    # Two batches of one loader, and the first of the other one twice.
    situation = Situation(
        Transferring,
        val=lambda: None,
        train=lambda: {"a": DataLoader(examples(20), batch_size=4), "b": loader()},
        batches=(2,),
        trainer={"limit_train_batches": 0.4},
    )
    probe = Watching()
    fit(situation, tmp_path, probe)
    assert seen[True] == seen[False] * 2
    assert len(seen[False]) == 2


def test_an_optimizer_that_has_never_stepped_gets_no_state(tmp_path: Path) -> None:
    class Late(Tiny):
        is_watched = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.is_watched:
                self.optimizers(use_pl_optimizer=False).step(lambda: self.loss(batch))
            return self.loss(batch)

        def optimizer_step(self, *args: Any) -> None:
            args[3]()

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    probe = Watching()
    fit(Situation(Late), tmp_path, probe)
    assert probe.trace() == {}


def test_nobody_hears_of_training_steps(tmp_path: Path) -> None:
    heard: list[str] = []
    hooks = [name for name in dir(Callback) if name.startswith("on_")]

    class Clearing(StepProbe):
        def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert {"on_before_backward", "on_before_optimizer_step", "on_after_backward"} <= set(heard)
            heard.clear()
            super().validate(trainer, pl_module)
            assert heard == []

    listening = LambdaCallback(**{hook: lambda *_, name=hook, **__: heard.append(name) for hook in hooks})
    arguments = {"callbacks": [listening], "num_sanity_val_steps": 0, "limit_val_batches": 0}
    fit(Situation(Unruly, trainer=arguments), tmp_path, Clearing())


def test_no_more_batches_are_drawn_than_are_asked_for(tmp_path: Path) -> None:
    class CountingExamples(NoisyExamples):
        drawn = 0

        def __getitem__(self, index: int) -> Any:
            CountingExamples.drawn += 1
            return super().__getitem__(index)

    fit(Situation(train=lambda: DataLoader(CountingExamples(), batch_size=4)), tmp_path, StepProbe(batches=2))
    # An epoch of the fit, and two batches of each of the two runs.
    assert CountingExamples.drawn == 10 + 2 * 8


def test_a_training_step_that_raises_leaves_no_trace(tmp_path: Path) -> None:
    class Troubled(Unruly):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            if self.trainer.sanity_checking or getattr(self, "is_troubled", False):
                raise RuntimeError("trouble")

    class Catching(Probe):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.is_troubled = True
            super().on_train_end(trainer, pl_module)

        def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
            flags = {module: module.training for module in pl_module.modules()}
            with pytest.raises(RuntimeError, match="trouble"):
                run_training_steps(trainer, pl_module, 2, flags, nullcontext())

    probe = Catching()
    fit(Situation(Troubled, trainer=writers(tmp_path, TensorBoardLogger, CountingLogger)), tmp_path, probe)
    assert probe.trace() == {}


def test_a_training_step_that_draws_its_batches_itself_is_refused() -> None:
    class Drawing(Tiny):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            return self.loss(next(dataloader_iter)[0])

    with pytest.raises(FoldingError, match="`training_step` takes a `dataloader_iter`"):
        run_training_steps(Trainer(logger=False, accelerator="cpu"), Drawing(), 1, {}, nullcontext())


def test_the_first_training_batch_leaves_no_trace(tmp_path: Path) -> None:
    class Asking(Probe):
        def validate(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.runs = [first_training_batch(trainer, pl_module)[0] for _ in range(2)]

    probe = Asking()
    arguments = {"precision": "64-true"}
    fit(Situation(train=lambda: loader(shuffle=True, generator=torch.Generator()), trainer=arguments), tmp_path, probe)
    assert probe.trace() == {}
    assert torch.equal(*probe.runs)
    assert probe.runs[0].dtype == torch.float64
