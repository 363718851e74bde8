"""The command line as a user types it: every configuration, every file it leaves, every way it can end."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_bnfold
import lit_bnfold.callbacks.export as exporting
from lit_bnfold import BatchNormFolding, BatchNormMLP, HistogramMonitor, NamesDataModule, UpdateRatioMonitor
from lit_bnfold.callbacks.last_checkpoint import LastCheckpoint
from lit_bnfold.cli import NamesCLI, _arguments_of_the_network, main
from lit_bnfold.names.sampling import Sampling
from lit_bnfold.parser import OneSentenceParser, first_line

pytestmark = [
    # A resumed run writes into a directory of its own, except where there is no logger.
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Five steps are fewer than the fifty between two written training losses.
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
]

# The one for other people's projects has a test of its own.
CONFIGS = sorted(
    path for path in (Path(__file__).parents[1] / "configs").glob("*.yaml") if path.name != "your_project.yaml"
)
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SHORT = ["--trainer.max_steps", "5", "--trainer.val_check_interval", "5"]
COMMAND = Path(sysconfig.get_path("scripts")) / "lit-bnfold"

REPORT_KEYS = {"folds", "kept", "validation", "output_error", "weights", "tolerance", "versions", "mismatch"}
FILES = {"folded.ckpt", "folding.html", "folding.json", "config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt"}


@dataclass
class Run:
    """What a command in this process left behind: its directory, its module and its metrics."""

    root: Path
    module: LightningModule
    metrics: dict[str, float]

    @property
    def directory(self) -> Path:
        return max((self.root / "lightning_logs").iterdir(), key=lambda path: int(path.name.split("_")[1]))

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.directory / "folding.json").read_text())
        # How fast it is comes out a little different each time.
        del report["inference"]
        return report

    def state(self, name: str = "checkpoints/last.ckpt") -> Any:
        return torch.load(self.directory / name, weights_only=True)


def command(root: Path, *args: object) -> Run:
    """Run one command in this process."""
    runs: list[Run] = []

    def after(cli: NamesCLI) -> None:
        metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
        runs.append(Run(root, cli.model, metrics))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fit", "validate", "test", "predict"):
            patch.setattr(NamesCLI, f"after_{name}", after, raising=False)
        main([*map(str, args), "--trainer.default_root_dir", str(root), *QUIET])
    return runs[0]


def fold(checkpoint: Path, output: Path, *args: object) -> None:
    """Fold a checkpoint in this process."""
    main(["fold", "--ckpt_path", str(checkpoint), "--output", str(output), *map(str, args), *QUIET])


def leaves(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Run a command that fails, and return what it says about that."""
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, args)])
    said = exit_.value.code if isinstance(exit_.value.code, str) else capsys.readouterr().err
    assert exit_.value.code not in (0, None)
    assert "Traceback" not in said
    return said


