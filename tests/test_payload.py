"""Nothing runs that should not: a checkpoint is data, whichever command or function reads it."""

from __future__ import annotations

import os
import pickle
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from lit_bnfold import BatchNormFolding, BatchNormMLP, FoldingError, NamesDataModule, load_folded
from lit_bnfold.checkpoint import MANIFEST, read_unfolded
from lit_bnfold.cli import main
from lit_bnfold.reading import read_checkpoint
from trainers import quiet_trainer

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.makedirs, (str(self.path), 0o777, True)


@pytest.fixture
def trace(tmp_path: Path) -> Iterator[Path]:
    """What a payload leaves if it runs; it must not be there in the end."""
    path = tmp_path / "it ran"
    yield path
    assert not path.exists()


def planted(saved: Any, trace: Path, place: str, folded: bool) -> Path:
    """A checkpoint with a payload in it."""
    path = trace.parent / "bad.ckpt"
    checkpoint = torch.load(saved.folded if folded else saved.last, weights_only=True)
    payload = Payload(trace)
    if place == "a pickle that is no zip":
        path.write_bytes(pickle.dumps(checkpoint | {"more": payload}))
        return path
    if place == "the top":
        checkpoint = {"more": payload, **checkpoint}
    elif place == "the manifest":
        checkpoint[MANIFEST] = checkpoint.get(MANIFEST, {}) | {"kept": [payload]}
    elif place == "callbacks":
        checkpoint["callbacks"] = {"BatchNormFolding": payload}
    else:
        checkpoint[place] = checkpoint[place] | {"more": payload}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=place != "hyper_parameters")
    return path


PLACES = ["a pickle that is no zip", "the top", "the manifest", "callbacks", "hyper_parameters", "state_dict"]


def test_the_payload_runs_where_anything_is_unpickled(saved: Any, tmp_path: Path) -> None:
    """Without this the tests below would prove nothing."""
    for place in PLACES[1:]:
        torch.load(planted(saved, tmp_path / place, place, folded=True), weights_only=False)
        assert (tmp_path / place).is_dir()


def fold_checkpoint(path: Path) -> None:
    trainer = quiet_trainer(path.parent)
    module, data = (
        BatchNormMLP(vocab_size=7, n_embd=3, n_hidden=(6, 6)),
        NamesDataModule(str(path.parent / "words.txt")),
    )
    BatchNormFolding().fold_checkpoint(trainer, module, path, data)


