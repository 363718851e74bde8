"""Names that come from somebody's module and metrics are text, wherever they are shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_bnfold import BatchNormFolding, load_folded
from lit_bnfold.callbacks import HistogramMonitor, UpdateRatioMonitor
from lit_bnfold.callbacks.export import ExampleCall, export_files
from lit_bnfold.callbacks.html_report import write_html
from lit_bnfold.callbacks.report import make_report, print_report, printable
from lit_bnfold.callbacks.tensorboard import markdown
from lit_bnfold.callbacks.validation import ValidationRun
from lit_bnfold.folding import Fold, FoldingPlan, Kept, Part

pytestmark = [
    # TensorBoard brings its own copies of libraries, and of what these say.
    pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning"),
]

ODD = [
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "[red]",
    "[/]",
    "[/red][link=http://x]y",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "a\nb\r\n# c",
    "\x1b[31mred\x1b]0;title\x07",
    "\0",
    "|`_*[x](http://y)",
    "李 é\u202e\u200b",
    "&lt;b&gt;",
    "</table></code>",
    "a/b/",
    "%s %d {0}",
]
LONE = "\ud800"


class Odd(LightningModule):
    """Has a layer and a BatchNorm of each odd name, and logs metrics that are called so."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.ModuleDict({name: nn.Linear(3, 3) for name in names})
        self.norms = nn.ModuleDict()
        for name in names:
            self.norms.add_module(name, nn.BatchNorm1d(3))
        self.kept = nn.ModuleDict({name: nn.BatchNorm1d(3) for name in names[:3]})

    def forward(self, inputs: Tensor) -> Tensor:
        for norm in self.kept.values():
            inputs = norm(inputs.relu()).tanh()
        for layer, norm in zip(self.layers.values(), self.norms.values(), strict=True):
            inputs = norm(layer(inputs)).relu()
        return inputs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self(batch[0]).square().mean()
        self.log_dict({f"val/{name}": loss for name in self.layers})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(16, 3, generator=torch.Generator().manual_seed(0))), batch_size=8)


def report_of(names: list[str]) -> dict[str, Any]:
    plan = FoldingPlan(
        tuple(Fold(f"norms.{name}", (Part(f"layers.{name}"),)) for name in names),
        tuple(Kept(f"kept.{name}", f"it is {name}", name) for name in names),
    )
    run = ValidationRun({f"val/{name}": 1.0 for name in names}, (1,))
    report = make_report(plan, [{"max_abs": 1e-7, "max_rel": 1e-7}] * len(names), (run, run), None, names[0], 1e-4)
    report["exports"] = {"onnx": {"failure": "".join(names)}}
    return report


class Page(HTMLParser):
    """The tags and attributes of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_fit_of_a_module_with_odd_names_leaves_what_every_fit_leaves(
    tmp_path: Path, randomised: Callable[[nn.Module], nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    folding = BatchNormFolding(dirpath=str(tmp_path / "out"))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
        callbacks=[HistogramMonitor(), UpdateRatioMonitor(every_n_steps=1), folding],
    )
    module = randomised(Odd(ODD))
    trainer.fit(module, loader(), loader())
    names = {f"norms.{name}" for name in ODD}
    folded = load_folded(Odd, tmp_path / "out" / "folded.ckpt")
    torch.testing.assert_close(folded(torch.ones(2, 3)), module.eval()(torch.ones(2, 3)))
    assert {fold["batchnorm"] for fold in json.loads((tmp_path / "out" / "folding.json").read_text())["folds"]} == names
    page = Page((tmp_path / "out" / "folding.html").read_text(encoding="utf-8"))
    assert page.tags.isdisjoint({"script", "img", "b", "link"})
    said = capsys.readouterr().out
    assert "norms.[red]" in said
    assert "norms.[/]" in said
    tags = EventAccumulator(str(trainer.log_dir)).Reload().Tags()
    assert {f"folding/scale/{printable(name)}" for name in names} <= set(tags["histograms"])


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_printed_is_text_that_no_terminal_obeys(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Console, "is_terminal", is_terminal)
    for start in range(0, len(ODD), 4):
        print_report(report_of([*ODD[start : start + 4], LONE]))
    said = capsys.readouterr().out
    # A terminal gets colours, of Rich's own.
    plain = re.sub(r"\x1b\[[\d;]*m", "", said) if is_terminal else said
    assert not [each for each in plain if not each.isprintable() and each != "\n"]
    assert "\x1b[31mred" not in said
    for name in ("[red]", "[/]", r"a\nb\r\n# c", r"\x1b[31mred\x1b]0;title\x07", r"\x00", r"\ud800"):
        # The tables cut what is long.
        assert f"norms.{name}" in plain or len(name) > 20
        assert f"kept.{name} stays: it is {name}" in plain


def test_a_page_shows_names_as_text(tmp_path: Path) -> None:
    write_html(report_of([*ODD, LONE]), tmp_path / "folding.html")
    page, harmless = Page((tmp_path / "folding.html").read_text(encoding="utf-8")), tmp_path / "harmless.html"
    write_html(report_of(["name"] * 2), harmless)
    expected = Page(harmless.read_text(encoding="utf-8"))
    assert (page.tags, page.attributes) == (expected.tags, expected.attributes)
    assert all(f"norms.{printable(name)}" in page.text for name in [*ODD, LONE])


def test_tensorboard_shows_names_as_text() -> None:
    from tensorboard.plugin_util import markdowns_to_safe_html

    text = markdown(report_of([*ODD, LONE]))
    shown = markdowns_to_safe_html([text], lambda texts: "".join(texts))
    page = Page(shown)
    assert page.tags <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
    assert page.attributes == set()
    assert all(f"norms.{printable(' '.join(name.split()))}" in page.text for name in [*ODD, LONE])


def exported(names: list[str], exports: list[str], tmp_path: Path) -> dict[str, dict[str, Any]]:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    return export_files(
        exports, trainer, Odd(names).eval(), [ExampleCall((torch.ones(2, 3),), {})], tmp_path, 1e-5, print
    )


@pytest.mark.long
def test_a_module_with_odd_names_is_exported_and_they_stay_names(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    names = [name for name in ODD if name.isprintable() and not {'"', "\\"} & set(name)]
    results = exported(names, ["onnx", "torch_export"], tmp_path)
    assert not [each for each in results.values() if "failure" in each], results
    weights = {each.name for each in onnx.load(tmp_path / "folded.onnx").graph.initializer}
    assert {f"layers.{name}.bias" for name in names} <= weights


@pytest.mark.parametrize("name", ['"', "\\", "\n", "\0", 'x"), print("ran") or getattr(self, "x'])
def test_a_name_that_torch_would_write_into_code_is_not_exported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = exported(["good", name], ["torch_export"], tmp_path)
    assert "`layers." in results["torch_export"]["failure"]
    assert "which torch takes for code" in results["torch_export"]["failure"]
    assert "ran" not in capsys.readouterr().out
    assert not (tmp_path / "folded.pt2").exists()
