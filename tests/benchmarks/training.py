"""What a step of the notebook's recipe costs under ``lit-bnfold fit``, against the notebook's own loop.

Run it with ``python tests/benchmarks/training.py``; it prints its table with hardware, versions and the number of
rounds, and where the Trainer's time goes.

Both run inside one fit, with everything that ``lit-bnfold fit`` sets by default: TensorBoard, progress bar, both
checkpoints and all monitors. Every 50 steps the training batches pause, and the opponents take 25 steps each: the
notebook's loop on plain tensors, with the statistics that it keeps of each step and without them, and the modules,
optimizer and schedule of the package in a plain loop. All are measured in processor time, on one thread, and compared
within their round; only such ratios are worth comparing between machines. Validations are left out on both sides.
"""

from __future__ import annotations

import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout

import torch
from measuring import Row, show  # the module beside this one
from torch import Tensor
from torch.nn import functional as F

import lit_bnfold.cli as cli
from lit_bnfold import BatchNormMLP, NamesDataModule
from lit_bnfold.names.data import Batch, RandomBatches

ROUNDS, STEPS, OPPONENT_STEPS = 240, 50, 25

OURS = "lit-bnfold fit"
NOTEBOOK = "the notebook's loop"
STATISTICS = "the notebook's loop with its statistics"
PLAIN = "our modules, optimizer and schedule in a plain loop"

# The most that a step of ours may be of theirs.
TARGETS = {NOTEBOOK: 1.15, STATISTICS: 0.80}

WHERE = """\
Where the Trainer's time goes, as parts of a step of the notebook's loop without statistics, each measured in the same
way with and without: the batch's way through the transfer hooks and a look at the signature of training_step, 0.13 to
0.15; calling the schedule, 0.06; entering and leaving the profiler that profiles nothing, 26 times, 0.04; both
checkpoint callbacks, 0.03; monitors and progress bar, at most 0.01 each. The rest is the loop itself: 6 hooks over all
callbacks, 13 of the module and 4 of the strategy, progress counters, and the results of the step.
`training_step(self, dataloader_iter)` leaves out the first of these, and comes to 1.17 to 1.21 and 0.87 to 0.90. It
is not taken: Lightning calls it experimental and says so on every fit, the module has to move its batches itself, and
nobody else can hand it batches, so that statistics could not be re-estimated. SGD with foreach or fused, and a garbage
collector that is off or frozen, change nothing."""


class Linear:
    """The notebook's layer, without autograd's help for modules."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        self.weight, self.bias = torch.randn(fan_in, fan_out) / fan_in**0.5, torch.randn(fan_out)
        self.parameters = [self.weight, self.bias]

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class BatchNorm:
    """The notebook's BatchNorm, in training."""

    def __init__(self, width: int, gain: float = 1.0) -> None:
        self.gain, self.bias = torch.full((width,), gain), torch.zeros(width)
        self.running_mean, self.running_var = torch.zeros(width), torch.ones(width)
        self.parameters = [self.gain, self.bias]

    def __call__(self, x: Tensor) -> Tensor:
        mean, var = x.mean(0, keepdim=True), x.var(0, keepdim=True)
        out = self.gain * ((x - mean) / torch.sqrt(var + 1e-5)) + self.bias
        with torch.no_grad():
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean
            self.running_var = 0.9 * self.running_var + 0.1 * var
        return out


class Notebook:
    """The notebook's loop: plain tensors, a learning rate, and lists of what it keeps of each step."""

    def __init__(self, contexts: Tensor, targets: Tensor) -> None:
        self.contexts, self.targets = contexts, targets  # (N, 3), (N,)
        self.embedding = torch.randn(27, 10)
        self.layers = [Linear(30, 100), BatchNorm(100), Linear(100, 100), BatchNorm(100), Linear(100, 27)]
        self.norm = BatchNorm(27, gain=0.1)
        layers = [*self.layers, self.norm]
        self.parameters = [self.embedding, *(parameter for layer in layers for parameter in layer.parameters)]
        for parameter in self.parameters:
            parameter.requires_grad = True
        self.losses: list[float] = []
        self.ratios: list[list[float]] = []

    def step(self, lr: float = 0.1) -> Tensor:
        chosen = torch.randint(0, len(self.contexts), (32,))
        x = self.embedding[self.contexts[chosen]].view(32, -1)  # (32, 3, 10) -> (32, 30)
        for layer in self.layers:
            x = layer(x)
            if isinstance(layer, BatchNorm):
                x = torch.tanh(x)
        loss = F.cross_entropy(self.norm(x), self.targets[chosen])
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        for parameter in self.parameters:
            parameter.data += -lr * parameter.grad
        return loss

    def step_with_statistics(self, lr: float = 0.1) -> None:
        loss = self.step(lr)
        self.losses.append(loss.log10().item())
        with torch.no_grad():
            self.ratios.append([((lr * p.grad).std() / p.data.std()).log10().item() for p in self.parameters])


