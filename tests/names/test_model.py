import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn import functional as F

from lit_bnfold.folding import fold_batchnorm
from lit_bnfold.names.data import NamesDataModule
from lit_bnfold.names.model import BatchNormMLP

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", **{**quiet, **options})


class Batches:
    """A loader of given batches; Lightning takes a list for a list of loaders."""

    def __init__(self, *batches: tuple[Tensor, Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def random_batches(count: int) -> Batches:
    return Batches(*zip(torch.randint(27, (count, 32, 3)), torch.randint(27, (count, 32)), strict=True))


# The network


def test_the_network_is_the_notebooks() -> None:
    model = BatchNormMLP()
    names = " ".join(name for name, _ in model.net.named_children())
    assert names == "embedding linear1 norm1 tanh1 linear2 norm2 tanh2 linear3 norm3"
    assert sum(parameter.numel() for parameter in model.parameters()) == 16_651
    assert len(list(model.parameters())) == 1 + 3 * 4
    assert {(norm.eps, norm.momentum) for norm in model.net if isinstance(norm, nn.BatchNorm1d)} == {(1e-5, 0.1)}
    assert [norm.weight.unique().item() for norm in model.net if isinstance(norm, nn.BatchNorm1d)] == [
        1,
        1,
        pytest.approx(0.1),
    ]


def test_the_initial_weights_are_normal_with_the_notebooks_spread() -> None:
    model = BatchNormMLP(vocab_size=500, block_size=4, n_embd=50, n_hidden=(400, 300))
    assert model.net.embedding.weight.std().item() == pytest.approx(1, rel=0.02)
    for linear in (module for module in model.net if isinstance(module, nn.Linear)):
        assert (linear.weight * linear.in_features**0.5).std().item() == pytest.approx(1, rel=0.02)
        # Four standard deviations of a normal variable's fourth moment; a uniform one of the same spread has 1.8.
        assert (linear.weight**4).mean().item() * linear.in_features**2 == pytest.approx(3, abs=0.15)
        assert linear.bias.std().item() == pytest.approx(1, rel=0.15)
        assert linear.bias.abs().max() > 2


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_the_loss_before_training_is_that_of_a_guess(seed: int) -> None:
    torch.manual_seed(seed)
    model, data = BatchNormMLP(), NamesDataModule()
    contexts, targets = data.splits["train"][:]
    with torch.no_grad():
        assert F.cross_entropy(model(contexts), targets).item() == pytest.approx(3.309, abs=0.015)
        assert F.cross_entropy(model.eval()(contexts), targets).item() == pytest.approx(3.309, abs=0.04)


@pytest.mark.parametrize(("n_hidden", "widths"), [(5, [5]), ((), []), ([7, 6, 5], [7, 6, 5])])
def test_there_may_be_any_number_of_hidden_layers(n_hidden: Any, widths: list[int]) -> None:
    model = BatchNormMLP(vocab_size=4, block_size=2, n_embd=3, n_hidden=n_hidden)
    linears = [(linear.in_features, linear.out_features) for linear in model.net if isinstance(linear, nn.Linear)]
    assert linears == list(zip([6, *widths], [*widths, 4], strict=True))
    assert isinstance(model.net[-1], nn.BatchNorm1d)
    assert model(torch.zeros(9, 2, dtype=torch.int64)).shape == (9, 4)


def test_the_example_input_runs_in_training_mode_too() -> None:
    model = BatchNormMLP(block_size=5)
    assert model.example_input_array.shape == (2, 5)
    assert model.train()(model.example_input_array).shape == (2, 27)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected ints of at least 1, got [0]; pass positive whole numbers."),
        ({"block_size": -3}, "block_size: expected ints of at least 1, got [-3]; pass positive whole numbers."),
        ({"n_embd": 2.5}, "n_embd: expected ints of at least 1, got [2.5]; pass positive whole numbers."),
        ({"n_hidden": (100, 0)}, "n_hidden: expected ints of at least 1, got [100, 0]; pass positive whole numbers."),
        ({"milestones": [0]}, "milestones: expected ints of at least 1, got [0]; pass positive whole numbers."),
        ({"lr": 0}, "lr: expected a number above 0, got 0; pass a positive number."),
        ({"gamma": float("nan")}, "gamma: expected a number above 0, got nan; pass a positive number."),
        ({"cycle_steps": 0}, "cycle_steps: expected ints of at least 1, got [0]; pass positive whole numbers."),
        ({"weight_decay": -0.1}, "weight_decay: expected a number of at least 0, got -0.1; pass 0 for none."),
        ({"optimizer": "Adam"}, "optimizer: expected 'sgd' or 'adamw', got 'Adam'; pass one of them."),
    ],
)
def test_a_hyperparameter_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BatchNormMLP(**arguments)


# Training


