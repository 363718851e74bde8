"""Folded checkpoints: into any class, in any process, whole or not at all, and never by mistake."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_bnfold import BatchNormFolding, BatchNormMLP, FoldingError, load_folded
from lit_bnfold.checkpoint import MANIFEST, FoldedLoading, save_folded
from lit_bnfold.folding import Fold, FoldingPlan, Part, plan_folding
from lit_bnfold.folding.rewrite import folded_in_place
from lit_bnfold.reading import read_checkpoint
from lit_bnfold.writing import WholeCheckpointIO, whole_file
from trainers import quiet_trainer

# A class of somebody who knows nothing of this package, in a file of its own so that another process can import it.
FOREIGN = '''
import torch
from lightning.pytorch import LightningModule
from torch import nn


class Foreign(LightningModule):
    """Takes an argument that has no default, and has a layer without a bias before a BatchNorm."""

    def __init__(self, width, depth=1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, inputs):
        return self.norm(self.net(inputs))

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self(batch[0]).square().mean())

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
'''

namespace: dict[str, Any] = {"__name__": "foreign"}
exec(FOREIGN, namespace)
Foreign: type[LightningModule] = namespace["Foreign"]

INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def save(tmp_path: Path, module: LightningModule, args: tuple[Any, ...], folded: bool = True) -> Path:
    """Save a module, folded or not, as a Trainer saves it."""
    trainer, path = quiet_trainer(tmp_path), tmp_path / ("folded.ckpt" if folded else "plain.ckpt")
    trainer.strategy.connect(module)
    if not folded:
        trainer.save_checkpoint(path, weights_only=True)
        return path
    plan = plan_folding(module, args)
    with folded_in_place(plan, module):
        save_folded(trainer, module, plan, path)
    return path


@pytest.fixture
def foreign(randomised: Callable[[nn.Module], nn.Module]) -> LightningModule:
    module = randomised(Foreign(width=5)).eval()
    assert isinstance(module, LightningModule)
    return module


@pytest.fixture
def folded_file(tmp_path: Path, foreign: LightningModule) -> Path:
    return save(tmp_path, foreign, (INPUTS,))


# Loading --------------------------------------------------------------------------------------------------------------


def test_a_foreign_class_is_loaded_without_a_word(folded_file: Path, foreign: LightningModule) -> None:
    """Without a warning too: warnings are errors here."""
    folded = load_folded(Foreign, folded_file)
    assert type(folded) is Foreign
    assert not any(module.training for module in folded.modules())
    assert folded.hparams == {"width": 5, "depth": 1}
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    torch.testing.assert_close(folded(INPUTS), foreign(INPUTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [nn.Linear, "folded.ckpt", Foreign(width=5)], ids=["class", "path", "module"])
def test_what_is_no_class_of_a_module_is_refused(given: Any, folded_file: Path) -> None:
    with pytest.raises(TypeError, match=r"model_class: expected the LightningModule class that was trained, got "):
        load_folded(given, folded_file)


def test_layers_without_a_bias_get_theirs_on_loading(folded_file: Path, foreign: LightningModule) -> None:
    assert foreign.net[0].bias is None
    bias = load_folded(Foreign, folded_file).net[0].bias
    assert isinstance(bias, nn.Parameter)
    assert torch.equal(bias, torch.load(folded_file, weights_only=True)["state_dict"]["net.0.bias"])
    assert bias.abs().max() > 0.01


def test_another_process_loads_what_this_one_folded(
    folded_file: Path, foreign: LightningModule, tmp_path: Path
) -> None:
    (tmp_path / "foreign_module.py").write_text(FOREIGN)
    torch.save(INPUTS, tmp_path / "inputs.pt")
    code = (
        "import torch; from foreign_module import Foreign; from lit_bnfold import load_folded;"
        "outputs = load_folded(Foreign, 'folded.ckpt')(torch.load('inputs.pt')); torch.save(outputs, 'outputs.pt')"
    )
    # Started in a directory of its own, so that it imports the installed package and the file beside it.
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "outputs.pt"), foreign(INPUTS), rtol=0, atol=1e-5)


def test_arguments_that_the_file_does_not_hold_are_passed_on(folded_file: Path) -> None:
    checkpoint = torch.load(folded_file, weights_only=True)
    del checkpoint["hyper_parameters"]
    torch.save(checkpoint, folded_file)
    with pytest.raises(TypeError, match="width"):
        load_folded(Foreign, folded_file)
    assert load_folded(Foreign, folded_file, width=5, map_location="cpu").hparams["width"] == 5


def test_our_own_module_loads_a_folded_checkpoint_in_the_ordinary_way(
    tmp_path: Path, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    module = randomised(BatchNormMLP(n_hidden=(6, 5))).eval()
    contexts = torch.randint(27, (9, 3))
    path = save(tmp_path, module, (contexts,))
    for folded in (BatchNormMLP.load_from_checkpoint(path).eval(), load_folded(BatchNormMLP, path)):
        assert type(folded) is BatchNormMLP
        assert not any("norm" in key for key in folded.state_dict())
        torch.testing.assert_close(folded(contexts), module(contexts), rtol=0, atol=1e-5)


def test_a_folded_module_takes_a_folded_checkpoint_again(folded_file: Path, foreign: LightningModule) -> None:
    class Mixed(FoldedLoading, Foreign):
        pass

    module = load_folded(Mixed, folded_file)
    module.on_load_checkpoint(checkpoint := torch.load(folded_file, weights_only=True))
    module.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(module(INPUTS), foreign(INPUTS), rtol=0, atol=1e-5)


class BehindLightning(Foreign, FoldedLoading):
    """Lightning's own hook, which comes first here, calls no other one."""


