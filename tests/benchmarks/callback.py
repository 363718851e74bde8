"""What ``on_train_end`` of BatchNormFolding costs, against one ordinary validation, and the memory that it takes.

Run it with ``python tests/benchmarks/callback.py``; it prints its table with hardware, versions and the number of runs.

An ordinary validation is the one that ``Trainer.fit`` itself runs before training ends, with its loggers and callbacks:
the whole of Lightning's validation loop. A pair is that validation and the ``on_train_end`` of the same fit: two
validations, the plan, the fold, the comparison of layers and of outputs, both files and the table. Both are measured in
processor time, on one thread. The first fit of a process pays for what is loaded at first use, and stands by itself.

Memory is that of tensors: a dispatch mode sees every tensor that an operation makes, and counts its storage for as long
as it lives. What torch.save writes through and what no operation makes, such as Python's objects, is not counted.
"""

from __future__ import annotations

import gc
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import networks
import torch
from lightning.pytorch import LightningModule, Trainer
from measuring import Row, median_ratio, medians, show
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset

import lit_bnfold.cli as cli
from lit_bnfold import BatchNormFolding


class ResNet18(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = networks.resnet18()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, classes = batch
        return F.cross_entropy(self.net(images), classes)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def images(batches: int) -> DataLoader[Any]:
    count = 32 * batches
    return DataLoader(TensorDataset(torch.randn(count, 3, 64, 64), torch.randint(1000, (count,))), batch_size=32)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the living tensors that operations have made, and remembers the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage.data_ptr() for storage in storages_in((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for storage in storages_in(output):
            # What is a view of something given was made before, and perhaps before anybody counted.
            if storage.data_ptr() not in given:
                self._living[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output

    @property
    def now(self) -> int:
        self._living = {address: known for address, known in self._living.items() if not known[0].expired()}
        return sum(size for _, size in self._living.values())


def storages_in(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Measured(BatchNormFolding):
    """Measures itself and the last validation before it: processor seconds, or bytes of tensors."""

    counts_memory = False
    validation, train_end, left, layers = 0.0, 0.0, 0.0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop.val_loop
        own = loop.run

        def run() -> Any:
            loop.run = own
            with self._measured() as self.spent:
                output = own()
            Measured.validation = self.spent[0]
            return output

        loop.run = run

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self._measured() as self.spent:
            super().on_train_end(trainer, pl_module)
        Measured.train_end, Measured.left = self.spent
        modules = dict(pl_module.named_modules())
        layers = {modules[name] for fold in self.plan.folds for name in fold.layers}
        Measured.layers = sum(p.nbytes for layer in layers for p in layer.parameters(recurse=False))

    @contextmanager
    def _measured(self) -> Iterator[list[float]]:
        spent: list[float] = []
        if not self.counts_memory:
            start = time.process_time()
            yield spent
            spent += [time.process_time() - start, 0.0]
            return
        with LiveTensors() as living:
            yield spent
        gc.collect()
        spent += [living.peak, living.now]


def fit_names(root: str) -> None:
    options = ["--trainer.max_steps", "200", "--trainer.val_check_interval", "200", "--trainer.default_root_dir", root]
    cli.main(["fit", *options, "--trainer.enable_model_summary", "false"])


def fit_resnet(root: str) -> None:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=root, log_every_n_steps=1, callbacks=[Measured()], **quiet
    )
    trainer.fit(ResNet18(), images(2), images(20))


def one(fit: Callable[[str], None]) -> tuple[float, float]:
    """A fit; what was measured of its last validation and of its end."""
    said = io.StringIO()
    gc.collect()
    with tempfile.TemporaryDirectory() as root, redirect_stdout(said), redirect_stderr(said):
        fit(root)
    return Measured.validation, Measured.train_end


def costs(name: str, fit: Callable[[str], None], count: int) -> Iterator[Row]:
    first, *pairs = ((end, validation) for validation, end in (one(fit) for _ in range(count + 1)))
    train_end, validation = medians(pairs)
    measured = f"{1e3 * train_end:.0f} ms; one ordinary validation {1e3 * validation:.0f} ms; {count} pairs"
    yield Row(f"on_train_end of BatchNormFolding, {name}", "<= 2.5", measured, median_ratio(pairs))
    yield Row("  the first pair in the process", "", "", first[0] / first[1])
    Measured.counts_memory = True
    validation, train_end = one(fit)
    Measured.counts_memory = False
    most = f"{train_end / 2**20:.2f} MiB; in a validation {validation / 2**20:.2f} MiB"
    yield Row("  most memory of tensors", "", f"{most}; the folded layers {Measured.layers / 2**20:.2f} MiB")
    yield Row("  left afterwards", "", f"{Measured.left / 2**20:.2f} MiB")


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cli.BatchNormFolding = Measured  # type: ignore[misc]
    yield from costs("names, 22,655 examples", fit_names, 11)
    yield from costs("ResNet-18, 20 x 32 images", fit_resnet, 5)


if __name__ == "__main__":
    show(rows())
