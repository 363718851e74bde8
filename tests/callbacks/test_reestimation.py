"""Re-estimated statistics: those of all elements of the batches at once, folded, reported, and taken back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lit_bnfold.folding.rewrite as rewriting
from lit_bnfold import BatchNormFolding, FoldingError, load_folded
from lit_bnfold.callbacks.reestimation import Moments, Reestimation
from trainers import quiet_trainer

pytestmark = [
    # Where only the measurement counts, nothing validates.
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # A module that is frozen in part says so itself.
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training"),
]

Randomised = Callable[[nn.Module], nn.Module]


# Moments --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_the_moments_of_parts_add_up_to_those_of_the_whole(offset: float) -> None:
    values = torch.randn(60, 3, 2, dtype=torch.float64) + offset
    parts = [values[:0], values[:1], values[1:20], values[20:20], values[20:]]
    total = sum(map(Moments.of, parts), Moments.none(3))
    assert total.count == 120
    torch.testing.assert_close(total.mean, values.mean((0, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(total.variance, values.var((0, 2), correction=1), rtol=1e-8 if offset else 1e-12, atol=0)


def test_half_precision_is_widened_before_anything_is_summed() -> None:
    values = (torch.randn(4096, 2) + 3.0).bfloat16()
    moments, exact = Moments.of(values), Moments.of(values.double())
    torch.testing.assert_close(moments.mean, exact.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.variance, exact.variance, rtol=1e-5, atol=0)


def test_nothing_and_nothing_is_nothing() -> None:
    assert (Moments.none(2) + Moments.none(2)).count == 0


# What is measured -----------------------------------------------------------------------------------------------------


def examples(count: int = 20) -> TensorDataset:
    """Inputs (count, 4) and targets (count,); twenty of them in batches of eight make the last batch a smaller one."""
    generator = torch.Generator().manual_seed(count)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)


def loader(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(examples(), batch_size=8, **kwargs)


class Tiny(LightningModule):
    """Two BatchNorms that can be folded, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3), nn.BatchNorm1d(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch  # (B, 4), (B,)
        return F.cross_entropy(self(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val/loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Dropping(Tiny):
    """Drops by module and by function, in ways that the data of a BatchNorm would show."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.5))
        self.net.insert(0, nn.AlphaDropout(0.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(F.dropout(input=inputs, p=0.5, training=self.training))


class Attending(Tiny):
    """Drops inside of attention and of recurrent layers, with and without packed sequences, and by torch's own name."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.gru = nn.GRU(4, 4, num_layers=2, dropout=0.5, batch_first=True)

    @property
    def is_dropping(self) -> bool:
        return self.training and self.attention.dropout > 0

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs[:, None] * torch.arange(1, 4)[:, None]  # (B, 4) -> (B, 3, 4)
        rows = rows + self.attention(rows, rows, rows)[0] + self.attention(rows, rows, rows, need_weights=False)[0]
        rows = rows + F.scaled_dot_product_attention(rows, rows, rows, dropout_p=0.5 * self.is_dropping)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.lstm(rows, [rows.new_zeros(2, len(rows), 4)] * 2)[0], [3] * len(rows), batch_first=True
        )
        rows = rows + nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]
        return self.net(torch.dropout(rows.mean(1), p=0.5, train=self.is_dropping))


class Convolutional(Tiny):
    def __init__(self) -> None:
        super().__init__()
        convolution = nn.Conv2d(1, 5, 2, padding=1)
        self.net = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), convolution, nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(45, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.net(inputs))


class Twice(Tiny):
    """Calls its network twice in a step."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + super().loss((batch[0] * 3.0 + 1.0, batch[1]))


class Negating(nn.BatchNorm1d):
    """Normalises something else than what it is given."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(-input).relu()