class Forgetting(FoldedLoading, Foreign):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        pass


@pytest.mark.parametrize("kind", [BehindLightning, Forgetting])
def test_a_class_whose_hook_does_not_reach_the_mixin_loads_what_is_folded(
    kind: type[LightningModule], folded_file: Path, foreign: LightningModule
) -> None:
    module = load_folded(kind, folded_file)
    torch.testing.assert_close(module(INPUTS), foreign(INPUTS), rtol=0, atol=1e-5)


def test_the_class_keeps_its_own_hooks_and_its_own_strictness(tmp_path: Path) -> None:
    class Particular(Foreign):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.strict_loading = True

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {f"mine.{key}": value for key, value in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key.removeprefix("mine."): value for key, value in state.items()}

    module = Particular(5).eval()
    folded = load_folded(Particular, save(tmp_path, module, (INPUTS,)))
    torch.testing.assert_close(folded(INPUTS), module(INPUTS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_loading_is_strict(change: str, folded_file: Path) -> None:
    checkpoint = torch.load(folded_file, weights_only=True)
    state = checkpoint["state_dict"]
    name = "net.3.weight"
    if change == "missing":
        del state[name]
    else:
        name = "net.9.weight"
        state[name] = torch.zeros(1)
    torch.save(checkpoint, folded_file)
    with pytest.raises(RuntimeError, match=rf"{change.capitalize()} key.*{name}"):
        load_folded(Foreign, folded_file)


# Refusing -------------------------------------------------------------------------------------------------------------


def test_an_ordinary_load_into_an_unfolded_class_fails_and_names_load_folded(folded_file: Path) -> None:
    with pytest.raises(RuntimeError, match=r"load it with lit_bnfold\.load_folded\(ModelClass, path\)"):
        Foreign.load_from_checkpoint(folded_file)


def test_an_unfolded_checkpoint_is_sent_to_the_ordinary_load(tmp_path: Path, foreign: LightningModule) -> None:
    path = save(tmp_path, foreign, (INPUTS,), folded=False)
    with pytest.raises(FoldingError, match=r"plain\.ckpt is not folded; Foreign\.load_from_checkpoint loads it"):
        load_folded(Foreign, path)
    plain = save(tmp_path, BatchNormMLP(n_hidden=4), (), folded=False)
    with pytest.raises(FoldingError, match=r"is not folded; BatchNormMLP\.load_from_checkpoint loads it"):
        load_folded(BatchNormMLP, plain)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        load_folded(Foreign, tmp_path / "nowhere.ckpt")


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (Fold("net.7", (Part("net.0"),)), "folds the BatchNorm `net.7`; the model has nothing of that name"),
        (Fold("net.2", (Part("net.0"),)), "folds the BatchNorm `net.2`; the model has ReLU of that name"),
        (Fold("net.1", (Part("net.2"),)), "folds into the layer `net.2`; the model has ReLU of that name"),
        (Fold("net.1", (Part("net.7"),)), "folds into the layer `net.7`; the model has nothing of that name"),
        (Fold("net.1", (Part("net.0", channels=(0, 1, 2, 3, 5)),)), "channels of `net.1` beyond its 5"),
        (Fold("net.1", (Part("net.3"),)), "wants 5 out_features of `net.3`, which has 3"),
    ],
)
def test_a_manifest_that_does_not_fit_names_the_first_difference(fold: Fold, message: str, folded_file: Path) -> None:
    checkpoint = torch.load(folded_file, weights_only=True)
    checkpoint[MANIFEST] = FoldingPlan((fold,)).to_dict()
    torch.save(checkpoint, folded_file)
    with pytest.raises(FoldingError, match=message):
        load_folded(Foreign, folded_file)


