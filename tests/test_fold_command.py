"""``lit-bnfold fold`` in somebody else's project: their classes, their checkpoints, their configuration."""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import json
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.distributed.checkpoint import save as save_shards
from torch.nn.modules.batchnorm import _BatchNorm

from lit_bnfold import BatchNormFolding, FoldingError, load_folded
from lit_bnfold.cli import main

pytestmark = [
    # Few batches are what a small test wants.
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden by `LightningCLI"),
    # Their class keeps an object among its hyperparameters.
    pytest.mark.filterwarnings("ignore:Attribute 'backbone' is an instance of `nn.Module`"),
]

NETS = '''
import argparse

import torch
from LIGHTNING import LightningModule
from torch import nn


class Backbone(nn.Module):
    def __init__(self, width: int = 5):
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(nn.Linear(4, width, bias=False), nn.BatchNorm1d(width), nn.ReLU())

    def forward(self, inputs):
        return self.layers(inputs)


class Steps(LightningModule):
    def on_train_start(self):
        norm = self.backbone.layers[1]
        norm.running_mean.normal_()
        nn.init.normal_(norm.weight)

    def forward(self, inputs):
        return self.head(self.backbone(inputs))

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Net(Steps):
    def __init__(self, width: int, outputs: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = Backbone(width)
        self.head = nn.Linear(width, outputs)


class WithData(Net):
    """Brings its own data, and an object that is no plain value among the hyperparameters."""

    def __init__(self, width: int, more: object = None):
        super().__init__(width)
        self.save_hyperparameters()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 4)), batch_size=4)

    val_dataloader = train_dataloader


class Assembled(Steps):
    """Gets its backbone as an object, and does not save it."""

    def __init__(self, backbone: Backbone, outputs: int = 2, **others):
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, outputs)


class Composed(Steps):
    """Gets its backbone as an object, and saves it: what a LightningCLI describes."""

    def __init__(self, backbone: Backbone, outputs: int = 2):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = backbone
        self.head = nn.Linear(backbone.width, outputs)


class Configured(Steps):
    """Gets all hyperparameters as one argument."""

    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters(config)
        self.backbone = Backbone(config.width)
        self.head = nn.Linear(config["width"], 2)
'''

DATA = """
import torch
from LIGHTNING import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset


class Rows(LightningDataModule):
    def __init__(self, rows: int, batch_size: int = 4):
        super().__init__()
        self.rows, self.batch_size = rows, batch_size

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(self.rows, 4)), batch_size=self.batch_size)

    val_dataloader = train_dataloader


class SavedRows(Rows):
    def __init__(self, rows: int, batch_size: int = 4):
        super().__init__(rows, batch_size)
        self.save_hyperparameters()
"""

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
ROWS = ["--data", "shop.data.Rows", "--data.rows", "16"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a package of somebody's, which is importable from there alone."""
    root = tmp_path_factory.mktemp("project")
    (root / "shop").mkdir()
    (root / "shop" / "nets.py").write_text(NETS.replace("LIGHTNING", "lightning.pytorch"))
    (root / "shop" / "data.py").write_text(DATA.replace("LIGHTNING", "lightning.pytorch"))
    (root / "standalone.py").write_text(NETS.replace("LIGHTNING", "pytorch_lightning"))
    return root


@pytest.fixture
def shop(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Finds a class of the project, from inside its directory; nothing stays imported."""
    monkeypatch.chdir(project)

    def find(name: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(project))
            module, _, of_class = name.rpartition(".")
            return getattr(importlib.import_module(module), of_class)

    yield find
    for module in [name for name in sys.modules if name.split(".")[0] in ("shop", "standalone")]:
        del sys.modules[module]


def train(module: LightningModule, data: Any, path: Path, trainer_class: type[Trainer] = Trainer) -> Path:
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = trainer_class(accelerator="cpu", max_epochs=2, enable_model_summary=False, **silent)
    trainer.fit(module, data)
    trainer.save_checkpoint(path)
    return path


def train_by_cli(root: Path, *args: str, classes: tuple[Any, ...] = ()) -> tuple[Path, Path]:
    """A checkpoint and the configuration that the project's own LightningCLI leaves."""
    trainer = ["--trainer.max_epochs=2", "--trainer.enable_model_summary=false", f"--trainer.default_root_dir={root}"]
    # What a training has and a fold must not trip over.
    trainer += ["--trainer.callbacks=LearningRateMonitor", "--trainer.precision=64"]
    LightningCLI(*classes, args=["fit", *trainer, *QUIET, *args])
    return next(root.rglob("*.ckpt")), next(root.rglob("config.yaml"))


def fold(checkpoint: Path, *args: str) -> dict[str, Any]:
    main(["fold", "--ckpt_path", str(checkpoint), *args, *QUIET])
    return torch.load(checkpoint.parent / "folded.ckpt", weights_only=True)


def assert_is_fold_of(checkpoint: Path, of_class: Any, **kwargs: Any) -> None:
    # An object among the arguments becomes a part of the module, so each gets its own.
    folded = load_folded(of_class, checkpoint.parent / "folded.ckpt", **copy.deepcopy(kwargs))
    original = of_class.load_from_checkpoint(checkpoint, **kwargs).eval()
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    assert any(isinstance(module, _BatchNorm) for module in original.modules())
    inputs = INPUTS.to(next(original.parameters()).dtype)
    torch.testing.assert_close(folded(inputs), original(inputs), rtol=0, atol=1e-5)


# Their classes --------------------------------------------------------------------------------------------------------


def test_a_class_of_the_current_directory_is_folded_with_the_hyperparameters_of_its_checkpoint(
    shop: Callable[[str], Any], tmp_path: Path
) -> None:
    net = shop("shop.nets.Net")
    checkpoint = train(net(width=7), shop("shop.data.SavedRows")(16), tmp_path / "any.ckpt")
    path = list(sys.path)
    written = fold(checkpoint, "--model", "shop.nets.Net", "--data", "shop.data.SavedRows", "--data.batch_size=8")
    assert sys.path == path
    assert_is_fold_of(checkpoint, net)
    assert written["hyper_parameters"] == {"width": 7, "outputs": 2}
    assert written["datamodule_hyper_parameters"] == {"rows": 16, "batch_size": 8}
    original = torch.load(checkpoint, weights_only=True)
    assert written["global_step"] == original["global_step"] == 8
    assert written["epoch"] == original["epoch"] == 2
    report = json.loads((tmp_path / "folding.json").read_text())
    assert report["weights"] == f"checkpoint {checkpoint}"
    assert {path.name for path in tmp_path.iterdir()} == {"any.ckpt", "folded.ckpt", "folding.html", "folding.json"}


def test_the_installed_command_finds_the_classes_of_the_current_directory(
    shop: Callable[[str], Any], project: Path, tmp_path: Path
) -> None:
    checkpoint = train(shop("shop.nets.Net")(width=3), shop("shop.data.Rows")(16), tmp_path / "any.ckpt")
    command = [str(Path(sysconfig.get_path("scripts")) / "lit-bnfold"), "fold", "--ckpt_path", str(checkpoint)]
    command += ["--model=shop.nets.Net", *ROWS, *QUIET, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"folded.ckpt", "folding.html", "folding.json"}


@pytest.mark.parametrize("width", ["--model.backbone.width=7", "--model.backbone.init_args.width=7"])
def test_an_object_that_the_checkpoint_lacks_is_described_on_the_command_line(
    width: str, shop: Callable[[str], Any], tmp_path: Path
) -> None:
    backbone, assembled = shop("shop.nets.Backbone"), shop("shop.nets.Assembled")
    checkpoint = train(assembled(backbone(7), outputs=3), shop("shop.data.Rows")(16), tmp_path / "any.ckpt")
    fold(checkpoint, "--model", "shop.nets.Assembled", "--model.backbone=shop.nets.Backbone", width, *ROWS)
    assert_is_fold_of(checkpoint, assembled, backbone=backbone(7))


def test_hyperparameters_that_are_one_argument_are_passed_as_one(shop: Callable[[str], Any], tmp_path: Path) -> None:
    configured, config = shop("shop.nets.Configured"), shop("lightning.pytorch.utilities.parsing.AttributeDict")
    checkpoint = train(configured(config(width=6)), shop("shop.data.Rows")(16), tmp_path / "any.ckpt")
    fold(checkpoint, "--model", "shop.nets.Configured", *ROWS)
    folded = torch.load(tmp_path / "folded.ckpt", weights_only=True)
    assert folded["hyper_parameters"] == {"width": 6}
    assert folded["state_dict"]["backbone.layers.0.bias"].shape == (6,)


def test_a_module_that_brings_its_data_needs_none_and_may_hold_any_object_if_it_is_trusted(
    shop: Callable[[str], Any], tmp_path: Path
) -> None:
    with_data = shop("shop.nets.WithData")
    checkpoint = train(with_data(width=4, more=Path("an object")), None, tmp_path / "any.ckpt")
    with pytest.raises(SystemExit, match=r"holds more than tensors .*`--weights_only false`"):
        fold(checkpoint, "--model", "shop.nets.WithData")
    main(["fold", "--ckpt_path", str(checkpoint), "--model=shop.nets.WithData", "--weights_only=false", *QUIET])
    assert_is_fold_of(checkpoint, with_data, weights_only=False)


def test_a_module_of_the_other_lightning_package_gets_its_trainer(shop: Callable[[str], Any], tmp_path: Path) -> None:
    standalone = shop("standalone.WithData")
    checkpoint = train(standalone(width=4), None, tmp_path / "any.ckpt", shop("pytorch_lightning.Trainer"))
    fold(checkpoint, "--model", "standalone.WithData")
    assert_is_fold_of(checkpoint, standalone)


# Their LightningCLI ---------------------------------------------------------------------------------------------------


CLI_ARGUMENTS = ["--model.backbone=shop.nets.Backbone", "--model.backbone.width=6", "--data.rows=16"]


def test_a_checkpoint_of_a_cli_names_its_classes_itself(shop: Callable[[str], Any], tmp_path: Path) -> None:
    composed, _ = shop("shop.nets.Composed"), shop("shop.data.SavedRows")
    classes = ["--model=shop.nets.Composed", "--data=shop.data.SavedRows", "--optimizer=SGD"]
    checkpoint, config = train_by_cli(tmp_path, *classes, *CLI_ARGUMENTS)
    written = fold(checkpoint)
    assert_is_fold_of(checkpoint, composed)
    # The description of the objects is kept, and not the objects.
    assert written["hyper_parameters"] == torch.load(checkpoint, weights_only=True)["hyper_parameters"]
    # Other data to validate on does not take the arguments of the data that is in the checkpoint.
    with pytest.raises(SystemExit, match=r"shop\.data\.Rows needs what is neither .*: --data\.rows"):
        fold(checkpoint, "--data", "shop.data.Rows")
    # With the configuration: the precision of the training, and so its tolerance.
    fold(checkpoint, "--config", str(config))
    assert json.loads((checkpoint.parent / "folding.json").read_text())["tolerance"] == 1e-10


def test_a_class_from_a_cli_is_loaded_as_any_kind_of_it_in_another_process(
    shop: Callable[[str], Any], project: Path, tmp_path: Path
) -> None:
    composed, _ = shop("shop.nets.Composed"), shop("shop.data.SavedRows")
    classes = ["--model=shop.nets.Composed", "--data=shop.data.SavedRows"]
    checkpoint, _ = train_by_cli(tmp_path, *classes, *CLI_ARGUMENTS)
    fold(checkpoint)
    own_hook = composed.on_load_checkpoint
    assert type(load_folded(LightningModule, checkpoint.parent / "folded.ckpt")) is composed
    assert composed.on_load_checkpoint is own_hook
    torch.save(INPUTS.double(), tmp_path / "inputs.pt")
    code = (
        "import sys, torch; from shop.nets import Composed; from lit_bnfold import load_folded;"
        "folded = load_folded(Composed, sys.argv[1]).double(); inputs = torch.load(sys.argv[2] + '/inputs.pt');"
        "torch.save(folded(inputs), sys.argv[2] + '/outputs.pt')"
    )
    arguments = [sys.executable, "-c", code, str(checkpoint.parent / "folded.ckpt"), str(tmp_path)]
    subprocess.run(arguments, cwd=project, check=True, timeout=120, capture_output=True)
    original = composed.load_from_checkpoint(checkpoint).double().eval()
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), original(INPUTS.double()), rtol=0, atol=1e-5)


def test_a_cli_of_fixed_classes_leaves_their_names_to_the_command_line(
    shop: Callable[[str], Any], tmp_path: Path
) -> None:
    classes = shop("shop.nets.Composed"), shop("shop.data.Rows")
    checkpoint, config = train_by_cli(tmp_path, *CLI_ARGUMENTS[1:], classes=classes)
    assert "class_path" not in yaml.safe_load(config.read_text())["model"]
    # The data saves no hyperparameters: they are in the configuration.
    fold(checkpoint, "--config", str(config), "--model=shop.nets.Composed", "--data=shop.data.Rows")
    assert_is_fold_of(checkpoint, classes[0])
    # The command line has the last word.
    fold(checkpoint, "--config", str(config), "--model=shop.nets.Composed", *ROWS, "--trainer.precision=32")
    assert json.loads((checkpoint.parent / "folding.json").read_text())["tolerance"] == 1e-4


# Their shards ---------------------------------------------------------------------------------------------------------


def shards(root: Path, module: LightningModule, data: Any, name: str) -> tuple[Path, Path]:
    """The same checkpoint as a file and as Lightning's sharded strategies write it."""
    whole, sharded = train(module, data, root / "whole.ckpt"), root / "sharded.ckpt"
    checkpoint = torch.load(whole, weights_only=True)
    tensors = {name: checkpoint.pop("state_dict"), "optimizer_0": checkpoint.pop("optimizer_states")[0]}
    with pytest.warns(UserWarning, match="assuming the intent is to save in a single process"):
        save_shards(tensors, checkpoint_id=sharded)
    torch.save(checkpoint, sharded / "meta.pt")
    return whole, sharded


# FSDP calls the weights by the first name, ModelParallel by the second.
@pytest.mark.parametrize("name", ["model", "state_dict"])
def test_a_sharded_checkpoint_is_folded_as_the_whole_one_is(
    name: str, shop: Callable[[str], Any], tmp_path: Path
) -> None:
    whole, sharded = shards(tmp_path, shop("shop.nets.Net")(width=7), shop("shop.data.Rows")(16), name)
    expected = fold(whole, "--model=shop.nets.Net", *ROWS)
    (tmp_path / "folded.ckpt").unlink()
    files = sorted(sharded.iterdir())
    folded = fold(sharded, "--model=shop.nets.Net", *ROWS)
    assert folded.keys() == expected.keys()
    assert folded["global_step"] == 8
    for key, value in expected["state_dict"].items():
        assert torch.equal(folded["state_dict"][key], value), key
    assert sorted(sharded.iterdir()) == files
    assert json.loads((tmp_path / "folding.json").read_text())["weights"] == f"checkpoint {sharded}"


def test_the_file_of_lightnings_own_command_is_folded_too(shop: Callable[[str], Any], tmp_path: Path) -> None:
    _, sharded = shards(tmp_path, shop("shop.nets.Net")(width=7), shop("shop.data.Rows")(16), "model")
    command = [sys.executable, "-m", "lightning.pytorch.utilities.consolidate_checkpoint", str(sharded)]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    fold(tmp_path / "sharded.ckpt.consolidated", "--model=shop.nets.Net", *ROWS)
    assert_is_fold_of(tmp_path / "whole.ckpt", shop("shop.nets.Net"))


TWO_PROCESSES = """
import sys

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from shop.nets import WithData
from torch.distributed.fsdp import fully_shard


class Sharded(WithData):
    def configure_model(self):
        if not sharded:
            return
        fully_shard(self.backbone, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.head, mesh=self.device_mesh["data_parallel"])


sharded = __name__ == "__main__"
if sharded:
    torch.set_num_threads(1)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, limit_val_batches=0, **silent)
    module = Sharded(width=6)
    trainer.fit(module)
    trainer.save_checkpoint(sys.argv[1])
"""


@pytest.mark.long
def test_what_two_processes_with_a_shard_each_have_saved_is_folded(
    shop: Callable[[str], Any], project: Path, tmp_path: Path
) -> None:
    (project / "parallel.py").write_text(TWO_PROCESSES)
    sharded = tmp_path / "sharded.ckpt"
    done = subprocess.run(
        [sys.executable, "parallel.py", str(sharded)],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list(sharded.glob("*.distcp"))) == 2
    fold(sharded, "--model=shop.nets.WithData")
    folded = load_folded(shop("shop.nets.WithData"), tmp_path / "folded.ckpt")
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    assert folded.hparams["width"] == 6


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_a_strategy_that_shards_is_refused_with_the_way_to_fold_afterwards(name: str) -> None:
    trainer = argparse.Namespace(strategy=type(name, (), {})(), callbacks=[])
    with pytest.raises(FoldingError) as raised:
        BatchNormFolding().setup(trainer, LightningModule(), "fit")  # type: ignore[arg-type]
    message = str(raised.value)
    assert f"{name} shards them" in message
    assert "`lit-bnfold fold --ckpt_path CHECKPOINT --model some.module.Class`" in message
    command = {
        "FSDPStrategy": "`python -m lightning.pytorch.utilities.consolidate_checkpoint`",
        "ModelParallelStrategy": "the sharded directory as it is",
        "DeepSpeedStrategy": "`lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict`",
    }
    assert command[name] in message
    assert importlib.util.find_spec("lightning.pytorch.utilities.consolidate_checkpoint")


# What it refuses ------------------------------------------------------------------------------------------------------


NET = ["--model", "shop.nets.Net"]

WRONG = {
    "no_such_class": (["--model", "shop.nets.Nets", *ROWS], "--model: the module shop.nets has no class Nets."),
    "no_such_module": (["--model", "shop.nest.Net", *ROWS], "No module named 'shop.nest'."),
    "no_such_package": (["--model", "chop.nets.Net", *ROWS], "No module named 'chop'."),
    "no_path": (["--model", "Net", *ROWS], "--model: expected a class as some.module.Class, got 'Net'; write"),
    "half_a_path": (["--model", "..Net", *ROWS], "--model: expected a class as some.module.Class, got '..Net'; write"),
    "script": (["--model", "__main__.Net", *ROWS], "name it as --model script.Net."),
    "no_module": (["--model", "shop.nets.Backbone"], "--model: expected a LightningModule, but shop.nets.Backbone is"),
    "no_class": (["--model", "shop.nets.torch"], "expected a LightningModule, but shop.nets.torch is not one."),
    "data_as_model": (
        ["--model", "shop.data.Rows"],
        "--model: expected a LightningModule, but shop.data.Rows is not one.",
    ),
    "model_as_data": ([*NET, "--data", "shop.nets.Net"], "--data: expected a LightningDataModule"),
    "other_class": (["--model", "shop.nets.WithData", "--model.width=5"], "is no checkpoint of shop.nets.WithData"),
    "no_model": ([], 'BatchNormMLP, whose weights are others (Missing key(s) in state_dict: "net.embedding.weight")'),
    "no_data": (NET, "shop.nets.Net has no val_dataloader: name what it was validated on, --data some.module.Class."),
    "missing_data_argument": (
        [*NET, *ROWS[:2]],
        "shop.data.Rows needs what is neither in the checkpoint nor given: --",
    ),
    "missing_argument": (
        ["--model", "shop.nets.Assembled", *ROWS],
        "neither in the checkpoint nor given: --model.back",
    ),
    "wrong_type": ([*NET, *ROWS, "--model.width=wide"], "model.width"),
    "wrong_width": ([*NET, *ROWS, "--model.width=5"], "size mismatch for backbone.layers.0.weight: copying a param"),
    "unknown_argument": (
        [*NET, *ROWS, "--model.weight=4"],
        "no option --model.weight; did you mean --model.width?",
    ),
    "no_memory": ([*NET, *ROWS, "--model.width=10000000000000"], "shop.nets.Net cannot be made: [enforce fail"),
    "no_config": (["--config", "nowhere.yaml"], "Expected a configuration at nowhere.yaml, found no file."),
    "not_yaml": (["--config", "shop/nets.py"], "Expected YAML in shop/nets.py"),
    "no_output": ([*NET, *ROWS, "--output", "standalone.py"], "expected a directory, found a file at standalone.py."),
    "no_value": (["--model"], "--model: expected one argument"),
    "no_boolean": (["--weights_only", "perhaps"], "expected true or false, got 'perhaps'"),
}


@pytest.fixture(scope="module")
def net_checkpoint(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    namespace: dict[str, Any] = {"__name__": "anonymous"}
    exec(NETS.replace("LIGHTNING", "lightning.pytorch"), namespace)
    module, path = namespace["Net"](width=7), tmp_path_factory.mktemp("checkpoint") / "net.ckpt"
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.usefixtures("shop")
def test_a_mistake_is_named_in_a_sentence(name: str, net_checkpoint: Path) -> None:
    args, sentence = WRONG[name]
    with pytest.raises(SystemExit) as raised:
        main(["fold", "--ckpt_path", str(net_checkpoint), *args, *QUIET])
    said = str(raised.value.code)
    assert said.startswith("lit-bnfold: ")
    assert sentence in said
    assert "\n" not in said
    assert [path.name for path in net_checkpoint.parent.iterdir()] == ["net.ckpt"]


def test_a_configuration_of_another_class_is_refused(net_checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {class_path: shop.nets.Composed}\n")
    with pytest.raises(
        SystemExit, match=r"--model: expected the class of the configuration, shop\.nets\.Composed, got"
    ):
        main(["fold", "--ckpt_path", str(net_checkpoint), "--config", str(config), *NET, *QUIET])


NO_OPTIONS = "expected names of options with their values, got {}; write each as `name: value`, or leave them out."
NO_CLASS = "expected a class as some.module.Class, got {}; write its module and its name."

WRONG_CONFIGS = {
    "model: 3": "model: " + NO_OPTIONS.format(3),
    "model: false": "model: " + NO_OPTIONS.format(False),
    "model: [a]": "model: " + NO_OPTIONS.format(["a"]),
    "model: {1: 2}": "model: " + NO_OPTIONS.format({1: 2}),
    "model: {class_path: [a]}": "model.class_path: " + NO_CLASS.format(["a"]),
    "model: {class_path: null}": "model.class_path: " + NO_CLASS.format(None),
    "model: Net": "model: " + NO_CLASS.format("'Net'"),
    "model: {class_path: shop.data.Rows}": "model: expected a LightningModule, but shop.data.Rows is not one.",
    "model: {class_path: shop.nets.Net, init_args: 3}": "model.init_args: " + NO_OPTIONS.format(3),
    "model: {class_path: shop.nets.Net, init_args: {0: 1}}": "model.init_args: " + NO_OPTIONS.format({0: 1}),
    "model: {class_path: shop.nets.Net, dict_kwargs: [[1]]}": "model.dict_kwargs: " + NO_OPTIONS.format([[1]]),
    "model: {class_path: shop.nets.Net, init_args: {widht: 3}}": "no option --model.widht; did you mean",
    "model: {class_path: shop.nets.Net, init_args: {width: wide}}": "--model.width: expected int, got wide.",
    "data: 0.5": "data: " + NO_OPTIONS.format(0.5),
    "data: {class_path: {a: 1}}": "data.class_path: " + NO_CLASS.format({"a": 1}),
    "folding: []": "folding: " + NO_OPTIONS.format([]),
    "folding: {export: {a: 1}}": "--folding.export: expected Sequence, got {'a': 1}.",
    "trainer: 3": "trainer: " + NO_OPTIONS.format(3),
    "trainer: {precision: [1]}": "--trainer.precision: expected one of",
    "seed_everything: {a: 1}": "--seed_everything: expected int, got {'a': 1}.",
    "seed_everything: [1]": "--seed_everything: expected int, got [1].",
}


@pytest.mark.parametrize("config", WRONG_CONFIGS)
@pytest.mark.usefixtures("shop")
def test_a_configuration_of_another_shape_is_refused_with_its_file_and_the_place(
    config: str, net_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config)
    with pytest.raises(SystemExit) as raised:
        main(["fold", "--ckpt_path", str(net_checkpoint), "--config", str(path)])
    said = str(raised.value.code)
    assert said.startswith(f"lit-bnfold: {path}")
    assert WRONG_CONFIGS[config] in said
    assert "\n" not in said


SILENT_CONFIG = """
seed_everything: SEED
model: {class_path: shop.nets.Net, init_args: null, dict_kwargs: null}
data: {class_path: shop.data.Rows, init_args: {rows: 16, batch_size: 4}}
folding: {tolerance: null, reestimate_batches: null, export: null}
trainer: {precision: null, callbacks: 3}
optimizer: null
"""


@pytest.mark.parametrize("seed", ["null", "true", "false"])
@pytest.mark.usefixtures("shop")
def test_what_a_configuration_leaves_open_is_no_mistake(seed: str, net_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SILENT_CONFIG.replace("SEED", seed))
    args = ["--config", str(path), "--output", str(tmp_path / "out"), *QUIET]
    main(["fold", "--ckpt_path", str(net_checkpoint), *args])
    assert (tmp_path / "out" / "folded.ckpt").is_file()


def test_a_class_that_a_checkpoint_names_and_that_is_none_is_refused(net_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(net_checkpoint, weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = "..Net"
    torch.save(checkpoint, tmp_path / "net.ckpt")
    with pytest.raises(SystemExit, match=r"the checkpoint's model: expected a class as .*, got '\.\.Net'; write"):
        main(["fold", "--ckpt_path", str(tmp_path / "net.ckpt"), *ROWS, *QUIET])


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ([], "found a directory without the meta.pt of a sharded one"),
        (["zero_to_fp32.py"], "convert_zero_checkpoint_to_fp32_state_dict"),
    ],
)
def test_a_directory_that_is_no_sharded_checkpoint_is_named(files: list[str], sentence: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).touch()
    with pytest.raises(SystemExit, match=sentence):
        main(["fold", "--ckpt_path", str(tmp_path), *NET, *QUIET])


def test_help_shows_the_arguments_of_the_class(shop: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["fold", *NET, "--data=shop.data.Rows", "--help"])
    assert raised.value.code == 0
    said = capsys.readouterr().out
    for option in ("--model.width", "--data.rows", "--output", "--folding.tolerance", "--trainer.precision"):
        assert option in said
    for option in ("--folding.dirpath", "--folding.weights", "--trainer.logger"):
        assert option not in said


def test_the_backbone_of_the_project_is_worth_folding() -> None:
    """Without this the comparisons above would prove nothing: the BatchNorms do something."""
    namespace: dict[str, Any] = {"__name__": "anonymous"}
    exec(NETS.replace("LIGHTNING", "lightning.pytorch"), namespace)
    module = namespace["Net"](width=7).eval()
    before = module(INPUTS)
    module.on_train_start()
    assert (module(INPUTS) - before).abs().max() > 0.05
    assert isinstance(module.backbone.layers[1], nn.BatchNorm1d)
