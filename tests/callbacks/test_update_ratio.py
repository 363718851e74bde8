from __future__ import annotations

import os
from collections.abc import Callable
from itertools import chain
from math import isfinite, log10
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.data import DataLoader, TensorDataset

from lit_bnfold import UpdateRatioMonitor

STEPS = 12


def loader(count: int = STEPS * 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(count)
    return DataLoader(TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3), batch_size=8)


class Tiny(LightningModule):
    """Seven parameters, of which one is frozen and one has a single element, and notes how they change."""

    def __init__(self, optimizer: Callable[..., Any] = torch.optim.SGD, **options: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.single = nn.Parameter(torch.ones(1))
        self.optimizer = lambda parameters: optimizer(parameters, **{"lr": 0.1, **options})

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs) * self.single + self.frozen

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch  # (B, 4), (B,)
        return F.cross_entropy(self(inputs), targets)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


NAMES = {"net.0.weight", "net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias"}


class PlainLoop(Callback):
    """The same numbers from a copy of everything around every batch, one parameter after the other, in float64."""

    def __init__(self) -> None:
        self.ratios: list[dict[str, float]] = []
        self.rated: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.before = {name: p.detach().double().clone() for name, p in pl_module.named_parameters()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ratios.append({})
        self.rated.append({})
        for name, parameter in pl_module.named_parameters():
            update = parameter.detach().double() - self.before[name]
            if parameter.numel() > 1 and update.any():
                self.ratios[-1][name] = (update.std() / parameter.double().std()).log10().item()
                # The notebook's own line.
                lr, grad = trainer.optimizers[0].param_groups[0]["lr"], parameter.grad
                assert grad is not None
                self.rated[-1][name] = ((lr * grad).std() / parameter.data.std()).log10().item()


def fit(module: LightningModule, path: Path, *callbacks: Callback, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": TensorBoardLogger(path, name=None, version=""),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 4,
        "callbacks": list(callbacks),
    }
    trainer = Trainer(**{**defaults, **options})
    trainer.fit(module, loader())
    return trainer


def written(path: Path) -> dict[str, dict[int, float]]:
    """What an event file holds of update ratios: parameter, step, value."""
    events = EventAccumulator(str(path)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("update_ratio/")]
    found = {tag.removeprefix("update_ratio/"): {e.step: e.value for e in events.Scalars(tag)} for tag in tags}
    assert all(isfinite(value) for value in chain.from_iterable(steps.values() for steps in found.values()))
    return found


def expected(plain: PlainLoop, steps: dict[int, int]) -> dict[str, Any]:
    """What a plain loop came to, by parameter and written step; the steps lead to the batches that made them."""
    table: dict[str, dict[int, float]] = {}
    for step, batch in steps.items():
        for name, ratio in plain.ratios[batch].items():
            table.setdefault(name, {})[step] = pytest.approx(ratio, abs=2e-4)
    return table


# What is written ------------------------------------------------------------------------------------------------------


def test_it_is_the_notebooks_statistic_for_plain_sgd(tmp_path: Path) -> None:
    plain = PlainLoop()
    fit(Tiny().double(), tmp_path, UpdateRatioMonitor(), plain, precision="64-true")
    found = written(tmp_path)
    assert found.keys() == NAMES
    assert found == expected(plain, {3: 3, 7: 7, 11: 11})
    for name, steps in found.items():
        assert steps == {step: pytest.approx(plain.rated[step][name], abs=1e-6) for step in (3, 7, 11)}


OPTIMIZERS = {
    "momentum": lambda: Tiny(momentum=0.9),
    "weight decay": lambda: Tiny(weight_decay=0.5),
    "Adam": lambda: Tiny(torch.optim.Adam),
    "AdamW, fused": lambda: Tiny(torch.optim.AdamW, fused=True),
    "LBFGS": lambda: Tiny(torch.optim.LBFGS, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_real_update_of_any_optimizer(name: str, tmp_path: Path) -> None:
    plain = PlainLoop()
    fit(OPTIMIZERS[name](), tmp_path, UpdateRatioMonitor(), plain)
    assert written(tmp_path) == expected(plain, {3: 3, 7: 7, 11: 11})
    differences = [abs(plain.ratios[step][name] - plain.rated[step][name]) for step in (3, 7, 11) for name in NAMES]
    assert max(differences) > 0.05


def test_a_clipped_gradient_counts_as_it_was_applied(tmp_path: Path) -> None:
    plain = PlainLoop()
    fit(Tiny(), tmp_path, UpdateRatioMonitor(), plain, gradient_clip_val=0.01)
    assert written(tmp_path) == expected(plain, {3: 3, 7: 7, 11: 11})


def test_accumulated_gradients_make_one_update(tmp_path: Path) -> None:
    plain = PlainLoop()
    fit(Tiny(), tmp_path, UpdateRatioMonitor(every_n_steps=2), plain, accumulate_grad_batches=3)
    # Steps 1 and 3 are made of batches 3 to 5 and 9 to 11.
    assert written(tmp_path) == expected(plain, {1: 5, 3: 11})


@pytest.mark.parametrize(("precision", "wide"), [("bf16-mixed", 2e-4), ("bf16-true", 2e-3)])
def test_half_precision_is_measured_in_single(precision: Any, wide: float, tmp_path: Path) -> None:
    plain = PlainLoop()
    fit(Tiny(), tmp_path, UpdateRatioMonitor(), plain, precision=precision)
    found = written(tmp_path)
    assert {step for steps in found.values() for step in steps} == {3, 7, 11}
    for name, steps in found.items():
        assert steps == {step: pytest.approx(plain.ratios[step][name], abs=wide) for step in steps}


class Adversarial(Tiny):
    """Two optimizers, each with half of the parameters, that step in turns: several times a batch, or not at all."""

    def __init__(self, turns: list[list[int]], raw: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.turns, self.raw = turns, raw

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers(use_pl_optimizer=not self.raw)
        for number in self.turns[batch_idx % len(self.turns)]:
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizers[number].step()
            optimizers[number].zero_grad()

    def configure_optimizers(self) -> Any:
        halves = self.net[:2].parameters(), self.net[2:].parameters()
        return [torch.optim.SGD(halves[0], lr=0.1), torch.optim.Adam(halves[1], lr=0.1)]


class Untroubled(PlainLoop):
    """Without the notebook's line, for which there may be no gradient left."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        parameters = dict(pl_module.named_parameters())
        updates = {name: parameters[name].detach().double() - self.before[name] for name in NAMES}
        self.ratios.append(
            {
                name: (update.std() / parameters[name].double().std()).log10().item()
                for name, update in updates.items()
                if update.any()
            }
        )


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    ("turns", "steps"),
    [
        ([[0, 1]], {3: 3, 7: 7, 11: 11}),
        ([[0, 0, 0, 1]], {3: 3, 7: 7, 11: 11}),
        ([[0], [1]], {3: 3, 7: 7, 11: 11}),
        # The batch that is chosen has no update: the next one that has takes its place.
        ([[0, 1], [], [], [], []], {5: 5, 10: 10}),
    ],
)
def test_manual_optimisation_is_counted_in_batches_as_lightning_does(
    turns: list[list[int]], steps: dict[int, int], raw: bool, tmp_path: Path
) -> None:
    plain = Untroubled()
    fit(Adversarial(turns, raw), tmp_path, UpdateRatioMonitor(), plain)
    assert written(tmp_path) == expected(plain, steps)


class Skipping(Tiny):
    """Leaves the optimizer alone on some steps, as a gradient scaler does after an overflow."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:  # type: ignore[override]
        if batch_idx in (3, 4, 7):
            closure()
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, closure)


def test_a_step_that_a_scaler_leaves_out_is_made_up_for_by_the_next(tmp_path: Path) -> None:
    fit(Skipping(), tmp_path, UpdateRatioMonitor(), plain := PlainLoop())
    updated = [step for step in range(STEPS) if plain.ratios[step]]
    assert updated == [0, 1, 2, 5, 6, 8, 9, 10, 11]
    found = written(tmp_path)
    assert {step for steps in found.values() for step in steps} >= {8, 11}
    assert found == expected(plain, {step: step for step in found["net.0.weight"]})


def test_what_does_not_change_or_diverges_is_left_out(tmp_path: Path) -> None:
    class Odd(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.randn(4))
            self.shifted = nn.Parameter(torch.zeros(3))
            self.wild = nn.Parameter(torch.ones(2))
            # Their spread is beyond float32.
            self.huge = nn.Parameter(torch.tensor([3e38, -3e38]))
            self.empty = nn.Parameter(torch.ones(0))
            self.rounded = nn.Parameter(torch.linspace(0, 100, 101))
            self.late = nn.LazyLinear(3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            # A power of two, so that all elements change alike to the last digit.
            loss = super().training_step(batch, batch_idx) + self.shifted.sum() * 8
            self.late(batch[0])
            loss = loss + (self.huge * torch.tensor([1e34, 2e34])).sum()
            # One of its elements changes, in the last digits.
            loss = loss + self.rounded[1] * 1e-5
            return loss + self.wild.sum() * float("inf")

    fit(Odd(), tmp_path, UpdateRatioMonitor(every_n_steps=1), max_steps=2)
    assert written(tmp_path).keys() == NAMES


def test_a_shared_parameter_comes_once_and_one_that_grows_not_at_all(tmp_path: Path) -> None:
    class Growing(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.net[0]
            self.table = nn.Parameter(torch.randn(4, 2))

        def configure_optimizers(self) -> Any:
            return self.optimizer(self.net.parameters())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.table.data = torch.randn(5 + batch_idx, 2)
            return super().training_step(batch, batch_idx)

    fit(Growing(), tmp_path, UpdateRatioMonitor(every_n_steps=1), max_steps=4)
    found = written(tmp_path)
    assert found.keys() == NAMES
    assert set(found["net.0.weight"]) == {0, 1, 2, 3}


# When it is written ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize(
    ("every", "log_every", "steps"),
    [(None, 5, {4, 9}), (3, 5, {2, 5, 8, 11}), (1, 50, set(range(12))), (None, 50, set()), (None, 0, set())],
)
def test_the_steps_are_those_of_the_trainer_or_its_own(
    every: int | None, log_every: int, steps: set[int], tmp_path: Path
) -> None:
    fit(Tiny(), tmp_path, UpdateRatioMonitor(every_n_steps=every), log_every_n_steps=log_every)
    found = written(tmp_path)
    assert {step for each in found.values() for step in each} == steps


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_training_that_goes_on_keeps_its_steps(tmp_path: Path) -> None:
    trainer = fit(Tiny(), tmp_path / "first", max_steps=6, max_epochs=-1)
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    again = Trainer(
        logger=TensorBoardLogger(tmp_path / "second", name=None, version=""),
        callbacks=[UpdateRatioMonitor()],
        log_every_n_steps=4,
        max_steps=15,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    again.fit(Tiny(), loader(), ckpt_path=tmp_path / "saved.ckpt")
    assert set(written(tmp_path / "second")["net.0.weight"]) == {7, 11}


def test_every_logger_gets_it_and_without_one_nothing_is_measured(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, name=None, version=""), CSVLogger(tmp_path, name="table")]
    fit(Tiny(), tmp_path, UpdateRatioMonitor(), logger=loggers)
    rows = (Path(loggers[1].log_dir) / "metrics.csv").read_text().splitlines()
    assert {f"update_ratio/{name}" for name in NAMES} <= set(rows[0].split(","))
    assert len(rows) == 1 + len(written(tmp_path)["net.0.weight"])

    monitor = UpdateRatioMonitor()
    monitor._begin = lambda *_: pytest.fail("There is no logger to measure for.")  # type: ignore[method-assign]
    fit(Tiny(), tmp_path, monitor, logger=False)


def test_the_other_steps_call_one_hook_and_touch_no_parameter(tmp_path: Path) -> None:
    monitor = UpdateRatioMonitor()
    begun: list[int] = []
    begin = monitor._begin

    class Looking(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            hooks = {name for name in dir(Callback) if name.startswith("on_") and getattr(monitor, name) is None}
            resting = {"on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"}
            # The monitor is behind this callback in the line.
            assert hooks == resting | (set() if batch_idx in (3, 7, 11) else {"on_train_batch_end"})
            assert bool(monitor._before) == (batch_idx in (3, 7, 11))

    def noting(trainer: Trainer, pl_module: LightningModule) -> None:
        begun.append(trainer.global_step)
        begin(trainer, pl_module)

    monitor._begin = noting  # type: ignore[method-assign]
    fit(Tiny(), tmp_path, Looking(), monitor)
    assert begun == [3, 7, 11]
    assert monitor._before == {}


# What must not happen -------------------------------------------------------------------------------------------------


def test_it_lets_go_of_its_copies_when_a_step_fails(tmp_path: Path) -> None:
    class Failing(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3:
                raise RuntimeError("trouble")
            return super().training_step(batch, batch_idx)

    monitor, before = UpdateRatioMonitor(), len(_global_optimizer_post_hooks)
    with pytest.raises(RuntimeError, match="trouble"):
        fit(Failing(), tmp_path, monitor)
    assert monitor._before == {}
    assert len(_global_optimizer_post_hooks) == before
    # It can be used again, and counts from the start.
    fit(Tiny(), tmp_path / "short", monitor, max_steps=2, log_every_n_steps=12)
    fit(Tiny(), tmp_path / "again", monitor)
    assert set(written(tmp_path / "again")["net.0.weight"]) == {3, 7, 11}
    assert len(_global_optimizer_post_hooks) == before


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "every_n_steps: expected at least 1, got 0"),
        (2.0, TypeError, "every_n_steps: expected an int, got 2.0"),
        (True, TypeError, "every_n_steps: expected an int, got True"),
    ],
)
def test_a_number_of_steps_that_is_none_is_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        UpdateRatioMonitor(every_n_steps=value)


def test_a_strategy_that_shards_parameters_is_refused() -> None:
    class Fake:
        strategy = FSDPStrategy()

    with pytest.raises(MisconfigurationException, match="UpdateRatioMonitor needs whole parameters on every device; F"):
        UpdateRatioMonitor().setup(Fake(), Tiny(), "fit")  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_of_several_ranks_the_first_writes(tmp_path: Path) -> None:
    class Asserting(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            assert bool(monitor._before) == (trainer.global_rank == 0 and batch_idx == 3)

    monitor = UpdateRatioMonitor()
    fit(Tiny(), tmp_path, Asserting(), monitor, strategy="ddp_fork", devices=2)
    found = written(tmp_path)
    assert found.keys() == NAMES
    assert {step for steps in found.values() for step in steps} == {3}
    assert len(list(tmp_path.rglob("events*"))) == 1


def test_a_logarithm_is_taken_of_spreads_that_a_quotient_would_lose(tmp_path: Path) -> None:
    class Vast(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.vast = nn.Parameter(torch.tensor([1e-30, 3e-30]))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + (self.vast * torch.tensor([1e-29, 2e-29])).sum()

    fit(Vast().double(), tmp_path, UpdateRatioMonitor(every_n_steps=1), max_steps=1, precision="64-true")
    # The parameter after the step is [0, 1e-30].
    assert written(tmp_path)["vast"][0] == pytest.approx(log10(0.1 * 1e-29 / 1e-30), abs=1e-6)