def test_a_layer_of_another_size_is_named(folded_file: Path) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.0\.weight: .*\[5, 4\].*\[6, 4\]"):
        load_folded(Foreign, folded_file, width=6)


def test_a_manifest_of_another_version_is_refused(folded_file: Path) -> None:
    checkpoint = torch.load(folded_file, weights_only=True)
    checkpoint[MANIFEST]["version"] = 99
    torch.save(checkpoint, folded_file)
    with pytest.raises(FoldingError, match="got version 99"):
        load_folded(Foreign, folded_file)


def test_training_does_not_go_on_from_a_folded_checkpoint(folded_file: Path, tmp_path: Path) -> None:
    class Mixed(FoldedLoading, Foreign):
        pass

    trainer = quiet_trainer(tmp_path, max_epochs=1)
    with pytest.raises(FoldingError, match="Training cannot go on from a folded checkpoint"):
        trainer.fit(Mixed(5), ckpt_path=folded_file, weights_only=True)
    # A class that knows nothing of folding stops too, at the keys of its state dict, and says where to go.
    with pytest.raises(RuntimeError, match="load_folded"):
        trainer.fit(Foreign(5), ckpt_path=folded_file, weights_only=True)
    # To measure a folded checkpoint is another matter.
    trainer.validate(Mixed(5), ckpt_path=folded_file, weights_only=True, verbose=False)


def test_with_the_callback_any_class_says_so_in_a_sentence_and_may_be_measured(
    folded_file: Path, tmp_path: Path, foreign: LightningModule
) -> None:
    # Two of them, as for the last and the best weights.
    callbacks = [BatchNormFolding(), BatchNormFolding(weights="best")]
    trainer, module = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks), Foreign(5)
    with pytest.raises(FoldingError, match="Training cannot go on from a folded checkpoint"):
        trainer.fit(module, ckpt_path=folded_file, weights_only=True)
    assert "on_load_checkpoint" not in vars(module)
    for _ in range(2):
        trainer.validate(module, ckpt_path=folded_file, weights_only=True, verbose=False)
    with pytest.raises(FoldingError, match="This module is folded, and the checkpoint is not: load it into a new"):
        module.on_load_checkpoint({"state_dict": {}})
    torch.testing.assert_close(module.eval()(INPUTS), foreign(INPUTS), rtol=0, atol=1e-5)


def test_a_hook_of_the_module_itself_is_called_and_stays(folded_file: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    module = Foreign(5)
    module.on_load_checkpoint = lambda checkpoint: seen.extend(checkpoint["hyper_parameters"])
    trainer = quiet_trainer(tmp_path, callbacks=[BatchNormFolding()])
    for count in (1, 2):
        trainer.validate(module, ckpt_path=folded_file, weights_only=True, verbose=False)
        assert seen == ["width", "depth"] * count


def test_a_folded_checkpoint_is_not_folded_again(folded_file: Path, tmp_path: Path) -> None:
    class Mixed(FoldedLoading, Foreign):
        pass

    for of_class in (Foreign, Mixed):
        folding, module = BatchNormFolding(dirpath=str(tmp_path / "again")), of_class(5)
        with pytest.raises(FoldingError, match="folded already; fold the checkpoint that it was made of"):
            folding.fold_checkpoint(quiet_trainer(tmp_path), module, folded_file, weights_only=True)
        assert any(isinstance(each, _BatchNorm) for each in module.modules())
    assert not (tmp_path / "again").exists()


# Damage ---------------------------------------------------------------------------------------------------------------


def flip_a_bit_of_a_weight(path: Path) -> None:
    """Change a file as a bad disk does: torch does not notice."""
    state = torch.load(path, weights_only=True)["state_dict"]
    name = next(name for name, tensor in state.items() if name.endswith("weight") and tensor.numel() > 9)
    content, number = bytearray(path.read_bytes()), state[name].flatten()[3:9].numpy().tobytes()
    content[content.index(number) + 2] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["state_dict"][name], state[name])