def equal(one: Any, other: Any) -> bool:
    """Whether two state dicts are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


# Every configuration --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=CONFIGS, ids=[path.stem for path in CONFIGS])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fit of five steps with one of the configurations."""
    torch.set_num_threads(1)
    return command(tmp_path_factory.mktemp(request.param.stem), "fit", "--config", request.param, *SHORT)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fit of the small network."""
    return command(tmp_path_factory.mktemp("smoke"), "fit", "--config", CONFIGS[0].parent / "smoke.yaml", *SHORT)


def test_there_are_configurations() -> None:
    assert {path.stem for path in CONFIGS} == {"best", "fast", "notebook", "quick", "smoke"}


def test_a_fit_leaves_whole_files(trained: Run) -> None:
    files = {path.relative_to(trained.directory).as_posix() for path in trained.directory.rglob("*") if path.is_file()}
    assert files >= FILES
    assert not [name for name in files if name.endswith(".part")]
    assert trained.state()["global_step"] == 5


def test_the_report_has_what_the_readme_promises(trained: Run) -> None:
    report = trained.report
    assert report.keys() >= REPORT_KEYS
    norms = [name for name, module in trained.module.named_modules() if isinstance(module, torch.nn.BatchNorm1d)]
    assert [fold["batchnorm"] for fold in report["folds"]] == norms
    assert len(norms) == len(trained.module.hparams["n_hidden"]) + 1
    assert all(fold["max_rel_error"] < 1e-5 and "max_abs_error" in fold for fold in report["folds"])
    assert report["kept"] == []
    assert report["mismatch"] is None
    assert report["weights"] == "last"
    assert set(report["output_error"]) == {"max_abs", "max_rel"}
    assert set(report["versions"]) >= {"lit_bnfold", "torch", "lightning"}
    assert set(report["validation"]["original"]) == {"val/loss", "val/perplexity", "val/accuracy", "val/top5"}
    assert report["validation"]["folded"] == pytest.approx(report["validation"]["original"], rel=1e-5)
    assert report["validation"]["original"]["val/loss"] == pytest.approx(trained.metrics["val/loss"], abs=1e-6)


def test_the_numbers_are_in_the_event_file_at_the_last_step(trained: Run) -> None:
    events = EventAccumulator(str(trained.directory)).Reload()
    keys = {f"folding/{version}/{key}" for version, values in trained.report["validation"].items() for key in values}
    keys |= {"folding/max_abs_error", "folding/max_rel_error", "folding/folds", "folding/kept"}
    assert keys == {key for key in events.Tags()["scalars"] if key.startswith("folding/")}
    assert keys <= trained.metrics.keys()
    assert {(event.step, len(events.Scalars(key))) for key in keys for event in events.Scalars(key)} == {(5, 1)}


def test_the_folded_checkpoint_tests_as_the_original_does(trained: Run) -> None:
    paths = [trained.directory / name for name in ("folded.ckpt", "checkpoints/last.ckpt")]
    folded, original = (command(trained.root / "test", "test", "--ckpt_path", path) for path in paths)
    # What is only measured has nothing to write.
    assert not (trained.root / "test").exists()
    assert folded.metrics.keys() == {"test/loss", "test/perplexity", "test/accuracy", "test/top5"}
    assert folded.metrics == pytest.approx(original.metrics, rel=1e-5)
    assert not [key for key in folded.module.state_dict() if "norm" in key]
    assert [key for key in original.module.state_dict() if "norm" in key]


# What TensorBoard shows of it -----------------------------------------------------------------------------------------

LAYERS = ("net.embedding", "net.linear1", "net.norm1", "net.tanh1", "net.linear2", "net.norm2")
BIASES_BEFORE_A_BATCHNORM = {"net.linear1.bias", "net.linear2.bias"}


def read_events(directory: Path) -> EventAccumulator:
    everything = dict.fromkeys(("scalars", "histograms", "tensors"), 0)
    return EventAccumulator(str(directory), size_guidance=everything).Reload()


def test_tensorboard_shows_the_training_the_folding_and_the_names(tmp_path: Path) -> None:
    twice = ["--trainer.val_check_interval", 10]
    run = command(tmp_path, "fit", "--config", CONFIGS[0].parent / "smoke.yaml", *twice)
    events, parameters = read_events(run.directory), {name for name, _ in run.module.named_parameters()}
    metrics = {"val/loss", "val/perplexity", "val/accuracy", "val/top5"}
    # Every fifth step is written, counted from 0; validation comes behind the tenth and the twentieth.
    training = ["train/loss", "train/log10_loss", "train/steps_per_second", "lr-SGD"]
    training += [f"update_ratio/{name}" for name in parameters - BIASES_BEFORE_A_BATCHNORM]
    pairs = {f"folding/{version}/{metric}" for version in ("original", "folded") for metric in metrics}
    numbers = {f"folding/{name}" for name in ("max_abs_error", "max_rel_error", "folds", "kept")}
    steps = dict.fromkeys(training, (4, 9, 14, 19))
    steps |= dict.fromkeys(metrics, (9, 19)) | dict.fromkeys(pairs | numbers, (20,)) | {"saturated/net.tanh1": (0, 9)}
    of_lightning = {"epoch", "hp_metric"}
    # The gradient of those biases is rounding noise, which may be exactly zero on a step or not.
    noise = {f"update_ratio/{name}" for name in BIASES_BEFORE_A_BATCHNORM}
    assert set(events.Tags()["scalars"]) - of_lightning - noise == steps.keys()
    for tag, expected in steps.items():
        written = events.Scalars(tag)
        assert tuple(event.step for event in written) == expected, tag
        assert all(math.isfinite(event.value) for event in written), tag
    losses = [[event.value for event in events.Scalars(f"train/{name}")] for name in ("loss", "log10_loss")]
    assert losses[1] == pytest.approx([math.log10(loss) for loss in losses[0]])

    watched = {f"activations/{name}" for name in LAYERS}
    watched |= {f"{kind}/{name}" for kind in ("gradients", "weights") for name in parameters}
    folded = {"folding/log10_layer_error", *(f"folding/{of}/net.norm{n}" for of in ("scale", "shift") for n in (1, 2))}
    histograms = dict.fromkeys(watched, (0, 9)) | dict.fromkeys(folded, (20,))
    assert set(events.Tags()["histograms"]) == histograms.keys()
    for tag, expected in histograms.items():
        drawn = events.Histograms(tag)
        assert tuple(event.step for event in drawn) == expected, tag
        assert all(math.isfinite(event.histogram_value.sum) and event.histogram_value.num > 0 for event in drawn), tag

    texts = {"names/text_summary": (10, 20), "folding/plan/text_summary": (20,)}
    assert set(events.Tags()["tensors"]) == texts.keys()
    for tag, expected in texts.items():
        shown = events.Tensors(tag)
        assert tuple(event.step for event in shown) == expected, tag
        assert all(len(event.tensor_proto.string_val[0]) > 20 for event in shown)
    [projector] = run.directory.rglob("projector_config.pbtxt")
    assert 'tensor_name: "characters:00020"' in projector.read_text()

    kinds = {
        version: [node.op for node in read_events(run.directory / "folding" / version).Graph().node]
        for version in ("original", "folded")
    }
    assert [kinds[version].count("batch_norm") for version in ("original", "folded")] == [2, 0]
    assert [kinds[version].count("linear") for version in ("original", "folded")] == [2, 2]
    folding = read_events(run.directory / "folding")
    assert folding.Tags()["tensors"] == ["custom_scalars__config__"]
    assert "_hparams_/session_start_info" in folding.PluginTagToContent("hparams")
    assert set(folding.Tags()["scalars"]) == {tag.removeprefix("folding/") for tag in pairs}


# What a run is --------------------------------------------------------------------------------------------------------


def test_two_runs_with_one_seed_are_the_same(smoke: Run, tmp_path: Path) -> None:
    again = command(tmp_path, "fit", "--config", CONFIGS[0].parent / "smoke.yaml", *SHORT)
    assert again.report == smoke.report
    assert again.metrics == smoke.metrics
    assert equal(again.state()["state_dict"], smoke.state()["state_dict"])
    other = command(tmp_path, "fit", "--config", CONFIGS[0].parent / "smoke.yaml", *SHORT, "--seed_everything", 1)
    assert other.report["validation"] != smoke.report["validation"]


def test_as_many_threads_give_the_same_bits_and_another_number_nearly_the_same(tmp_path: Path) -> None:
    # Large enough for torch to share the work out.
    args = [*SHORT, "--data.batch_size", 1024, "--model.n_hidden", "[64]"]
    runs = {}
    try:
        for number in (1, 2):
            for root in (tmp_path / f"{number}", tmp_path / f"{number} again"):
                args_of_run = ["--config", CONFIGS[0].parent / "smoke.yaml", *args, "--num_threads", number]
                runs[root.name] = command(root, "fit", *args_of_run)
                assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(1)
    for one in ("1", "2"):
        again = runs[f"{one} again"]
        assert again.report == runs[one].report
        assert again.metrics == runs[one].metrics
        for name in ("checkpoints/last.ckpt", "folded.ckpt"):
            assert equal(again.state(name)["state_dict"], runs[one].state(name)["state_dict"])
    assert runs["2"].metrics == pytest.approx(runs["1"].metrics, abs=1e-4)
    weights, others = (runs[number].state()["state_dict"] for number in ("1", "2"))
    torch.testing.assert_close(weights, others, rtol=0, atol=1e-4)


def test_folding_a_checkpoint_is_what_fit_did(smoke: Run, tmp_path: Path) -> None:
    last = smoke.directory / "checkpoints" / "last.ckpt"
    before = last.read_bytes()
    fold(last, tmp_path / "folded")
    folded, of_fit = torch.load(tmp_path / "folded" / "folded.ckpt", weights_only=True), smoke.state("folded.ckpt")
    assert folded.keys() == of_fit.keys()
    for key in folded:
        assert equal(folded[key], of_fit[key]), key
    report = json.loads((tmp_path / "folded" / "folding.json").read_text())
    assert report.pop("weights") == f"checkpoint {last}"
    del report["inference"]
    assert report == {key: value for key, value in smoke.report.items() if key != "weights"}
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "folded.ckpt",
        "folding.html",
        "folding.json",
    }
    assert last.read_bytes() == before


def test_the_best_weights_are_folded_on_request(tmp_path: Path) -> None:
    steps = ["--trainer.max_steps", 6, "--trainer.val_check_interval", 2, "--model.lr", 3.0]
    run = command(tmp_path, "fit", "--config", CONFIGS[0].parent / "smoke.yaml", *steps, "--folding.weights", "best")
    best = run.state("checkpoints/best.ckpt")
    assert run.report["weights"].startswith("best: ")
    validated = command(tmp_path / "best", "validate", "--ckpt_path", run.directory / "checkpoints" / "best.ckpt")
    assert validated.metrics == pytest.approx(run.report["validation"]["original"], rel=1e-6)
    assert best["global_step"] in (2, 4, 6)


def test_without_a_logger_the_files_lie_in_the_root(tmp_path: Path) -> None:
    without = ["--trainer.logger", "false"]
    command(tmp_path, "fit", "--config", CONFIGS[0].parent / "smoke.yaml", *SHORT, *without)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == FILES
    resumed = command(tmp_path, "fit", "--ckpt_path", "last", "--trainer.max_steps", 7, *without)
    assert resumed.module.trainer.global_step == 7


def test_a_trial_run_leaves_nothing(tmp_path: Path) -> None:
    command(tmp_path, "fit", "--config", CONFIGS[0].parent / "smoke.yaml", "--trainer.fast_dev_run", "true")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# Stopping and going on ------------------------------------------------------------------------------------------------


class Stop(Callback):
    """Stops a training in the middle of a step, as Ctrl-C does."""

    step = 0

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A few words, in epochs of about ten steps."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    path = tmp_path / "a few words.txt"
    path.write_text("\n".join(letters[i % 23 : i % 23 + 2 + i % 3] for i in range(100)) + "\nz\nx\nzx\nzxy\n")
    return path


STOPS = {4: "before_a_save", 7: "in_an_epoch", 14: "in_another_epoch"}
SHUFFLED = ("--data.replacement", "false", "--model.optimizer", "adamw", "--model.cycle_steps", 25)


@pytest.mark.parametrize(
    ("how", "stop", "recipe"),
    [
        *(
            pytest.param(how, stop, (), id=f"{how}-{STOPS[stop]}")
            for how in ("max_steps", "interrupt")
            for stop in STOPS
        ),
        pytest.param("interrupt", 14, SHUFFLED, id="shuffled"),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    how: str, stop: int, recipe: tuple[Any, ...], words: Path, tmp_path: Path
) -> None:
    fit = ["fit", *recipe, "--config", CONFIGS[0].parent / "smoke.yaml", "--data.words", words, "--data.block_size", 2]
    # The learning rate falls and the checkpoint is saved in the middle of what follows.
    fit += ["--model.milestones", "[9]", "--last_checkpoint.every_n_train_steps", 6, "--trainer.max_steps"]
    whole = command(tmp_path / "whole", *fit, 25)
    assert 9 < whole.module.trainer.num_training_batches < 14
    assert whole.module.trainer.current_epoch >= 2

    root = tmp_path / "stopped"
    if how == "max_steps":
        command(root, *fit, stop)
    else:
        stopped = [*fit, 25, "--trainer.callbacks", json.dumps([{"class_path": f"{__name__}.Stop"}])]
        with pytest.MonkeyPatch.context() as patch:
            # Lightning stops listening to the signal once it has come, which would outlive this test.
            patch.setattr(signal, "signal", lambda *_: None)
            patch.setattr(Stop, "step", stop)
            with pytest.raises(SystemExit, match="1"):
                command(root, *stopped)
    saved = torch.load(next(root.rglob("last.ckpt")), weights_only=True)["global_step"]
    assert saved == (stop if how == "max_steps" else stop // 6 * 6)
    # What the data and the network were is in the checkpoint.
    resumed = command(root, "fit", "--ckpt_path", "last", "--trainer.max_steps", 25)
    assert resumed.module.trainer.global_step == 25
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert equal(resumed.state()[key], whole.state()[key]), key
    assert resumed.report == whole.report
    assert equal(resumed.state("folded.ckpt")["state_dict"], whole.state("folded.ckpt")["state_dict"])


class StopInValidation(Callback):
    """Stops a training in the validation after a step."""

    step = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [12, 20], ids=["before_the_best_is_saved", "after_the_best_is_saved"])
def test_the_best_checkpoint_of_a_stopped_run_is_that_of_the_whole_run(stop: int, words: Path, tmp_path: Path) -> None:
    """A save falls together with the validation that is the best one; what goes on has a directory of its own."""
    fit = ["fit", "--config", CONFIGS[0].parent / "smoke.yaml", "--data.words", words, "--data.batch_size", 4]
    fit += ["--model.lr", 1.0, "--trainer.max_steps", 24, "--trainer.val_check_interval", 4, "--folding.weights"]
    fit += ["best", "--last_checkpoint.every_n_train_steps", 6]
    whole, root = command(tmp_path / "whole", *fit), tmp_path / "stopped"
    assert whole.state("checkpoints/best.ckpt")["global_step"] == 12
    with pytest.MonkeyPatch.context() as patch:
        # Lightning stops listening to the signal once it has come, which would outlive this test.
        patch.setattr(signal, "signal", lambda *_: None)
        patch.setattr(StopInValidation, "step", stop)
        stopped = ["--trainer.callbacks", json.dumps([{"class_path": f"{__name__}.StopInValidation"}])]
        with pytest.raises(SystemExit, match="1"):
            command(root, *fit, *stopped)
    resumed = command(root, *fit, "--ckpt_path", "last")
    assert equal(resumed.state("folded.ckpt")["state_dict"], whole.state("folded.ckpt")["state_dict"])
    told = [
        {key: run.report[key] for key in run.report if key not in ("weights", "best_score")} for run in (whole, resumed)
    ]
    assert told[0] == told[1]


def test_ctrl_c_leaves_a_checkpoint_and_the_command_that_folds_it(tmp_path: Path) -> None:
    """In a process of its own, as ``python -m lit_bnfold`` starts it."""
    # A shell starts what runs in the background deaf to Ctrl-C, and its children inherit that.
    listening = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start = [sys.executable, "-c", listening + "runpy.run_module('lit_bnfold', run_name='__main__')"]
    root = tmp_path / "a root"
    args = ["--trainer.default_root_dir", root, "--model.n_hidden", "[16]", "--data.block_size", "4"]
    args += ["--last_checkpoint.every_n_train_steps", "20", "--trainer.enable_model_summary", "false"]
    with subprocess.Popen(
        [*start, "fit", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        said, deadline = b"", time.monotonic() + 60
        while b"Epoch 0:   " not in said and process.poll() is None and time.monotonic() < deadline:
            said += process.stdout.read() or b""
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        os.set_blocking(process.stdout.fileno(), True)
        said += process.stdout.read()
    output = said.decode()
    assert process.returncode == 1, output
    assert "Traceback" not in output
    offered = re.search(r"Nothing was folded\. To fold the last checkpoint: (lit-bnfold fold --ckpt_path .*)", output)
    assert offered, output
    assert not list(tmp_path.rglob("*.part"))

    name, *rest = shlex.split(offered[1])
    assert COMMAND.name == name
    done = subprocess.run([COMMAND, *rest], capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(next(root.rglob("folding.json")).read_text())
    assert len(report["folds"]) == 2
    assert report["mismatch"] is None
    folded = BatchNormMLP.load_from_checkpoint(next(root.rglob("folded.ckpt")))
    assert folded.hparams["block_size"] == 4


# What is asked for besides --------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.__version__ < "2.13", reason="exports are promised from torch 2.13 on")
def test_statistics_are_reestimated_and_the_folded_network_exported_on_request(tmp_path: Path) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    extras = ["--folding.reestimate_batches", 3, "--folding.export", "[onnx]"]
    run = command(tmp_path, "fit", "--config", CONFIGS[0].parent / "smoke.yaml", *SHORT, *extras)
    assert run.report["reestimated"]["batches"] == 3
    assert run.report["reestimated"]["before"].keys() == run.report["validation"]["original"].keys()
    assert run.report["exports"].keys() == {"onnx"}
    assert "failure" not in run.report["exports"]["onnx"]
    assert (run.directory / "folded.onnx").is_file()
    assert "folding/before_reestimation/val/loss" in run.metrics
    # Of a checkpoint that exists, from batches that another run draws at its beginning.
    last = run.directory / "checkpoints" / "last.ckpt"
    fold(last, tmp_path, "--folding.reestimate_batches", 2)
    report = json.loads((tmp_path / "folding.json").read_text())
    assert report["reestimated"]["batches"] == 2
    assert report["reestimated"]["before"] == pytest.approx(run.report["reestimated"]["before"])


def test_what_an_export_needs_is_said_before_training_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    said = leaves(capsys, "fit", *QUIET, *SHORT, "--folding.export", "[onnx]", "--trainer.logger", "false")
    assert said.startswith("lit-bnfold: Exporting to ONNX needs onnx")
    assert said.endswith("pip install 'lit-bnfold[onnx]'")
    assert not list(tmp_path.rglob("*.ckpt"))


# Names ----------------------------------------------------------------------------------------------------------------


def names_of(capsys: pytest.CaptureFixture[str], checkpoint: Path, *args: object) -> list[str]:
    """The names that are printed."""
    capsys.readouterr()
    main(["predict", "--ckpt_path", str(checkpoint), *map(str, args)])
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.endswith("\n")
    return captured.out.removesuffix("\n").split("\n")


def test_the_original_and_the_folded_network_make_up_the_same_thousand_names(
    smoke: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    original, folded = (smoke.directory / name for name in ("checkpoints/last.ckpt", "folded.ckpt"))
    wishes = ["--names.number", 1_000, "--names.seed", 3, "--names.prefix", "ma", "--names.min_length", 5]
    names = names_of(capsys, original, *wishes, "--names.max_length", 12)
    assert names_of(capsys, folded, *wishes, "--names.max_length", 12) == names
    assert len(names) == 1_000
    assert all(name.startswith("ma") and 5 <= len(name) <= 12 for name in names)
    assert len(set(names)) > 900
    for precision in ("bf16-mixed", "64-true"):
        again = names_of(capsys, original, *wishes, "--names.max_length", 12, "--trainer.precision", precision)
        assert again == names


def test_names_can_be_piped(smoke: Run, tmp_path: Path) -> None:
    predict = [COMMAND, "predict", "--ckpt_path", smoke.directory / "folded.ckpt", "--names.number"]
    with subprocess.Popen([*predict, "4000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert re.fullmatch(rb"[a-z]+\n", process.stdout.readline())
        process.stdout.close()
        assert process.stderr.read() == b""
    assert not list(tmp_path.iterdir())


def test_a_prefix_that_no_word_begins_with_is_refused(smoke: Run, capsys: pytest.CaptureFixture[str]) -> None:
    said = leaves(capsys, "predict", "--ckpt_path", smoke.directory / "folded.ckpt", "--names.prefix", "Zoë")
    assert said.startswith("lit-bnfold: prefix: 'Zoë' has ['Z', 'ë'], which no word has")


def test_a_fit_shows_names_and_letters_in_tensorboard(trained: Run) -> None:
    assert "names/text_summary" in EventAccumulator(str(trained.directory)).Reload().Tags()["tensors"]
    [letters] = trained.directory.rglob("metadata.tsv")
    assert letters.read_text().split() == [*".abcdefghijklmnopqrstuvwxyz"]


# What it refuses ------------------------------------------------------------------------------------------------------


def test_training_does_not_go_on_from_a_folded_checkpoint(
    smoke: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--trainer.default_root_dir", tmp_path]
    said = leaves(capsys, "fit", "--ckpt_path", smoke.directory / "folded.ckpt", *QUIET, *root)
    assert said.startswith("lit-bnfold: Training cannot go on from a folded checkpoint")
    assert "\n" not in said


def test_a_folded_checkpoint_is_not_folded_again(
    smoke: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folded = smoke.directory / "folded.ckpt"
    said = leaves(capsys, "fold", "--ckpt_path", folded, "--output", tmp_path / "again")
    assert said == f"lit-bnfold: {folded} is folded already; fold the checkpoint that it was made of."
    assert not (tmp_path / "again").exists()


WRONG = {
    "missing_words": (["fit", "--data.words", "nowhere.txt"], "lit-bnfold: Expected a words file at nowhere.txt"),
    "empty_words": (["fit", "--data.words", "empty.txt"], "lit-bnfold: empty.txt, line 1: expected a word"),
    "bad_words": (["fit", "--data.words", "bad.txt"], "lit-bnfold: bad.txt, line 2: 'b.c' contains '.'"),
    "binary_words": (["fit", "--data.words", "binary.txt"], "is not UTF-8"),
    "few_words": (["fit", "--data.words", "few.txt"], "lit-bnfold: few.txt: expected words for every split, got 2"),
    "missing_checkpoint": (["test", "--ckpt_path", "nowhere.ckpt"], "lit-bnfold: Checkpoint file not found"),
    "missing_checkpoint_to_fold": (["fold", "--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
    "no_checkpoint": (["test", "--ckpt_path", "bad.txt"], "lit-bnfold: Expected a checkpoint of Lightning at bad.txt"),
    "nothing_to_go_on_from": (["fit", "--ckpt_path", "last"], "last.ckpt in"),
    "fold_of_what": (["fold"], "lit-bnfold: Expected `--ckpt_path`, the checkpoint to fold."),
    "fold_behind_its_arguments": (["--config", "few.yaml", "fold"], "lit-bnfold: Expected `fold` before its arguments"),
    "fold_to_where": (["fold", "--folding.dirpath=x"], "lit-bnfold: Expected `--output`"),
    "unknown_flag": (["fit", "--nonsense", "3"], "--nonsense"),
    "wrong_type": (["fit", "--trainer.max_steps", "many"], "max_steps"),
    "predict_of_what": (["predict"], "lit-bnfold: Expected a checkpoint to sample names from; pass --ckpt_path FILE"),
    "missing_checkpoint_to_predict": (["predict", "--ckpt_path", "nowhere.ckpt"], "Checkpoint file not found"),
    "too_cold": (["predict", "--ckpt_path", "x", "--names.temperature", "0"], "lit-bnfold: temperature: expected"),
    "no_names": (["predict", "--ckpt_path", "x", "--names.number", "0"], "lit-bnfold: number: expected at least 1"),
    "cut_too_soon": (["fit", "--names.min_length", "200"], "lit-bnfold: max_length: expected at least the 200"),
    "no_subcommand": ([], "{fit,validate,test,predict,fold"),
    "unknown_subcommand": (["train"], "train"),
    "missing_config": (["fit", "--config", "nowhere.yaml"], "nowhere.yaml"),
    "wrong_value": (
        ["fit", "--folding.tolerance", "0"],
        "lit-bnfold: tolerance: expected a finite number above 0 or None",
    ),
    "wrong_choice": (["fit", "--folding.weights", "first"], "weights"),
    "wrong_count": (["fit", "--folding.reestimate_batches", "-1"], "lit-bnfold: reestimate_batches: expected a number"),
    "wrong_export": (["fit", "--folding.export", "[torchscript]"], "export"),
    "wrong_size": (["fit", "--data.block_size", "0"], "lit-bnfold: block_size: expected at least 1, got 0"),
    "wrong_device": (
        ["fit", "--trainer.accelerator", "abacus"],
        "lit-bnfold: You selected an invalid accelerator name",
    ),
    "wrong_number": (["fit", "--trainer.max_steps", "-5"], "lit-bnfold: `max_steps` must be"),
    "file_as_directory": (["fit", "--folding.dirpath", "bad.txt"], "lit-bnfold: dirpath: expected a directory"),
    "no_such_key": (["fit", "--checkpoint.monitor", "val/nothing", *SHORT], "val/nothing"),
    "misspelt": (["fit", "--model.n_hiden", "3"], "There is no option --model.n_hiden; did you mean --model.n_hidden?"),
    "ungrouped": (["fit", "--max_steps=3"], "There is no option --max_steps; did you mean --trainer.max_steps?"),
    "abbreviated": (["fit", "--trainer.max_st", "3"], "There is no option --trainer.max_st; did you mean"),
    "unlike_any": (["fit", "--xyzzy", "3"], "There is no option --xyzzy.\n"),
    "misspelt_in_yaml": (["fit", "-c", "misspelt.yaml"], "There is no option --model.lrr; did you mean --model.lr?"),
    "loose": (["fit", "3"], "Nothing is expected at 3; an option begins with --."),
    "no_value": (["fit", "--model.lr"], "lit-bnfold: --model.lr: expected one argument."),
    "no_number": (["fit", "--trainer.max_steps", "many"], "lit-bnfold: --trainer.max_steps: expected int, got many."),
    "no_choice": (["fit", "--folding.weights", "bst"], "--folding.weights: expected one of ['last', 'best'], got bst."),
    "neither": (["fit", "--model.n_hidden", "[a]"], "--model.n_hidden: expected Sequence[int], int, got ['a']."),
    "no_config": (["fit", "-c", "none.yaml"], "lit-bnfold: --config: File does not exist"),
    "no_yaml": (["fit", "--config=broken.yaml"], "lit-bnfold: Expected YAML in broken.yaml: "),
    "no_mapping": (
        ["fit", "-c", "list.yaml"],
        "Expected a configuration with `model` and `data` in list.yaml",
    ),
    "endless_aliases": (
        ["fit", "-c", "aliases.yaml"],
        "in aliases.yaml, got over 100,000 values; look at its aliases.",
    ),
    "bottomless": (["fit", "-c", "deep.yaml"], "in deep.yaml, which is two or three levels deep, got more."),
    "no_date": (["fit", "-c", "date.yaml"], "Expected YAML in date.yaml: month must be in 1..12."),
    "no_threads": (["fit", "--num_threads", "0"], "lit-bnfold: num_threads: expected a number from 1 to 65536, got 0."),
    "no_memory": (["fit", "--model.n_hidden", "10000000000000"], "can't allocate memory"),
    "no_command": (["fti"], "invalid choice: 'fti' (choose from 'fit', 'validate', 'test',"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_named_in_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, content in (("empty", b""), ("bad", b"a\nb.c\n"), ("binary", b"a\xff\n"), ("few", b"ab\ncd\n")):
        (tmp_path / f"{file}.txt").write_bytes(content)
    for file, text in (("few", "{}"), ("misspelt", "model: {lrr: 1.0}"), ("broken", "model: [1,"), ("list", "[1]")):
        (tmp_path / f"{file}.yaml").write_text(text)
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}, *a{n}]\n" for n in range(30))
    for file, text in (("aliases", laughs), ("deep", "[" * 60 + "]" * 60), ("date", "seed_everything: 2001-13-45")):
        (tmp_path / f"{file}.yaml").write_text(text)
    args, sentence = WRONG[name]
    said = leaves(capsys, *args, *(QUIET if args[:1] in (["fit"], ["test"]) else []))
    assert sentence in said
    assert "usage:" not in said
    assert not list(tmp_path.rglob("*.ckpt")) or name == "no_such_key"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("optimizer_states", None, "cannot be loaded (TypeError: "),
        ("loops", 3, "cannot be loaded ("),
        ("optimizer_states", "delete", "cannot be loaded (KeyError"),
        ("hyper_parameters", [], "`hyper_parameters`: expected a dict"),
    ],
)
def test_training_does_not_go_on_from_what_no_trainer_has_written(
    key: str, value: Any, said: str, saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = torch.load(saved.last, weights_only=True) | {key: value}
    if value == "delete":
        del checkpoint[key]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    root = ["--trainer.default_root_dir", tmp_path, "--trainer.logger", "false", "--trainer.max_steps", 10]
    message = leaves(capsys, "fit", "--ckpt_path", tmp_path / "other.ckpt", *QUIET, *root)
    assert message.startswith(f"lit-bnfold: {tmp_path / 'other.ckpt'}")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(("value", "is_left_out"), [("0.7", True), ("0.1", False)])
def test_an_argument_that_a_checkpoint_overrides_is_named(value: str, is_left_out: bool, smoke: Run) -> None:
    last = smoke.directory / "checkpoints" / "last.ckpt"
    message = f"{last} was trained with model.lr=0.1, which counts; {value} is left out."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(["test", "--ckpt_path", str(last), "--model.lr", value, *QUIET, "--trainer.logger", "false"])
    assert (message in [str(warning.message) for warning in caught]) == is_left_out


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["predict", "--names.prefix", "gamma"], set()),
        (["test", "--model.lr", "0.7", "--model.gamma=1"], {"lr", "gamma"}),
    ],
)
def test_the_arguments_of_the_network_are_those_that_are_flagged(args: list[str], names: set[str]) -> None:
    assert _arguments_of_the_network(args, []) == names


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--trainer.logger", "CSVLogger"], "--trainer.logger: CSVLogger needs --trainer.logger.save_dir."),
        (["--lr_scheduler", "StepLR"], "--lr_scheduler: StepLR needs --lr_scheduler.step_size."),
        (["--optimizer", "SGD", "--optimizer.lr", "x"], "--optimizer.lr: expected float, Tensor, got 'x'."),
        (["--ckpt_path", "nothing.ckpt"], "Expected a checkpoint at nothing.ckpt, found nothing."),
    ],
)
def test_a_mistake_further_in_is_named(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert leaves(capsys, "fit", *args).splitlines()[0] == f"lit-bnfold: {said}"
    assert list(tmp_path.iterdir()) == []


def test_a_fit_without_checkpoints_writes_none_but_the_folded_one(words: Path, tmp_path: Path) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path), "--data.words", str(words)]
    main(["fit", *QUIET, *SHORT, *root, "--trainer.enable_checkpointing", "false", "--trainer.logger", "false"])
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["folded.ckpt"]


def test_one_callback_needs_no_brackets(words: Path, tmp_path: Path) -> None:
    root = ["--trainer.default_root_dir", str(tmp_path), "--data.words", str(words), "--trainer.logger", "false"]
    main(["fit", *QUIET, *SHORT, *root, "--trainer.callbacks", "lightning.pytorch.callbacks.EMAWeightAveraging"])
    assert (tmp_path / "folded.ckpt").is_file()


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"lit-bnfold {lit_bnfold.__version__}\n"


def test_an_error_without_words_is_named() -> None:
    assert first_line(MemoryError()) == "MemoryError"
    assert first_line(RuntimeError("first\nsecond")) == "first"


def test_a_checkpoint_of_other_words_is_refused(
    smoke: Run, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = smoke.directory / "checkpoints" / "last.ckpt"
    greek = tmp_path / "greek.txt"
    greek.write_text("\n".join("αβγδεζηθικλμνξοπρστυφχψωςϊ" for _ in range(20)), encoding="utf-8")
    said = leaves(capsys, "test", "--ckpt_path", last, "--data.words", greek, *QUIET, "--trainer.logger", "false")
    assert "expected the 27 characters of the checkpoint" in said
    few = tmp_path / "few.txt"
    few.write_text("\n".join(["ab", "ba"] * 20))
    said = leaves(capsys, "test", "--ckpt_path", last, "--data.words", few, *QUIET, "--trainer.logger", "false")
    assert "Expected the 27 characters that the checkpoint was trained on, got 3" in said


OTHER_HYPERPARAMETERS = {
    "data": ({"datamodule_hyper_parameters": {"root": "x", "batch_size": 4}}, "another data class, with root;"),
    "model": ({"hyper_parameters": {"lr": 0.1, "width": 3, "depth": 2}}, "another model class, with width, depth;"),
    "model_of_a_cli": (
        {"hyper_parameters": {"_class_path": "shop.Net", "_instantiator": "lightning.pytorch.cli", "lr": 0.1}},
        "a LightningCLI with the model class shop.Net;",
    ),
    "our_model_of_a_cli": (
        {"hyper_parameters": {"_class_path": "lit_bnfold.BatchNormMLP", "_instantiator": "a.b", "lr": 0.1}},
        "a LightningCLI with the model class lit_bnfold.BatchNormMLP;",
    ),
    "data_of_a_cli": (
        {"datamodule_hyper_parameters": {"_class_path": "shop.Rows", "batch_size": 4}},
        "a LightningCLI with the data class shop.Rows;",
    ),
}


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("name", OTHER_HYPERPARAMETERS)
def test_a_checkpoint_of_another_project_is_sent_to_the_command_that_takes_it(
    name: str, subcommand: str, saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And no option is named that nobody has typed."""
    other, (hyperparameters, found) = tmp_path / "other.ckpt", OTHER_HYPERPARAMETERS[name]
    torch.save(torch.load(saved.last, weights_only=True) | hyperparameters, other)
    said = leaves(capsys, subcommand, "--ckpt_path", other, *QUIET, "--trainer.logger", "false")
    assert said == (
        f"lit-bnfold: {other}: expected a checkpoint that `lit-bnfold fit` wrote, got one of {found} to fold it: "
        f"`lit-bnfold fold --ckpt_path {other} --model some.module.Class --data some.module.DataClass`."
    )