class NotebookNetwork:
    """The notebook's arithmetic on plain tensors, with the buffers that torch's BatchNorm keeps."""

    def __init__(self, model: BatchNormMLP) -> None:
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in model.net.named_parameters()}
        self.mean = {number: torch.zeros(width).double() for number, width in ((1, 100), (2, 100), (3, 27))}
        self.var = {number: torch.ones_like(mean) for number, mean in self.mean.items()}

    def logits(self, contexts: Tensor, training: bool) -> Tensor:
        p = self.parameters
        h = p["embedding.weight"][contexts].view(len(contexts), -1)
        for n in (1, 2, 3):
            h = h @ p[f"linear{n}.weight"].T + p[f"linear{n}.bias"]
            mean, var = self.mean[n], self.var[n]
            if training:
                mean, var = h.mean(0), ((h - h.mean(0)) ** 2).mean(0)
                unbiased = var.detach() * len(h) / (len(h) - 1)
                self.mean[n] = 0.9 * self.mean[n] + 0.1 * mean.detach()
                self.var[n] = 0.9 * self.var[n] + 0.1 * unbiased
            h = p[f"norm{n}.weight"] * (h - mean) / torch.sqrt(var + 1e-5) + p[f"norm{n}.bias"]
            h = h if n == 3 else torch.tanh(h)
        return h

    def step(self, contexts: Tensor, targets: Tensor, lr: float) -> None:
        logits = self.logits(contexts, training=True)
        probabilities = logits.exp() / logits.exp().sum(1, keepdim=True)
        loss = -probabilities[torch.arange(len(targets)), targets].log().mean()
        for parameter, gradient in zip(
            self.parameters.values(), torch.autograd.grad(loss, list(self.parameters.values())), strict=True
        ):
            parameter.data -= lr * gradient


def test_training_is_the_notebooks_arithmetic_before_and_after_folding() -> None:
    model, batches = BatchNormMLP(milestones=[4]).double(), random_batches(7)
    notebook = NotebookNetwork(model)
    for step, batch in enumerate(batches):
        notebook.step(*batch, lr=0.1 if step < 4 else 0.01)
    trainer(precision="64-true", max_steps=7).fit(model, batches)

    contexts = torch.cat([contexts for contexts, _ in batches])
    folded = fold_batchnorm(model, (contexts,)).eval()
    assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())
    with torch.no_grad():
        expected = notebook.logits(contexts, training=False)
        for network in (model.eval(), folded):
            logits = network(contexts)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
            assert logits.dtype == torch.float64


