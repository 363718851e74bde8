"""The report: its keys, what counts as a mismatch, and how it is shown."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lit_bnfold.callbacks.html_report import render
from lit_bnfold.callbacks.report import Report, make_report, print_report, scalars, write_report
from lit_bnfold.callbacks.tensorboard import markdown
from lit_bnfold.callbacks.validation import ValidationRun
from lit_bnfold.folding import Fold, FoldingPlan, Kept, Part

PLAN = FoldingPlan(
    folds=(Fold("net.norm1", (Part("net.linear1"),)), Fold("net.norm2", (Part("net.left"), Part("net.right")))),
    kept=(Kept("net.norm3", "the run did not reach it [bold]", "not-reached"),),
)


def report(
    layers: tuple[float, float] = (1e-7, 2e-7), output: float | None = 1e-7, batches: tuple[int, int] = (3, 3)
) -> Report:
    runs = tuple(ValidationRun({"val/loss": 2.4, "val/accuracy": 0.25}, (count,)) for count in batches)
    errors = [{"max_abs": error * 2, "max_rel": error} for error in layers]
    outputs = None if output is None else {"max_abs": output * 3, "max_rel": output}
    return make_report(PLAN, errors, runs, outputs, "last", 1e-4)


def test_it_has_the_keys_that_others_rely_on() -> None:
    made = report()
    promised = {"folds", "kept", "validation", "output_error", "weights", "tolerance", "versions"}
    assert made.keys() == promised | {"mismatch", "moved", "reestimated", "exports", "inference", "best_score"}
    assert (made["reestimated"], made["exports"], made["best_score"]) == (None, {}, None)
    assert made["folds"][1] == {
        "batchnorm": "net.norm2",
        "layers": ["net.left", "net.right"],
        "direction": "backward",
        "max_abs_error": 4e-7,
        "max_rel_error": 2e-7,
    }
    reason = "the run did not reach it [bold]"
    assert made["kept"] == [{"batchnorm": "net.norm3", "reason": reason, "code": "not-reached"}]
    assert made["validation"]["original"] == made["validation"]["folded"] == {"val/loss": 2.4, "val/accuracy": 0.25}
    assert made["output_error"] == {"max_abs": pytest.approx(3e-7), "max_rel": 1e-7}
    assert made["mismatch"] is None


def test_the_scalars_are_those_of_the_loggers() -> None:
    assert scalars(report()) == {
        "folding/original/val/loss": 2.4,
        "folding/original/val/accuracy": 0.25,
        "folding/folded/val/loss": 2.4,
        "folding/folded/val/accuracy": 0.25,
        "folding/max_abs_error": pytest.approx(3e-7),
        "folding/max_rel_error": 1e-7,
        "folding/folds": 2.0,
        "folding/kept": 1.0,
    }


def test_without_validation_and_outputs_there_are_no_numbers_of_them() -> None:
    made = make_report(FoldingPlan(), [], (None, None), None, "last", 1e-4)
    assert made["validation"] == {"original": {}, "folded": {}}
    assert made["output_error"] is None
    assert made["mismatch"] is None
    assert scalars(made) == {"folding/folds": 0.0, "folding/kept": 0.0}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": (1e-3, 1e-2)}, "the folded layer `net.left` and `net.right` is off by 1.00e-02"),
        ({"layers": (1e-3, 0.0)}, "the folded layer `net.linear1` is off by 1.00e-03"),
        ({"layers": (math.nan, 1e-2)}, "the folded layer `net.linear1` is off by nan"),
        ({"layers": (1e-2, math.inf)}, "the folded layer `net.left` and `net.right` is off by inf"),
        ({"output": 1e-3}, "the output of the folded module is off by 1.00e-03"),
        ({"output": math.nan}, "the output of the folded module is off by nan"),
        ({"batches": (3, 0)}, "the original was validated on (3,) batches and the folded module on (0,)"),
    ],
)
def test_what_does_not_agree_is_said_in_a_sentence(arguments: dict[str, Any], sentence: str) -> None:
    made = report(**arguments)
    assert made["mismatch"] is not None
    assert sentence in made["mismatch"]


@pytest.mark.parametrize(("validated", "agrees"), [(2.4, True), (2.4001, True), (2.401, False), (math.nan, False)])
def test_the_best_weights_validate_as_they_did_or_the_report_says_no(validated: float, agrees: bool) -> None:
    runs = ValidationRun({"val/loss": validated}, (1,)), ValidationRun({"val/loss": validated}, (1,))
    made = make_report(FoldingPlan(), [], runs, None, "best", 1e-4, best=("val/loss", 2.4))
    expected = {"monitor": "val/loss", "noted": 2.4, "validated": validated, "agrees": agrees}
    assert made["best_score"] == pytest.approx(expected, nan_ok=True)
    # What was validated with the statistics of the checkpoint counts, not with those that were re-estimated.
    reestimated = {"batches": 1, "batchnorms": [], "before": {"val/loss": 2.4}}
    made = make_report(FoldingPlan(), [], runs, None, "best", 1e-4, best=("val/loss", 2.4), reestimated=reestimated)
    assert made["best_score"]["agrees"]
    assert make_report(FoldingPlan(), [], runs, None, "best", 1e-4, best=("train/loss", 2.4))["best_score"] is None


def test_an_objection_is_a_mismatch_and_a_measured_error_goes_before_it() -> None:
    runs = (ValidationRun({}, (1,)), ValidationRun({}, (1,)))
    assert make_report(FoldingPlan(), [], runs, None, "last", 1e-4, objection="no")["mismatch"] == "no"
    errors = {"max_abs": 1.0, "max_rel": 1.0}
    assert "off by 1.00e+00" in make_report(FoldingPlan(), [], runs, errors, "", 1e-4, objection="no")["mismatch"]


def test_the_tolerance_itself_is_still_agreement() -> None:
    assert report(layers=(1e-4, 0.0), output=1e-4)["mismatch"] is None


def test_it_is_plain_json_whatever_the_numbers_are(tmp_path: Path) -> None:
    made = report(layers=(math.nan, math.inf))
    write_report(made, tmp_path / "folding.json")
    read = json.loads((tmp_path / "folding.json").read_text(), parse_constant=pytest.fail)
    assert [fold["max_rel_error"] for fold in read["folds"]] == ["nan", "inf"]
    write_report(report(), tmp_path / "folding.json")
    assert json.loads((tmp_path / "folding.json").read_text()) == report()


def test_it_is_printed_as_tables_with_a_reason_for_what_stays(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report())
    printed = capsys.readouterr().out
    for part in ("net.norm1", "net.linear1", "net.left + net.right", "2.400000", "0.250000", "largest output error"):
        assert part in printed
    # A reason is text, not markup.
    assert "net.norm3 stays: the run did not reach it [bold]." in printed.splitlines()


def test_a_fold_that_costs_digits_says_so_wherever_it_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "behind it, a rounding error is 1e4 times larger"
    plan = FoldingPlan((Fold("norm[1]", (Part("linear"),), note=note), Fold("norm2", (Part("other"),))))
    errors = [{"max_abs": 1e-7, "max_rel": 1e-7}] * 2
    made = make_report(plan, errors, (None, None), None, "last", 1e-4)
    assert [fold.get("note") for fold in made["folds"]] == [note, None]
    write_report(made, tmp_path / "folding.json")
    assert note in (tmp_path / "folding.json").read_text()
    print_report(made)
    assert f"norm[1] is folded: {note}." in capsys.readouterr().out.splitlines()
    assert render(made).count(note) == 1
    assert r"| norm\[1\] | behind it, a rounding error is 1e4 times larger |" in markdown(made)


def test_folds_that_do_not_agree_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    made = report(layers=(1e-7, 1e-2))
    numbers = scalars(made)
    assert (numbers["folding/folds"], numbers["folding/kept"]) == (0.0, 3.0)
    print_report(made)
    assert capsys.readouterr().out.startswith("BatchNorm folding: 0 of 3 folded: the versions disagree\n")
    made["folds"][0]["note"] = "a rounding error is larger behind it"
    print_report(made)
    assert "is folded" not in capsys.readouterr().out
    print_report(report())
    assert capsys.readouterr().out.startswith("BatchNorm folding: 2 of 3 folded\n")


def test_a_mismatch_shows_the_tolerance_as_it_is_and_no_layer_twice() -> None:
    runs = (ValidationRun({}, (1,)), ValidationRun({}, (1,)))
    errors = [{"max_abs": 1.0, "max_rel": 1.6e-4}, {"max_abs": 1.0, "max_rel": 1e-5}]
    mismatch = make_report(PLAN, errors, runs, None, "last", 1.5e-4)["mismatch"]
    expected = "off by 1.60e-04 of its largest value, more than the tolerance of 1.50e-04"
    assert mismatch == f"the folded layer `net.linear1` is {expected}"
    output = {"max_abs": 1.0, "max_rel": 1e-3}
    mismatch = make_report(PLAN, [*reversed(errors)], runs, output, "last", 5e-4)["mismatch"]
    assert mismatch.endswith("tolerance of 5.00e-04; the worst layer is `net.left` with 1.60e-04")


def large_report(folds: int, kept: int) -> Report:
    """A report whose names are long or hold brackets; fold number 3 has the largest error."""
    path = "backbone.layer4.residual_branch"
    plan = FoldingPlan(
        tuple(Fold(f"{path}.norm{i}", (Part(f"{path}.convolution{i}"),)) for i in range(folds)),
        tuple(Kept(f"[red]kept{i}", "the run did not reach it", "not-reached") for i in range(kept)),
    )
    errors = [{"max_abs": 1e-6, "max_rel": 1e-5 if i == 3 else 1e-7} for i in range(folds)]
    run = ValidationRun({"val/loss": 2.4, "val/accuracy_of_the_largest_class": 0.5}, (1,))
    reestimated = {"batches": 1, "batchnorms": [], "before": {"val/loss": 2.5}}
    return make_report(
        plan, errors, (run, run), {"max_abs": 1.0, "max_rel": 1e-7}, "last", 1e-4, reestimated=reestimated
    )


@pytest.mark.parametrize(("folds", "kept"), [(5, 1), (500, 70)])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_printed_fits_80_columns_and_a_screen_or_two(
    folds: int,
    kept: int,
    is_terminal: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(Console, "is_terminal", is_terminal)
    print_report(large_report(folds, kept))
    lines = capsys.readouterr().out.splitlines()
    tables = [line for line in lines if "stay" not in line]
    assert max(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in tables) <= 80
    assert len(lines) < 80
    said = "\n".join(lines)
    # The end of a name is what tells it apart, and the worst fold is among those that are shown.
    assert any("branch.norm3 " in line and "branch.convolution3 " in line and "1.0e-05" in line for line in lines)
    assert any("[red]kept0 " in line and "stays" not in line for line in lines)
    assert ("480 more" in said, "60 more stay" in said) == (folds > 20, kept > 10)


def test_where_there_is_no_terminal_it_is_plain_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_report(large_report(3, 1))
    assert capsys.readouterr().out.isascii()
    monkeypatch.setattr(Console, "is_terminal", True)
    print_report(large_report(3, 1))
    assert not capsys.readouterr().out.isascii()


def test_a_metric_that_only_one_version_logged_is_shown_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    runs = ValidationRun({"val/loss": 2.4}, (1,)), ValidationRun({"val/other": 2.0}, (1,))
    print_report(make_report(FoldingPlan(), [], runs, None, "last", 1e-4))
    assert "nan" in capsys.readouterr().out


def test_a_terminal_that_lacks_a_letter_gets_it_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    kept = [Kept("größe", "the output of `größe` is returned by the model", "kept-alive")]
    print_report(make_report(FoldingPlan(kept=tuple(kept)), [], (None, None), None, "last", 1e-4))
    assert rb"gr\xf6\xdfe stays: the output of `gr\xf6\xdfe` is returned" in written.getvalue()
