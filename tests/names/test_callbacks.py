"""What a training shows of the network, and what is printed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from lit_bnfold.names.callbacks import CharacterEmbedding, SampledNames
from lit_bnfold.names.data import NamesDataModule
from lit_bnfold.names.model import BatchNormMLP
from lit_bnfold.names.sampling import BLOCK, Sampling, sample_names

WORDS = "\n".join(f"{a}{b}{c}" for a in "abc" for b in " \u2003d" for c in "aeé" * 3)

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")


@pytest.fixture
def data(tmp_path: Path) -> NamesDataModule:
    path = tmp_path / "words.txt"
    path.write_text(WORDS, encoding="utf-8")
    return NamesDataModule(str(path), batch_size=16)


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, "logger": False, **options})


def fit(data: NamesDataModule, *callbacks: Callback, **options: Any) -> Trainer:
    seed_everything(1, verbose=False)
    steps = {"max_steps": 9, "val_check_interval": 3, "check_val_every_n_epoch": None}
    fitting = trainer(*callbacks, **{**steps, **options})
    fitting.fit(BatchNormMLP(data.vocab_size, n_hidden=8), data)
    return fitting


def texts(directory: Path) -> dict[int, str]:
    """The text at each step, as TensorBoard's own reader finds it."""
    events = EventAccumulator(str(directory)).Reload()
    assert events.Tags()["tensors"] == ["names/text_summary"]
    tensors = events.Tensors("names/text_summary")
    return {event.step: event.tensor_proto.string_val[0].decode() for event in tensors}


class Names(Callback):
    """Remembers what should be shown."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.at: dict[int, list[str]] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        if not trainer.sanity_checking:
            self.at[trainer.global_step] = sample_names(pl_module.net, data.stoi, data.block_size, self.sampling)


# In TensorBoard


def test_each_validation_shows_the_names_of_its_step(tmp_path: Path, data: NamesDataModule) -> None:
    sampling = Sampling(number=200, seed=5, min_length=2, max_length=3)
    names = Names(sampling)
    fit(data, SampledNames(sampling), names, logger=TensorBoardLogger(tmp_path, "", ""))
    written = texts(tmp_path)
    assert list(written) == list(names.at) == [3, 6, 9]
    for step, text in written.items():
        marked = [f"    {'*' if name in data.training_words else ' '} {name}" for name in names.at[step]]
        assert text.split("\n") == [*marked, "    ", "    * is one of the training words"]
    assert names.at[3] != names.at[9]
    assert "    * " in written[9].split("    * is one")[0]


def test_training_is_the_same_with_the_callbacks_and_without(tmp_path: Path, data: NamesDataModule) -> None:
    with_, without = (
        fit(data, *callbacks, logger=TensorBoardLogger(tmp_path / str(len(callbacks)), "", ""))
        for callbacks in ((SampledNames(), CharacterEmbedding()), ())
    )
    state, expected = (each.lightning_module.state_dict() for each in (with_, without))
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert with_.callback_metrics == without.callback_metrics
    assert len(texts(tmp_path / "2")) == 3


def test_the_projector_shows_the_embedding_at_the_end_under_its_letters(tmp_path: Path, data: NamesDataModule) -> None:
    from google.protobuf import text_format

    fitted = fit(data, CharacterEmbedding(), logger=TensorBoardLogger(tmp_path, "", ""))
    config = text_format.Parse((tmp_path / "projector_config.pbtxt").read_text(), ProjectorConfig())
    [embedding] = config.embeddings
    assert embedding.tensor_name == "characters:00009"
    letters = (tmp_path / embedding.metadata_path).read_text(encoding="utf-8").split("\n")
    assert letters == [".", "U+0020", "a", "b", "c", "d", "e", "é", "U+2003", ""]  # The last line ends, too.
    rows = [list(map(float, row.split("\t"))) for row in (tmp_path / embedding.tensor_path).read_text().splitlines()]
    torch.testing.assert_close(torch.tensor(rows), fitted.lightning_module.net.embedding.weight.detach())


def test_a_network_in_bfloat16_is_shown_too(tmp_path: Path, data: NamesDataModule) -> None:
    callbacks = SampledNames(Sampling(number=2)), CharacterEmbedding()
    fit(data, *callbacks, logger=TensorBoardLogger(tmp_path, "", ""), precision="bf16-true", max_steps=3)
    assert list(texts(tmp_path)) == [3]
    assert (tmp_path / "00003" / "characters" / "tensors.tsv").stat().st_size > 100


def test_a_training_that_went_wrong_is_told_of_and_goes_on(tmp_path: Path, data: NamesDataModule) -> None:
    class Spoil(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.nn.init.constant_(pl_module.net.linear1.weight, float("nan"))

    fitted = fit(data, Spoil(), SampledNames(), logger=TensorBoardLogger(tmp_path, "", ""), max_steps=3)
    assert fitted.global_step == 3
    assert texts(tmp_path)[3].startswith("    Expected finite logits")


@pytest.mark.parametrize("which", ["csv", "none", "fast_dev_run"])
def test_without_tensorboard_nothing_is_written(
    which: str, tmp_path: Path, data: NamesDataModule, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    logger = {"csv": CSVLogger(logs, "", ""), "none": False, "fast_dev_run": TensorBoardLogger(logs, "", "")}[which]
    fit(data, SampledNames(), CharacterEmbedding(), logger=logger, fast_dev_run=which == "fast_dev_run")
    written = {path.name for path in logs.rglob("*") if path.is_file()}
    assert written == ({"metrics.csv", "hparams.yaml"} if which == "csv" else set())
    assert "training words" not in capsys.readouterr().out


def test_only_a_fit_shows_names_in_tensorboard(tmp_path: Path, data: NamesDataModule) -> None:
    validating = trainer(SampledNames(), CharacterEmbedding(), logger=TensorBoardLogger(tmp_path, "", ""))
    validating.validate(BatchNormMLP(data.vocab_size, n_hidden=8), data, verbose=False)
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"] == []


def test_a_prefix_that_cannot_be_is_refused_before_training_begins(data: NamesDataModule) -> None:
    names = Names(Sampling())
    with pytest.raises(ValueError, match=r"^prefix: 'x' has \['x'\]"):
        fit(data, SampledNames(Sampling(prefix="x")), names)
    assert names.at == {}


class Other(LightningModule):
    """A module of somebody else, which has nothing to show."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("the training has begun")

    validation_step = training_step

    def configure_optimizers(self) -> None:
        return None


