"""Projects like other people's: the folds of each are worked out by hand, and it trains as it does without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lit_bnfold import BatchNormFolding, load_folded

pytestmark = [
    # The lengths of packed batches say nothing of their number.
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size` from an ambiguous collection"),
]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def classes(count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(sum(shape)))


# A ResNet that classifies images, with two validation sets ------------------------------------------------------------


class BasicBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        projects = stride > 1 or i != o
        self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        hidden = F.relu(self.bn1(self.conv1(x)), inplace=True)
        hidden = self.bn2(self.conv2(hidden))
        hidden += identity
        return F.relu(hidden, inplace=True)


class ResNetClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = nn.Sequential(BasicBlock(4, 4, 1)), nn.Sequential(BasicBlock(4, 8, 2))
        self.fc = nn.Linear(8, 3)
        scores = MetricCollection([MulticlassAccuracy(3), MulticlassF1Score(3)])
        self.scores = nn.ModuleList([scores.clone(prefix=f"{name}/") for name in ("clean", "noisy")])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1], label_smoothing=0.1)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        self.scores[dataloader_idx].update(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        for scores in self.scores:
            self.log_dict(scores.compute())
            scores.reset()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.OneCycleLR(
                    optimizer, 0.01, total_steps=int(self.trainer.estimated_stepping_batches)
                ),
                "interval": "step",
            },
        }


class Images(LightningDataModule):
    def loader(self, shift: float, **kwargs: Any) -> Any:
        return DataLoader(TensorDataset(noise(10, 3, 8, 8) + shift, classes(3, 10)), batch_size=4, **kwargs)

    def train_dataloader(self) -> Any:
        return self.loader(0.0, shuffle=True)

    def val_dataloader(self) -> Any:
        return [self.loader(0.0), self.loader(0.5)]


# A GAN that steps its two optimizers itself ---------------------------------------------------------------------------


class GAN(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(4, 8 * 2 * 2),
            nn.Unflatten(1, (8, 2, 2)),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 4, 2, 1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 1, 4, 2, 1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, 6, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(6, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(32, 1),
        )
        self.register_buffer("z", noise(6, 4))

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    @staticmethod
    def against(logits: Tensor, target: float) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, (of_generator, of_discriminator) = batch[0], self.optimizers()
        z = torch.randn(len(real), 4, device=self.device)
        self.toggle_optimizer(of_generator)
        loss = self.against(self.discriminator(self(z)), 1.0)
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.toggle_optimizer(of_discriminator)
        fake = self(z).detach()
        other = (self.against(self.discriminator(real), 1.0) + self.against(self.discriminator(fake), 0.0)) / 2
        of_discriminator.zero_grad()
        self.manual_backward(other)
        of_discriminator.step()
        self.untoggle_optimizer(of_discriminator)
        self.log_dict({"g_loss": loss, "d_loss": other})

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        z = torch.randn(len(batch[0]), 4, device=self.device)
        fake = self.discriminator(self(z))
        self.log_dict({"val_real": self.discriminator(batch[0]).sigmoid().mean(), "val_fake": fake.sigmoid().mean()})

    def on_validation_epoch_end(self) -> None:
        self.log("val_contrast", self(self.z).std())

    def configure_optimizers(self) -> Any:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999)) for network in networks], []


class Digits(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(noise(10, 1, 8, 8).tanh()), batch_size=4, shuffle=True, drop_last=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(noise(6, 1, 8, 8).tanh()), batch_size=4)


# A U-Net that segments images given as dicts --------------------------------------------------------------------------


def double_conv(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)),
        *(nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True)),
    )


class UNet(nn.Module):
    """Ronneberger et al. (2015), with a BatchNorm on what comes in from above and from the side."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down, self.pool = double_conv(1, 4), double_conv(4, 8), nn.MaxPool2d(2)
        self.up, self.joined = nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(8)
        self.conv, self.outc = double_conv(8, 4), nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        side = self.inc(image)
        below = self.up(self.down(self.pool(side)))
        return {"logits": self.outc(self.conv(self.joined(torch.cat([side, below], dim=1))))}


