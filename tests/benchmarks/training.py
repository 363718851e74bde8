"""What a step of the notebook's recipe costs under ``lit-bnfold fit``, against the notebook's own loop.

Run it with ``python tests/benchmarks/training.py``; it prints its table with hardware, versions and the number of pairs.
"""

from __future__ import annotations

import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout

import torch
from torch import Tensor
from torch.nn import functional as F

import lit_bnfold.cli as cli
from lit_bnfold.names.data import Batch, Examples, NamesDataModule, RandomBatches

PAIRS, STEPS, OPPONENTS_STEPS = 100, 200, 100


class Linear:
    """A layer of the notebook: a weight and a bias."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        self.weight = torch.randn(fan_in, fan_out) / fan_in**0.5
        self.bias = torch.randn(fan_out)
        self.parameters = [self.weight, self.bias]

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class BatchNorm:
    """The notebook's BatchNorm, with its running statistics."""

    def __init__(self, width: int) -> None:
        self.gamma, self.beta = torch.ones(width), torch.zeros(width)
        self.running_mean, self.running_var = torch.zeros(width), torch.ones(width)
        self.parameters = [self.gamma, self.beta]

    def __call__(self, x: Tensor) -> Tensor:
        mean, var = x.mean(0, keepdim=True), x.var(0, keepdim=True)
        out = self.gamma * ((x - mean) / torch.sqrt(var + 1e-5)) + self.beta
        with torch.no_grad():
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean
            self.running_var = 0.9 * self.running_var + 0.1 * var
        return out


class Tanh:
    """The notebook's activation."""

    parameters: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Notebook:
    """The notebook's loop: plain tensors and lists, with or without the statistics that it kept of each step."""

    def __init__(self, examples: Examples) -> None:
        self.contexts, self.targets = examples[:]  # (N, 3), (N,)
        self.embedding = torch.randn(27, 10)
        self.layers = [
            Linear(30, 100), BatchNorm(100), Tanh(), Linear(100, 100), BatchNorm(100), Tanh(), Linear(100, 27),
            BatchNorm(27),
        ]  # fmt: skip
        self.layers[-1].gamma *= 0.1
        self.parameters = [self.embedding, *(p for layer in self.layers for p in layer.parameters)]
        for parameter in self.parameters:
            parameter.requires_grad = True
        self.losses: list[float] = []
        self.ratios: list[list[float]] = []

    def step(self, *, keeps_statistics: bool) -> None:
        chosen = torch.randint(0, len(self.contexts), (32,))
        x = self.embedding[self.contexts[chosen]].view(32, -1)
        for layer in self.layers:
            x = layer(x)
        loss = F.cross_entropy(x, self.targets[chosen])
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        lr = 0.1
        for parameter in self.parameters:
            parameter.data += -lr * parameter.grad
        if keeps_statistics:
            self.losses.append(loss.log10().item())
            with torch.no_grad():
                self.ratios.append(
                    [(lr * p.grad.std() / p.data.std()).log10().item() for p in self.parameters]
                )


class Turns(RandomBatches):
    """Training batches that pause now and then for steps of the notebook's loop, and note the time of both."""

    times: dict[str, list[float]]

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            MEETING.before_a_batch(self.examples)
            yield batch


class Meeting:
    def __init__(self) -> None:
        self.drawn = 0
        self.times: dict[str, list[float]] = {"ours": [], "nb": [], "nbS": []}

    def before_a_batch(self, examples: Examples) -> None:
        now = time.process_time()
        if self.drawn == 0:
            self.notebook = Notebook(examples)
        if self.drawn % STEPS == 0:
            if self.drawn:
                self.times["ours"].append(1e6 * (now - self.start) / STEPS)
                order = [("nb", False), ("nbS", True)]
                for name, keeps in order if self.drawn // STEPS % 2 else order[::-1]:
                    start = time.process_time()
                    for _ in range(OPPONENTS_STEPS):
                        self.notebook.step(keeps_statistics=keeps)
                    self.times[name].append(1e6 * (time.process_time() - start) / OPPONENTS_STEPS)
            self.start = time.process_time()
        self.drawn += 1

MEETING = Meeting()

class Data(NamesDataModule):
    def train_dataloader(self):
        l = super().train_dataloader()
        l.__class__ = Turns
        return l

def main(extra=()):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cli.NamesDataModule = Data
    said = io.StringIO()
    steps = (PAIRS + 1) * STEPS + 1
    with tempfile.TemporaryDirectory() as root, redirect_stdout(said), redirect_stderr(said):
        cli.main(["fit", "--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps), "--trainer.default_root_dir", root, *extra])
    t = {k: v[1:] for k, v in MEETING.times.items()}
    print({k: (round(statistics.median(v)), round(statistics.mean(v))) for k, v in t.items()})
    for o in ("nb", "nbS"):
        r = sorted(a / b for a, b in zip(t["ours"], t[o]))
        print(o, f"median {statistics.median(r):.3f} mean-ratio {sum(t['ours'])/sum(t[o]):.3f} quartiles {r[len(r)//4]:.3f} {r[3*len(r)//4]:.3f}", len(r))

if __name__ == "__main__":
    import sys
    main(sys.argv[1:])