class MemoryLogger(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, list[str]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # type: ignore[override]
        self.written.append((step, sorted(set(metrics) - {"epoch"})))


def test_the_training_loss_is_logged_on_the_steps_that_are_written_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    log: Callable[..., None] = LightningModule.log
    monkeypatch.setattr(
        LightningModule,
        "log",
        lambda self, name, *args, **kwargs: calls.append(name) or log(self, name, *args, **kwargs),
    )
    logger = MemoryLogger()
    trainer(logger=logger, log_every_n_steps=4, max_epochs=2).fit(BatchNormMLP(), random_batches(7))
    assert logger.written == [(step, ["train/log10_loss", "train/loss"]) for step in (3, 7, 11)]
    assert calls == ["train/loss", "train/log10_loss"] * 3


def test_the_common_logarithm_of_the_loss_is_logged_beside_it() -> None:
    fitted = trainer(logger=MemoryLogger(), log_every_n_steps=2, max_steps=2)
    fitted.fit(BatchNormMLP(), random_batches(2))
    loss = fitted.logged_metrics["train/loss"].item()
    assert fitted.logged_metrics["train/log10_loss"].item() == pytest.approx(math.log10(loss), rel=1e-6)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log..` but it is disabled")
def test_a_trainer_that_logs_nothing_can_train() -> None:
    barebones = Trainer(accelerator="cpu", barebones=True, max_epochs=1)
    barebones.fit(BatchNormMLP(), random_batches(3))
    assert barebones.global_step == 3


def learning_rates(model: BatchNormMLP, **options: Any) -> list[float]:
    """The learning rate of each step of a fit over epochs of four batches."""
    rates: list[float] = []
    model.on_before_optimizer_step = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    trainer(**options).fit(model, random_batches(4))
    return rates


def test_the_learning_rate_falls_at_the_milestones_counted_in_optimizer_steps() -> None:
    model = BatchNormMLP(lr=1.0, milestones=[2, 5], gamma=0.5)
    assert learning_rates(model, max_epochs=2) == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]


def test_the_learning_rate_rises_and_falls_once_in_straight_lines() -> None:
    model = BatchNormMLP(lr=1.0, milestones=[2], cycle_steps=20, optimizer="adamw")
    fall = [1 - step / 18 for step in range(1, 19)]
    assert learning_rates(model, max_epochs=5) == pytest.approx([0.04, 1, *fall], abs=1e-5)


def test_a_training_may_stop_within_its_cycle_and_not_go_on_after_it() -> None:
    assert learning_rates(BatchNormMLP(lr=1.0, cycle_steps=20), max_steps=2) == pytest.approx([0.04, 1])
    message = "cycle_steps: expected at least the 21 steps of the training, got 20; pass as many, or set the Trainer's"
    with pytest.raises(ValueError, match=f"^{re.escape(message)} max_steps to 20"):
        learning_rates(BatchNormMLP(cycle_steps=20), max_steps=21)


@pytest.mark.parametrize(("optimizer", "expected"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_optimizer_takes_its_hyperparameters(optimizer: Any, expected: type[torch.optim.Optimizer]) -> None:
    fitted = trainer(max_steps=1)
    fitted.fit(BatchNormMLP(lr=0.5, optimizer=optimizer, weight_decay=0.07), random_batches(1))
    [used] = fitted.optimizers
    assert type(used) is expected
    assert (used.defaults["lr"], used.defaults["weight_decay"]) == (0.5, 0.07)
    assert used.defaults.get("betas") == ((0.9, 0.99) if optimizer == "adamw" else None)


@pytest.mark.filterwarnings("ignore:`BatchNormMLP.configure_optimizers` will be overridden")
# Lightning's own calls of jsonargparse.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_line_can_replace_optimizer_and_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lit-bnfold"])
    args = ["--model.n_hidden=[8, 4]", "--optimizer=AdamW", "--optimizer.lr=0.03", "--lr_scheduler=StepLR"]
    args += ["--lr_scheduler.step_size=5"]
    cli = LightningCLI(BatchNormMLP, NamesDataModule, seed_everything_default=0, run=False, args=args)
    [optimizer], [scheduler] = cli.model.configure_optimizers()
    assert (type(optimizer), optimizer.defaults["lr"]) == (torch.optim.AdamW, 0.03)
    assert (type(scheduler), scheduler.step_size) == (torch.optim.lr_scheduler.StepLR, 5)


# Evaluation


@pytest.mark.parametrize("letters", ["ab", "abcdefghij"])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_the_metrics_are_those_of_the_whole_split(
    tmp_path: Path, randomised: Callable[[nn.Module], nn.Module], letters: str, stage: str
) -> None:
    generator = torch.Generator().manual_seed(5)
    draws = torch.randint(len(letters), (400, 5), generator=generator).tolist()
    (tmp_path / "words.txt").write_text("\n".join("".join(letters[i] for i in draw) for draw in draws))
    # 40 words of 5 letters are 240 examples, in batches of 34 and 35.
    data = NamesDataModule(str(tmp_path / "words.txt"), eval_batch_size=37)
    model = BatchNormMLP(data.vocab_size)
    randomised(model)
    evaluate = {"val": trainer().validate, "test": trainer().test}[stage]
    [metrics] = evaluate(model, data, verbose=False)

    contexts, targets = data.splits[stage][:]
    logits = model.eval()(contexts).double()
    loss = -logits.log_softmax(1)[torch.arange(240), targets].mean()
    likelier = (logits > logits[torch.arange(240), targets][:, None]).sum(1)
    assert metrics == pytest.approx(
        {
            f"{stage}/loss": loss.item(),
            f"{stage}/perplexity": loss.exp().item(),
            f"{stage}/accuracy": (likelier < 1).double().mean().item(),
            f"{stage}/top5": (likelier < 5).double().mean().item(),
        },
        rel=1e-6,
    )


def test_a_loss_that_is_not_a_number_shows() -> None:
    model = BatchNormMLP()
    nn.init.constant_(model.net.embedding.weight[5], float("nan"))
    batches = Batches((torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)), *random_batches(2))
    [metrics] = trainer().validate(model, batches, verbose=False)
    assert metrics["val/loss"] != metrics["val/loss"]
    assert metrics["val/perplexity"] != metrics["val/perplexity"]


# Checkpoints


def test_a_checkpoint_holds_plain_hyperparameters_and_rebuilds_the_model(tmp_path: Path) -> None:
    model = BatchNormMLP(n_embd=4, n_hidden=(9, 8), milestones=(5,))
    saving = trainer(max_steps=2)
    saving.fit(model, random_batches(2))
    saving.save_checkpoint(tmp_path / "model.ckpt")
    assert dict(model.hparams) == {
        "vocab_size": 27, "block_size": 3, "n_embd": 4, "n_hidden": [9, 8], "lr": 0.1, "milestones": [5], "gamma": 0.1,
        "optimizer": "sgd", "weight_decay": 0.0, "cycle_steps": None,
    }  # fmt: skip
    loaded = BatchNormMLP.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    [(contexts, _)] = random_batches(1)
    assert torch.equal(loaded.eval()(contexts), model.eval()(contexts))
