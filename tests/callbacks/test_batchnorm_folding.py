"""The callback in fits of other people's modules: what is folded, what is proven, and that nothing else changes."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision

import lit_bnfold.callbacks.batchnorm_folding as the_callback
import lit_bnfold.folding.rewrite as rewriting
from lit_bnfold import BatchNormFolding, FoldingError, load_folded
from lit_bnfold.folding import FoldingPlan
from trainers import files_in, quiet_trainer

pytestmark = [
    # A shuffled loader is among the situations.
    pytest.mark.filterwarnings("ignore:Your `val_dataloader`'s sampler has shuffling enabled"),
    # So is a loader that is missing.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

Randomised = Callable[[nn.Module], nn.Module]


# A tiny fit, of which every situation is a variation -----------------------------------------------------------------


def examples(count: int = 20) -> TensorDataset:
    """Inputs (count, 4) and targets (count,)."""
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)


def loader(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(examples(), batch_size=8, **kwargs)


class Tiny(LightningModule):
    """A network with a BatchNorm that can be folded, fitted to noise."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, inputs: Tensor) -> Any:
        return self.net(inputs)

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch  # (B, 4), (B,)
        return nn.functional.cross_entropy(self(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Watched(BatchNormFolding):
    """The callback itself, with a look at everything before and after the end of training."""

    everything: Callable[..., dict[str, object]]
    before: dict[str, object]
    after: dict[str, object]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        alive: list[object] = []
        # Lightning makes it at the first save, be it this one.
        assert trainer.strategy.checkpoint_io is not None
        self.before = self.look(trainer, pl_module, alive)
        try:
            super().on_train_end(trainer, pl_module)
        finally:
            self.after = self.look(trainer, pl_module, alive)

    def look(self, trainer: Trainer, pl_module: LightningModule, alive: list[object]) -> dict[str, object]:
        """Everything, except for what the callback is there to add: its files and its metrics."""
        metrics: dict[str, Any] = trainer.callback_metrics
        added = {key: metrics.pop(key) for key in list(metrics) if key.startswith("folding/")}
        seen = snapshot(trainer, pl_module) | Watched.everything(trainer, alive, BatchNormFolding)
        metrics.update(added)
        grow = ("files/", "trainer.__dict__._loggers.")
        return {name: value for name, value in seen.items() if not name.startswith(grow)}

    @property
    def trace(self) -> list[str]:
        """The names of what changed."""
        names = self.before.keys() | self.after.keys()
        return sorted(name for name in names if self.before.get(name) != self.after.get(name))


@pytest.fixture(autouse=True)
def _everything(everything: Callable[..., dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watched, "everything", staticmethod(everything), raising=False)


def snapshot(trainer: Trainer, pl_module: LightningModule) -> dict[str, object]:
    """Everything of a module, of its training and of the random generators that a fold could disturb, by name."""
    seen: dict[str, object] = {
        "state_dict": {key: numbers(value) for key, value in pl_module.state_dict().items()},
        "random/torch": numbers(torch.get_rng_state()),
        "random/python": random.getstate(),
        "random/numpy": repr(numpy.random.get_state()),
        "trainer/state": (trainer.state.fn, trainer.state.stage, trainer.state.status),
        "trainer/callbacks": [id(callback) for callback in trainer.callbacks],
        "trainer/loggers": [(id(logger), type(logger)) for logger in trainer.loggers],
        "trainer/progress": (trainer.global_step, trainer.current_epoch, trainer.should_stop),
        "optimizers": [(id(each), repr(each), len(each.state)) for each in trainer.optimizers],
        "owned": [[id(p) for group in each.param_groups for p in group["params"]] for each in trainer.optimizers],
    }
    for name, module in pl_module.named_modules():
        hooks = [len(vars(module)[key]) for key in sorted(vars(module)) if key.endswith("_hooks")]
        seen[f"module/{name}"] = (id(module), type(module), module.training, hooks, sorted(vars(module)))
    for name, tensor in (*pl_module.named_parameters(), *pl_module.named_buffers()):
        seen[f"tensor/{name}"] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, numbers(tensor.grad))
    for kind in ("callback_metrics", "logged_metrics", "progress_bar_metrics"):
        for key, value in getattr(trainer, kind).items():
            if not key.startswith("folding/"):
                seen[f"{kind}/{key}"] = float(value)
    return seen


def numbers(tensor: Any) -> object:
    if not isinstance(tensor, Tensor):
        return tensor
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def fit(
    tmp_path: Path,
    module: LightningModule,
    folding: BatchNormFolding,
    train: Any = None,
    val: Any = "as for training",
    **trainer: Any,
) -> Trainer:
    """Fit a module with the callback and whatever else there is beside it."""
    made = quiet_trainer(tmp_path, **{**trainer, "callbacks": [folding, *trainer.get("callbacks", [])]})
    made.fit(module, train or loader(), loader() if val == "as for training" else val)
    return made


# The situations ------------------------------------------------------------------------------------------------------


class Attributes(Tiny):
    """Layers and BatchNorms as attributes, in another order than they are called in."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Identity()
        self.second_norm = nn.BatchNorm1d(3)
        self.norm = nn.BatchNorm1d(5, affine=False)
        self.first = nn.Linear(4, 5, bias=False)
        self.second = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second_norm(self.second(torch.relu(self.norm(self.first(inputs)))))


class TwoNetworks(Tiny):
    """Two networks, two losses, two optimizers by hand; one of the networks is called twice in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Identity()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.encoder(inputs))

    def losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        code = self.encoder(batch[0])  # (B, 4) -> (B, 2)
        decoded = self.decoder(code)
        return nn.functional.mse_loss(decoded, batch[0]), nn.functional.mse_loss(self.encoder(decoded), code)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for number, optimizer in enumerate(self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch)[number])
            optimizer.step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name, loss in zip(("decoded", "cycle"), self.losses(batch), strict=True):
            self.log(f"val/{name}", loss)

    def configure_optimizers(self) -> Any:
        networks = (self.encoder, self.decoder)
        return [torch.optim.SGD(network.parameters(), lr=0.05) for network in networks]


class DictBatches(Tiny):
    """Gets its batches as dicts, calls its network with keywords and gets a dict back."""

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(inputs)}

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(inputs=batch["inputs"])["logits"], batch["targets"])


class DictExamples(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        inputs, targets = super().__getitem__(index)
        return {"inputs": inputs, "targets": targets}


def dict_loader() -> DataLoader[Any]:
    return DataLoader(DictExamples(*examples().tensors), batch_size=8)


class Silent(Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)


class Bypassing(Tiny):
    """The second validation loader reaches the first layer without its BatchNorm."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if dataloader_idx == 0:
            super().validation_step(batch, batch_idx)
        else:
            self.log("val/raw", self.net[0](batch[0]).square().mean())


class Stochastic(Tiny):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        inputs, targets = batch
        super().validation_step((inputs + torch.randn_like(inputs) * random.random(), targets), batch_idx)


class Convolutional(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs))


class NormFirst(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))


class Compiled(Tiny):
    """One of its two networks is compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), backend="eager")

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs))


class Hooked(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].register_forward_hook(lambda *_: None)
        self.head = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs))


class WithoutBias(nn.Linear):
    """Refuses the bias that it is lent to see whether it would use one."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is not None:
            raise NotImplementedError("a bias")
        return nn.functional.linear(input, self.weight)


class OtherWithBias(nn.Linear):
    """Does something else once it has a bias, be it one that it is lent."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        outputs = nn.functional.linear(input, self.weight)
        return 2 * outputs if self.bias is None else outputs + self.bias


