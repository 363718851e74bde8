"""Exported files: of any batch size, run before they are put in place, and never in the way of the checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_bnfold.callbacks.export as exporting
from lit_bnfold import BatchNormFolding, FoldingError, load_folded
from lit_bnfold.callbacks.export import ExampleCall, check_extras, export_files, first_call

pytestmark = [
    # With older ones some modules are refused, in a sentence.
    pytest.mark.skipif(torch.__version__ < "2.13", reason="exports are promised from torch 2.13 on"),
]

Randomised = Callable[[nn.Module], nn.Module]


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, inputs: Tensor) -> Any:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self(batch[0])
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Bypassing(Tiny):
    """Its validation uses the network and never calls the module itself."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))


class Branching(Tiny):
    """Does one thing or another, depending on the numbers."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs) if inputs.sum() > 0 else -self.net(inputs)


class Structured(Tiny):
    """Takes a nested batch, a table of another length, a number and a flag; gives tensors in a dict."""

    def forward(self, batch: Any, table: Tensor, *, scale: float = 1.0, mask: Any = None, flag: bool = False) -> Any:
        logits = self.net(batch["inputs"]) * scale
        logits = logits if mask is None else logits.masked_fill(mask[:, None], 0.0)
        if flag:
            logits = logits + table.sum()
        return {"logits": logits, "more": (logits.argmax(-1), batch["index"] * 2)}


class Comparing(Tiny):
    """Takes no single example."""

    def forward(self, inputs: Tensor) -> Tensor:
        if inputs.shape[0] == 1:
            raise ValueError("nothing to compare with")
        return self.net(inputs)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(20, 4, generator=generator), torch.arange(20) % 3), batch_size=8)


def quiet_trainer(tmp_path: Path, **kwargs: Any) -> Trainer:
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "enable_model_summary": False}
    return Trainer(**{**defaults, **silent, "default_root_dir": tmp_path, **kwargs})


def fit(tmp_path: Path, module: nn.Module, folding: BatchNormFolding, **kwargs: Any) -> Trainer:
    trainer = quiet_trainer(tmp_path, callbacks=[folding], **kwargs)
    trainer.fit(module, loader(), loader())
    return trainer


def export(tmp_path: Path, module: nn.Module, kind: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    assert isinstance(module, LightningModule)
    trainer, calls = quiet_trainer(tmp_path), [ExampleCall(args, kwargs)]
    return export_files([kind], trainer, module.eval(), calls, tmp_path, 1e-5, lambda stage: None)[kind]


def run_onnx(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {each.name: value.numpy() for each, value in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def names_in(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}


@pytest.fixture
def onnx() -> Any:
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    return pytest.importorskip("onnx")


# What comes out -------------------------------------------------------------------------------------------------------


def test_a_fit_ends_with_files_of_the_folded_module_for_any_batch_size(
    onnx: Any,
    tmp_path: Path,
    randomised: Randomised,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Watched(BatchNormFolding):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = [torch.get_rng_state(), *(value.clone() for value in pl_module.state_dict().values())]
            flags = [module.training for module in pl_module.modules()]
            super().on_train_end(trainer, pl_module)
            after = [torch.get_rng_state(), *pl_module.state_dict().values()]
            assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
            assert flags == [module.training for module in pl_module.modules()]

    folding = Watched(export=["onnx", "torch_export", "onnx"])
    assert folding.export == ("onnx", "torch_export")
    fit(tmp_path, randomised(Tiny()), folding)
    # One file each, and nothing beside them.
    assert names_in(tmp_path) == {"folded.ckpt", "folding.html", "folding.json", "folded.onnx", "folded.pt2"}

    program = torch.export.load(tmp_path / "folded.pt2").module()
    module = load_folded(Tiny, tmp_path / "folded.ckpt")
    for size in (1, 5, 33):
        inputs = torch.randn(size, 4)
        expected = module(inputs)
        for output in (folding.folded_module(inputs), program(inputs), *run_onnx(tmp_path / "folded.onnx", inputs)):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    graph = onnx.load(tmp_path / "folded.onnx").graph
    assert [(each.name, _axes(each)) for each in graph.input] == [("inputs", ["batch", 4])]
    assert [(each.name, _axes(each)) for each in graph.output] == [("output", ["batch", 3])]

    exports = folding.report["exports"]
    assert exports.keys() == {"onnx", "torch_export"}
    assert all(0.0 <= each["max_rel"] < 1e-5 for each in exports.values())
    assert json.loads((tmp_path / "folding.json").read_text())["exports"] == exports
    said = "".join(capfd.readouterr()) + caplog.text
    assert "error of folded.onnx" in said
    assert "Wrote folded.ckpt, folded.onnx, folded.pt2, folding.html and folding.json" in said
    # The exporters keep to themselves.
    assert not [word for word in ("torchvision", "[torch.onnx]", "Obtain", "Warning") if word in said]


def _axes(value: Any) -> list[Any]:
    return [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("kind", ["onnx", "torch_export"])
def test_several_inputs_and_outputs_in_any_structure_are_exported(
    kind: str, onnx: Any, tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(part: Path, calls: list[ExampleCall]) -> list[list[Tensor]]:
        with part.open("rb") as file:
            program = torch.export.load(file).module()
        return [exporting._outputs(program, call) for call in calls]

    # A fresh process for one of these tests is enough.
    monkeypatch.setattr(exporting, "_run_program", run_here)
    module = randomised(Structured())
    batch = {"inputs": torch.randn(4, 4), "index": torch.arange(4)}
    table, mask = torch.ones(7, 2), torch.tensor([True, False, True, False])
    result = export(tmp_path, module, kind, batch, table, mask=mask, scale=2.0, flag=True)
    assert result.keys() == {"max_abs", "max_rel"}, result
    batch = {"inputs": torch.randn(9, 4), "index": torch.arange(9)}
    mask = torch.arange(9) % 2 == 0
    expected = module(batch, table, scale=2.0, mask=mask, flag=True)
    if kind == "onnx":
        logits, *more = run_onnx(tmp_path / "folded.onnx", *batch.values(), table, mask)
        graph = onnx.load(tmp_path / "folded.onnx").graph
        assert [each.name for each in graph.output] == ["logits", "more_0", "more_1"]
        assert [type(_axes(each)[0]) for each in graph.input] == [str, str, int, str]
    else:
        program = torch.export.load(tmp_path / "folded.pt2").module()
        logits, more = program(batch, table, mask=mask, scale=2.0, flag=True).values()
    torch.testing.assert_close([logits, *more], [expected["logits"], *expected["more"]], rtol=0, atol=1e-5)


def test_a_module_that_takes_no_single_example_is_checked_on_a_larger_batch_alone(randomised: Randomised) -> None:
    checks = exporting._checks(randomised(Comparing()).eval(), ExampleCall((torch.randn(4, 4),), {}))
    assert [check.call.batch_size for check in checks] == [5]


def test_an_example_input_array_serves_where_validation_does_not_call_the_module(
    tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(_kind: str, _folded: Any, calls: list[ExampleCall], part: Path, _tolerance: float) -> dict[str, float]:
        part.touch()
        noted.extend(calls)
        return {"max_abs": 0.0, "max_rel": 0.0}

    noted: list[ExampleCall] = []
    monkeypatch.setattr(exporting, "_export", note)
    for kind in (Bypassing, Tiny):
        module = randomised(kind())
        module.example_input_array = torch.randn(1, 4)
        fit(tmp_path, module, BatchNormFolding(export=["torch_export"]))
    assert len(noted[0].args[0]) == 1
    # What validation showed comes first.
    assert torch.equal(noted[1].args[0], next(iter(loader()))[0])


def test_a_fast_dev_run_exports_nothing(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding(export=["torch_export"])
    fit(tmp_path, randomised(Tiny()), folding, fast_dev_run=True)
    assert names_in(tmp_path) == set()
    assert folding.report["exports"] == {}


# What is not put in place ---------------------------------------------------------------------------------------------


def test_a_file_that_gives_other_numbers_is_not_put_in_place(
    onnx: Any, tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = exporting._write_onnx

    def wrong(module: Any, *args: Any) -> None:
        other = Tiny().eval()
        other.load_state_dict({key: value * 1.001 for key, value in module.state_dict().items()})
        right(other, *args)

    monkeypatch.setattr(exporting, "_write_onnx", wrong)
    failure = export(tmp_path, randomised(Tiny()), "onnx", torch.randn(4, 4))["failure"]
    assert "its outputs are off by" in failure
    assert "more than the tolerance of 1.00e-05" in failure
    assert names_in(tmp_path) == set()


def test_a_file_for_one_batch_size_only_is_not_put_in_place(
    onnx: Any, tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExampleCall, "dynamic_shapes", lambda *_: None)
    assert "Got: 5 Expected: 4" in export(tmp_path, randomised(Tiny()), "onnx", torch.randn(4, 4))["failure"]
    assert names_in(tmp_path) == set()


def test_a_file_that_gives_other_shapes_is_not_put_in_place(
    onnx: Any, tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flat(part: Path, calls: list[ExampleCall]) -> list[list[Tensor]]:
        first, *others = right(part, calls)
        return [first, *([output.flatten() for output in answer] for answer in others)]

    right = exporting._run_onnx
    monkeypatch.setattr(exporting, "_run_onnx", flat)
    failure = export(tmp_path, randomised(Tiny()), "onnx", torch.randn(1, 4))["failure"]
    assert failure == "for a batch of 1 it gives outputs of other shapes than the folded module"
    assert names_in(tmp_path) == set()


def test_a_program_that_a_fresh_process_cannot_run_is_not_put_in_place(
    tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(module: nn.Module, call: ExampleCall, shapes: Any, part: Path) -> None:
        # From one row, torch would make a program for one row.
        assert call.batch_size == 2
        part.write_bytes(b"no program")

    monkeypatch.setattr(exporting, "_write_program", write)
    failure = export(tmp_path, randomised(Tiny()), "torch_export", torch.randn(1, 4))["failure"]
    assert failure.startswith("a fresh process cannot run it and says: ")
    assert names_in(tmp_path) == set()


def test_an_export_leaves_no_trace_in_its_example_and_in_the_random_numbers(
    tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Writing(Tiny):
        def forward(self, inputs: Tensor, table: Tensor) -> Tensor:
            return self.net(inputs.add_(table.add_(torch.rand(())).sum()))

    def troubled(*_: Any) -> None:
        raise RuntimeError("\n\ntrouble\nat length" + " and more" * 99) from ValueError("no\n  disk")

    monkeypatch.setattr(exporting, "_write_program", troubled)
    module, inputs, table = randomised(Writing()), torch.ones(4, 4), torch.ones(7)
    before = torch.get_rng_state()
    failure = export(tmp_path, module, "torch_export", inputs, table)["failure"]
    assert failure == "ValueError: no disk"
    assert (inputs.unique().item(), table.unique().item()) == (1.0, 1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("on_mismatch", ["raise", "warn"])
def test_an_export_that_fails_is_told_when_everything_else_is_written(
    on_mismatch: Any, onnx: Any, tmp_path: Path, randomised: Randomised
) -> None:
    # They are of an earlier run, with other weights.
    for name in ("folded.onnx", "folded.pt2"):
        (tmp_path / name).write_text("old")
    folding = BatchNormFolding(export=("onnx", "torch_export"), on_mismatch=on_mismatch)
    sentence = r"failed, folded\.onnx: .*; folded\.pt2: GuardOnDataDependent\w+: Could not .*folded\.ckpt is written"
    raises, warns = pytest.raises(FoldingError, match=sentence), pytest.warns(UserWarning, match=sentence)
    with raises if on_mismatch == "raise" else warns as told:
        fit(tmp_path, randomised(Branching()), folding)
    assert names_in(tmp_path) == {"folded.ckpt", "folding.html", "folding.json"}
    assert "\n" not in str(told.value if on_mismatch == "raise" else told[-1].message)
    assert json.loads((tmp_path / "folding.json").read_text())["exports"]["onnx"].keys() == {"failure"}
    assert folding.folded_module is not None
    assert folding.report["mismatch"] is None


def test_without_an_example_nothing_is_exported_and_it_says_why(tmp_path: Path, randomised: Randomised) -> None:
    folding = BatchNormFolding(export=["torch_export"])
    with pytest.raises(
        FoldingError, match=r"folded\.pt2: validation does not call the module itself, as `self.x.` does"
    ):
        fit(tmp_path, randomised(Bypassing()), folding)
    assert names_in(tmp_path) == {"folded.ckpt", "folding.html", "folding.json"}


def test_a_module_that_cannot_be_copied_is_not_exported(tmp_path: Path, randomised: Randomised) -> None:
    module = randomised(Tiny())
    module.generator = (number for number in range(3))
    folding = BatchNormFolding(export=["torch_export"], on_mismatch="warn")
    with (
        pytest.warns(UserWarning, match="has no folded_module"),
        pytest.warns(UserWarning, match=r"folded\.pt2: the folded module cannot be copied"),
    ):
        fit(tmp_path, module, folding)


# What it refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("onnx", TypeError, r"export: expected a sequence such as \('onnx',\), got 'onnx'"),
        (["torchscript"], ValueError, r"export: expected any of \('onnx', 'torch_export'\), got 'torchscript'"),
    ],
)
def test_an_export_that_is_none_is_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BatchNormFolding(export=value)


def test_missing_extras_are_said_before_training_begins(
    tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NeverTrained(Tiny):
        def on_fit_start(self) -> None:
            raise AssertionError("too late")

    monkeypatch.setattr(exporting, "find_spec", lambda name: None if "onnx" in name else name)
    sentence = r"needs onnx and onnxruntime and onnxscript, not installed here: pip install 'lit-bnfold\[onnx\]'"
    folding = BatchNormFolding(export=["onnx"])
    with pytest.raises(ModuleNotFoundError, match=sentence):
        fit(tmp_path, randomised(NeverTrained()), folding)
    with pytest.raises(ModuleNotFoundError, match=sentence):
        folding.fold_checkpoint(quiet_trainer(tmp_path), NeverTrained(), tmp_path / "any.ckpt")
    check_extras(["torch_export"])


# The example ----------------------------------------------------------------------------------------------------------


def test_an_example_is_read_as_lightning_reads_it() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert ExampleCall.of(x) == ExampleCall((x,), {})
    assert ExampleCall.of((x, y)) == ExampleCall((x, y), {})
    assert ExampleCall.of({"a": x}) == ExampleCall((), {"a": x})


def test_a_batch_is_made_longer_by_repetition_and_shorter_by_its_first_rows() -> None:
    call = ExampleCall((torch.arange(3), {"table": torch.ones(5), "rows": torch.arange(6).view(3, 2)}), {"flag": True})
    longer, shorter = call.of_size(5), call.of_size(1)
    assert longer.args[0].tolist() == [0, 1, 2, 0, 1]
    assert longer.args[1]["rows"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert shorter.args[0].tolist() == [0]
    for each in (longer, shorter):
        assert each.args[1]["table"] is call.args[1]["table"]
        assert each.kwargs == {"flag": True}


@pytest.mark.parametrize(
    ("args", "message"), [((torch.tensor(1.0), 3), "no tensor with a batch axis"), ((torch.ones(0, 2),), "is empty")]
)
def test_an_example_without_a_batch_is_refused(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(FoldingError, match=message):
        ExampleCall(args, {}).of_size(2)


def test_the_first_call_is_noted_as_it_was() -> None:
    module, x = nn.Linear(2, 1), torch.ones(3, 2)
    with first_call(module) as calls:
        with torch.inference_mode():
            seen = x * 1.0
            module(seen)
            module(input=x + 1.0)
            seen.zero_()
        assert len(module._forward_pre_hooks) == 1
    assert [call.args[0].tolist() for call in calls] == [[[1.0, 1.0]] * 3]
    assert not calls[0].args[0].is_inference()
    assert not module._forward_pre_hooks


def test_an_example_is_noted_as_a_call_is() -> None:
    module = nn.Linear(2, 1)
    module.example_input_array = torch.ones(3, 2, requires_grad=True)
    with first_call(module) as calls:
        pass
    (noted,) = calls[0].args
    assert noted is not module.example_input_array
    assert (noted.requires_grad, noted.tolist()) == (False, [[1.0, 1.0]] * 3)


# Several processes ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_one_rank_exports_and_every_rank_knows_how_that_went(
    tmp_path: Path, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Noting(BatchNormFolding):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_train_end(trainer, pl_module)
            assert self.report["exports"] == {"torch_export": {"max_abs": 0.0, "max_rel": 0.0}}
            (tmp_path / f"noted by {trainer.global_rank}, who wrote {len(written)}").touch()

    written: list[nn.Module] = []
    monkeypatch.setattr(exporting, "_write_program", lambda *args: (written.append(args[0]), args[-1].touch()))
    monkeypatch.setattr(
        exporting, "_run_program", lambda _, calls: [exporting._outputs(written[0], call) for call in calls]
    )
    fit(tmp_path, randomised(Tiny()), Noting(export=["torch_export"]), strategy="ddp_fork", devices=2)
    files = {"folded.ckpt", "folding.html", "folding.json", "folded.pt2"}
    assert names_in(tmp_path) == files | {"noted by 0, who wrote 1", "noted by 1, who wrote 0"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the ranks are forked")
def test_every_rank_hears_of_an_export_that_failed(tmp_path: Path, randomised: Randomised) -> None:
    class Hearing(BatchNormFolding):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with pytest.raises(FoldingError, match="does not call the module itself"):
                super().on_train_end(trainer, pl_module)
            (tmp_path / f"heard by {trainer.global_rank}").touch()

    module = randomised(Tiny())
    module.validation_step = lambda batch, batch_idx: module.log("val/loss", module.net(batch[0]).sum(), sync_dist=True)
    fit(tmp_path, module, Hearing(export=["torch_export"]), strategy="ddp_fork", devices=2)
    assert names_in(tmp_path) == {"folded.ckpt", "folding.html", "folding.json", "heard by 0", "heard by 1"}