class Special(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.net[1] = Negating(5)


class Synchronised(Tiny):
    """As on several devices, where no call of `batch_norm` can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.SyncBatchNorm.convert_sync_batchnorm(self.net)


class Measuring(Callback):
    """Measures at the end of training, and compares with the inputs of each normalisation, all in one tensor."""

    def __init__(self, batches: int, atol: float) -> None:
        self.batches, self.atol = batches, atol
        self.has_measured = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reestimation = Reestimation(pl_module, self.batches)
        before = {key: value.clone() for key, value in pl_module.state_dict().items()}
        reestimation.measure(trainer, pl_module)
        assert all(torch.equal(before[key], value) for key, value in pl_module.state_dict().items())
        expected = self.expected(pl_module, list(loader())[: self.batches])
        assert reestimation.moments.keys() == expected.keys()
        assert len(expected) > 0
        for name, inputs in expected.items():
            flat = inputs.movedim(1, -1).flatten(0, -2)  # (N, C)
            moments = reestimation.moments[name]
            assert moments.count == len(flat)
            torch.testing.assert_close(moments.mean, flat.mean(0).double(), rtol=0, atol=self.atol)
            torch.testing.assert_close(moments.variance, flat.var(0, correction=1).double(), rtol=0, atol=self.atol)
        self.has_measured = True

    def expected(self, pl_module: LightningModule, batches: list[Any]) -> dict[str, Tensor]:
        """The inputs of each BatchNorm, as a copy of the module that trains without dropout gets them."""
        twin = type(pl_module)().to(pl_module.dtype)
        twin.load_state_dict(pl_module.state_dict())
        for module in twin.modules():
            if isinstance(module, (nn.Dropout, nn.AlphaDropout)):
                module.p = 0.0
            if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
                module.dropout = 0.0
        if isinstance(twin, Dropping):
            twin.forward = twin.net.forward
        inputs: dict[str, list[Tensor]] = {}
        for name, module in twin.named_modules():
            if isinstance(module, _BatchNorm):
                sign = -1.0 if isinstance(module, Negating) else 1.0
                seen = inputs.setdefault(name, [])
                module.register_forward_pre_hook(lambda _, args, seen=seen, sign=sign: seen.append(sign * args[0]))
        for values, targets in batches:
            twin.loss((values.to(twin.dtype), targets))
        return {name: torch.cat(seen).detach() for name, seen in inputs.items()}


@pytest.mark.parametrize("batches", [2, 9])
@pytest.mark.parametrize("module", [Tiny, Dropping, Attending, Convolutional, Twice, Special, Synchronised])
def test_the_statistics_are_those_of_all_elements_at_once(
    module: type[Tiny], batches: int, tmp_path: Path, randomised: Randomised
) -> None:
    measuring = Measuring(batches, atol=1e-12)
    trainer = quiet_trainer(tmp_path, max_epochs=1, precision="64-true", callbacks=[measuring])
    trainer.fit(randomised(module()), loader())
    assert measuring.has_measured


def test_in_single_precision_they_are_those_up_to_rounding(tmp_path: Path, randomised: Randomised) -> None:
    measuring = Measuring(3, atol=1e-6)
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[measuring]).fit(randomised(Convolutional()), loader())
    assert measuring.has_measured


class Augmenting(Tiny):
    """Adds noise to each batch, from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.seen = torch.Generator().manual_seed(1), nn.Identity()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        noise = torch.randn((), generator=self.generator)
        return self.seen(batch[0] * 0 + noise), batch[1]


def test_each_batch_is_augmented_anew(tmp_path: Path, randomised: Randomised) -> None:
    drawn: list[float] = []

    class Listening(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            hook = pl_module.seen.register_forward_hook(lambda *args: drawn.append(float(args[2].mean())))
            Reestimation(pl_module, 3).measure(trainer, pl_module)
            hook.remove()

    quiet_trainer(tmp_path, max_epochs=1, callbacks=[Listening()]).fit(randomised(Augmenting()), loader())
    assert len(set(drawn)) == len(drawn) == 3


def moments_after_a_fit(tmp_path: Path, module: LightningModule, **trainer: Any) -> dict[str, Moments]:
    class Keeping(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            reestimation = Reestimation(pl_module, 3)
            reestimation.measure(trainer, pl_module)
            moments.update(reestimation.moments)

    moments: dict[str, Moments] = {}
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[Keeping()], **trainer).fit(module, loader())
    return moments


class Frozen(Tiny):
    """Keeps its first BatchNorm frozen, as fine-tuning does."""

    def __init__(self) -> None:
        super().__init__()
        self.net[1].eval()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.net[1].eval()
        return self


def test_a_frozen_batchnorm_stays_as_it_is(tmp_path: Path) -> None:
    assert moments_after_a_fit(tmp_path, Frozen()).keys() == {"net.4"}


@pytest.mark.parametrize("kind", [Tiny, Synchronised])
def test_what_runs_in_eval_mode_within_a_step_does_not_count(kind: Any, tmp_path: Path) -> None:
    class Peeking(kind):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.net.eval()
            self(batch[0] + 100.0)
            self.net.train()
            return super().training_step(batch, batch_idx)

    moments = moments_after_a_fit(tmp_path, Peeking())
    assert {name: each.count for name, each in moments.items()} == {"net.1": 20, "net.4": 20}


def test_batchnorms_without_statistics_or_without_data_are_left_out(tmp_path: Path) -> None:
    class Partial(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.net[1] = nn.BatchNorm1d(5, track_running_stats=False)
            self.unused = nn.BatchNorm1d(7)

    assert moments_after_a_fit(tmp_path, Partial()).keys() == {"net.4"}


def test_a_module_in_eval_mode_is_measured_as_it_would_train() -> None:
    module = Frozen().eval()
    flags = Reestimation(module, 1)._flags
    assert {name for name, each in module.named_modules() if not flags[each]} == {"net.1"}
    assert not any(each.training for each in module.modules())


# What the callback makes of it ----------------------------------------------------------------------------------------


class Kept(Tiny):
    """Has one BatchNorm that stays, so that its statistics can be looked at after the fold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(self.first(inputs).tanh())


def statistics(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items() if "running" in key}


def fit(tmp_path: Path, module: LightningModule, folding: BatchNormFolding, val: Any = "", **trainer: Any) -> Trainer:
    made = quiet_trainer(tmp_path, **{**trainer, "callbacks": [folding, *trainer.get("callbacks", [])]})
    made.fit(module, loader(), loader() if val == "" else val)
    return made


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


class Noting(Callback):
    """Notes the module as training leaves it."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}


def test_reestimated_statistics_are_folded_and_the_modules_own_come_back(
    tmp_path: Path, randomised: Randomised
) -> None:
    module, folding, noting = randomised(Kept()), BatchNormFolding(reestimate_batches=2), Noting()
    trainer = fit(tmp_path, module, folding, callbacks=[noting])
    assert equal(module.state_dict(), noting.state)

    # The first BatchNorm sees the data itself.
    inputs = examples().tensors[0]
    folded = load_folded(Kept, tmp_path / "folded.ckpt")
    for of_folded in (folded, folding.folded_module):
        torch.testing.assert_close(of_folded.first.running_mean, inputs[:16].mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(of_folded.first.running_var, inputs[:16].var(0), rtol=0, atol=1e-6)
    # The next one sees what that makes of each batch by itself.
    reference = Kept()
    reference.load_state_dict(noting.state)
    with torch.no_grad():
        hidden = torch.cat([reference.net[0](reference.first(part).tanh()) for part in inputs[:16].split(8)])
        reference.first.running_mean.copy_(inputs[:16].mean(0))
        reference.first.running_var.copy_(inputs[:16].var(0))
        reference.net[1].running_mean.copy_(hidden.mean(0))
        reference.net[1].running_var.copy_(hidden.var(0))
        expected = reference.eval().net[:3](reference.first(inputs).tanh())
    torch.testing.assert_close(folded.net[:3](folded.first(inputs).tanh()), expected, rtol=0, atol=1e-5)

    # The report says what that did, and so do the loggers' numbers and the file.
    report = folding.report
    assert report["reestimated"]["batches"] == 2
    assert report["reestimated"]["batchnorms"] == ["net.1", "net.4", "first"]
    before, original = report["reestimated"]["before"], report["validation"]["original"]
    module.eval()
    losses = [module.loss(batch).item() * len(batch[1]) for batch in loader()]
    assert before == {"val/loss": pytest.approx(sum(losses) / 20)}
    assert abs(original["val/loss"] - before["val/loss"]) > 1e-3
    assert report["validation"]["folded"] == pytest.approx(original, abs=1e-6)
    assert trainer.callback_metrics["folding/before_reestimation/val/loss"].item() == pytest.approx(before["val/loss"])
    assert json.loads((tmp_path / "folding.json").read_text()) == report


def test_the_table_has_a_column_for_what_training_left(
    tmp_path: Path, randomised: Randomised, capsys: pytest.CaptureFixture[str]
) -> None:
    folding = BatchNormFolding(reestimate_batches=1)
    fit(tmp_path, randomised(Tiny()), folding)
    printed = capsys.readouterr().out
    assert all(column in printed for column in ("as trained", "re-estimated", "folded", "difference"))
    assert f"{folding.report['reestimated']['before']['val/loss']:.6f}" in printed


def test_without_reestimation_the_report_says_that_there_was_none(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding()
    trainer = fit(tmp_path, randomised(Tiny()), folding)
    assert folding.report["reestimated"] is None
    assert not [key for key in trainer.callback_metrics if "before" in key]


def test_a_module_that_is_replaced_keeps_the_new_statistics(tmp_path: Path, randomised: Randomised) -> None:
    module, folding = randomised(Kept()), BatchNormFolding(reestimate_batches=9, replace=True)
    fit(tmp_path, module, folding)
    assert folding.folded_module is module
    assert folding.report["reestimated"]["batches"] == 3
    assert statistics(module).keys() == {"first.running_mean", "first.running_var"}
    torch.testing.assert_close(module.first.running_mean, examples().tensors[0].mean(0), rtol=0, atol=1e-6)
    state = torch.load(tmp_path / "folded.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_the_best_weights_are_reestimated_and_the_last_ones_come_back(tmp_path: Path, randomised: Randomised) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", monitor="val/loss", mode="max", filename="best")
    noting, folding = Noting(), BatchNormFolding(weights="best", reestimate_batches=3)
    module = randomised(Kept())
    trainer = fit(
        tmp_path, module, folding, callbacks=[noting, saved], enable_checkpointing=True, num_sanity_val_steps=0
    )
    assert equal(module.state_dict(), noting.state)
    best = float(trainer.checkpoint_callback.best_model_score)
    assert folding.report["reestimated"]["before"] == {"val/loss": pytest.approx(best)}
    torch.testing.assert_close(
        folding.folded_module.first.running_mean, examples().tensors[0].mean(0), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("trainer", [{}, {"limit_val_batches": 0}])
def test_without_validation_statistics_are_reestimated_all_the_same(
    trainer: dict[str, Any], tmp_path: Path, randomised: Randomised, recwarn: pytest.WarningsRecorder
) -> None:
    class WithoutValidation(Kept):
        validation_step = None

    kind = Kept if trainer else WithoutValidation
    module, folding, noting = randomised(kind()), BatchNormFolding(reestimate_batches=3), Noting()
    fit(tmp_path, module, folding, val=loader() if trainer else None, callbacks=[noting], **trainer)
    assert equal(module.state_dict(), noting.state)
    assert folding.report["reestimated"]["before"] == {}
    assert folding.report["output_error"] is not None
    torch.testing.assert_close(
        folding.folded_module.first.running_mean, examples().tensors[0].mean(0), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("on_mismatch", ["raise", "warn"])
def test_after_a_mismatch_the_modules_own_statistics_are_back(
    on_mismatch: Any, tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = rewriting.scale_and_shift
    monkeypatch.setattr(rewriting, "scale_and_shift", lambda *args: (right(*args)[0] * 1.01, right(*args)[1]))
    folding = BatchNormFolding(reestimate_batches=2, on_mismatch=on_mismatch, replace=True)
    module, noting = randomised(Kept()), Noting()
    sentence = "does not do what the original does"
    raises, warns = pytest.raises(FoldingError, match=sentence), pytest.warns(UserWarning, match=sentence)
    with raises if on_mismatch == "raise" else warns:
        fit(tmp_path, module, folding, callbacks=[noting])
    assert equal(module.state_dict(), noting.state)
    assert not list(tmp_path.iterdir())


def test_a_training_step_that_fails_leaves_the_module_whole(tmp_path: Path, randomised: Randomised) -> None:
    class Troubled(Kept):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 6 and batch_idx == 1:
                raise RuntimeError("trouble")
            return loss

    module, folding, noting = randomised(Troubled()), BatchNormFolding(reestimate_batches=2), Noting()
    with pytest.raises(RuntimeError, match="trouble"):
        fit(tmp_path, module, folding, callbacks=[noting])
    assert equal(module.state_dict(), noting.state)
    assert all(each.training for each in module.modules())
    assert folding.report is None
    assert not list(tmp_path.iterdir())


class OneShot(IterableDataset[Any]):
    """Gives its batches once."""

    def __init__(self) -> None:
        self.rest = iter(list(loader()))

    def __iter__(self) -> Iterator[Any]:
        return self.rest


def test_training_data_that_is_used_up_is_said_in_a_sentence(tmp_path: Path, randomised: Randomised) -> None:
    module, noting = randomised(Kept()), Noting()
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[BatchNormFolding(reestimate_batches=2), noting])
    with pytest.raises(FoldingError, match="There is no training batch left to re-estimate"):
        trainer.fit(module, DataLoader(OneShot(), batch_size=None), loader())
    assert equal(module.state_dict(), noting.state)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "reestimate_batches: expected a number of batches from 0 on, got -1"),
        (2.0, TypeError, "reestimate_batches: expected an int, got 2.0"),
        (True, TypeError, "reestimate_batches: expected an int, got True"),
        (None, TypeError, "reestimate_batches: expected an int, got None"),
    ],
)
def test_a_number_of_batches_that_is_none_is_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchNormFolding(reestimate_batches=value)


# A checkpoint that exists ---------------------------------------------------------------------------------------------


class Data(LightningDataModule):
    """Knows its training data only after `setup`."""

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.data = examples()

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=8)

    def val_dataloader(self) -> Any:
        return loader()


class Adversarial(Kept):
    """Optimises by hand, which in a Trainer that only validates nobody has prepared."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        assert self.trainer.training
        assert self.training
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("kind", [Kept, Adversarial])
def test_a_checkpoint_is_reestimated_as_the_fit_does_it(
    kind: type[Kept], inference_mode: bool, tmp_path: Path, randomised: Randomised
) -> None:
    folding = BatchNormFolding(dirpath=str(tmp_path / "fit"), reestimate_batches=2)
    trainer, module = quiet_trainer(tmp_path, callbacks=[folding]), randomised(kind())
    trainer.fit(module, datamodule=Data())
    trainer.save_checkpoint(tmp_path / "saved.ckpt")

    again, other = BatchNormFolding(reestimate_batches=2), kind()
    idle = quiet_trainer(tmp_path, callbacks=[again], inference_mode=inference_mode)
    val_check_batch = idle.val_check_batch
    again.fold_checkpoint(idle, other, tmp_path / "saved.ckpt", Data())
    assert again.report["reestimated"] == folding.report["reestimated"]
    assert again.report["validation"] == folding.report["validation"]
    states = [torch.load(each, weights_only=True)["state_dict"] for each in tmp_path.rglob("folded.ckpt")]
    assert len(states) == 2
    assert equal(*states)
    assert equal(other.state_dict(), module.state_dict())
    assert idle.optimizers == []
    assert idle.val_check_batch == val_check_batch
    assert idle.global_step == 0


# Several processes ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_the_ranks_of_a_distributed_fit_pool_what_they_see(tmp_path: Path, randomised: Randomised) -> None:
    class Asserting(BatchNormFolding):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = statistics(pl_module)
            super().on_train_end(trainer, pl_module)
            assert equal(statistics(pl_module), before)
            # Two ranks take every other example; one of them measures a batch of eight and one of two.
            inputs = examples().tensors[0].double()
            first = self.folded_module.first
            torch.testing.assert_close(first.running_mean, inputs.mean(0), rtol=0, atol=1e-12)
            torch.testing.assert_close(first.running_var, inputs.var(0, correction=1), rtol=0, atol=1e-12)
            assert self.report["reestimated"]["batches"] == 2

    trainer = quiet_trainer(
        tmp_path, callbacks=[Asserting(reestimate_batches=9)], strategy="ddp_fork", devices=2, precision="64-true"
    )
    trainer.fit(randomised(Kept()), loader(), loader())
    assert (tmp_path / "folded.ckpt").is_file()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_a_module_that_is_replaced_is_the_same_on_every_rank(tmp_path: Path, randomised: Randomised) -> None:
    class Asserting(BatchNormFolding):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_train_end(trainer, pl_module)
            inputs = examples().tensors[0]
            torch.testing.assert_close(pl_module.first.running_mean, inputs.mean(0), rtol=0, atol=1e-6)

    folding = Asserting(reestimate_batches=9, replace=True)
    trainer = quiet_trainer(tmp_path, callbacks=[folding], strategy="ddp_fork", devices=2, max_epochs=1)
    trainer.fit(randomised(Kept()), loader(), loader())
