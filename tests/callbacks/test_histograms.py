from __future__ import annotations

import os
from math import isfinite
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, HistogramValue
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from lit_bnfold import HistogramMonitor, UpdateRatioMonitor
from lit_bnfold.callbacks.histograms import _sample
from lit_bnfold.callbacks.speed import SpeedMonitor

BATCHES = 25


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    count = BATCHES * 8
    return DataLoader(TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3), batch_size=8)


class Tiny(LightningModule):
    """A module whose numbers are easy to collect a second time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 50), nn.BatchNorm1d(50), nn.Tanh(), nn.Dropout(0.1), nn.Identity(), nn.Linear(50, 3)
        )
        self.mean = MeanMetric()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch  # (B, 4), (B,)
        loss = F.cross_entropy(self(inputs), targets)
        self.mean(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


MODULES = {f"net.{number}" for number in (0, 1, 2, 3, 5)}
PARAMETERS = {f"net.{number}.{kind}" for number in (0, 1, 5) for kind in ("weight", "bias")}


def fit(module: LightningModule, path: Path, *callbacks: Callback, val: Any = None, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": TensorBoardLogger(path, name=None, version=""),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 5,
        "callbacks": list(callbacks),
    }
    trainer = Trainer(**{**defaults, **options})
    trainer.fit(module, loader(), val)
    return trainer


pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def read(path: Path) -> EventAccumulator:
    return EventAccumulator(str(path), size_guidance={"histograms": 0}).Reload()


def histograms(path: Path) -> dict[str, dict[int, HistogramValue]]:
    events = read(path)
    found = {}
    for tag in events.Tags()["histograms"]:
        found[tag] = {event.step: event.histogram_value for event in events.Histograms(tag)}
        for value in found[tag].values():
            assert all(isfinite(number) for number in (value.min, value.max, value.sum, value.sum_squares))
    return found


def same(histogram: HistogramValue, tensor: Tensor) -> bool:
    """Whether a histogram is that of a tensor."""
    values = tensor.detach().double().flatten().numpy()
    counts, limits = numpy.histogram(values, bins=64)
    assert sum(histogram.bucket) == histogram.num == values.size
    assert [histogram.min, histogram.max] == pytest.approx([values.min(), values.max()], rel=1e-5)
    assert histogram.sum == pytest.approx(values.sum(), rel=1e-5, abs=1e-5)
    assert histogram.sum_squares == pytest.approx(numpy.square(values).sum(), rel=1e-5)
    # TensorBoard leaves out empty bins at both ends.
    full = [count for count in histogram.bucket if count]
    assert full == [count for count in counts if count]
    assert set(numpy.float32(histogram.bucket_limit)) <= {numpy.float32(limit) for limit in limits}
    return True


class Seeing(Callback):
    """Collects by other means what the histograms should be made of."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = self.seen[trainer.global_step] = {}
        # Only the tanh is still whole when the step is over: nothing works on it in place.
        values = batch[0]
        state = {key: value.clone() for key, value in pl_module.state_dict().items()}
        with torch.no_grad():
            for number in (0, 1, 2):
                values = pl_module.net[number](values)
                now[f"activations/net.{number}"] = values.clone()
        pl_module.load_state_dict(state)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            assert parameter.grad is not None
            self.seen[trainer.global_step][f"gradients/{name}"] = parameter.grad.clone()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        for name, parameter in pl_module.named_parameters():
            self.seen[trainer.global_step - 1][f"weights/{name}"] = parameter.detach().clone()


# What is written ------------------------------------------------------------------------------------------------------


