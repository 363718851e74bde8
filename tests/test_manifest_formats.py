"""Folded checkpoints of every manifest format that was ever written load for ever, and compute what they computed.

``tests/data`` has one small file for each format, and beside it what the unfolded module made of some inputs then. They
are never written again. When the format changes, the file of the new one is made by

    python tests/test_manifest_formats.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_bnfold import load_folded
from lit_bnfold.checkpoint import MANIFEST, save_folded
from lit_bnfold.folding import plan_folding
from lit_bnfold.folding.plan import MANIFEST_VERSION
from lit_bnfold.folding.rewrite import folded_in_place

DATA = Path(__file__).parent / "data"
VERSIONS = range(1, MANIFEST_VERSION + 1)


class Lasting(LightningModule):
    """Folds of every kind that a manifest tells of. It must stay as it is, as must the files."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.left, self.right = nn.Linear(3, width, bias=False), nn.Linear(3, width)
        self.both = nn.BatchNorm1d(2 * width)  # parts of it, and a bias that was not there
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2 * width, width))  # baked
        self.behind = nn.BatchNorm1d(width)
        self.ahead, self.last = nn.BatchNorm1d(width), nn.Linear(width, 2)  # forward
        self.branch, self.beside = nn.BatchNorm2d(width), nn.Conv2d(width, width, 1)  # parallel
        self.kept = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.both(torch.cat([self.left(x), self.right(x)], 1)).relu()
        h = self.behind(self.normed(h)).tanh()
        image = h[:, :, None, None].sin()
        h = (self.branch(image) + self.beside(image)).mean((2, 3)).relu()
        return self.kept(self.last(self.ahead(h)).tanh())  # type: ignore[no-any-return]


# An older Lightning says that a newer one has written the file.
@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")
@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_of_each_format_loads_and_computes_what_it_computed(version: int) -> None:
    path = DATA / f"folded-manifest-{version}.ckpt"
    expected = json.loads(path.with_suffix(".json").read_text())
    module = load_folded(Lasting, path)
    # The one that stays has a `tanh` on one side and the end on the other.
    assert [name for name, each in module.named_modules() if isinstance(each, _BatchNorm)] == ["kept"]
    outputs = module(torch.tensor(expected["inputs"]))
    torch.testing.assert_close(outputs, torch.tensor(expected["outputs"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_file_of_each_format_is_what_it_is_called_and_holds_folds_of_every_kind(version: int) -> None:
    manifest = torch.load(DATA / f"folded-manifest-{version}.ckpt", weights_only=True)[MANIFEST]
    assert manifest["version"] == version
    assert {fold["direction"] for fold in manifest["folds"]} == {"backward", "forward", "parallel"}
    parts = [part for fold in manifest["folds"] for part in fold["parts"]]
    assert any(part["channels"] is not None for part in parts)
    assert any(part["baked"] for part in parts)
    assert [kept["batchnorm"] for kept in manifest["kept"]] == ["kept"]


def write(path: Path) -> None:
    """Write the file of the present format, which must not be there yet."""
    if path.exists():
        sys.exit(f"{path} is there, and its format is the present one: nothing to write.")
    torch.manual_seed(0)
    module, inputs = Lasting(width=4).eval(), torch.randn(4, 3)
    for each in module.modules():
        if isinstance(each, _BatchNorm):
            assert each.running_mean is not None
            assert each.running_var is not None
            each.running_mean.normal_()
            each.running_var.uniform_(0.2, 3.0)
            nn.init.normal_(each.weight)
            nn.init.normal_(each.bias)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    plan = plan_folding(module, (inputs,))
    with folded_in_place(plan, module):
        save_folded(trainer, module, plan, path)
    expected = {"inputs": inputs.tolist(), "outputs": module(inputs).tolist()}
    path.with_suffix(".json").write_text(json.dumps(expected) + "\n")
    print(plan)


if __name__ == "__main__":
    write(DATA / f"folded-manifest-{MANIFEST_VERSION}.ckpt")