def validate(module: LightningModule, path: Path, *callbacks: Any) -> None:
    trainer = quiet_trainer(path.parent, callbacks=[*callbacks])
    trainer.validate(module, ckpt_path=path, weights_only=True, verbose=False)


class Mixed(FoldedLoading, Foreign):
    pass


@pytest.mark.parametrize(
    "load",
    [
        lambda path: load_folded(Foreign, path),
        lambda path: Mixed.load_from_checkpoint(path),
        lambda path: validate(Mixed(5), path),
        lambda path: validate(Foreign(5), path, BatchNormFolding()),
        lambda path: read_checkpoint(path),
    ],
    ids=["load_folded", "load_from_checkpoint", "trainer", "callback", "read_checkpoint"],
)
def test_a_bit_that_is_another_one_is_noticed(load: Callable[[Path], Any], folded_file: Path) -> None:
    load(folded_file)
    flip_a_bit_of_a_weight(folded_file)
    with pytest.raises(ValueError, match=r"folded\.ckpt is damaged: .* is not what was written\. Take another copy"):
        load(folded_file)


def test_a_damaged_checkpoint_is_not_folded(tmp_path: Path, foreign: LightningModule) -> None:
    path = save(tmp_path, foreign, (INPUTS,), folded=False)
    flip_a_bit_of_a_weight(path)
    with pytest.raises(ValueError, match=r"plain\.ckpt is damaged"):
        BatchNormFolding().fold_checkpoint(quiet_trainer(tmp_path), Foreign(5), path)
    assert [each.name for each in tmp_path.iterdir()] == ["plain.ckpt"]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "an empty file"),
        (b"PK\3\4 and so on", "cut off or damaged. Take another"),
        (b"text", "another kind of file"),
    ],
)
def test_what_is_no_checkpoint_is_told_apart(content: bytes, found: str, tmp_path: Path) -> None:
    (tmp_path / "file.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"at .*file\.ckpt, found .*{found}"):
        load_folded(Foreign, tmp_path / "file.ckpt")


def test_a_checkpoint_that_is_cut_off_is_named(folded_file: Path) -> None:
    content = folded_file.read_bytes()
    # With 0.75 of it, torch's reader calls it an argument that is invalid, and names no file.
    for share in (0.1, 0.5, 0.75, 0.99):
        folded_file.write_bytes(content[: int(share * len(content))])
        for load in (load_folded, lambda _, path: Mixed.load_from_checkpoint(path)):
            with pytest.raises(ValueError, match=r"folded\.ckpt.* Take another copy of the file"):
                load(Foreign, folded_file)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hyper_parameters", [1], "`hyper_parameters`: expected a dict whose keys are names, found list"),
        ("hyper_parameters", {1: 2}, "`hyper_parameters`: expected a dict whose keys are names, found dict"),
        ("hyper_parameters", {"_class_path": 3}, "`hyper_parameters._class_path`: expected a name, found int"),
        ("hparams_name", 3, "`hparams_name`: expected a name, found int"),
        ("state_dict", None, "`state_dict`: expected a dict whose keys are names, found NoneType"),
        ("pytorch-lightning_version", 2, "found another kind of file"),
        ("pytorch-lightning_version", "2.6.6.x.y", "cannot be loaded .InvalidVersion"),
    ],
)
def test_content_that_no_trainer_writes_is_named(key: str, value: Any, message: str, folded_file: Path) -> None:
    checkpoint = torch.load(folded_file, weights_only=True)
    torch.save(checkpoint | {key: value}, folded_file)
    with pytest.raises(ValueError, match=r"folded\.ckpt") as raised:
        load_folded(Foreign, folded_file)
    assert re.search(message, str(raised.value))


def test_weights_are_not_made_of_integers(folded_file: Path) -> None:
    checkpoint = torch.load(folded_file, weights_only=True)
    checkpoint["state_dict"]["net.0.bias"] = checkpoint["state_dict"]["net.0.bias"].long()
    torch.save(checkpoint, folded_file)
    with pytest.raises(
        FoldingError, match=r"has `net\.0\.bias` in torch\.int64, and the module has it in torch\.float32"
    ):
        load_folded(Foreign, folded_file)