@pytest.mark.parametrize("callback", [SampledNames, CharacterEmbedding])
def test_another_module_is_refused_before_training_begins(
    callback: type[Callback], tmp_path: Path, data: NamesDataModule
) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    with pytest.raises(
        TypeError, match=r"^Expected a BatchNormMLP, which makes up names, got Other; pass one, or leave"
    ):
        trainer(callback(), logger=logger, max_steps=1).fit(Other(), data)


def test_other_data_is_refused_before_training_begins(tmp_path: Path, data: NamesDataModule) -> None:
    fitting = trainer(CharacterEmbedding(), logger=TensorBoardLogger(tmp_path, "", ""), max_steps=1)
    with pytest.raises(TypeError, match=r"^Expected a NamesDataModule, which knows the characters, got None; pass one"):
        fitting.fit(BatchNormMLP(data.vocab_size, n_hidden=8), data.train_dataloader(), data.val_dataloader())
    assert fitting.global_step == 0


# On the terminal


def predict(data: NamesDataModule, sampling: Sampling) -> list[str]:
    batches = trainer(SampledNames(sampling)).predict(BatchNormMLP(data.vocab_size, n_hidden=8), data)
    return [name for batch in batches for name in batch]


def test_a_pipe_gets_the_names_and_nothing_else(data: NamesDataModule, capsys: pytest.CaptureFixture[str]) -> None:
    names = predict(data, Sampling(number=BLOCK + 3, prefix="a", max_length=3))
    assert len(names) == BLOCK + 3
    assert capsys.readouterr().out == "\n".join(names) + "\n"


def test_a_terminal_gets_marks_and_what_they_mean(
    data: NamesDataModule, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    names = predict(data, Sampling(number=BLOCK + 3, prefix="a", max_length=3))
    marked = [("* " if name in data.training_words else "  ") + name for name in names]
    known = sum(name in data.training_words for name in names)
    assert 0 < known < len(names)
    legend = f"* is one of the training words ({known} of {len(names)})"
    assert capsys.readouterr().out.split("\n") == [*marked, "", legend, ""]


def test_names_need_the_data_that_knows_the_characters(data: NamesDataModule) -> None:
    with pytest.raises(TypeError, match=r"^Expected a NamesDataModule, which knows the characters, got None"):
        trainer(logger=False).predict(BatchNormMLP(), data.predict_dataloader())
