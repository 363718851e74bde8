"""The notebook's network: a multilayer perceptron over the last few characters, with a BatchNorm after every layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_bnfold.checkpoint import FoldedLoading
from lit_bnfold.names.data import NamesDataModule
from lit_bnfold.names.sampling import sample_names


class Perplexity(MeanMetric):
    """The exponential of the mean loss."""

    def compute(self) -> Tensor:
        """Return the perplexity, a scalar."""
        return super().compute().exp()


def evaluation_metrics(vocab_size: int, prefix: str) -> MetricCollection:
    """Return the metrics of a split, which sum over its examples, so that it does not matter how they were batched.

    Args:
        vocab_size: Number of characters.
        prefix: What the names of the metrics begin with.
    """
    return MetricCollection(
        {
            # A loss that is not a number shall show: the default is to leave it out of the mean.
            "loss": MeanMetric(nan_strategy="disable"),
            "perplexity": Perplexity(nan_strategy="disable"),
            "accuracy": MulticlassAccuracy(vocab_size, average="micro", validate_args=False),
            "top5": MulticlassAccuracy(vocab_size, top_k=min(5, vocab_size), average="micro", validate_args=False),
        },
        # No two metrics share a state, so that each can be saved and restored by itself.
        compute_groups=False,
        prefix=prefix,
    )


def normal_linear(fan_in: int, fan_out: int) -> nn.Linear:
    """Return a layer with weights (fan_out, fan_in) from N(0, 1 / fan_in) and biases (fan_out,) from N(0, 1).

    Args:
        fan_in: Number of its inputs.
        fan_out: Number of its outputs.
    """
    linear = nn.Linear(fan_in, fan_out)
    nn.init.normal_(linear.weight, std=fan_in**-0.5)
    nn.init.normal_(linear.bias)
    return linear


class ContextEmbedding(nn.Embedding):
    """The embeddings of the characters of a context, one behind the other.

    It does the flattening itself: calling an ``nn.Flatten`` for it would take a thirtieth of the whole network's time
    with one example.

    Example:
        >>> ContextEmbedding(27, 10)(torch.zeros(32, 3, dtype=torch.int64)).shape
        torch.Size([32, 30])
    """

    def forward(self, contexts: Tensor) -> Tensor:
        """Return the embeddings (B, block_size * embedding_dim) of contexts (B, block_size) of indices."""
        return super().forward(contexts).flatten(1)


class BatchNormMLP(FoldedLoading, LightningModule):
    """Predicts the next character from the embeddings of the last few ones, with a BatchNorm after every linear layer.

    The defaults are the notebook's network and recipe. As there, the linear layers have biases, which do nothing in
    training, because each BatchNorm subtracts them again.

    Args:
        vocab_size: Number of characters.
        block_size: Number of characters of a context.
        n_embd: Width of a character's embedding.
        n_hidden: Widths of the hidden layers; one number is one layer.
        lr: Learning rate at the start; with `cycle_steps` the largest one.
        milestones: Optimizer steps after which the learning rate is multiplied by `gamma`.
        gamma: Factor of the learning rate at a milestone.
        optimizer: SGD, or AdamW with betas of 0.9 and 0.99, whose second one fits trainings of some thousand steps.
        weight_decay: Pull of all parameters towards zero, in torch's measure: of SGD it is a part of the gradient, of
            AdamW a factor of the learning rate.
        cycle_steps: Optimizer steps in which the learning rate rises and falls once, each in a straight line: in the
            first tenth from a 25th of `lr` to `lr`, then to nearly zero. The training ends then at the latest, and
            milestones do not count. None leaves the learning rate to the milestones.

    Raises:
        ValueError: If a hyperparameter makes no sense.

    Example:
        >>> model = BatchNormMLP()
        >>> sum(parameter.numel() for parameter in model.parameters())
        16651
        >>> model(torch.zeros(32, 3, dtype=torch.int64)).shape
        torch.Size([32, 27])
    """

    def __init__(
        self,
        vocab_size: int = 27,
        block_size: int = 3,
        n_embd: int = 10,
        n_hidden: Sequence[int] | int = (100, 100),
        lr: float = 0.1,
        milestones: Sequence[int] = (100_000,),
        gamma: float = 0.1,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        weight_decay: float = 0.0,
        cycle_steps: int | None = None,
    ) -> None:
        super().__init__()
        n_hidden = [n_hidden] if isinstance(n_hidden, int) else list(n_hidden)
        milestones = list(milestones)
        sizes = {"vocab_size": [vocab_size], "block_size": [block_size], "n_embd": [n_embd], "n_hidden": n_hidden}
        sizes |= {"milestones": milestones, "cycle_steps": [] if cycle_steps is None else [cycle_steps]}
        for name, values in sizes.items():
            if not all(isinstance(value, int) and value > 0 for value in values):
                raise ValueError(f"{name}: expected ints of at least 1, got {values}; pass positive whole numbers.")
        for name, factor in {"lr": lr, "gamma": gamma}.items():
            if not factor > 0:
                raise ValueError(f"{name}: expected a number above 0, got {factor}; pass a positive number.")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay: expected a number of at least 0, got {weight_decay}; pass 0 for none.")
        if optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer: expected 'sgd' or 'adamw', got {optimizer!r}; pass one of them.")
        self.save_hyperparameters()
        widths = [block_size * n_embd, *n_hidden, vocab_size]
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            embedding=ContextEmbedding(vocab_size, n_embd),  # from N(0, 1)
        )
        for number, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
            layers[f"linear{number}"] = normal_linear(fan_in, fan_out)
            layers[f"norm{number}"] = norm = nn.BatchNorm1d(fan_out)
            layers[f"tanh{number}"] = nn.Tanh()
        # The last layer gives the logits. They start small, so that no character is likelier than another by much.
        layers.popitem()
        nn.init.constant_(norm.weight, 0.1)
        self.net = nn.Sequential(layers)
        self.val_metrics = evaluation_metrics(vocab_size, prefix="val/")
        self.test_metrics = evaluation_metrics(vocab_size, prefix="test/")
        self.example_input_array = torch.zeros(2, block_size, dtype=torch.int64)

    def forward(self, contexts: Tensor) -> Tensor:
        """Return the logits (B, vocab_size) of the characters after contexts (B, block_size) of indices."""
        return self.net(contexts)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        contexts, targets = batch  # (B, block_size), (B,)
        loss = F.cross_entropy(self(contexts), targets)
        # A call of `log` costs about half a step, also on the steps of which nothing is written.
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (self.global_step + 1) % every == 0:
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/log10_loss", loss.detach().log10())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: Tensor, batch_idx: int) -> list[str]:
        """Return the names with the numbers of a batch (B,), as the trainer's data wants them sampled."""
        data = NamesDataModule.of(self.trainer)
        return sample_names(self.net, data.stoi, self.hparams["block_size"], data.sampling, batch)

    def _evaluate(self, batch: tuple[Tensor, Tensor], metrics: MetricCollection) -> None:
        contexts, targets = batch  # (B, block_size), (B,)
        logits = self(contexts)  # (B, vocab_size)
        # One loss per example, because torchmetrics leaves weights out of a mean whose `nan_strategy` is "disable".
        losses = F.cross_entropy(logits, targets, reduction="none")  # (B,)
        metrics.update(preds=logits, target=targets, value=losses)
        self.log_dict(metrics)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the structure of a folded checkpoint.

        Raises:
            ValueError: If the checkpoint was trained with another number of characters.
        """
        own = self.hparams["vocab_size"]
        trained = checkpoint.get("hyper_parameters", {}).get("vocab_size", own)
        if own != trained:
            raise ValueError(
                f"Expected the {trained} characters that the checkpoint was trained on, got {own}; pass the words it "
                "was trained on, as they were then."
            )
        super().on_load_checkpoint(checkpoint)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer and the schedule of its learning rate, which moves with each step.

        Raises:
            ValueError: If the training is to go on after the one cycle of the learning rate.
        """
        lr, weight_decay = self.hparams["lr"], self.hparams["weight_decay"]
        if self.hparams["optimizer"] == "sgd":
            optimizer: Optimizer = SGD(self.parameters(), lr, weight_decay=weight_decay)
        else:
            # One call for all parameters: AdamW makes a dozen small operations of each.
            optimizer = AdamW(self.parameters(), lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule(optimizer), "interval": "step"}}

    def _schedule(self, optimizer: Optimizer) -> LRScheduler:
        cycle = self.hparams["cycle_steps"]
        if cycle is None:
            return MultiStepLR(optimizer, self.hparams["milestones"], self.hparams["gamma"])
        steps = self.trainer.estimated_stepping_batches
        if steps > cycle:
            raise ValueError(
                f"cycle_steps: expected at least the {steps} steps of the training, got {cycle}; pass as many, or set "
                f"the Trainer's max_steps to {cycle}."
            )
        return OneCycleLR(
            optimizer, self.hparams["lr"], cycle, pct_start=0.1, anneal_strategy="linear", cycle_momentum=False
        )