def test_what_a_module_counts_with_may_have_begun_as_something_else(
    tmp_path: Path, foreign: LightningModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the number of components in anomalib's PCA, which begins as an empty tensor.
    foreign.register_buffer("count", torch.tensor([2]))
    path = save(tmp_path, foreign, (INPUTS,))

    class Counting(Foreign):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_buffer("count", torch.zeros(1))

    assert load_folded(Counting, path).count == 2.0
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["count"] = torch.tensor([2.5], dtype=torch.complex64)
    torch.save(checkpoint, path)
    with pytest.raises(FoldingError, match=r"has `count` in torch\.complex64, and the module has it in torch\.float32"):
        load_folded(Counting, path)


def test_object_of_a_class_that_is_not_found_is_no_damage(folded_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type("Gone", (), {"__module__": __name__})
    monkeypatch.setattr(sys.modules[__name__], "Gone", kind, raising=False)
    torch.save(torch.load(folded_file, weights_only=True) | {"extra": kind()}, folded_file)
    monkeypatch.delattr(sys.modules[__name__], "Gone")
    with pytest.raises(ValueError, match=r"holds an object of a class that is not found here: .*Gone.* Read it where"):
        load_folded(Foreign, folded_file, weights_only=False)


def test_a_class_is_asked_to_load_and_not_an_instance(folded_file: Path) -> None:
    with pytest.raises(TypeError, match="instance"):
        Mixed(5).load_from_checkpoint(folded_file)


# Saving ---------------------------------------------------------------------------------------------------------------


def test_a_folded_file_holds_plain_types_and_no_batchnorm(folded_file: Path) -> None:
    checkpoint = torch.load(folded_file, weights_only=True)
    assert [fold["batchnorm"] for fold in checkpoint[MANIFEST]["folds"]] == ["net.1", "norm"]
    assert not [key for key in checkpoint["state_dict"] if "norm" in key or key.startswith("net.1.")]
    assert not {"optimizer_states", "lr_schedulers", "callbacks"} & checkpoint.keys()
    assert [path.name for path in folded_file.parent.iterdir()] == ["folded.ckpt"]


@pytest.mark.parametrize("older", [False, True])
def test_a_failed_save_leaves_no_file_and_an_older_one_untouched(
    older: bool, tmp_path: Path, foreign: LightningModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folded.ckpt"
    if older:
        path.write_bytes(b"older")

    def half_way(checkpoint: Any, file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half") if hasattr(file, "write") else Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_way)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, foreign, (INPUTS,))
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == ({"folded.ckpt": b"older"} if older else {})
    # The module saves in its own way again.
    assert "on_save_checkpoint" not in vars(foreign)


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path, trainer = tmp_path / "new" / "file", quiet_trainer(tmp_path)
    with whole_file(path, trainer) as part:
        part.write_bytes(b"first")
        assert not path.exists()
    with whole_file(path, trainer) as part:
        part.write_bytes(b"second")
        assert path.read_bytes() == b"first"
    assert [each.read_bytes() for each in path.parent.iterdir()] == [b"second"]


def test_a_file_that_is_half_written_is_taken_away(tmp_path: Path) -> None:
    def half_way() -> None:
        with whole_file(tmp_path / "file", quiet_trainer(tmp_path)) as part:
            part.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        half_way()
    assert list(tmp_path.iterdir()) == []


def test_a_trainer_that_saves_in_the_background_waits_for_this_file(tmp_path: Path, foreign: LightningModule) -> None:
    background = AsyncCheckpointIO()
    trainer = quiet_trainer(tmp_path, plugins=[background])
    trainer.strategy.connect(foreign)
    plan = plan_folding(foreign, (INPUTS,))
    with folded_in_place(plan, foreign):
        save_folded(trainer, foreign, plan, tmp_path / "folded.ckpt")
    assert trainer.strategy.checkpoint_io is background
    torch.testing.assert_close(load_folded(Foreign, tmp_path / "folded.ckpt")(INPUTS), foreign(INPUTS))


def test_what_the_modules_own_hook_adds_is_saved_too(tmp_path: Path, foreign: LightningModule) -> None:
    foreign.on_save_checkpoint = lambda checkpoint: checkpoint.update(note=1)
    own = foreign.on_save_checkpoint
    checkpoint = torch.load(save(tmp_path, foreign, (INPUTS,)), weights_only=True)
    assert checkpoint["note"] == 1
    assert foreign.on_save_checkpoint is own


def test_a_module_is_saved_by_what_it_computes(folded_file: Path, foreign: LightningModule) -> None:
    """The rounding of the fold is the only difference: in the file is what ``fold_batchnorm`` gives, bit for bit."""
    expected: Tensor = plan_folding(foreign, (INPUTS,)).apply(foreign)(INPUTS)
    assert torch.equal(load_folded(Foreign, folded_file)(INPUTS), expected)


# A folded module that goes on living ----------------------------------------------------------------------------------


def assert_saves_its_plan(trainer: Trainer, module: LightningModule, path: Path, weights_only: bool) -> None:
    trainer.save_checkpoint(path, weights_only=weights_only)
    torch.testing.assert_close(load_folded(Foreign, path)(INPUTS), module.eval()(INPUTS))
    with pytest.raises(RuntimeError, match="load_folded"):
        Foreign.load_from_checkpoint(path)
    # The module takes back what it saved.
    trainer.validate(module, ckpt_path=path, weights_only=True, verbose=False)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_replaced_module_saves_its_plan_in_every_checkpoint(
    weights_only: bool, tmp_path: Path, foreign: LightningModule
) -> None:
    # Trained on and folded anew, there is nothing left to fold: the structure is still that of the first plan.
    for name in ("first.ckpt", "second.ckpt"):
        folding = BatchNormFolding(replace=True)
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[folding])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="BatchNormFolding has nothing to fold")
            trainer.fit(foreign.train())
        assert bool(folding.plan.folds) is (name == "first.ckpt")
        assert_saves_its_plan(trainer, foreign, tmp_path / name, weights_only)
        torch.testing.assert_close(load_folded(Foreign, tmp_path / "folded.ckpt")(INPUTS), foreign.eval()(INPUTS))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_loaded_module_saves_its_plan_in_every_checkpoint(mixed: bool, folded_file: Path, tmp_path: Path) -> None:
    class Mixed(FoldedLoading, Foreign):
        pass

    module, trainer = load_folded(Mixed if mixed else Foreign, folded_file), quiet_trainer(tmp_path)
    trainer.strategy.connect(module)
    assert_saves_its_plan(trainer, module, tmp_path / "again.ckpt", weights_only=True)


def test_a_loaded_module_is_copied_and_pickled_with_its_hooks(folded_file: Path, tmp_path: Path) -> None:
    module = load_folded(BatchNormMLP, save(tmp_path, BatchNormMLP(n_hidden=(6,)).eval(), (torch.zeros(2, 3).long(),)))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        trainer = quiet_trainer(tmp_path)
        trainer.strategy.connect(twin)
        torch.nn.init.zeros_(twin.net.linear1.weight)
        trainer.save_checkpoint(tmp_path / "twin.ckpt", weights_only=True)
        assert not load_folded(BatchNormMLP, tmp_path / "twin.ckpt").net.linear1.weight.any()
    assert module.net.linear1.weight.any()


def test_a_class_loads_as_before_once_a_folded_file_is_loaded(folded_file: Path, tmp_path: Path) -> None:
    class Own(Foreign):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            pass

    own = Own.on_load_checkpoint
    load_folded(Own, folded_file)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_folded(Own, folded_file, width=6)
    load_folded(Foreign, folded_file)
    assert vars(Own)["on_load_checkpoint"] is own
    assert "on_load_checkpoint" not in vars(Foreign)


class Stopped(BaseException):
    """Something that nothing catches, as a kill."""


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_checkpoint_that_is_written_by_halves_leaves_the_one_before(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "below" / "best.ckpt"
    whole = WholeCheckpointIO()
    whole.save_checkpoint({"number": 1}, path)

    def stop(*args: Any) -> None:
        assert torch.load(path, weights_only=True) == {"number": 1}
        raise Stopped

    monkeypatch.setattr(os, "fsync", stop) if where == "write" else monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(Stopped):
        whole.save_checkpoint({"number": 2}, path)
    assert torch.load(path, weights_only=True) == {"number": 1}
    monkeypatch.undo()
    whole.save_checkpoint({"number": 2}, path)
    assert torch.load(path, weights_only=True) == {"number": 2}
    assert [file.name for file in path.parent.iterdir()] == ["best.ckpt"]


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "best.ckpt"
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{path}'")):
        WholeCheckpointIO().save_checkpoint({}, path)
    assert list(tmp_path.iterdir()) == []