class Deceived(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(OtherWithBias(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


class Refusing(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(WithoutBias(4, 5), nn.BatchNorm1d(5), *Tiny().net)
        self.net[2] = nn.Linear(5, 5)
        self.net.insert(2, nn.Tanh())


class Remembering(Tiny):
    """Keeps what a step computed as an attribute, with its gradient history, as people do to plot it later."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.last_loss = super().training_step(batch, batch_idx)
        return self.last_loss


class BuiltLate(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Tiny().net


@dataclass
class Situation:
    """A fit with the callback in it.

    Attributes:
        module: Makes the module.
        folds: The BatchNorms that are folded.
        kept: The others, each with the code of the reason.
        keys: What validation logs.
        train: Makes the training loader.
        val: Makes the validation loaders.
        atol: Largest difference of an output and of a metric between the two versions.
        comparable: Whether a fresh Trainer's validation gives the same numbers.
        writes: Whether files are written.
        trainer: More arguments of the Trainer.
    """

    module: Callable[[], LightningModule] = Tiny
    folds: tuple[str, ...] = ("net.1",)
    kept: dict[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ("val/loss",)
    train: Callable[[], Any] = loader
    val: Callable[[], Any] = loader
    atol: float = 1e-5
    comparable: bool = True
    writes: bool = True
    trainer: dict[str, Any] = field(default_factory=dict)


def neighbours(path: Path, reverse: bool = False) -> dict[str, Any]:
    """Arguments of a Trainer with callbacks that save, stop and average, and that also act when training ends."""
    callbacks: list[Callback] = [
        EarlyStopping("val/loss", patience=9),
        ModelCheckpoint(path / "saved", monitor="val/loss", save_last=True, save_weights_only=True),
        StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
    ]
    return {"callbacks": callbacks[::-1] if reverse else callbacks, "enable_checkpointing": True}


class Combined(Tiny):
    """Gets one batch from each of two loaders at a time."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch["a"]) + self.loss(batch["b"]), batch_size=len(batch["a"][0]))


class WithMetrics(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.scores = MetricCollection([MulticlassAccuracy(3), MulticlassPrecision(3)])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.scores(self(batch[0]), batch[1])
        self.log_dict(self.scores)


def combined_loader() -> CombinedLoader:
    return CombinedLoader({"a": loader(), "b": loader()}, "max_size_cycle")


def pruning() -> ModelPruning:
    return ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.2, apply_pruning=True)


class EMA(WeightAveraging):
    """Averages after each step; without the buffers, as by default, the statistics are those of the last step."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None


TWO_KEYS = ("val/loss/dataloader_idx_0", "val/loss/dataloader_idx_1")

SITUATIONS: dict[str, Callable[[Path], Situation]] = {
    "sequential": lambda _: Situation(),
    "attributes": lambda _: Situation(Attributes, folds=("norm", "second_norm")),
    "two_networks": lambda _: Situation(
        TwoNetworks, folds=("encoder.1", "decoder.1"), keys=("val/decoded", "val/cycle"), comparable=True
    ),
    "dict_batches": lambda _: Situation(DictBatches, train=dict_loader, val=dict_loader),
    "silent": lambda _: Situation(Silent, keys=("loss",), comparable=False),
    "convolutional": lambda _: Situation(Convolutional, folds=("net.2", "head.1")),
    "everything_kept": lambda _: Situation(NormFirst, folds=(), kept={"net.0": "no-layer"}),
    "compiled": lambda _: Situation(Compiled, kept={"head._orig_mod.1": "opaque"}),
    "hooked": lambda _: Situation(Hooked, folds=("head.1",), kept={"net.1": "other-reader"}),
    "deceived": lambda _: Situation(Deceived, folds=("net.3",)),
    "refusing": lambda _: Situation(Refusing, folds=("net.4",), kept={"net.1": "own-forward"}),
    "refusing_on_an_example": lambda _: Situation(
        Refusing,
        folds=("net.4",),
        kept={"net.1": "own-forward"},
        keys=(),
        comparable=False,
        trainer={"limit_val_batches": 0},
    ),
    "remembering": lambda _: Situation(Remembering),
    "built_late": lambda _: Situation(BuiltLate),
    # Loaders and limits.
    "no_validation_loader": lambda _: Situation(keys=(), val=lambda: None, comparable=False),
    "no_validation_batches": lambda _: Situation(keys=(), comparable=False, trainer={"limit_val_batches": 0}),
    "one_validation_batch": lambda _: Situation(trainer={"limit_val_batches": 1}),
    "fast_dev_run": lambda _: Situation(writes=False, trainer={"fast_dev_run": True}),
    "two_loaders": lambda _: Situation(keys=TWO_KEYS, val=lambda: [loader(), loader()]),
    "bypassed_by_a_loader": lambda _: Situation(
        Bypassing,
        folds=(),
        kept={"net.1": "other-call"},
        keys=("val/loss/dataloader_idx_0", "val/raw/dataloader_idx_1"),
        val=lambda: [loader(), loader()],
    ),
    "shuffled": lambda _: Situation(val=lambda: loader(shuffle=True)),
    "shuffled_by_a_generator": lambda _: Situation(
        val=lambda: loader(sampler=RandomSampler(examples(), generator=torch.Generator()))
    ),
    "stochastic": lambda _: Situation(Stochastic, comparable=False),
    # What runs beside it.
    "neighbours": lambda path: Situation(trainer=neighbours(path)),
    "neighbours_in_another_order": lambda path: Situation(trainer=neighbours(path, reverse=True)),
    "ema": lambda _: Situation(trainer={"callbacks": [EMA()]}),
    "no_sanity_check": lambda _: Situation(trainer={"num_sanity_val_steps": 0}),
    "accumulation": lambda _: Situation(trainer={"accumulate_grad_batches": 2}),
    # Data and lengths of a fit.
    "combined_loader": lambda _: Situation(Combined, val=combined_loader),
    "sequential_combined_loader": lambda _: Situation(
        keys=TWO_KEYS, val=lambda: CombinedLoader([loader(), loader()], "sequential")
    ),
    "persistent_worker": lambda _: Situation(val=lambda: loader(num_workers=1, persistent_workers=True)),
    "two_validation_batches": lambda _: Situation(trainer={"limit_val_batches": 2}),
    "overfit_batches": lambda _: Situation(trainer={"overfit_batches": 1}),
    "max_steps": lambda _: Situation(trainer={"max_steps": 2, "max_epochs": -1}),
    "max_time": lambda _: Situation(trainer={"max_time": {"seconds": 0.2}, "max_epochs": -1}),
    "metrics": lambda _: Situation(WithMetrics, keys=("MulticlassAccuracy", "MulticlassPrecision")),
    # Further neighbours, and where they write.
    "early_stopping": lambda _: Situation(trainer={"callbacks": [EarlyStopping("val/loss", patience=9)]}),
    "checkpoint": lambda path: Situation(
        trainer={"callbacks": [ModelCheckpoint(path / "saved", monitor="val/loss")], "enable_checkpointing": True}
    ),
    "ema_by_name": lambda _: Situation(trainer={"callbacks": [EMAWeightAveraging()]}),
    "pruning": lambda _: Situation(trainer={"callbacks": [pruning()]}),
    "tqdm": lambda _: Situation(trainer={"callbacks": [TQDMProgressBar()], "enable_progress_bar": True}),
    "rich": lambda _: Situation(trainer={"callbacks": [RichProgressBar()], "enable_progress_bar": True}),
    "tensorboard": lambda path: Situation(trainer={"logger": TensorBoardLogger(path)}),
    "csv": lambda path: Situation(trainer={"logger": CSVLogger(path)}),
    "both_loggers": lambda path: Situation(trainer={"logger": [TensorBoardLogger(path, "a"), CSVLogger(path, "b")]}),
    # Arithmetic.
    "bf16_mixed": lambda _: Situation(atol=0.05, trainer={"precision": "bf16-mixed"}),
    "bf16_true": lambda _: Situation(atol=0.1, trainer={"precision": "bf16-true"}),
    "float64": lambda _: Situation(atol=1e-12, trainer={"precision": "64-true"}),
}


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_fit_is_folded_and_proven_and_otherwise_left_alone(
    name: str, tmp_path: Path, randomised: Randomised, recwarn: pytest.WarningsRecorder
) -> None:
    situation = SITUATIONS[name](tmp_path)
    module, folding = randomised(situation.module()), Watched()
    assert isinstance(module, LightningModule)
    trainer = fit(tmp_path, module, folding, situation.train(), situation.val(), **situation.trainer)
    assert folding.trace == []

    # The plan names every BatchNorm once.
    assert folding.plan is not None
    assert {fold.batchnorm for fold in folding.plan.folds} == set(situation.folds)
    assert {kept.batchnorm: kept.code for kept in folding.plan.kept} == situation.kept
    names = {name for name, each in module.named_modules() if isinstance(each, _BatchNorm)}
    assert names == {*situation.folds, *situation.kept}

    # The folded module gives what the module gives, without its BatchNorms and without any of its memory.
    folded = folding.folded_module
    assert type(folded) is type(module)
    assert not any(each.training for each in folded.modules())
    assert {name for name, each in folded.named_modules() if isinstance(each, _BatchNorm)} == set(situation.kept)
    inputs = torch.randn(7, 4).to(module.dtype)
    torch.testing.assert_close(folded(inputs), module.eval()(inputs), rtol=0, atol=situation.atol)
    memory = [{tensor.data_ptr() for tensor in each.state_dict().values()} for each in (module, folded)]
    assert memory[0].isdisjoint(memory[1])

    # The report has both versions' numbers, and the Trainer has them too.
    report = folding.report
    assert report is not None
    assert report["mismatch"] is None
    assert [fold["batchnorm"] for fold in report["folds"]] == [fold.batchnorm for fold in folding.plan.folds]
    assert all(fold["max_rel_error"] <= report["tolerance"] for fold in report["folds"])
    original, of_folded = report["validation"]["original"], report["validation"]["folded"]
    assert set(original) == set(situation.keys)
    assert of_folded == pytest.approx(original, rel=0, abs=situation.atol)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("folding/")}
    assert {key.removeprefix("folding/original/") for key in metrics if "/original/" in key} == set(situation.keys)
    assert {key.removeprefix("folding/folded/") for key in metrics if "/folded/" in key} == set(situation.keys)
    assert metrics["folding/folds"] == len(situation.folds)
    assert metrics["folding/kept"] == len(situation.kept)
    assert ("folding/max_rel_error" in metrics) == bool(situation.folds)
    if situation.comparable:
        limits = {"precision", "limit_val_batches", "fast_dev_run", "overfit_batches"} & situation.trainer.keys()
        fresh = quiet_trainer(tmp_path / "fresh", **{key: situation.trainer[key] for key in limits})
        fresh.validate(module, situation.val(), verbose=False)
        assert original == pytest.approx({key: value.item() for key, value in fresh.callback_metrics.items()})

    # The files say the same.
    assert files_in(tmp_path) >= {"folded.ckpt", "folding.html", "folding.json"} or not situation.writes
    assert files_in(tmp_path) == set() or situation.writes
    if situation.writes:
        (written,) = tmp_path.rglob("folding.json")
        assert json.loads(written.read_text()) == report
        assert not [name for name in files_in(tmp_path) if name.endswith(".part")]


# Which weights --------------------------------------------------------------------------------------------------------


class Worsening(Tiny):
    """Validates worse after each epoch, so that the best weights are not the last ones.

    It also has state that is no tensor, and leaves the frozen part of itself out of its checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2)
        self.strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if not key.startswith("frozen.")}

    def get_extra_state(self) -> Any:
        return {"note": "no tensor"}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"note": "no tensor"}

    def on_train_epoch_start(self) -> None:
        if self.current_epoch > 0:
            with torch.no_grad():
                self.net[3].weight.mul_(3.0)


def checkpointing(path: Path) -> dict[str, Any]:
    saved = ModelCheckpoint(path / "saved", monitor="val/loss", filename="best")
    return {"callbacks": [saved], "enable_checkpointing": True, "max_epochs": 4}


def test_best_weights_that_do_not_validate_as_they_did_are_warned_of(tmp_path: Path, randomised: Randomised) -> None:
    class Overwriting(ModelCheckpoint):
        """Its file holds other weights than those that it has noted the score of."""

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pass

        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            path, score = self.best_model_path, self.best_model_score
            super().on_train_epoch_end(trainer, pl_module)
            if path:
                self.best_model_path, self.best_model_score = path, score
                trainer.save_checkpoint(path)

    saved = Overwriting(tmp_path / "saved", monitor="val/loss", filename="best", save_on_train_epoch_end=True)
    folding = BatchNormFolding(weights="best")
    with pytest.warns(UserWarning, match="the checkpoint does not hold the weights that were validated"):
        fit(tmp_path, randomised(Worsening()), folding, **checkpointing(tmp_path) | {"callbacks": [saved]})
    score = folding.report["best_score"]
    assert (score["monitor"], score["agrees"]) == ("val/loss", False)
    assert score["validated"] == folding.report["validation"]["original"]["val/loss"]
    assert score["noted"] == float(saved.best_model_score) < score["validated"]
    # The fold is right all the same.
    assert folding.report["mismatch"] is None


def test_the_best_weights_are_folded_and_the_last_ones_come_back(tmp_path: Path, randomised: Randomised) -> None:
    module, folding = randomised(Worsening()), Watched(weights="best")
    trainer = fit(tmp_path, module, folding, **checkpointing(tmp_path))
    assert folding.trace == []
    assert folding.report["weights"] == f"best: {trainer.checkpoint_callback.best_model_path}"
    best = float(trainer.checkpoint_callback.best_model_score)
    assert best < float(trainer.callback_metrics["val/loss"]) - 0.01
    assert folding.report["validation"]["original"] == {"val/loss": pytest.approx(best, abs=1e-7)}
    assert folding.report["best_score"] == {
        "monitor": "val/loss",
        "noted": best,
        "validated": folding.report["validation"]["original"]["val/loss"],
        "agrees": True,
    }
    assert folding.report["validation"]["folded"] == {"val/loss": pytest.approx(best, abs=1e-5)}
    inputs, before = torch.randn(7, 4), module.eval()(torch.ones(1, 4))
    best_module = Worsening()
    best_module.load_state_dict(torch.load(tmp_path / "saved/best.ckpt", weights_only=True)["state_dict"], strict=False)
    torch.testing.assert_close(folding.folded_module(inputs), best_module.eval()(inputs), rtol=0, atol=1e-5)
    assert not torch.allclose(folding.folded_module(torch.ones(1, 4)), before, atol=0.01)


def test_what_a_module_reads_from_the_best_checkpoint_is_gone_again(tmp_path: Path, randomised: Randomised) -> None:
    class Counting(Worsening):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.counts = 0, []

        def on_train_batch_end(self, *args: Any) -> None:
            self.count += 1
            self.counts.append(self.count)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["counts"] = [*self.counts]

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.count, self.counts = len(checkpoint["counts"]), checkpoint["counts"]

    module = randomised(Counting())
    trainer = fit(tmp_path, module, BatchNormFolding(weights="best"), **checkpointing(tmp_path))
    assert torch.load(tmp_path / "saved/best.ckpt", weights_only=True)["global_step"] < trainer.global_step
    assert (module.count, module.counts) == (trainer.global_step, [*range(1, trainer.global_step + 1)])


def test_replacing_with_the_best_weights_leaves_these_in_the_module(tmp_path: Path, randomised: Randomised) -> None:
    module, folding = randomised(Worsening()), BatchNormFolding(weights="best", replace=True)
    trainer = fit(tmp_path, module, folding, **checkpointing(tmp_path))
    assert folding.folded_module is module
    assert not any(isinstance(each, _BatchNorm) for each in module.modules())
    assert not any(name.startswith("net.1.") for name in module.state_dict())
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    assert "batchnorm_folding" in torch.load(tmp_path / "later.ckpt", weights_only=True)
    trainer.validate(module, loader(), verbose=False)
    best = float(trainer.checkpoint_callback.best_model_score)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(best, abs=1e-5)
    with pytest.raises(FoldingError, match="This module is folded, and the checkpoint is not: load it into a new"):
        trainer.validate(module, loader(), ckpt_path="best", verbose=False)


def test_without_a_best_checkpoint_the_last_weights_are_folded_and_it_says_so(tmp_path: Path) -> None:
    folding = BatchNormFolding(weights="best")
    with pytest.warns(UserWarning, match="found no best checkpoint; it folds the last weights"):
        fit(tmp_path, Tiny(), folding)
    assert folding.report["weights"] == "last"


def test_the_trainers_own_module_is_replaced_on_request(tmp_path: Path, randomised: Randomised) -> None:
    module, folding = randomised(Tiny()), BatchNormFolding(replace=True)
    trainer = fit(tmp_path, module, folding)
    assert folding.folded_module is module
    assert [type(layer) for layer in module.net] == [nn.Linear, nn.Identity, nn.Tanh, nn.Linear]
    assert "net.1.running_mean" not in module.state_dict()
    trainer.validate(module, loader(), verbose=False)
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(
        folding.report["validation"]["folded"]["val/loss"]
    )


class OfTwoBlocks(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5), nn.BatchNorm1d(5))

    def forward(self, inputs: Tensor) -> Any:
        return self.net(inputs)