COMMANDS = ("fit", "validate", "test", "predict", "fit from the last")
READERS: dict[str, Callable[[Path], Any]] = {
    "load_folded": lambda path: load_folded(BatchNormMLP, path),
    "load_folded of any class": lambda path: load_folded(LightningModule, path),
    "load_from_checkpoint": lambda path: BatchNormMLP.load_from_checkpoint(path),
    "read_checkpoint": read_checkpoint,
    "read_unfolded": read_unfolded,
    "fold_checkpoint": fold_checkpoint,
    "fold": lambda path: main(["fold", "--ckpt_path", str(path), *QUIET]),
    **{
        command: lambda path, command=command: main([command, "--ckpt_path", str(path), *QUIET])  # type: ignore[misc]
        for command in COMMANDS[:4]
    },
    "fit from the last": lambda path: main(
        ["fit", "--ckpt_path", "last", "--trainer.default_root_dir", str(path.parent), *QUIET]
    ),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_payload_in_a_checkpoint_does_not_run(reader: str, saved: Any, trace: Path) -> None:
    """Where loading has nothing to refuse, it says so: every one of these files is refused as a whole."""
    (trace.parent / "words.txt").write_bytes(saved.words.read_bytes())
    # The commands share one way of reading, and take a while.
    for place in PLACES if reader not in COMMANDS else ("the top", "hyper_parameters"):
        path = planted(saved, trace, place, folded=place == "the top")
        (path.parent / "checkpoints").mkdir(exist_ok=True)
        shutil.copy(path, path.parent / "checkpoints" / "last.ckpt")
        with pytest.raises((ValueError, SystemExit), match=r"(bad|last)\.ckpt"):
            READERS[reader](path)
        assert not trace.exists()


def test_what_it_takes_to_trust_a_checkpoint_is_said(saved: Any, trace: Path) -> None:
    path = planted(saved, trace, "the top", folded=True)
    with pytest.raises(
        ValueError, match=r"bad\.ckpt holds more .* any code .*`--weights_only false`, .*weights_only=Fal"
    ):
        load_folded(BatchNormMLP, path)
    # And it takes effect.
    load_folded(BatchNormMLP, path, weights_only=False)
    trace.rmdir()


@pytest.mark.parametrize("ordinary", [BatchNormMLP.load_from_checkpoint, partial(load_folded, BatchNormMLP)])
def test_an_environment_that_asks_torch_for_old_ways_does_not_count(
    ordinary: Any, saved: Any, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        ordinary(planted(saved, trace, "the top", folded=True))


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_from_the_net_is_read_as_data(
    command: str, saved: Any, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = planted(saved, trace, "the top", folded=False)
    asked: list[Any] = []

    def download(url: str, **kwargs: Any) -> Any:
        asked.append(kwargs["weights_only"])
        return torch.load(path, weights_only=kwargs["weights_only"])

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    there = SimpleNamespace(exists=lambda path: True)
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.get_filesystem", lambda path: there)
    arguments = ["--data.words", str(saved.words), "--trainer.default_root_dir", str(trace.parent)]
    with pytest.raises(SystemExit, match="holds more than tensors and plain values"):
        main([command, "--ckpt_path", "http://nowhere.invalid/bad.ckpt", *arguments, *QUIET])
    assert asked == [True]


# Sharded checkpoints --------------------------------------------------------------------------------------------------


def shards(saved: Any, root: Path, trace: Path | None, place: str) -> Path:
    """A checkpoint as ModelParallel writes it, with a payload somewhere."""
    checkpoint = torch.load(saved.last, weights_only=True)
    state = checkpoint.pop("state_dict")
    for key in ("optimizer_states", "lr_schedulers", "callbacks"):
        checkpoint.pop(key)
    if place == "weights" and trace:
        state["net.more"] = Payload(trace)
    optimizer = {"more": Payload(trace) if place == "optimizer" and trace else 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_shards({"state_dict": state, "optimizer_0": optimizer}, checkpoint_id=root)
    torch.save(checkpoint | ({"more": Payload(trace)} if place == "rest" and trace else {}), root / "meta.pt")
    if place == "index" and trace:
        index = pickle.loads((root / ".metadata").read_bytes())
        index.storage_meta = Payload(trace)
        (root / ".metadata").write_bytes(pickle.dumps(index))
    return root


@pytest.mark.parametrize("place", ["nowhere", "weights", "rest", "index", "optimizer"])
def test_a_payload_in_a_sharded_checkpoint_does_not_run(place: str, saved: Any, tmp_path: Path, trace: Path) -> None:
    path = shards(saved, tmp_path / "sharded.ckpt", trace, place)
    fold = ["fold", "--ckpt_path", str(path), "--output", str(tmp_path), *QUIET]
    if place in ("nowhere", "optimizer"):
        # What the optimizer holds is not read.
        main(fold)
        state = torch.load(tmp_path / "folded.ckpt", weights_only=True)["state_dict"]
        expected = torch.load(saved.folded, weights_only=True)["state_dict"]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
    else:
        with pytest.raises(SystemExit, match=r"sharded\.ckpt holds more than tensors and plain values"):
            main(fold)
        assert not (tmp_path / "folded.ckpt").exists()


# Training that goes on ------------------------------------------------------------------------------------------------


class Kept:
    """An object that a module keeps among its hyperparameters."""


class WithObject(BatchNormMLP):
    def __init__(self, more: Any = None) -> None:
        super().__init__(vocab_size=7, n_embd=3, n_hidden=(6,))
        self.hparams["more"] = more


def resumed(saved: Any, tmp_path: Path, path: Path) -> BatchNormFolding:
    """A training that folds its best weights, and goes on from a checkpoint that names the best one."""
    folding = BatchNormFolding(weights="best", dirpath=str(tmp_path / "out"))
    # Nothing is better than what was there.
    saving = ModelCheckpoint(tmp_path / "own", monitor="val/loss", save_top_k=0)
    module = BatchNormMLP(vocab_size=7, n_embd=3, n_hidden=(6, 6))
    trainer = quiet_trainer(tmp_path, max_steps=12, callbacks=[folding, saving], enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, NamesDataModule(str(saved.words), batch_size=8), ckpt_path=path)
    return folding


def names_as_best(saved: Any, tmp_path: Path, best: Path) -> Path:
    """A checkpoint that holds nothing but data, and the path of another one."""
    checkpoint = torch.load(saved.last, weights_only=True)
    saving = ModelCheckpoint(tmp_path / "own", monitor="val/loss", save_top_k=0)
    checkpoint["callbacks"] = {saving.state_key: saving.state_dict() | {"best_model_path": str(best)}}
    torch.save(checkpoint, tmp_path / "resume.ckpt")
    return tmp_path / "resume.ckpt"


def test_a_best_checkpoint_that_another_checkpoint_names_does_not_run(saved: Any, tmp_path: Path, trace: Path) -> None:
    best = planted(saved, trace, "the top", folded=False)
    with pytest.raises(FoldingError, match=r"bad\.ckpt, was there before this training.*--weights_only false"):
        resumed(saved, tmp_path, names_as_best(saved, tmp_path, best))
    # One that holds data alone is as good as ever.
    folding = resumed(saved, tmp_path, names_as_best(saved, tmp_path, saved.last))
    assert folding.report is not None
    assert folding.report["weights"] == f"best: {saved.last}"


def test_a_best_checkpoint_of_this_training_may_hold_any_object(saved: Any, tmp_path: Path) -> None:
    folding = BatchNormFolding(weights="best", dirpath=str(tmp_path))
    saving = ModelCheckpoint(tmp_path, monitor="val/loss")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[folding, saving], enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(WithObject(Kept()), NamesDataModule(str(saved.words), batch_size=8))
    assert folding.report is not None
    assert folding.report["weights"] == f"best: {saving.best_model_path}"
    with pytest.raises(pickle.UnpicklingError):
        torch.load(saving.best_model_path, weights_only=True)


# What hyperparameters describe ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["load_folded", "load_from_checkpoint", "fold", "test"])
def test_what_hyperparameters_describe_does_not_run(reader: str, saved: Any, trace: Path) -> None:
    (trace.parent / "words.txt").write_bytes(saved.words.read_bytes())
    described = {"class_path": "os.mkdir", "init_args": {"path": str(trace)}}
    for instantiator in ("lightning.pytorch.cli.instantiate_module", "os.mkdir", None):
        for name in ("n_hidden", "lr", "more") if reader.startswith("load") else ("n_hidden",):
            checkpoint = torch.load(saved.last if reader in ("fold", "test") else saved.folded, weights_only=True)
            checkpoint["hyper_parameters"] |= {name: described}
            if instantiator is not None:
                checkpoint["hyper_parameters"]["_instantiator"] = instantiator
            torch.save(checkpoint, trace.parent / "bad.ckpt")
            with suppress(ValueError, TypeError, SystemExit):
                READERS[reader](trace.parent / "bad.ckpt")
            assert not trace.exists()


def test_importing_the_command_line_unpickles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: loaded.append(args))
    monkeypatch.setattr(sys, "argv", ["lit-bnfold", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module("lit_bnfold", run_name="__main__")
    assert loaded == []