def test_each_histogram_is_that_of_its_tensor_and_each_share_that_of_its_tanh(tmp_path: Path) -> None:
    seeing = Seeing()
    module = Tiny()
    # So that a good share of the units is saturated.
    nn.init.normal_(module.net[1].weight, std=3)
    fit(module, tmp_path, seeing, HistogramMonitor(every_n_steps=20), gradient_clip_val=0.01)
    found = histograms(tmp_path)
    tags = {f"activations/{name}" for name in MODULES}
    tags |= {f"{kind}/{name}" for kind in ("gradients", "weights") for name in PARAMETERS}
    assert found.keys() == tags
    for tag, steps in found.items():
        assert steps.keys() == {0, 9, 19}
        if tag not in ("activations/net.3", "activations/net.5"):
            assert all(same(value, seeing.seen[step][tag]) for step, value in steps.items())
    events = read(tmp_path)
    assert [tag for tag in events.Tags()["scalars"] if tag.startswith("saturated")] == ["saturated/net.2"]
    shares = {event.step: event.value for event in events.Scalars("saturated/net.2")}
    for step, share in shares.items():
        outputs = seeing.seen[step]["activations/net.2"].double().flatten().tolist()
        assert share == pytest.approx(sum(abs(output) > 0.97 for output in outputs) / len(outputs), rel=1e-6)
        assert 0.1 < share < 0.9


@pytest.mark.parametrize(
    ("every", "steps"), [(5000, {0, 9}), (1, set(range(BATCHES))), (7, {0, 6, 13, 20}), (12, {0, 9, 11, 23})]
)
def test_the_first_steps_are_chosen_at_powers_of_ten(every: int, steps: set[int], tmp_path: Path) -> None:
    fit(Tiny(), tmp_path, HistogramMonitor(every_n_steps=every))
    assert {frozenset(each) for each in histograms(tmp_path).values()} == {frozenset(steps)}


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        (["Tanh"], {"net.2"}),
        (["Linear", "_BatchNorm"], {"net.0", "net.1", "net.5"}),
        ([], set()),
        (None, MODULES),
    ],
)
def test_the_activations_are_those_of_the_chosen_classes(
    modules: list[str] | None, names: set[str], tmp_path: Path
) -> None:
    fit(Tiny(), tmp_path, HistogramMonitor(modules=modules), max_steps=1)
    assert {tag for tag in histograms(tmp_path) if tag.startswith("act")} == {f"activations/{name}" for name in names}


class Strange(nn.Module):
    """Returns whatever it is given."""

    def __init__(self, returned: Any) -> None:
        super().__init__()
        self.returned = returned

    def forward(self, inputs: Tensor) -> Any:
        return self.returned


