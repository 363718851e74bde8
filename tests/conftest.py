"""Fixtures of every test: one thread, one seed, and BatchNorms whose statistics are worth folding."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_bnfold import BatchNormFolding, BatchNormMLP, NamesDataModule


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Gives every BatchNorm of a model random statistics; a fresh one is nearly the identity and proves nothing."""
    return randomise_batchnorms


def randomise_batchnorms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


@dataclass
class Saved:
    """What a short training left: its last checkpoint, the folded one, and the words it was trained on."""

    last: Path
    folded: Path
    words: Path


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The checkpoints of a small network that was trained for some steps on a few words; to be read only."""
    root = tmp_path_factory.mktemp("saved")
    words = root / "words.txt"
    words.write_text("\n".join(["anna", "bob", "eve", "abba", "beb", "nan", "ana", "bo", "ebba", "one"] * 3))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(
            accelerator="cpu",
            max_steps=9,
            enable_model_summary=False,
            default_root_dir=root,
            callbacks=[BatchNormFolding()],
            **silent,
        )
        data = NamesDataModule(str(words), batch_size=8)
        trainer.fit(BatchNormMLP(vocab_size=data.vocab_size, n_embd=3, n_hidden=(6, 6)), data)
        trainer.save_checkpoint(root / "last.ckpt")
    return Saved(root / "last.ckpt", root / "folded.ckpt", words)


class Lines:
    """Traces a process, counts the lines of some files that run, and sends the process a signal at one of them."""

    def __init__(self, files: Collection[str], last: float, signum: int) -> None:
        self.files, self.seen, self.last, self.signum = files, 0, last, signum

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.last:
                sys.settrace(None)
                os.kill(os.getpid(), self.signum)
        return self


@pytest.fixture(scope="session")
def lines() -> type[Lines]:
    """What stops a process at any line."""
    return Lines
