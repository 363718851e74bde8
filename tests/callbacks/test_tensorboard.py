"""What TensorBoard is given of a folding, read back with TensorBoard's own reader."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.metadata import (
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    parse_session_start_info_plugin_data,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection

from lit_bnfold import BatchNormFolding
from lit_bnfold.callbacks.tensorboard import markdown
from lit_bnfold.folding.algebra import scale_and_shift

Randomised = Callable[[nn.Module], nn.Module]

ATTACK = "<script>alert(1)</script>|`_*[x](y)"


class Small(LightningModule):
    """A network with two BatchNorms, the second of which stays: its input is an output as well."""

    def __init__(self, width: int = 5, name: str = "norm") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(4, width)
        self.norms = nn.ModuleDict({name: nn.BatchNorm1d(width)})
        self.second = nn.Linear(width, 3)
        self.last = nn.BatchNorm1d(3)
        self.metrics = MetricCollection({"mean": MeanMetric()})

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        (norm,) = self.norms.values()
        hidden = self.second(norm(self.first(inputs)).tanh())
        return self.last(hidden), hidden

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self(batch[0])[0].square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self(batch[0])[0].square().mean()
        self.log_dict({"val/loss": loss, "val/loss+1": loss + 1})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(tmp_path: Path, module: LightningModule, logger: Any, *callbacks: Callback, **folding: Any) -> Trainer:
    data = DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=8)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[*callbacks, BatchNormFolding(**folding)],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data, data)
    return trainer


def events(*parts: str | Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(Path(*map(str, parts))), size_guidance={"histograms": 0, "tensors": 0})
    return accumulator.Reload()


@pytest.fixture
def board(tmp_path: Path, randomised: Randomised) -> tuple[Trainer, str]:
    """A fit that was folded, and the folder of its events."""
    logger = TensorBoardLogger(tmp_path, name="board", default_hp_metric=False)
    return fit(tmp_path, randomised(Small()), logger), logger.log_dir


def operations(directory: str, version: str) -> dict[str, str]:
    """The operation of each node, by its name."""
    return {node.name: node.op for node in events(directory, "folding", version).Graph().node}


def test_batchnorm_is_in_the_graph_of_the_original_and_gone_where_it_is_folded(board: tuple[Trainer, str]) -> None:
    original, folded = (operations(board[1], version) for version in ("original", "folded"))
    common = {"input": "input", "first/linear": "linear", "tanh": "tanh", "second/linear": "linear"}
    assert original == common | {"norms/norm/batch_norm": "batch_norm", "last/batch_norm": "batch_norm"}
    # The one that is left is the one that stays.
    assert folded == common | {"last/batch_norm": "batch_norm"}


def test_the_graph_has_an_edge_for_each_tensor_that_is_read(board: tuple[Trainer, str]) -> None:
    nodes = {node.name: node for node in events(board[1], "folding", "folded").Graph().node}
    assert {name: list(node.input) for name, node in nodes.items()} == {
        "input": [],
        "first/linear": ["input"],
        "tanh": ["first/linear"],
        "second/linear": ["tanh"],
        "last/batch_norm": ["second/linear"],
    }
    (shape,) = nodes["first/linear"].attr["_output_shapes"].list.shape
    assert [dim.size for dim in shape.dim] == [8, 5]


def test_every_tag_is_there_on_the_last_step_and_finite(board: tuple[Trainer, str]) -> None:
    trainer, directory = board
    read = events(directory)
    histograms = {"folding/log10_layer_error", "folding/scale/norms.norm", "folding/shift/norms.norm"}
    assert set(read.Tags()["histograms"]) == histograms
    for tag in histograms:
        (event,) = read.Histograms(tag)
        assert event.step == trainer.global_step
        assert event.histogram_value.num == (1 if tag.endswith("error") else 5)
        assert math.isfinite(event.histogram_value.sum)
    scalars = {tag for tag in read.Tags()["scalars"] if tag.startswith("folding/")}
    pairs = {f"folding/{version}/{key}" for version in ("original", "folded") for key in ("val/loss", "val/loss+1")}
    assert scalars == pairs | {f"folding/{key}" for key in ("max_abs_error", "max_rel_error", "folds", "kept")}
    for tag in scalars:
        (scalar,) = read.Scalars(tag)
        assert scalar.step == trainer.global_step
        assert math.isfinite(scalar.value)


@pytest.mark.parametrize("replace", [False, True])
def test_scale_and_shift_are_those_of_the_batchnorm_that_was_folded(
    replace: bool, tmp_path: Path, randomised: Randomised
) -> None:
    module, logger = randomised(Small()), TensorBoardLogger(tmp_path)
    norm = module.norms["norm"]
    expected: list[Tensor] = []

    class BeforeFolding(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with torch.no_grad():
                moments = (norm.running_mean.clone(), norm.running_var.clone())
                expected.extend(scale_and_shift(*moments, norm.weight, norm.bias, norm.eps))

    fit(tmp_path, module, logger, BeforeFolding(), replace=replace)
    for name, values in zip(("scale", "shift"), expected, strict=True):
        (event,) = events(logger.log_dir).Histograms(f"folding/{name}/norms.norm")
        assert event.histogram_value.sum == pytest.approx(float(values.sum()), rel=1e-5)


class FrozenBatchNorm1d(nn.Module):
    """As detection models have it: an eps that stands in the forward alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-3).rsqrt()
        return input * scale + (self.bias - self.running_mean * scale)