def test_a_folded_checkpoint_of_another_project_is_not_sent_to_be_folded(
    saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "folded.ckpt"
    torch.save(torch.load(saved.folded, weights_only=True) | OTHER_HYPERPARAMETERS["model"][0], other)
    said = leaves(capsys, "validate", "--ckpt_path", other, *QUIET)
    assert said.endswith("with width, depth; it is folded, and `load_folded` loads it.")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": "x"}, "batch_size: expected an int, got 'x'; pass a whole number."),
        ({"replacement": torch.zeros(3)}, "Object of type Tensor is not JSON serializable."),
        ({"fractions": torch.ones(3, 3)}, "Boolean value of Tensor with more than one value is ambiguous."),
    ],
)
def test_arguments_of_the_data_that_are_none_are_those_of_the_checkpoint(
    arguments: dict[str, Any], sentence: str, saved: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.ckpt"
    torch.save(torch.load(saved.last, weights_only=True) | {"datamodule_hyper_parameters": arguments}, other)
    said = leaves(capsys, "test", "--ckpt_path", other, *QUIET, "--trainer.logger", "false")
    assert said == f"lit-bnfold: {other}, `datamodule_hyper_parameters`: {sentence}"


# Help -----------------------------------------------------------------------------------------------------------------

# What the options of each command come from, by how they begin; what is linked to another option is not offered.
EXPLAINED: dict[str, Any] = {
    "model": BatchNormMLP,
    "data": NamesDataModule,
    "folding": BatchNormFolding,
    "last_checkpoint": LastCheckpoint,
    "update_ratio": UpdateRatioMonitor,
    "histograms": HistogramMonitor,
    "names": Sampling,
}
LINKED = {"--model.block_size", "--model.vocab_size"}
NOT_FOR_FOLD = {"--folding.weights", "--folding.replace", "--folding.dirpath"}
OF_LIGHTNING = ("--trainer", "--checkpoint", "--learning_rate", "--optimizer", "--lr_scheduler", "--verbose")


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    """What is printed on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        main([*args, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def explanations(said: str) -> dict[str, str]:
    """What is said of each option, on one line."""
    # A newer jsonargparse lists the form that appends as well, behind a comma.
    entries = re.findall(r"^  (--[^\s,]+)(.*(?:\n {4,}.*)*)", said, flags=re.MULTILINE)
    return {option: " ".join(text.split()) for option, text in entries}


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict", "fold"])
def test_every_option_of_ours_is_explained_in_a_sentence_with_its_default(
    subcommand: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    explained = explanations(help_of(capsys, monkeypatch, subcommand))
    groups = {key: EXPLAINED[key] for key in EXPLAINED if subcommand != "fold" or key in ("model", "data", "folding")}
    expected = {f"--{key}.{name}" for key, made in groups.items() for name in inspect.signature(made).parameters}
    expected -= NOT_FOR_FOLD if subcommand == "fold" else LINKED
    expected |= {"--ckpt_path", "--weights_only", "--seed_everything", "--num_threads"}
    expected |= {"--output"} if subcommand == "fold" else set()
    configurations = {"--print_config", *(f"--{key}" for key in groups)}
    ours = {option for option in explained if not option.startswith(OF_LIGHTNING)}
    assert ours - configurations == expected
    for option in expected:
        # Behind the option, its value and perhaps its choices or a second form.
        assert re.search(r" [A-Z`].{14,}\. \(type: .+, default: .+\)$|\. \(default: .+\)$", explained[option]), option


@pytest.mark.parametrize("subcommand", [[], ["fit"], ["validate"], ["test"], ["predict"], ["fold"]])
def test_help_fits_the_terminal_and_begins_with_what_the_command_does(
    subcommand: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = help_of(capsys, monkeypatch, *subcommand)
    assert subcommand or all(f"    {name} " in said for name in ("fit", "validate", "test", "predict", "fold"))
    assert max(map(len, said.splitlines())) <= 80
    usage, description = said.split("\n\n")[:2]
    assert usage.startswith(" ".join(["usage: lit-bnfold", *subcommand]) + " [-c CONFIG]")
    assert "\n" not in usage
    assert re.match(r"[A-Z].*\.$", description.replace("\n", " "))
    assert "``" not in said
    # The address of an object, which tells nobody anything.
    assert " at 0x" not in said


def test_the_help_of_a_command_begins_with_what_is_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for subcommand, first in (("fit", "--model"), ("predict", "--names"), ("fold", "--model")):
        grouped = [option for option in explanations(help_of(capsys, monkeypatch, subcommand)) if "." in option]
        assert grouped[0].startswith(f"{first}.")
        kinds = [option.startswith(OF_LIGHTNING) for option in grouped]
        assert kinds == sorted(kinds)


def test_the_help_of_anyones_class_shows_defaults_that_are_objects() -> None:
    parser = OneSentenceParser()
    parser.add_argument("--paths", type=list[Path], default=[Path("a"), Path("ä")], help="Where they are.")
    assert '(type: list[Path], default: ["a", "ä"])' in " ".join(parser.format_help().split())


# The notebook's own run -----------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_quick_run_trains_as_the_notebook_does_and_ships_without_batchnorm(seed: int, tmp_path: Path) -> None:
    seeds = ["--seed_everything", seed, "--data.seed", 42]
    quick = CONFIGS[0].parent / "quick.yaml"
    run = command(tmp_path, "fit", "--config", quick, *seeds, "--trainer.log_every_n_steps", 1)
    assert sum(parameter.numel() for parameter in run.module.parameters()) == 16_651
    first = EventAccumulator(str(run.directory)).Reload().Scalars("train/loss")[0].value
    assert first == pytest.approx(3.31, abs=0.06)
    original, folded = run.report["validation"]["original"], run.report["validation"]["folded"]
    assert 2.40 < original["val/loss"] < 2.47
    assert folded == pytest.approx(original, rel=1e-5)
    assert run.state()["global_step"] == 1_001
    state = run.state("folded.ckpt")["state_dict"]
    assert not [key for key in state if "norm" in key or "running" in key]
    paths = [run.directory / name for name in ("folded.ckpt", "checkpoints/last.ckpt")]
    tested = [command(tmp_path / "test", "test", "--ckpt_path", path).metrics for path in paths]
    assert tested[0] == pytest.approx(tested[1], rel=1e-5)
    assert 2.40 < tested[0]["test/loss"] < 2.47


def test_the_command_line_offers_the_callback_as_it_is() -> None:
    """A default that the command line changed would not be what the README says of the callback."""
    folding = BatchNormFolding()
    assert (folding.weights, folding.tolerance, folding.on_mismatch, folding.replace) == ("last", None, "raise", False)
    assert (folding.reestimate_batches, folding.export) == (0, ())
