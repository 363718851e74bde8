"""The configuration for other people's projects, run by a LightningCLI that knows nothing of this package."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_bnfold import BatchNormFolding, HistogramMonitor, UpdateRatioMonitor, load_folded

pytestmark = [
    # Few batches are what a small test wants.
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]

CONFIG = Path(__file__).parents[1] / "configs" / "your_project.yaml"


class Waves(LightningDataModule):
    """Short pieces of noise and how loud they are."""

    def __init__(self, seed: int, examples: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        waves = torch.randn(examples, 2, 16, generator=generator)
        self.examples = TensorDataset(waves, waves.square().mean((1, 2)))

    def train_dataloader(self) -> Any:
        return DataLoader(self.examples, batch_size=8)

    val_dataloader = train_dataloader


class Loudness(LightningModule):
    """A small convolutional network."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.features = nn.Sequential(nn.Conv1d(2, channels, 3, bias=False), nn.BatchNorm1d(channels), nn.Tanh())
        self.head = nn.Linear(channels, 1)

    def forward(self, waves: Tensor) -> Tensor:
        return self.head(self.features(waves).mean(-1)).squeeze(-1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_the_configuration_for_your_project_folds_the_best_weights_of_a_project_that_is_not_ours(
    tmp_path: Path,
) -> None:
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    here = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu", *quiet]
    short = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--data.seed=1"]
    cli = LightningCLI(
        Loudness, Waves, args=["fit", "--config", str(CONFIG), *here, *short], save_config_kwargs={"overwrite": True}
    )
    directory = Path(str(cli.trainer.log_dir))
    report = json.loads((directory / "folding.json").read_text())
    assert [(fold["batchnorm"], fold["layers"]) for fold in report["folds"]] == [("features.1", ["features.0"])]
    assert report["weights"] == f"best: {next(directory.rglob('checkpoints/*.ckpt'))}"
    assert report["mismatch"] is None
    assert not any(
        isinstance(each, nn.BatchNorm1d) for each in load_folded(Loudness, directory / "folded.ckpt").modules()
    )
    assert (directory / "folding.html").is_file()
    assert "saturated/features.2" in EventAccumulator(str(directory)).Reload().Tags()["scalars"]


@pytest.mark.parametrize("monitor", [BatchNormFolding, HistogramMonitor, UpdateRatioMonitor])
def test_the_configuration_for_your_project_shows_what_there_is(monitor: type[Any]) -> None:
    callbacks = yaml.safe_load(CONFIG.read_text())["trainer"]["callbacks"]
    (arguments,) = [each["init_args"] for each in callbacks if each["class_path"] == f"lit_bnfold.{monitor.__name__}"]
    assert arguments.keys() == inspect.signature(monitor).parameters.keys()