def test_scale_is_that_of_the_eps_which_the_run_has_shown(tmp_path: Path, randomised: Randomised) -> None:
    module, logger = randomised(Small()), TensorBoardLogger(tmp_path)
    module.norms["norm"] = norm = FrozenBatchNorm1d(5)
    norm.running_var.fill_(1e-3)
    fit(tmp_path, module, logger)
    (event,) = events(logger.log_dir).Histograms("folding/scale/norms.norm")
    expected = norm.weight * (norm.running_var + 1e-3).rsqrt()
    assert event.histogram_value.sum == pytest.approx(float(expected.sum()), rel=1e-5)


def test_both_versions_of_a_metric_share_a_chart(board: tuple[Trainer, str]) -> None:
    (event,) = events(board[1], "folding").Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    (category,) = layout.category
    assert [chart.title for chart in category.chart] == ["val/loss", "val/loss+1"]
    runs = [events(path.parent).Tags()["scalars"] for path in sorted(Path(board[1]).rglob("events*"))]
    written = [tag for tags in runs for tag in tags]
    for chart in category.chart:
        patterns = [re.compile(pattern) for pattern in chart.multiline.tag]
        matched = [[tag for tag in written if pattern.match(tag)] for pattern in patterns]
        assert matched == [[f"folding/original/{chart.title}"], [f"folding/folded/{chart.title}"]]


def test_hyperparameters_have_the_final_metrics_of_both_versions(board: tuple[Trainer, str]) -> None:
    read = events(board[1], "folding")
    data = read.PluginTagToContent("hparams")
    assert {SESSION_START_INFO_TAG, SESSION_END_INFO_TAG} <= data.keys()
    start = parse_session_start_info_plugin_data(data[SESSION_START_INFO_TAG])
    assert (start.hparams["width"].number_value, start.hparams["name"].string_value) == (5, "norm")
    for version in ("original", "folded"):
        (scalar,) = read.Scalars(f"{version}/val/loss")
        assert scalar.value == pytest.approx(float(board[0].callback_metrics[f"folding/{version}/val/loss"]))


def test_what_the_logger_wrote_of_the_hyperparameters_stays(tmp_path: Path, randomised: Randomised) -> None:
    logger = TensorBoardLogger(tmp_path, name="board")
    fit(tmp_path, randomised(Small()), logger)
    read = events(logger.log_dir)
    assert [event.value for event in read.Scalars("hp_metric")] == [-1]
    assert logger.hparams == {"width": 5, "name": "norm"}
    assert sorted(path.name for path in Path(logger.log_dir).rglob("hparams.yaml")) == ["hparams.yaml"]


# TensorBoard brings its own copies of libraries, and of what these say.
@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
def test_the_plan_is_a_text_that_shows_names_as_they_are(tmp_path: Path, randomised: Randomised) -> None:
    from tensorboard.plugin_util import markdowns_to_safe_html

    logger = TensorBoardLogger(tmp_path, name="board")
    fit(tmp_path, randomised(Small(name=ATTACK)), logger)
    (event,) = events(logger.log_dir).Tensors("folding/plan/text_summary")
    (text,) = event.tensor_proto.string_val
    assert b"<" not in text
    shown = markdowns_to_safe_html([text], lambda texts: "".join(texts))
    assert "1 of 2 BatchNorms folded." in shown
    assert "<script" not in shown
    assert "<em>" not in shown
    assert "<a " not in shown
    assert "<td>norms.&lt;script&gt;alert(1)&lt;/script&gt;|`_*[x](y)</td>" in shown
    assert shown.count("<table>") == 2


def test_a_plan_of_many_rows_is_cut() -> None:
    fold = {"batchnorm": "norm", "layers": ["a", "b"], "direction": "forward", "max_rel_error": 0.0}
    text = markdown({"folds": [fold] * 500, "kept": []})
    assert text.count("| norm | a \\+ b | forward |") == 100
    assert text.endswith("and 400 more, see `folding.html`")


class ByKeyword(Small):
    def forward(self, *, inputs: Tensor) -> Any:
        return super().forward(inputs)

    def __call__(self, inputs: Tensor) -> Any:
        return super().__call__(inputs=inputs)


class NoForward(Small):
    """Validates without a call of the module itself."""

    def __call__(self, inputs: Tensor) -> Any:
        return Small.forward(self, inputs)


@pytest.mark.parametrize(("module", "stay"), [(ByKeyword, 1), (NoForward, 2)])
def test_the_graph_shows_what_validation_does_however_it_calls_its_networks(
    module: type[Small], stay: int, tmp_path: Path, randomised: Randomised
) -> None:
    logger = TensorBoardLogger(tmp_path, name="board")
    fit(tmp_path, randomised(module()), logger)
    for version, batchnorms in (("original", 2), ("folded", stay)):
        kinds = list(operations(logger.log_dir, version).values())
        assert [kinds.count(kind) for kind in ("batch_norm", "linear", "tanh")] == [batchnorms, 2, 1]


def test_other_loggers_get_the_numbers_alone(tmp_path: Path, randomised: Randomised) -> None:
    logger = CSVLogger(tmp_path)
    fit(tmp_path, randomised(Small()), logger)
    assert not (Path(logger.log_dir) / "folding").exists()
    assert "folding/folded/val/loss" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_a_mismatch_leaves_nothing_but_the_numbers(tmp_path: Path, randomised: Randomised) -> None:
    logger = TensorBoardLogger(tmp_path, name="board")
    with pytest.warns(UserWarning, match="does not do what the original does"):
        fit(tmp_path, randomised(Small()), logger, tolerance=1e-30, on_mismatch="warn")
    assert not (Path(logger.log_dir) / "folding").exists()