class Segmenter(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = UNet()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(image=batch["image"])["logits"]

    def shared_step(self, batch: Any, stage: str) -> dict[str, Tensor]:
        logits = self(batch)
        loss = F.cross_entropy(logits, batch["mask"])
        chosen, mask = logits.argmax(1), batch["mask"]
        self.log(f"{stage}_loss", loss, batch_size=len(mask))
        return {"loss": loss, "both": (chosen & mask).sum(), "either": (chosen | mask).sum()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.shared_step(batch, "train")

    def on_validation_epoch_start(self) -> None:
        self.counts: list[dict[str, Tensor]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counts.append(self.shared_step(batch, "valid"))

    def on_validation_epoch_end(self) -> None:
        both, either = (sum(count[key] for count in self.counts) for key in ("both", "either"))
        self.log("valid_iou", both / either)
        self.counts.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters(), lr=1e-3, momentum=0.9)


class Scans(Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.images, self.masks = noise(count, 1, 8, 8), classes(2, count, 8, 8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return {"image": self.images[index], "mask": self.masks[index], "name": f"scan {index}"}


class Scanned(LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(Scans(7), batch_size=3, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(Scans(5), batch_size=3)


# A regressor of tables that begins with a BatchNorm -------------------------------------------------------------------


class TabularRegressor(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.bn_cont = nn.BatchNorm1d(4)
        self.layers = nn.Sequential(
            *(nn.Linear(7, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 1)),
        )

    def forward(self, category: Tensor, numbers: Tensor) -> Tensor:
        return self.layers(torch.cat([self.embedding(category), self.bn_cont(numbers)], dim=1)).squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        category, numbers, target = batch
        return F.huber_loss(self(category, numbers), target)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        category, numbers, target = batch
        return F.mse_loss(self(category, numbers), target)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "epoch_loss"}}

    def on_train_epoch_end(self) -> None:
        self.log("epoch_loss", 1.0)


class Tables(LightningDataModule):
    def rows(self, count: int) -> TensorDataset:
        return TensorDataset(classes(6, count), noise(count, 4) * 5.0 + 2.0, noise(count))

    def train_dataloader(self) -> Any:
        return DataLoader(self.rows(20), batch_size=8, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.rows(11), batch_size=8)


# A tagger of sequences of different lengths ---------------------------------------------------------------------------


class Tagger(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.project, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
        self.rnn = nn.GRU(6, 4, batch_first=True, bidirectional=True)
        self.hidden, self.hidden_norm, self.tag = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.loss = MeanMetric()

    def forward(self, words: Any) -> Tensor:
        # On the words of a packed batch alone, so that no padding counts.
        tokens = F.gelu(self.norm(self.project(self.embed(words.data))))  # (words, 6)
        states, _ = pad_packed_sequence(self.rnn(words._replace(data=tokens))[0], batch_first=True)
        hidden = self.hidden(states)  # (B, T, 6)
        return self.tag(self.hidden_norm(hidden.transpose(1, 2)).transpose(1, 2).relu())

    def losses(self, batch: Any) -> Tensor:
        words, tags = batch
        return F.cross_entropy(self(words).transpose(1, 2), tags, ignore_index=-1, reduction="none")[tags >= 0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss.update(self.losses(batch))
        self.log("val/loss", self.loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True)


class Sentences(LightningDataModule):
    @staticmethod
    def collate(sentences: list[Any]) -> Any:
        sentences = sorted(sentences, key=lambda pair: len(pair[0]), reverse=True)
        words, tags = zip(*sentences, strict=True)
        return pack_sequence(words), pad_sequence(tags, batch_first=True, padding_value=-1)

    def loader(self, count: int) -> Any:
        lengths = [2 + index % 4 for index in range(count)]
        sentences = [(classes(9, length), classes(3, length)) for length in lengths]
        return DataLoader(sentences, batch_size=3, collate_fn=self.collate)

    def train_dataloader(self) -> Any:
        return self.loader(8)

    def val_dataloader(self) -> Any:
        return self.loader(7)


# A module without a forward, and one that logs when a validation epoch ends -------------------------------------------


class Contrastive(LightningModule):
    """Two encoders that never meet in a ``forward``, the second of which follows the first by an average."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = self.encoder(), self.encoder().requires_grad_(False)
        self.target.load_state_dict(self.online.state_dict())
        self.predictor = nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))

    @staticmethod
    def encoder() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3), nn.BatchNorm1d(3))

    def compare(self, views: Any) -> Tensor:
        one, other = views
        with torch.no_grad():
            expected = self.target(other)
        return -F.cosine_similarity(self.predictor(self.online(one)), expected).mean()

    def training_step(self, views: Any, batch_idx: int) -> Tensor:
        return self.compare(views)

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for own, other in zip(self.target.parameters(), self.online.parameters(), strict=True):
                own.lerp_(other, 0.1)

    def validation_step(self, views: Any, batch_idx: int) -> None:
        self.log("similarity", self.compare(views))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([*self.online.parameters(), *self.predictor.parameters()], lr=0.05)


class Views(LightningDataModule):
    def loader(self, count: int) -> Any:
        return DataLoader(TensorDataset(noise(count, 4), noise(count, 4) + 0.1), batch_size=4)

    def train_dataloader(self) -> Any:
        return self.loader(12)

    def val_dataloader(self) -> Any:
        return self.loader(9)


class Collecting(LightningModule):
    """Keeps the outputs of its validation steps, as since Lightning 2 everybody has to, and logs them at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU())
        self.head = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 3))
        self.validation_step_outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x.unsqueeze(1)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), classes(3, len(batch[0])))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(batch[0])
        self.validation_step_outputs.append(logits)
        return logits

    def on_validation_epoch_end(self) -> None:
        logits = torch.cat(self.validation_step_outputs)
        self.log("entropy", torch.distributions.Categorical(logits=logits).entropy().mean())
        self.log("largest", logits.abs().max())
        self.validation_step_outputs.clear()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adagrad(self.parameters(), lr=0.05)


# What each of them has to come to -------------------------------------------------------------------------------------


@dataclass
class Project:
    """A module with its data, and what folding it has to come to.

    Attributes:
        module: Makes the module.
        data: Makes the data.
        folds: Each BatchNorm that is folded, with its layers.
        kept: Each other one, with the code of the reason.
        keys: What validation logs.
        run: What a module gives for some input, for a comparison after loading.
    """

    module: Callable[[], Any]
    data: Callable[[], LightningDataModule]
    folds: dict[str, tuple[str, ...]]
    keys: set[str]
    run: Callable[[Any], Tensor]
    kept: dict[str, str] | None = None


PROJECTS = {
    "resnet": Project(
        ResNetClassifier,
        Images,
        {
            "bn1": ("conv1",),
            "layer1.0.bn1": ("layer1.0.conv1",),
            "layer1.0.bn2": ("layer1.0.conv2",),
            "layer2.0.bn1": ("layer2.0.conv1",),
            "layer2.0.bn2": ("layer2.0.conv2",),
            "layer2.0.downsample.1": ("layer2.0.downsample.0",),
        },
        {
            *("val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"),
            *(f"{name}/Multiclass{score}" for name in ("clean", "noisy") for score in ("Accuracy", "F1Score")),
        },
        lambda module: module(noise(3, 3, 8, 8)),
    ),
    # A Linear gives its outputs four by four to the channels of the images that they become.
    "gan": Project(
        GAN,
        Digits,
        {
            "generator.2": ("generator.0",),
            "generator.5": ("generator.4",),
            "discriminator.3": ("discriminator.2",),
        },
        {"val_real", "val_fake", "val_contrast"},
        lambda module: module.discriminator(module(noise(5, 4))),
    ),
    # Half of what `joined` normalises is also read by the pool, and the convolution behind it adds zeros.
    "unet": Project(
        Segmenter,
        Scanned,
        {
            f"model.{part}.{index + 1}": (f"model.{part}.{index}",)
            for part in ("inc", "down", "conv")
            for index in (0, 3)
        },
        {"valid_loss", "valid_iou"},
        lambda module: module({"image": noise(2, 1, 8, 8)}),
        kept={"model.joined": "other-reader"},
    ),
    # The first BatchNorm stands before a Linear that also reads embeddings; the last one behind a ReLU, but before one.
    "tabular": Project(
        TabularRegressor,
        Tables,
        {"bn_cont": ("layers.0",), "layers.1": ("layers.0",), "layers.6": ("layers.8",)},
        {"loss"},
        lambda module: module(classes(6, 9), noise(9, 4)),
    ),
    "tagger": Project(
        Tagger,
        Sentences,
        {"norm": ("project",), "hidden_norm": ("hidden",)},
        {"val/loss"},
        lambda module: module(Sentences.collate([(classes(9, 4), classes(3, 4)), (classes(9, 2), classes(3, 2))])[0]),
    ),
    "no_forward": Project(
        Contrastive,
        Views,
        {
            "online.1": ("online.0",),
            "online.4": ("online.3",),
            "target.1": ("target.0",),
            "target.4": ("target.3",),
            "predictor.1": ("predictor.0",),
        },
        {"similarity"},
        lambda module: module.compare((noise(5, 4), noise(6, 4)[:5])),
    ),
    "logs_at_the_end": Project(
        Collecting,
        Views,
        {"backbone.1": ("backbone.0",), "head.1": ("head.2",)},
        {"entropy", "largest"},
        lambda module: module(noise(5, 4)),
    ),
}


def fitted(
    project: Project, tmp_path: Path, callbacks: list[Any], randomise: Callable[[nn.Module], nn.Module]
) -> Trainer:
    torch.manual_seed(1)
    module = randomise(project.module())
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
        callbacks=callbacks,
    )
    trainer.fit(module, datamodule=project.data())
    return trainer


def what_is_left(trainer: Trainer) -> dict[str, Any]:
    """All that a fit has come to, as far as two fits can be compared."""
    return {
        "module": trainer.lightning_module.state_dict(),
        "flags": [module.training for module in trainer.lightning_module.modules()],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "metrics": {key: value for key, value in trainer.callback_metrics.items() if not key.startswith("folding/")},
        "step": (trainer.global_step, trainer.current_epoch),
        "random": torch.get_rng_state(),
    }


def assert_same(one: Any, other: Any) -> None:
    """To the bit, and in the same order."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for each, its_like in zip(one, other, strict=True):
            assert_same(each, its_like)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif not callable(one):
        assert one == other


@pytest.mark.parametrize("name", PROJECTS)
def test_a_project_is_folded_as_by_hand_and_trains_as_without(
    name: str, tmp_path: Path, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    project, folding = PROJECTS[name], BatchNormFolding()
    trainer = fitted(project, tmp_path, [folding], randomised)

    with_it = what_is_left(trainer)
    assert_same(with_it, what_is_left(fitted(project, tmp_path / "without", [], randomised)))

    assert {fold.batchnorm: fold.layers for fold in folding.plan.folds} == project.folds
    assert {kept.batchnorm: kept.code for kept in folding.plan.kept} == (project.kept or {})
    original, folded = folding.report["validation"]["original"], folding.report["validation"]["folded"]
    assert original.keys() == folded.keys() == project.keys
    assert folded == pytest.approx(original, rel=1e-5, abs=1e-5)
    assert folding.report["mismatch"] is None
    assert folding.report["moved"] == []

    # Whoever loads the file has the trained module without these BatchNorms.
    module, loaded = trainer.lightning_module.eval(), load_folded(project.module, tmp_path / "folded.ckpt")
    left = [name for name, each in loaded.named_modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    assert left == list(project.kept or {})
    with torch.no_grad():
        torch.testing.assert_close(project.run(loaded), project.run(module), rtol=1e-4, atol=1e-5)