NAN, INF = float("nan"), float("inf")
OUTPUTS: dict[str, tuple[Any, dict[str, list[float]]]] = {
    "tuple": ((torch.tensor([1.0, 2.0]), [torch.tensor([3, 4])]), {"": [1, 2], "/1": [3, 4]}),
    "dict": ({"a": "text", "b": torch.tensor([5.0, 7.0])}, {"": [5, 7]}),
    "none": (None, {}),
    "text": ("text", {}),
    "number": (3.5, {}),
    "scalar": (torch.tensor(3.5), {}),
    "empty": (torch.zeros(0, 3), {}),
    "bfloat16": (torch.tensor([1.5, -2.0], dtype=torch.bfloat16), {"": [1.5, -2]}),
    "half": (torch.tensor([1.5, -2.0], dtype=torch.float16), {"": [1.5, -2]}),
    "double": (torch.tensor([1.5, -2.0], dtype=torch.float64), {"": [1.5, -2]}),
    "bool": (torch.tensor([True, False]), {"": [1, 0]}),
    "complex": (torch.tensor([1 + 2j, 3 - 4j]).conj(), {"": [1, -2, 3, 4]}),
    "not finite": (torch.tensor([NAN, 1.0, INF, 2.0, -INF]), {"": [1, 2]}),
    "nothing finite": (torch.tensor([NAN, INF]), {}),
    "equal": (torch.tensor([2.0, 2.0]), {"": [2, 2]}),
    "sparse": (torch.eye(3).to_sparse(), {}),
    "nested": (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), {}),
    "transposed": (torch.tensor([[1.0, 2.0], [3.0, 5.0]]).T, {"": [1, 2, 3, 5]}),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_any_output_is_shown_as_far_as_it_is_numbers(name: str, tmp_path: Path) -> None:
    returned, expected = OUTPUTS[name]

    class Odd(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.strange = Strange(returned)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.strange(batch[0])
            return super().training_step(batch, batch_idx)

    fit(Odd(), tmp_path, HistogramMonitor(), max_steps=1)
    found = {
        tag.removeprefix("activations/strange"): steps[0]
        for tag, steps in histograms(tmp_path).items()
        if "strange" in tag
    }
    assert found.keys() == expected.keys()
    for suffix, values in expected.items():
        assert same(found[suffix], torch.tensor(values))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_output_of_the_old_kind_is_passed_over(tmp_path: Path) -> None:
    class Odd(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.strange = Strange(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.strange(batch[0])
            return super().training_step(batch, batch_idx)

    fit(Odd(), tmp_path, HistogramMonitor(), max_steps=1)
    assert "activations/strange" not in histograms(tmp_path)


def test_the_first_of_several_calls_is_shown_before_it_is_changed_in_place(tmp_path: Path) -> None:
    class Twice(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.doubled = Strange(None)
            self.relu = nn.ReLU(inplace=True)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            for number in (-1.0, 5.0):
                self.doubled.returned = torch.tensor([number, 2.0])
                self.relu(self.doubled(batch[0]))
            return super().training_step(batch, batch_idx)

    fit(Twice(), tmp_path, HistogramMonitor(), max_steps=1)
    found = histograms(tmp_path)
    assert same(found["activations/doubled"][0], torch.tensor([-1.0, 2.0]))
    assert same(found["activations/relu"][0], torch.tensor([0.0, 2.0]))


def test_a_large_tensor_is_sampled_over_all_its_rows_and_columns() -> None:
    rows, columns = torch.meshgrid(torch.arange(1024), torch.arange(512), indexing="ij")
    for values in (rows, columns):
        sample = _sample(values)
        assert sample.shape == (65_521,)
        counts = sample.long().bincount(minlength=int(values.max()) + 1)
        mean = 65_521 / len(counts)
        assert counts.min() > 0.95 * mean - 1
        assert counts.max() < 1.05 * mean + 1


def test_two_optimizers_give_each_their_own_gradients(tmp_path: Path) -> None:
    class Adversarial(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.gradients: dict[str, Tensor] = {}

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, half in zip(self.optimizers(), (self.net[:2], self.net[2:]), strict=True):
                self.manual_backward(super().training_step(batch, batch_idx))
                if batch_idx == 0:
                    owned = {id(parameter) for parameter in half.parameters()}
                    self.gradients |= {n: p.grad.clone() for n, p in self.named_parameters() if id(p) in owned}
                optimizer.step()
                self.zero_grad()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(half.parameters(), lr=0.1) for half in (self.net[:2], self.net[2:])]

    module = Adversarial()
    fit(module, tmp_path, HistogramMonitor())
    found = histograms(tmp_path)
    assert module.gradients.keys() == PARAMETERS
    for name, gradient in module.gradients.items():
        assert same(found[f"gradients/{name}"][0], gradient)
    assert found["weights/net.0.weight"].keys() == {0, 9}


@pytest.mark.parametrize("how", ["compiled", "compiled in place", "scripted"])
@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::DeprecationWarning")
def test_compiled_modules_are_left_alone(how: str, tmp_path: Path) -> None:
    module = Tiny()
    inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    if how == "compiled":
        module.inner = torch.compile(inner, backend="eager")
    elif how == "compiled in place":
        inner.compile(backend="eager")
        module.inner = inner
    else:
        module.inner = torch.jit.script(inner)

    class Using(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert not any(len(each._forward_hooks) for each in pl_module.inner.modules() if how != "scripted")
            assert len(pl_module.net[0]._forward_hooks) == (trainer.global_step in (0, 9))

    fit(module, tmp_path, HistogramMonitor(), Using())
    assert {tag for tag in histograms(tmp_path) if tag.startswith("act")} == {f"activations/{name}" for name in MODULES}


# What must not happen -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_with_all_monitors_is_the_same_bit_by_bit(precision: Any, tmp_path: Path) -> None:
    states = []
    for monitors in ([], [UpdateRatioMonitor(1), HistogramMonitor(1), SpeedMonitor()]):
        torch.manual_seed(3)
        module = Tiny()
        options: dict[str, Any] = {"precision": precision, "log_every_n_steps": 1, "val_check_interval": 5}
        trainer = fit(module, tmp_path / str(len(monitors)), *monitors, val=loader(), **options)
        states.append((module.state_dict(), trainer.optimizers[0].state_dict()["state"], torch.get_rng_state()))
    (state, momenta, random), (other, other_momenta, other_random) = states
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    assert all(torch.equal(momenta[n]["momentum_buffer"], other_momenta[n]["momentum_buffer"]) for n in momenta)
    assert torch.equal(random, other_random)
    assert len(histograms(tmp_path / "3")["weights/net.0.weight"]) == BATCHES


class Failing(Tiny):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert len(self.net[0]._forward_hooks) == 1
        super().training_step(batch, batch_idx)
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError("trouble"), KeyboardInterrupt()])
def test_the_hooks_are_gone_after_an_exception(error: BaseException, tmp_path: Path) -> None:
    module, monitor = Failing(), HistogramMonitor()
    module.error = error
    with pytest.raises((RuntimeError, SystemExit)):
        fit(module, tmp_path, monitor)
    assert not any(len(each._forward_hooks) for each in module.modules())
    assert vars(monitor)["on_before_optimizer_step"] is None


def test_the_hooks_are_on_for_the_chosen_steps_only(tmp_path: Path) -> None:
    class Looking(Tiny):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.training:
                hooked = {len(self.net[number]._forward_hooks) for number in (0, 1, 2, 3, 5)}
                assert hooked == {int(self.global_step in (0, 9, 19))}
            else:
                assert not any(len(each._forward_hooks) for each in self.modules())
            return super().training_step(batch, batch_idx)

    fit(Looking(), tmp_path, HistogramMonitor(every_n_steps=20), val=loader(), val_check_interval=1)


def test_without_tensorboard_a_sentence_says_that_nothing_is_written(tmp_path: Path) -> None:
    monitor = HistogramMonitor()
    monitor._begin = lambda *_: pytest.fail("There is nothing to write to.")  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="HistogramMonitor writes nothing: it needs a TensorBoardLogger"):
        fit(Tiny(), tmp_path, monitor, logger=CSVLogger(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps: expected at least 1, got 0"),
        ({"every_n_steps": None}, TypeError, "every_n_steps: expected an int, got None"),
        ({"modules": "Tanh"}, TypeError, r"modules: expected a list of class names, got 'Tanh'; pass \['Tanh'\]"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        HistogramMonitor(**arguments)


def test_a_class_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of Tiny, got \['Tahn'\]; there are \['BatchNorm1d', 'Dropout', 'L.*'Tanh'"):
        fit(Tiny(), tmp_path, HistogramMonitor(modules=["Tahn"]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_of_several_ranks_the_first_writes(tmp_path: Path) -> None:
    class Asserting(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            hooked = trainer.global_rank == 0 and trainer.global_step in (0, 9)
            assert len(pl_module.net[0]._forward_hooks) == hooked

    fit(Tiny(), tmp_path, HistogramMonitor(), Asserting(), strategy="ddp_fork", devices=2)
    assert {frozenset(each) for each in histograms(tmp_path).values()} == {frozenset({0, 9})}
    assert len(list(tmp_path.rglob("events*"))) == 1