class PlainLoop:
    """The package's modules, optimizer and schedule, without a Trainer."""

    def __init__(self, data: NamesDataModule) -> None:
        self.model = BatchNormMLP()
        configured = self.model.configure_optimizers()
        self.optimizer, self.scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
        self.batches = self._endless(data)

    @staticmethod
    def _endless(data: NamesDataModule) -> Iterator[Batch]:
        while True:
            yield from RandomBatches(data.splits["train"], data.batch_size, data.seed)

    def step(self) -> None:
        contexts, targets = next(self.batches)
        loss = F.cross_entropy(self.model(contexts), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()


class Turns:
    """Training batches that pause now and then while the opponents take steps, and note the time of each side."""

    def __init__(self, batches: RandomBatches, opponents: dict[str, Callable[[], object]]) -> None:
        self.batches, self.opponents = batches, opponents
        self.times: dict[str, list[float]] = {name: [] for name in (OURS, *opponents)}  # us a step, of each round
        self.drawn, self.start = 0, 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            if self.drawn % STEPS == 0:
                self.pause()
            self.drawn += 1
            yield batch

    def pause(self) -> None:
        if self.drawn:
            self.times[OURS].append(1e6 * (time.process_time() - self.start) / STEPS)
            # The rounds differ in their order, so that nobody always follows the same one.
            names = list(self.opponents)
            first = len(self.times[OURS]) % len(names)
            for name in names[first:] + names[:first]:
                self.times[name].append(self.turn(self.opponents[name]))
        self.start = time.process_time()

    @staticmethod
    def turn(step: Callable[[], object]) -> float:
        start = time.process_time()
        for _ in range(OPPONENT_STEPS):
            step()
        return 1e6 * (time.process_time() - start) / OPPONENT_STEPS


class PausingData(NamesDataModule):
    turns: Turns

    def train_dataloader(self) -> Turns:  # type: ignore[override]
        notebook, plain = Notebook(*self.splits["train"][:]), PlainLoop(self)
        opponents = {NOTEBOOK: notebook.step, STATISTICS: notebook.step_with_statistics, PLAIN: plain.step}
        PausingData.turns = Turns(super().train_dataloader(), opponents)
        return PausingData.turns


def measure() -> dict[str, list[float]]:
    """Train in turns; returns the microseconds a step of each side, one number for each round."""
    # The first round warms up.
    steps = str((ROUNDS + 1) * STEPS + 1)
    cli.NamesDataModule = PausingData  # type: ignore[misc]
    said = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as root, redirect_stdout(said), redirect_stderr(said):
            options = ["--trainer.max_steps", steps, "--trainer.val_check_interval", steps]
            cli.main(["fit", *options, "--trainer.default_root_dir", root])
    finally:
        cli.NamesDataModule = NamesDataModule  # type: ignore[misc]
    return {name: times[1:] for name, times in PausingData.turns.times.items()}


def rows() -> Iterator[Row]:
    """Processor time of a step of each side; the ratio is that of ours to it, the median over the rounds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times = measure()
    ours = times.pop(OURS)
    yield Row(OURS, measured=f"{statistics.median(ours):.0f} us a step, {ROUNDS} rounds")
    for name, theirs in times.items():
        ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        target = f"<= {TARGETS[name]:.2f}" if name in TARGETS else ""
        # The mean has its part of what comes on some steps only: saved checkpoints, histograms, what is written.
        mean, step = sum(ours) / sum(theirs), statistics.median(theirs)
        yield Row(name, target, f"{step:.0f} us; ours {low:.2f} to {high:.2f}, by the mean {mean:.2f}", middle)


def main() -> None:
    show(rows())
    print(WHERE)


if __name__ == "__main__":
    main()
