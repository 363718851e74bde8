"""The report as a page for people: ``folding.html``, made of nothing but the report, so that any report can be drawn.

The page is the template ``folding.html.jinja`` beside this file. It loads nothing, so it reads the same from an archive
or a mail. Every name in it comes from somebody's module and is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_bnfold.callbacks.export import FILES
from lit_bnfold.callbacks.report import Report, printable, severity

if TYPE_CHECKING:
    from jinja2 import Template

_TEMPLATE = Path(__file__).with_name("folding.html.jinja")

# A table of more rows is closed until somebody asks for it.
_OPEN_ROWS = 60

# Pixels: the height of the picture between its frame's lines, and the margins that hold its labels.
_HEIGHT, _MARGIN = 200, 16
_MOST_TICKS = 7

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


class Dot(NamedTuple):
    """One fold in the picture: where it is, in percent from the left and in pixels from the top, and what it says."""

    x: float
    y: float
    is_within: bool
    label: str


class Picture(NamedTuple):
    """The error of each fold on a logarithmic scale.

    Attributes:
        dots: The folds, in the order of the plan.
        ticks: Heights of lines in pixels from the top, with the error that they stand for.
        numbers: Places in percent from the left, with the number of the fold that lies there.
        tolerance: Height of the tolerance's line.
        height: Height of the picture in pixels.
    """

    dots: list[Dot]
    ticks: list[tuple[float, str]]
    numbers: list[tuple[float, int]]
    tolerance: float
    height: int


def render(report: Report) -> str:
    """Draw a report.

    Args:
        report: The report of a fit, or what ``json.load`` makes of its ``folding.json``.

    Returns:
        A page of HTML that loads nothing from anywhere.

    Example:
        >>> report = {"folds": [], "kept": [], "validation": {"original": {}, "folded": {}}, "output_error": None}
        >>> report |= {"tolerance": 1e-4, "weights": "last", "mismatch": None, "moved": [], "versions": {}}
        >>> "no BatchNorm" in render(report)
        True
    """
    report = _shown(report)
    folds = [_fold(number, fold, report) for number, fold in enumerate(report["folds"], start=1)]
    return _template().render(
        report=report,
        folds=folds,
        worst=max((fold["error"] for fold in folds), key=severity, default=None),
        largest_error=_largest_error(report),
        metrics=_metrics(report),
        reestimated=report.get("reestimated"),
        inference=report.get("inference") or {},
        exports=[(FILES.get(kind, kind), result) for kind, result in (report.get("exports") or {}).items()],
        picture=_picture(folds, float(report["tolerance"])),
        open_rows=_OPEN_ROWS,
    )


def _shown(tree: Any) -> Any:
    """A report whose texts show all of their characters."""
    if isinstance(tree, dict):
        return {_shown(key): _shown(inner) for key, inner in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_shown(inner) for inner in tree]
    return printable(tree) if isinstance(tree, str) else tree


def write_html(report: Report, path: Path) -> None:
    """Write a report as a page.

    Args:
        report: A report.
        path: The file.
    """
    path.write_text(render(report), encoding="utf-8")


@cache
def _template() -> Template:
    # Nobody who only trains has to wait for it to load.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "error": _error,
        "metric": lambda value: f"{float(value):.6f}",
        "signed": lambda value: f"{float(value):+.1e}" if float(value) else "0",
        "number": lambda value: f"{value:,}",
        "size": _size,
        "duration": _duration,
    }
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _fold(number: int, fold: dict[str, Any], report: Report) -> dict[str, Any]:
    # JSON has no word for infinities and NaNs, which stand in it as strings.
    error = float(fold["max_rel_error"])
    return {
        "number": number,
        "batchnorm": fold["batchnorm"],
        "layers": fold["layers"],
        "direction": fold["direction"],
        "error": error,
        "max_abs_error": float(fold["max_abs_error"]),
        "is_within": error <= float(report["tolerance"]),
        "note": fold.get("note"),
    }


def _largest_error(report: Report) -> float | None:
    """The largest relative error that was measured, of a layer or of an output."""
    errors = [float(fold["max_rel_error"]) for fold in report["folds"]]
    if report["output_error"] is not None:
        errors.append(float(report["output_error"]["max_rel"]))
    return max(errors, key=severity, default=None)


def _metrics(report: Report) -> list[dict[str, Any]]:
    """One row for each metric that either version logged."""
    original, folded = report["validation"]["original"], report["validation"]["folded"]
    before = (report.get("reestimated") or {}).get("before", {})
    rows = []
    for key in dict.fromkeys((*original, *folded)):
        values = [float(metrics.get(key, math.nan)) for metrics in (before, original, folded)]
        row = dict(zip(("before", "original", "folded"), values, strict=True))
        row["difference"] = 0.0 if values[1] == values[2] else values[2] - values[1]
        rows.append({"key": key, "moved": key in report["moved"], **row})
    return rows


def _picture(folds: Sequence[dict[str, Any]], tolerance: float) -> Picture | None:
    if not folds:
        return None
    errors = [fold["error"] for fold in folds]
    finite = [error for error in (*errors, tolerance) if 0 < error < math.inf]
    low, high = math.floor(math.log10(min(finite))) - 1, math.ceil(math.log10(max(finite))) + 1

    def height(error: float) -> float:
        exponent = float(high) if not error < math.inf else math.log10(error) if error > 0 else float(low)
        return round(_MARGIN + _HEIGHT * (high - exponent) / (high - low), 1)

    # A single fold stands in the middle.
    places = [100 * (index + 0.5) / len(folds) for index in range(len(folds))]
    dots = [
        Dot(round(x, 3), height(fold["error"]), fold["is_within"], _label(fold))
        for x, fold in zip(places, folds, strict=True)
    ]
    step = math.ceil((high - low) / _MOST_TICKS)
    ticks = [(height(10.0**exponent), f"1e{exponent}") for exponent in range(low + 1, high, step)]
    if 0.0 in errors:
        ticks.append((height(0.0), "0"))
    if not max(errors, key=severity) < math.inf:
        ticks.append((height(math.inf), "inf"))
    shown = sorted({round(share * (len(folds) - 1) / 4) for share in range(5)})
    numbers = [(round(places[index], 3), index + 1) for index in shown]
    return Picture(dots, ticks, numbers, height(tolerance), _HEIGHT + 2 * _MARGIN)


def _label(fold: dict[str, Any]) -> str:
    return f"{fold['number']}: {fold['batchnorm']}, {_error(fold['error'])}"


def _error(value: Any) -> str:
    return f"{float(value):.1e}" if float(value) else "0"


def _size(count: float) -> str:
    """Bytes in the largest unit that gives a number of at least 1."""
    power = max((power for power in range(len(_UNITS)) if count >= 1024**power), default=0)
    return f"{count / 1024**power:,.{0 if power == 0 else 1}f} {_UNITS[power]}"


def _duration(seconds: float) -> str:
    """Seconds with three digits, in a unit that leaves few zeros."""
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("\N{MICRO SIGN}s", 1e6)
    value = seconds * factor
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