def test_what_is_replaced_twice_writes_both_plans(tmp_path: Path, randomised: Randomised) -> None:
    module = randomised(OfTwoBlocks())
    hook = module.net[4].register_forward_hook(lambda *_: None)
    fit(tmp_path, module, BatchNormFolding(replace=True))
    assert [type(layer) for layer in module.net[1::3]] == [nn.Identity, nn.BatchNorm1d]
    hook.remove()
    trainer = fit(tmp_path, module, BatchNormFolding(replace=True))
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    saved = torch.load(tmp_path / "later.ckpt", weights_only=True)["batchnorm_folding"]
    assert [fold["batchnorm"] for fold in saved["folds"]] == ["net.1", "net.4"]
    inputs = examples(4).tensors[0]
    assert torch.equal(load_folded(OfTwoBlocks, tmp_path / "later.ckpt")(inputs), module.eval()(inputs))


# What comes after the fit ---------------------------------------------------------------------------------------------


def test_a_fit_with_the_callback_ends_where_one_without_it_ends(tmp_path: Path, randomised: Randomised) -> None:
    ends = []
    for callbacks in ([], [BatchNormFolding(dirpath=str(tmp_path / "folded"))]):
        torch.manual_seed(3)
        trainer, module = quiet_trainer(tmp_path, callbacks=callbacks), randomised(Stochastic())
        trainer.fit(module, loader(shuffle=True), loader())
        after = torch.rand(3)
        trainer.test(module, loader(), verbose=False)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if "folding" not in key}
        ends.append((metrics, after.tolist(), numbers(nn.utils.parameters_to_vector(module.parameters()))))
    assert ends[0] == ends[1]


