"""The report of a folding: a plain dict, a JSON file, numbers for loggers and a table for the terminal."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
import torchmetrics
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lit_bnfold
from lit_bnfold.callbacks.export import FILES
from lit_bnfold.callbacks.validation import ValidationRun
from lit_bnfold.folding import Fold, FoldingPlan

Report = dict[str, Any]

# What fits 80 columns twice, beside an error and the lines of a table.
_LONGEST = 30
_MOST_FOLDS, _MOST_KEPT = 20, 10


def make_report(
    plan: FoldingPlan,
    layer_errors: Sequence[Mapping[str, float]],
    runs: tuple[ValidationRun | None, ValidationRun | None],
    output_error: Mapping[str, float] | None,
    weights: str,
    tolerance: float,
    *,
    objection: str | None = None,
    reestimated: Mapping[str, Any] | None = None,
    best: tuple[str, float] | None = None,
) -> Report:
    """Put together what a folding did and what its proof measured.

    Args:
        plan: What was folded and what was kept.
        layer_errors: For each fold its ``max_abs`` error, and its ``max_rel`` in units of the layer's largest output.
        runs: The validation of the original and of the folded module; None where there was nothing to validate on.
        output_error: The same two errors of the module's outputs, None where they were not compared.
        weights: Which weights were folded, in words.
        tolerance: The largest relative error that counts as agreement.
        objection: A sentence about what is wrong beside these errors, such as a batch that took another path than the
            one the plan was made for; None if nothing is.
        reestimated: What was re-estimated before all that, with the metrics ``before``; None if nothing was.
        best: For the best weights, the metric that they are the best by and its value when they were saved.

    Returns:
        Plain dicts, lists, strings and numbers. ``mismatch`` says in a sentence what does not agree; None if all does.
        ``moved`` names the metrics that moved by more than rounding explains, which alone is no mismatch: the loss of
        a perfect model is all rounding, and an accuracy jumps where two classes were equally likely. ``best_score``
        says whether the best weights validate as they did when they were saved; None for other weights, and where
        validation does not log what they are the best by. ``exports`` and ``inference`` are empty, and for whoever
        exports and measures to fill.
    """
    report: Report = {
        "folds": [_proven(fold, error) for fold, error in zip(plan.folds, layer_errors, strict=True)],
        "kept": plan.to_dict()["kept"],
        "validation": {
            version: dict(run.metrics) if run else {} for version, run in zip(("original", "folded"), runs, strict=True)
        },
        "output_error": None if output_error is None else dict(output_error),
        "weights": weights,
        "reestimated": None if reestimated is None else dict(reestimated),
        "exports": {},
        "inference": {},
        "tolerance": tolerance,
        "versions": _versions(),
    }
    report["mismatch"] = _mismatch(report, [run.batches for run in runs if run]) or objection
    report["best_score"] = _best_score(report, best)
    original, folded = report["validation"]["original"], report["validation"]["folded"]
    report["moved"] = [
        key
        for key in dict.fromkeys((*original, *folded))
        if _has_moved(original.get(key, math.nan), folded.get(key, math.nan), tolerance)
    ]
    return report


def _proven(fold: Fold, error: Mapping[str, float]) -> dict[str, Any]:
    """A fold with what was measured of it; with its note, if it has one."""
    proven = {
        "batchnorm": fold.batchnorm,
        "layers": list(fold.layers),
        "direction": fold.direction,
        "max_abs_error": error["max_abs"],
        "max_rel_error": error["max_rel"],
    }
    return proven if fold.note is None else proven | {"note": fold.note}


def _versions() -> dict[str, str]:
    return {
        "lit_bnfold": lit_bnfold.__version__,
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
        "torchmetrics": torchmetrics.__version__,
        "python": platform.python_version(),
    }


def _best_score(report: Report, best: tuple[str, float] | None) -> dict[str, Any] | None:
    as_saved = report["validation"]["original"] if report["reestimated"] is None else report["reestimated"]["before"]
    if best is None or best[0] not in as_saved:
        return None
    monitor, noted = best
    validated = as_saved[monitor]
    return {
        "monitor": monitor,
        "noted": noted,
        "validated": validated,
        "agrees": abs(validated - noted) <= report["tolerance"] * abs(noted),
    }


def _has_moved(original: float, folded: float, tolerance: float) -> bool:
    agree = original == folded or (math.isnan(original) and math.isnan(folded))
    return not agree and not abs(folded - original) <= 100 * tolerance * abs(original)


def _mismatch(report: Report, batches: list[tuple[int, ...]]) -> str | None:
    if len(set(batches)) > 1:
        return f"the original was validated on {batches[0]} batches and the folded module on {batches[1]}"
    tolerance, output = report["tolerance"], report["output_error"]
    worst = max(report["folds"], key=lambda fold: severity(fold["max_rel_error"]), default=None)
    if worst is not None and not worst["max_rel_error"] <= tolerance:
        where, hint = f"the folded layer {' and '.join(f'`{layer}`' for layer in worst['layers'])}", ""
        error = worst["max_rel_error"]
    elif output is not None and not output["max_rel"] <= tolerance:
        where, error = "the output of the folded module", output["max_rel"]
        hint = f"; the worst layer is `{worst['layers'][0]}` with {worst['max_rel_error']:.2e}" if worst else ""
    else:
        return None
    return f"{where} is off by {error:.2e} of its largest value, more than the tolerance of {tolerance:.2e}{hint}"


def severity(error: float) -> float:
    """An error as a key to sort by: NaN counts as infinite.

    Args:
        error: The error.
    """
    return math.inf if math.isnan(error) else error


def scalars(report: Report) -> dict[str, float]:
    """The numbers of a report under the keys that loggers and ``trainer.callback_metrics`` get.

    Args:
        report: A report.

    Returns:
        ``folding/original/<key>`` and ``folding/folded/<key>`` for every key that validation logs, and four more;
        ``folding/before_reestimation/<key>`` as well, if statistics were re-estimated.
    """
    numbers = {
        f"folding/{version}/{key}": value
        for version, metrics in report["validation"].items()
        for key, value in metrics.items()
    }
    if report["reestimated"] is not None:
        before = report["reestimated"]["before"]
        numbers |= {f"folding/before_reestimation/{key}": value for key, value in before.items()}
    if report["output_error"] is not None:
        numbers |= {f"folding/{key}_error": value for key, value in report["output_error"].items()}
    folded, every = _counts(report)
    return numbers | {"folding/folds": float(folded), "folding/kept": float(every - folded)}


def _counts(report: Report) -> tuple[int, int]:
    """How many BatchNorms are folded in what stands now, and how many there were: a mismatch undoes every fold."""
    tried = len(report["folds"])
    return tried if report["mismatch"] is None else 0, tried + len(report["kept"])


def write_report(report: Report, path: Path) -> None:
    """Write a report as JSON; infinities and NaNs, which JSON has no word for, as strings.

    Args:
        report: A report.
        path: The file.
    """
    path.write_text(json.dumps(_for_json(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _for_json(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _for_json(branch) for key, branch in tree.items()}
    if isinstance(tree, list):
        return [_for_json(branch) for branch in tree]
    return str(tree) if isinstance(tree, float) and not math.isfinite(tree) else tree


def print_report(report: Report) -> None:
    """Print a report: where each BatchNorm went, then each metric of both versions, then why the others stay.

    It fits 80 columns. Long names lose their beginning, since what tells layers apart comes last. Of many folds those
    with the largest errors are shown. Where the output is no terminal, it is plain text.

    Args:
        report: A report.
    """
    console = Console()
    # Lines and bold letters are for whoever looks at a terminal, and in the way of whoever searches a file.
    style: dict[str, Any] = {} if console.is_terminal else {"box": None, "header_style": "", "title_style": ""}
    folded, every = _counts(report)
    undone = "" if report["mismatch"] is None else ": the versions disagree"
    console.print(f"BatchNorm folding: {folded} of {every} folded{undone}", highlight=False)
    console.print(_folds_table(report, style))
    console.print(_numbers_table(report, style))
    noted = [fold for fold in report["folds"] if "note" in fold and report["mismatch"] is None]
    sentences = [f"{fold['batchnorm']} is folded: {fold['note']}." for fold in noted[:_MOST_KEPT]]
    if len(noted) > _MOST_KEPT:
        sentences.append(f"{len(noted) - _MOST_KEPT} more are folded with a note; folding.json has each.")
    sentences += [f"{kept['batchnorm']} stays: {kept['reason']}." for kept in report["kept"][:_MOST_KEPT]]
    if len(report["kept"]) > _MOST_KEPT:
        # Of versions that disagree nothing is written.
        place = "folding.json" if report["mismatch"] is None else "the callback's `plan`"
        sentences.append(f"{len(report['kept']) - _MOST_KEPT} more stay; {place} says of each why.")
    for sentence in map(_writable, sentences):
        console.print(sentence, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _folds_table(report: Report, style: Mapping[str, Any]) -> Table:
    folds, kept = report["folds"], report["kept"]
    table = Table("BatchNorm", "folded into", "error", **style)
    table.columns[2].justify = "right"
    shown = sorted(range(len(folds)), key=lambda index: -severity(folds[index]["max_rel_error"]))[:_MOST_FOLDS]
    for index in sorted(shown):
        fold = folds[index]
        _add_row(table, fold["batchnorm"], " + ".join(fold["layers"]), f"{fold['max_rel_error']:.1e}")
    if len(folds) > _MOST_FOLDS:
        _add_row(table, f"{len(folds) - _MOST_FOLDS} more", "", "smaller")
    for each in kept[:_MOST_KEPT]:
        _add_row(table, each["batchnorm"], "kept", "")
    return table


def _numbers_table(report: Report, style: Mapping[str, Any]) -> Table:
    reestimated = report["reestimated"]
    trained = ["original"] if reestimated is None else ["as trained", "re-estimated"]
    table = Table("", *trained, "folded", "difference", **style)
    for column in table.columns[1:]:
        column.justify = "right"

    def add_row(name: str, before: str, *cells: str) -> None:
        _add_row(table, name, *([] if reestimated is None else [before]), *cells)

    before = {} if reestimated is None else reestimated["before"]
    original, folded = report["validation"]["original"], report["validation"]["folded"]
    for key in dict.fromkeys((*original, *folded)):
        earlier, value, other = (metrics.get(key, math.nan) for metrics in (before, original, folded))
        add_row(key, f"{earlier:.6f}", f"{value:.6f}", f"{other:.6f}", f"{other - value:+.1e}")
    if report["output_error"] is not None:
        add_row("largest output error", "", "", "", f"{report['output_error']['max_abs']:.1e}")
    for kind, result in report["exports"].items():
        add_row(f"error of {FILES[kind]}", "", "", "", f"{result['max_abs']:.1e}" if "max_abs" in result else "failed")
    return table


def _add_row(table: Table, *cells: str) -> None:
    # A name is text, whatever brackets it has.
    table.add_row(*(Text(_shortened(_writable(cell))) for cell in cells))


def _writable(text: str) -> str:
    """A printable text with what the encoding of the terminal lacks written in letters that it has."""
    encoding = sys.stdout.encoding or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def printable(text: str) -> str:
    r"""A text as one line that shows all of its characters: a terminal obeys some, and others show nothing.

    Args:
        text: Any text.

    Example:
        >>> print(printable("a\x1b[31mb"))
        a\x1b[31mb
    """
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"