def test_a_later_checkpoint_holds_the_report(tmp_path: Path) -> None:
    folding = BatchNormFolding()
    trainer = fit(tmp_path, Tiny(), folding)
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    states = torch.load(tmp_path / "later.ckpt", weights_only=True)["callbacks"]
    assert states["BatchNormFolding"] == folding.report

    # A training that goes on from there knows what was folded before, until it folds itself.
    class Asking(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.report, self.folded_module = again.report, again.folded_module

    again, asking = BatchNormFolding(dirpath=str(tmp_path / "again")), Asking()
    resumed = quiet_trainer(tmp_path, max_epochs=3, callbacks=[again, asking])
    resumed.fit(Tiny(), loader(), loader(), ckpt_path=tmp_path / "later.ckpt", weights_only=True)
    assert asking.report == folding.report
    assert asking.folded_module is None
    assert again.report["validation"] != folding.report["validation"]


def test_a_report_of_an_earlier_training_is_not_told_as_that_of_one_that_folded_nothing(tmp_path: Path) -> None:
    class Unable(Tiny):
        """Does not take what a batch begins with, and has no other example."""

        def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
            return self.net(inputs)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(*batch).square().mean()

    trainer = fit(tmp_path, Tiny(), BatchNormFolding())
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    folding = BatchNormFolding(dirpath=tmp_path / "again", on_mismatch="warn")
    resumed = quiet_trainer(tmp_path, max_epochs=3, callbacks=[folding])
    with pytest.warns(UserWarning, match="Nothing was folded"):
        resumed.fit(Unable(), loader(), ckpt_path=tmp_path / "later.ckpt", weights_only=True)
    assert folding.report is None
    assert not any("folding" in key for key in resumed.callback_metrics)


@pytest.mark.parametrize("kind", [TwoNetworks, Attributes, Convolutional])
def test_the_folded_module_shares_no_memory_with_the_trained_one(
    kind: type[Tiny], tmp_path: Path, randomised: Randomised
) -> None:
    """It takes over what the fold made, and nothing that the module has after it."""
    module, folding = randomised(kind()), BatchNormFolding()
    fit(tmp_path, module, folding)
    addresses = [
        {tensor.untyped_storage().data_ptr() for tensor in (*each.parameters(), *each.buffers())}
        for each in (module, folding.folded_module)
    ]
    assert addresses[0].isdisjoint(addresses[1])
    expected, inputs = folding.folded_module(torch.ones(3, 4)), torch.ones(3, 4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(folding.folded_module(inputs), expected)


def test_a_second_fit_begins_with_nothing_folded(tmp_path: Path) -> None:
    class Failing(Tiny):
        def on_train_start(self) -> None:
            raise RuntimeError("trouble")

    folding = BatchNormFolding()
    fit(tmp_path, Tiny(), folding)
    with pytest.raises(RuntimeError, match="trouble"):
        fit(tmp_path, Failing(), folding)
    assert (folding.plan, folding.report, folding.folded_module) == (None, None, None)


def test_a_module_that_cannot_be_copied_is_folded_all_the_same(tmp_path: Path, randomised: Randomised) -> None:
    class Locked(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.generator = (number for number in range(3))

    module, folding = randomised(Locked()), Watched()
    with pytest.warns(UserWarning, match="has no folded_module; load_folded makes one of the file"):
        fit(tmp_path, module, folding)
    assert folding.trace == []
    assert folding.folded_module is None
    inputs = torch.randn(7, 4)
    folded = load_folded(Locked, tmp_path / "folded.ckpt")
    torch.testing.assert_close(folded(inputs), module.eval()(inputs), rtol=0, atol=1e-5)


# Where the files and the numbers go -----------------------------------------------------------------------------------


def test_the_files_lie_with_the_first_logger_and_the_numbers_in_all_of_them(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="table")]
    trainer = fit(tmp_path, Tiny(), BatchNormFolding(), logger=loggers)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("fold*.*")} == {
        "board/version_0/folded.ckpt",
        "board/version_0/folding.html",
        "board/version_0/folding.json",
    }
    keys = {f"folding/{key}" for key in ("original/val/loss", "folded/val/loss", "folds", "kept")}
    keys |= {"folding/max_abs_error", "folding/max_rel_error"}
    events = EventAccumulator(loggers[0].log_dir).Reload()
    assert keys <= set(events.Tags()["scalars"])
    assert {event.step for key in keys for event in events.Scalars(key)} == {trainer.global_step}
    for key in keys:
        assert events.Scalars(key)[0].value == pytest.approx(float(trainer.callback_metrics[key]))
    assert keys <= set((Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()[0].split(","))
    # Nothing of the two validations is logged a second time under its own name.
    assert len(events.Scalars("val/loss")) == 2


def test_the_files_go_where_dirpath_says(tmp_path: Path) -> None:
    fit(tmp_path, Tiny(), BatchNormFolding(dirpath=str(tmp_path / "a" / "b")), logger=CSVLogger(tmp_path))
    assert files_in(tmp_path / "a" / "b") == {"folded.ckpt", "folding.html", "folding.json"}
    assert len(list(tmp_path.rglob("folded.ckpt"))) == 1


# What does not agree, and what goes wrong -----------------------------------------------------------------------------


class TwoLayers(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3), nn.BatchNorm1d(3))


@pytest.fixture
def wrong_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds with a wrong scale wherever a BatchNorm has three features."""
    right = rewriting.scale_and_shift

    def wrong(running_mean: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        scale, shift = right(running_mean, *args)
        return (scale * 1.01 if len(running_mean) == 3 else scale), shift

    monkeypatch.setattr(rewriting, "scale_and_shift", wrong)


@pytest.mark.usefixtures("wrong_algebra")
def test_a_mismatch_raises_names_the_worst_layer_and_writes_nothing(tmp_path: Path, randomised: Randomised) -> None:
    module, folding = randomised(TwoLayers()), Watched()
    with pytest.raises(FoldingError, match=r"does not do what the original does.*`net\.3`.*tolerance of 1.00e-04"):
        fit(tmp_path, module, folding)
    assert folding.trace == []
    assert files_in(tmp_path) == set()
    assert folding.folded_module is None
    assert folding.report["folds"][1]["max_rel_error"] > folding.report["tolerance"]
    assert folding.report["folds"][0]["max_rel_error"] < folding.report["tolerance"]


@pytest.mark.usefixtures("wrong_algebra")
@pytest.mark.parametrize("replace", [False, True])
def test_a_mismatch_warns_on_request_and_keeps_the_unfolded_module(
    replace: bool, tmp_path: Path, randomised: Randomised
) -> None:
    module, folding = randomised(TwoLayers()), Watched(on_mismatch="warn", replace=replace)
    with pytest.warns(UserWarning, match=r"`net\.3`.*The unfolded module stands; nothing was written"):
        fit(tmp_path, module, folding)
    assert folding.trace == []
    assert files_in(tmp_path) == set()
    assert folding.folded_module is None


def scaling(monkeypatch: pytest.MonkeyPatch, factor: float) -> list[bool]:
    """Scale the weights of all layers after the fold; notes for each whether that changed a number."""
    right, changed = the_callback.folded_in_place, []

    @contextmanager
    def wrong(plan: FoldingPlan, model: nn.Module) -> Iterator[None]:
        with right(plan, model):
            for layer in (model.get_submodule(name) for fold in plan.folds for name in fold.layers):
                scaled = layer.weight.data * factor
                changed.append(not torch.equal(scaled, layer.weight.data))
                layer.weight.data = scaled
            yield

    monkeypatch.setattr(the_callback, "folded_in_place", wrong)
    return changed


# On a CPU, Lightning makes bf16-mixed of 16-mixed.
@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "16-mixed", "16-true"])
def test_weights_scaled_by_a_thousandth_after_the_fold_are_a_mismatch_at_every_precision(
    precision: Any, tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, folding, changed = randomised(TwoLayers()), Watched(), scaling(monkeypatch, 1.001)
    with pytest.raises(FoldingError, match=r"does not do what the original does: .* `net\.[03]`"):
        fit(tmp_path, module, folding, precision=precision)
    assert changed == [True, True]
    assert folding.trace == []
    assert files_in(tmp_path) == set()
    assert folding.folded_module is None


def test_a_thousandth_changes_no_weight_in_bfloat16_and_a_hundredth_is_a_mismatch(
    tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two neighbours among its numbers differ by four thousandths at least."""
    with monkeypatch.context() as context:
        changed = scaling(context, 1.001)
        fit(tmp_path / "same", randomised(TwoLayers()), BatchNormFolding(), precision="bf16-true")
        assert changed == [False, False]
        assert files_in(tmp_path / "same") == {"folded.ckpt", "folding.html", "folding.json"}
    changed = scaling(monkeypatch, 1.01)
    with pytest.raises(FoldingError, match=r"`net\.[03]` has a `weight` that is off by .* roundings to torch.bfloat16"):
        fit(tmp_path / "other", randomised(TwoLayers()), BatchNormFolding(), precision="bf16-true")
    assert changed == [True, True]
    assert files_in(tmp_path / "other") == set()


class AllDirections(Tiny):
    """One BatchNorm before its layer, one beside it, two behind it, of which one is over the sum with its input."""

    class Rectifying(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    class Passing(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    def __init__(self) -> None:
        super().__init__()
        self.before, self.beside, self.behind = nn.BatchNorm1d(4), self.Passing(4), self.Rectifying(4)
        self.first, self.second, self.net = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.around, self.over = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.behind(self.first(self.before(inputs)))
        hidden = self.over(self.around(hidden) + hidden).relu()
        return self.net((self.second(hidden) + self.beside(hidden)).tanh())


def test_folds_in_every_direction_are_proven(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding()
    fit(tmp_path, randomised(AllDirections()), folding)
    directions = {fold["batchnorm"]: fold["direction"] for fold in folding.report["folds"]}
    assert directions == {"before": "forward", "behind": "backward", "over": "backward", "beside": "parallel"}
    assert all(0.0 <= fold["max_rel_error"] < 1e-6 for fold in folding.report["folds"])
    assert folding.report["mismatch"] is None
    module = load_folded(AllDirections, tmp_path / "folded.ckpt")
    inputs = torch.randn(7, 4)
    assert torch.equal(module(inputs), folding.folded_module(inputs))
    assert not any("running" in key or "before" in key for key in module.state_dict())


class OfAllSorts(Tiny):
    """A weight that is computed, a BatchNorm that takes another one, and a layer that nobody knows by its class."""

    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3))

        def forward(self, inputs: Tensor) -> Tensor:
            return nn.functional.linear(inputs, self.weight, self.bias)

    def __init__(self) -> None:
        super().__init__()
        computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        norms = (nn.BatchNorm1d(5, affine=False) for _ in range(3))
        self.net = nn.Sequential(
            computed, next(norms), nn.ReLU(), next(norms), next(norms), nn.Tanh(), self.Unknown(), nn.BatchNorm1d(3)
        )


def test_folds_into_all_sorts_of_layers_are_proven_and_loaded(tmp_path: Path, randomised: Randomised) -> None:
    folding, module = BatchNormFolding(), randomised(OfAllSorts())
    fit(tmp_path, module, folding)
    assert [(fold.batchnorm, fold.layers) for fold in folding.plan.folds] == [
        ("net.1", ("net.0",)),
        ("net.7", ("net.6",)),
        ("net.3", ("net.4",)),
    ]
    assert folding.report["mismatch"] is None
    loaded, inputs = load_folded(OfAllSorts, tmp_path / "folded.ckpt"), torch.randn(7, 4)
    assert torch.equal(loaded(inputs), folding.folded_module(inputs))
    torch.testing.assert_close(loaded(inputs), module.eval()(inputs), rtol=0, atol=1e-5)
    # The module that was trained still computes its weight.
    assert "net.0.parametrizations.weight.original0" in module.state_dict()


@pytest.mark.parametrize("direction", ["forward", "backward", "parallel"])
def test_a_wrong_fold_in_any_direction_is_a_mismatch(
    direction: str, tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"forward": "fold_into_inputs", "backward": "fold_into_outputs", "parallel": "add_identity"}[direction]
    right = getattr(rewriting, name)

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weight, bias = right(*args, **kwargs)
        return weight, bias + 0.01

    monkeypatch.setattr(rewriting, name, wrong)
    with pytest.raises(FoldingError, match="does not do what the original does: the folded layer"):
        fit(tmp_path, randomised(AllDirections()), BatchNormFolding())
    assert files_in(tmp_path) == set()


class Straying(Tiny):
    """Reads a layer without its BatchNorm, on the second batch only."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.log("val/raw", self.net[0](batch[0]).square().mean(), batch_size=8)
        else:
            self.log("val/loss", self.loss(batch), batch_size=8)


def test_a_later_batch_that_takes_another_path_is_a_mismatch(tmp_path: Path, randomised: Randomised) -> None:
    with pytest.raises(
        FoldingError, match=r"batch 1 of .* calls `net\.0` 1 times and `net\.1` 0 times, unlike the first"
    ):
        fit(tmp_path, randomised(Straying()), BatchNormFolding())
    assert files_in(tmp_path) == set()


def test_two_callbacks_for_the_last_and_the_best_weights_keep_apart(tmp_path: Path, randomised: Randomised) -> None:
    last, best = BatchNormFolding(), BatchNormFolding(weights="best", dirpath=str(tmp_path / "best"))
    assert last.state_key != best.state_key
    with pytest.warns(UserWarning, match="found no best checkpoint"):
        fit(tmp_path, randomised(Tiny()), last, callbacks=[best])
    assert {"folded.ckpt", "folding.html", "folding.json"} <= files_in(tmp_path)


@pytest.mark.usefixtures("wrong_algebra")
def test_numbers_that_validation_collects_keep_no_batchnorm(tmp_path: Path, randomised: Randomised) -> None:
    class Collecting(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = self.net[0], self.net[1], self.net[3]
            del self.net
            self.losses: list[float] = []

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(self.norm(self.first(inputs)).tanh())

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            loss = self.loss(batch)
            self.losses.append(float(loss))
            self.log("val/loss", loss)

    folding = BatchNormFolding()
    fit(tmp_path, randomised(Collecting()), folding)
    assert [fold.batchnorm for fold in folding.plan.folds] == ["norm"]


def test_a_larger_tolerance_accepts_a_larger_error(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding(tolerance=0.5)
    fit(tmp_path, randomised(TwoLayers()), folding)
    assert folding.report["tolerance"] == 0.5
    assert folding.report["mismatch"] is None
    assert files_in(tmp_path) == {"folded.ckpt", "folding.html", "folding.json"}


def test_a_tolerance_that_is_too_small_for_roundings_is_a_mismatch(tmp_path: Path, randomised: Randomised) -> None:
    with pytest.raises(FoldingError, match=r"tolerance of 1\.00e-12"):
        fit(tmp_path, randomised(TwoLayers()), BatchNormFolding(tolerance=1e-12))


def test_a_last_weight_that_is_not_a_number_is_folded_like_any_other(tmp_path: Path) -> None:
    """A training that diverged has other worries: its NaNs agree with themselves."""

    class Diverged(TwoLayers):
        def on_train_end(self) -> None:
            pass

        def on_train_epoch_end(self) -> None:
            with torch.no_grad():
                self.net[3].weight.fill_(torch.nan)

    folding = BatchNormFolding()
    fit(tmp_path, Diverged(), folding, max_epochs=1)
    assert {fold.batchnorm for fold in folding.plan.folds} == {"net.1", "net.4"}
    json.loads((tmp_path / "folding.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("hook", ["validation_step", "on_validation_epoch_end"])
def test_an_exception_in_the_folded_validation_leaves_the_module_whole(
    hook: str, tmp_path: Path, randomised: Randomised
) -> None:
    class Troubled(Tiny):
        pass

    def trouble(self: Tiny, *args: Any, **kwargs: Any) -> None:
        if not any(isinstance(each, _BatchNorm) for each in self.modules()):
            raise RuntimeError("trouble")
        getattr(super(Troubled, self), hook)(*args, **kwargs)

    setattr(Troubled, hook, trouble)
    module, folding = randomised(Troubled()), Watched()
    with pytest.raises(RuntimeError, match="trouble"):
        fit(tmp_path, module, folding)
    assert folding.trace == []
    assert files_in(tmp_path) == set()
    assert folding.folded_module is None


@pytest.mark.parametrize("kind", [TwoNetworks, Remembering, Stochastic, Hooked])
def test_reestimated_statistics_leave_no_trace(kind: type[Tiny], tmp_path: Path, randomised: Randomised) -> None:
    module, folding = randomised(kind()), Watched(reestimate_batches=2)
    fit(tmp_path, module, folding, loader(shuffle=True), **(neighbours(tmp_path) if kind is Stochastic else {}))
    assert folding.trace == []
    names = {name for name, each in module.named_modules() if isinstance(each, _BatchNorm)}
    assert set(folding.report["reestimated"]["batchnorms"]) == names
    assert folding.report["mismatch"] is None


def test_a_failure_to_write_leaves_the_module_whole(
    tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(the_callback, "write_report", full)
    module, folding = randomised(Tiny()), Watched()
    with pytest.raises(OSError, match="disk full"):
        fit(tmp_path, module, folding)
    assert folding.trace == []
    assert "folding.json" not in files_in(tmp_path)


class Full(Watched):
    """Writes to a disk on which no file may become larger than so many bytes."""

    def _write(self, *args: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
        try:
            super()._write(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_with_the_file_and_costs_nothing_but_the_fold(
    tmp_path: Path, randomised: Randomised, caplog: pytest.LogCaptureFixture
) -> None:
    module, folding = randomised(Tiny()), Full(dirpath=str(tmp_path / "folded"))
    message = rf"File too large: '{tmp_path / 'folded' / 'folded.ckpt'}'"
    with pytest.raises(OSError, match=message):
        fit(tmp_path, module, folding, enable_checkpointing=True)
    assert folding.trace == []
    assert files_in(tmp_path / "folded") == set()
    assert folding.folded_module is None
    (path,) = tmp_path.rglob("*.ckpt")
    assert f"Nothing was folded. To fold the best checkpoint: lit-bnfold fold --ckpt_path {path}" in caplog.text

    # With room on the disk, what the message says works.
    class Validating(Tiny):
        def val_dataloader(self) -> Any:
            return loader()

    again = BatchNormFolding()
    trainer = quiet_trainer(tmp_path, callbacks=[again], enable_checkpointing=True)
    again.fold_checkpoint(trainer, Validating(), path)
    assert {"folded.ckpt", "folding.html", "folding.json"} <= files_in(path.parent)


def test_a_full_disk_leaves_the_files_of_an_older_run(tmp_path: Path, randomised: Randomised) -> None:
    fit(tmp_path, randomised(Tiny()), BatchNormFolding())
    before = {name: (tmp_path / name).read_bytes() for name in ("folded.ckpt", "folding.html", "folding.json")}
    with pytest.raises(OSError, match="File too large"):
        fit(tmp_path, randomised(Tiny()), Full())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path, randomised: Randomised) -> None:
    """Nor can one be written into; that no test can arrange which may run as root."""
    (tmp_path / "file").write_text("in the way")
    module, folding = randomised(Tiny()), Watched(dirpath=str(tmp_path / "file" / "below"))
    with pytest.raises(NotADirectoryError, match=rf"Not a directory: '{tmp_path / 'file' / 'below'}'"):
        fit(tmp_path, module, folding, enable_checkpointing=True)
    assert folding.trace == []
    assert folding.folded_module is None
    (path,) = tmp_path.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 6
    assert files_in(tmp_path) == {"file", path.name}


def test_nothing_to_validate_on_and_no_example_that_runs_is_said_in_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class NoForward(Tiny):
        forward = None

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch["inputs"]), batch["targets"])

    folding = Watched()
    with caplog.at_level("INFO"):
        with pytest.raises(FoldingError, match=r"does not run on a training batch.*Set `example_input_array`, or give"):
            fit(tmp_path, NoForward(), folding, dict_loader(), None)
        assert folding.trace == []
        module = NoForward()
        module.example_input_array = torch.randn(2, 4)
        with pytest.raises(FoldingError, match=r"run on its `example_input_array`.*Set another `example_input_array`"):
            fit(tmp_path, module, Watched(), dict_loader(), None)
    assert "Nothing was folded" not in caplog.text  # `lit-bnfold fold` could not prove anything either.
    assert "is proven on" not in caplog.text
    folding = Watched(on_mismatch="warn")
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match=r"There is nothing to validate.* Nothing was folded"):
        trainer = fit(tmp_path, NoForward(), folding, dict_loader(), None)
    assert folding.trace == []
    assert folding.report is None
    assert trainer.state.finished
    assert not (tmp_path / "folded.ckpt").exists()
    early = [each for each in caplog.messages if each.startswith("BatchNormFolding will find nothing to validate on")]
    assert len(early) == 2  # Of the first training and the last, which have no example either.


class CallingNothing(Tiny):
    """Validates nothing, and has an example."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.randn(2, 4)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 1.0)


def test_validation_that_calls_no_module_leaves_the_example_to_prove_it_on(
    tmp_path: Path, randomised: Randomised, caplog: pytest.LogCaptureFixture
) -> None:
    folding = Watched()
    with caplog.at_level("INFO"):
        fit(tmp_path, randomised(CallingNothing()), folding)
    assert "Validation calls nothing: the folded module is proven on one example alone." in caplog.messages
    assert folding.trace == []
    assert folding.plan is not None
    assert [fold.batchnorm for fold in folding.plan.folds] == ["net.1"]
    assert folding.report is not None
    assert folding.report["output_error"]["max_rel"] < 1e-5


def test_validation_that_calls_no_module_and_an_example_that_does_not_run_fold_nothing(
    tmp_path: Path, randomised: Randomised
) -> None:
    module, folding = randomised(CallingNothing()), Watched()
    module.example_input_array = torch.randn(2, 7)
    fit(tmp_path, module, folding)
    assert folding.trace == []
    assert folding.plan is not None
    assert [(kept.batchnorm, kept.code) for kept in folding.plan.kept] == [("net.1", "not-reached")]


def test_checkpoint_of_a_module_whose_validation_calls_nothing_is_proven_on_its_example(
    tmp_path: Path, randomised: Randomised
) -> None:
    class WithData(CallingNothing):
        def val_dataloader(self) -> Any:
            return loader()

    fit(tmp_path, randomised(CallingNothing()), BatchNormFolding()).save_checkpoint(tmp_path / "plain.ckpt")
    folding = BatchNormFolding()
    folding.fold_checkpoint(quiet_trainer(tmp_path, callbacks=[folding]), WithData(), tmp_path / "plain.ckpt")
    assert folding.plan is not None
    assert [fold.batchnorm for fold in folding.plan.folds] == ["net.1"]
    assert folding.report is not None
    assert folding.report["output_error"]["max_rel"] < 1e-5


class Noting(DictBatches):
    """Writes what it predicts into its batch, as anomalib's modules do."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)
        batch["prediction"] = self(batch["inputs"])


def test_outputs_are_compared_where_a_step_writes_into_its_batch(tmp_path: Path, randomised: Randomised) -> None:
    folding = Watched()
    fit(tmp_path, randomised(Noting()), folding, dict_loader(), dict_loader())
    assert folding.report is not None
    assert folding.report["output_error"]["max_rel"] < 1e-5


class OneShot(IterableDataset[Any]):
    """Gives its batches once."""

    def __init__(self) -> None:
        self.rest = iter(list(loader()))

    def __iter__(self) -> Iterator[Any]:
        return self.rest


def one_shot_loader() -> DataLoader[Any]:
    return DataLoader(OneShot(), batch_size=None)


def test_a_loader_that_is_used_up_leaves_a_training_batch_to_prove_it_on(tmp_path: Path) -> None:
    folding = Watched()
    fit(tmp_path, Tiny(), folding, val=one_shot_loader(), num_sanity_val_steps=0)
    assert folding.trace == []
    assert [fold.batchnorm for fold in folding.plan.folds] == ["net.1"]
    assert folding.report["validation"] == {"original": {}, "folded": {}}
    assert folding.report["output_error"] is not None


def test_a_loader_that_is_used_up_by_the_first_validation_is_a_mismatch(tmp_path: Path) -> None:
    never = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 9}
    with pytest.raises(FoldingError, match=r"validated on \(3,\) batches and the folded module on \(0,\)"):
        fit(tmp_path, Tiny(), BatchNormFolding(), val=one_shot_loader(), **never)


def test_a_module_that_gives_something_else_without_batchnorm_is_a_mismatch(tmp_path: Path) -> None:
    class Looking(Tiny):
        def forward(self, inputs: Tensor) -> Any:
            outputs = self.net(inputs)
            return [outputs, outputs] if isinstance(self.net[1], nn.BatchNorm1d) else [outputs]

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0])[0], batch[1])

    folding = Watched()
    with pytest.raises(FoldingError, match="the output of the folded module is off by inf"):
        fit(tmp_path, Looking(), folding)
    assert folding.trace == []
    assert files_in(tmp_path) == set()


def test_several_training_loaders_serve_as_an_example_where_nothing_validates(tmp_path: Path) -> None:
    class TwoSources(Tiny):
        def forward(self, left: Tensor, right: Tensor | None = None) -> Any:
            return self.net(left[0] if isinstance(left, list) else left)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch["left"]) + self.loss(batch["right"])

    folding = BatchNormFolding()
    fit(tmp_path, TwoSources(), folding, {"left": loader(), "right": loader()}, None)
    assert [fold.batchnorm for fold in folding.plan.folds] == ["net.1"]


def test_a_module_without_batchnorm_is_warned_of_at_the_start(tmp_path: Path) -> None:
    class Plain(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 3)

        def on_train_start(self) -> None:
            raise RuntimeError("too late")

    warning = pytest.warns(UserWarning, match="has nothing to fold: Plain has no BatchNorm")
    with warning, pytest.raises(RuntimeError, match="too late"):
        fit(tmp_path, Plain(), BatchNormFolding())


def test_validation_and_test_alone_do_nothing(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding()
    trainer = quiet_trainer(tmp_path, callbacks=[folding])
    trainer.validate(randomised(Tiny()), loader(), verbose=False)
    trainer.test(randomised(Tiny()), loader(), verbose=False)
    assert folding.report is None
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "first"}, "weights: expected one of"),
        ({"on_mismatch": "ignore"}, "on_mismatch: expected one of"),
        ({"tolerance": 0.0}, "tolerance: expected a finite number above 0 or None, got 0.0"),
        ({"tolerance": float("inf")}, "tolerance: expected a finite number above 0 or None, got inf"),
        ({"tolerance": -1.0}, "tolerance: expected a finite number above 0 or None, got -1.0"),
        ({"tolerance": float("nan")}, "tolerance: expected a finite number above 0 or None, got nan"),
    ],
)
def test_an_argument_that_is_none_of_its_choices_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchNormFolding(**arguments)


def test_strategies_that_shard_the_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quiet_trainer(tmp_path)
    sharding = type("FSDPStrategy", (type(trainer.strategy),), {})
    monkeypatch.setattr(trainer.strategy, "__class__", sharding)
    with pytest.raises(FoldingError, match="FSDPStrategy shards them"):
        BatchNormFolding().setup(trainer, Tiny(), "fit")


# A checkpoint that exists ---------------------------------------------------------------------------------------------


def test_a_checkpoint_is_folded_as_the_fit_folds_it(tmp_path: Path, randomised: Randomised) -> None:
    module, folding = randomised(Stochastic()), BatchNormFolding(dirpath=str(tmp_path / "fit"))
    fit(tmp_path, module, folding, val=loader()).save_checkpoint(tmp_path / "saved.ckpt")

    class Validating(Stochastic):
        def val_dataloader(self) -> Any:
            return loader()

    again, other = BatchNormFolding(), Validating()
    again.fold_checkpoint(quiet_trainer(tmp_path, callbacks=[again]), other, tmp_path / "saved.ckpt")
    assert again.plan == folding.plan
    assert again.report["weights"] == f"checkpoint {tmp_path / 'saved.ckpt'}"
    # This module draws random numbers when it validates: both versions must have drawn the same.
    assert again.report["output_error"] is not None
    assert again.report["validation"]["folded"] == pytest.approx(again.report["validation"]["original"], abs=1e-5)
    paths = tmp_path / "folded.ckpt", tmp_path / "fit" / "folded.ckpt"
    states = [torch.load(path, weights_only=True)["state_dict"] for path in paths]
    assert [*map(numbers, states[0].values())] == [*map(numbers, states[1].values())]
    # The module has the weights of the checkpoint afterwards, unfolded.
    assert [*map(numbers, other.state_dict().values())] == [*map(numbers, module.state_dict().values())]


class ValidatingItself(Tiny):
    def val_dataloader(self) -> Any:
        return loader()


def test_a_checkpoint_that_mismatches_leaves_nothing_of_the_one_before(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding(on_mismatch="warn")
    fit(tmp_path, randomised(Tiny()), folding).save_checkpoint(tmp_path / "saved.ckpt")
    trainer = quiet_trainer(tmp_path, callbacks=[folding])
    folding.fold_checkpoint(trainer, ValidatingItself(), tmp_path / "saved.ckpt")
    assert folding.folded_module is not None
    folding.tolerance = 1e-30
    with pytest.warns(UserWarning, match="does not do what the original does"):
        folding.fold_checkpoint(trainer, ValidatingItself(), tmp_path / "saved.ckpt")
    assert folding.folded_module is None
    with pytest.raises(FileNotFoundError):
        folding.fold_checkpoint(trainer, ValidatingItself(), tmp_path / "missing.ckpt")
    assert (folding.plan, folding.report) == (None, None)


def test_a_checkpoint_whose_validation_fails_costs_no_random_numbers(tmp_path: Path) -> None:
    class Failing(ValidatingItself):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            torch.rand(1), random.random(), numpy.random.rand()
            raise RuntimeError("trouble")

    folding = BatchNormFolding()
    fit(tmp_path, Tiny(), folding).save_checkpoint(tmp_path / "saved.ckpt")
    trainer, module = quiet_trainer(tmp_path, callbacks=[folding]), Failing()
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    with pytest.raises(RuntimeError, match="trouble"):
        folding.fold_checkpoint(trainer, module, tmp_path / "saved.ckpt")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(numpy.random.get_state())) == before[1:]


class Endless(ValidatingItself):
    """Validates on data that does not know its length."""

    def val_dataloader(self) -> Any:
        return DataLoader(Rows(), batch_size=None)


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(loader())


class Returning(ValidatingItself):
    """Logs nothing."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return {"loss": F.cross_entropy(self(batch[0]), batch[1])}


class LoggingSeveral(ValidatingItself):
    """Logs a number for each class, which no logger takes and callbacks may."""

    def on_validation_epoch_end(self) -> None:
        self.trainer.callback_metrics["of classes"] = torch.ones(3)


@pytest.mark.parametrize("make", [ValidatingItself, Endless, Returning, LoggingSeveral])
def test_a_checkpoint_is_validated_as_the_training_that_left_it(
    make: Callable[[], LightningModule], tmp_path: Path, randomised: Randomised
) -> None:
    by_fit, folding = BatchNormFolding(), BatchNormFolding()
    module, saved = randomised(make()), tmp_path / "saved.ckpt"
    trainer = quiet_trainer(tmp_path, callbacks=[by_fit])
    trainer.fit(module, loader())
    trainer.save_checkpoint(saved)
    logger = CSVLogger(tmp_path / "logs")
    folding.fold_checkpoint(quiet_trainer(tmp_path, logger=logger, callbacks=[folding]), make(), saved)
    assert by_fit.report is not None
    assert folding.report is not None
    assert folding.report["validation"]["original"]
    for key in ("validation", "folds", "kept", "output_error", "mismatch"):
        assert folding.report[key] == by_fit.report[key]
    assert not files_in(tmp_path / "logs")


def test_a_checkpoint_without_a_validation_is_proven_on_an_example(tmp_path: Path, randomised: Randomised) -> None:
    saved, module, folding = tmp_path / "saved.ckpt", ValidatingItself(), BatchNormFolding()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(randomised(Tiny()), loader())
    trainer.save_checkpoint(saved)
    module.example_input_array = examples(2).tensors[0]
    folding.fold_checkpoint(quiet_trainer(tmp_path, limit_val_batches=0), module, saved)
    assert folding.plan is not None
    assert folding.plan.folds


class FailingFolded(ValidatingItself):
    def on_validation_epoch_end(self) -> None:
        assert isinstance(self.net[1], nn.BatchNorm1d)


def test_a_checkpoint_whose_hook_cannot_run_folded_is_treated_as_agreed(tmp_path: Path, randomised: Randomised) -> None:
    saved = tmp_path / "saved.ckpt"
    trainer = quiet_trainer(tmp_path)
    trainer.fit(randomised(Tiny()), loader())
    trainer.save_checkpoint(saved)
    with pytest.raises(AssertionError):
        BatchNormFolding().fold_checkpoint(quiet_trainer(tmp_path), FailingFolded(), saved)
    folding = BatchNormFolding(on_mismatch="warn")
    with pytest.warns(UserWarning, match="did not come to its end: AssertionError"):
        folding.fold_checkpoint(quiet_trainer(tmp_path), FailingFolded(), saved)
    assert (folding.plan, folding.report, folding.folded_module) == (None, None, None)
    assert files_in(tmp_path) == {"saved.ckpt"}


# Several processes ----------------------------------------------------------------------------------------------------


class AssertingInEachProcess(Watched):
    """What the callback holds does not come back from the processes, so they look at it themselves."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        assert self.trace == []
        # The input of the other one is returned, as it would be seen in one process too.
        assert [fold.batchnorm for fold in self.plan.folds] == ["net.1"]
        assert self.report["output_error"] is not None
        assert self.report["validation"]["folded"] == pytest.approx(self.report["validation"]["original"], abs=1e-5)
        # The processes have seen other data, so their statistics differ; what is folded are the first one's.
        statistics, inputs = pl_module.net[1].running_mean, torch.ones(3, 4)
        assert torch.equal(statistics, trainer.strategy.broadcast(statistics)) == trainer.is_global_zero
        expected = trainer.strategy.broadcast(pl_module.eval()(inputs)[0].detach())
        torch.testing.assert_close(self.folded_module(inputs)[0], expected, rtol=0, atol=1e-5)


class Gathering(Tiny):
    """Returns from its forward what only a training step reads, and ends its training long after a validation."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def forward(self, inputs: Tensor) -> Any:
        hidden = self.shown[0](inputs)  # (B, 3)
        return self.net(inputs) + self.shown[1](hidden), hidden

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0])[0], batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), sync_dist=True)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
def test_two_processes_fold_together(strategy: str, tmp_path: Path, randomised: Randomised) -> None:
    if strategy == "ddp_fork" and not hasattr(os, "fork"):
        pytest.skip("the processes are forked")
    module = randomised(Gathering())
    arguments = {"strategy": strategy, "devices": 2, "check_val_every_n_epoch": 2, "max_epochs": 3}
    trainer = fit(tmp_path, module, AssertingInEachProcess(), **arguments)
    assert files_in(tmp_path) == {"folded.ckpt", "folding.html", "folding.json"}
    inputs = torch.ones(3, 4)
    folded = load_folded(Gathering, tmp_path / "folded.ckpt")
    torch.testing.assert_close(folded(inputs)[0], module.eval()(inputs)[0], rtol=0, atol=1e-5)
    assert float(trainer.callback_metrics["folding/folds"]) == 1.0


# Interrupted ----------------------------------------------------------------------------------------------------------


def test_the_command_that_folds_an_interrupted_training_names_its_classes(caplog: pytest.LogCaptureFixture) -> None:
    class Script(Tiny):
        __module__ = "__main__"
        __qualname__ = "Script"

    class Rows(LightningDataModule):
        __qualname__ = "Rows"

    saved = argparse.Namespace(last_model_path="a directory/last.ckpt")
    fitting = argparse.Namespace(fn="fit")
    trainer: Any = argparse.Namespace(checkpoint_callbacks=[saved], datamodule=Rows(), state=fitting)
    with caplog.at_level("INFO"):
        BatchNormFolding().on_exception(trainer, Script(), KeyboardInterrupt())
    script = Path(sys.modules["__main__"].__file__).stem
    command = f"lit-bnfold fold --ckpt_path 'a directory/last.ckpt' --model {script}.Script --data {__name__}.Rows"
    assert caplog.messages[-1] == f"Nothing was folded. To fold the last checkpoint: {command}"

    class Local(Tiny):
        pass

    with caplog.at_level("INFO"):
        BatchNormFolding().on_exception(trainer, Local(), KeyboardInterrupt())
    assert "--model some.module.Local --data" in caplog.messages[-1]


def test_only_a_training_that_fails_speaks_of_what_can_be_folded(
    tmp_path: Path, randomised: Randomised, caplog: pytest.LogCaptureFixture
) -> None:
    folding = BatchNormFolding()
    fit(tmp_path, randomised(Tiny()), folding)
    trainer = quiet_trainer(tmp_path, callbacks=[BatchNormFolding()])
    with caplog.at_level("INFO"):
        with pytest.raises(FileNotFoundError):
            trainer.validate(Tiny(), loader(), ckpt_path=tmp_path / "missing.ckpt")
        assert "Nothing was folded" not in caplog.text
        # Nobody can fold what training cannot go on from.
        with pytest.raises(FoldingError, match="cannot go on from a folded checkpoint"):
            trainer.fit(Tiny(), loader(), loader(), ckpt_path=tmp_path / "folded.ckpt")
    assert "Nothing was folded. There is no checkpoint to fold either." in caplog.messages
