"""The page ``folding.html``: what it says, that it loads nothing, and that a name in it stays a name."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lit_bnfold.callbacks.html_report import render, write_html
from lit_bnfold.callbacks.report import Report, make_report, write_report
from lit_bnfold.callbacks.validation import ValidationRun
from lit_bnfold.folding import Fold, FoldingPlan, Kept, Part

ATTACK = "<script>alert(1)</script>\"' onload=x {{ 7 * 7 }} &amp;"

INFERENCE: dict[str, Any] = {
    "size": {
        "original": {"parameters": 16651, "buffers": 457, "bytes": 68432},
        "folded": {"parameters": 16424, "buffers": 0, "bytes": 65696},
    },
    "operations": {"original": 17, "folded": 11},
    "latency": [{"batch_size": 1024, "runs": 33, "seconds": {"original": 1.5e-3, "folded": 1.2e-4}}],
    "not_measured": ["batch of 1: it takes two"],
    "setup": {"device": "cpu", "hardware": "A Processor", "threads": 1},
}


def report(folds: int = 3, kept: int = 1, errors: dict[int, float] | None = None, **changes: Any) -> Report:
    """A report of so many folds, in which the errors of some are given by number."""
    plan = FoldingPlan(
        tuple(Fold(f"net.norm{i}", (Part(f"net.linear{i}"),)) for i in range(folds)),
        tuple(Kept(f"net.kept{i}", "the run did not reach it", "not-reached") for i in range(kept)),
    )
    sizes = [(errors or {}).get(i, 1e-7) for i in range(folds)]
    runs = (ValidationRun({"val/loss": 2.4}, (1,)), ValidationRun({"val/loss": 2.5}, (1,)))
    made = make_report(plan, [{"max_abs": 2 * e, "max_rel": e} for e in sizes], runs, None, "last", 1e-4)
    return made | {"inference": INFERENCE} | changes


class Page(HTMLParser):
    """The elements of a page, its text, and what stands in its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag in ("th", "td"):
            self.words.append(" ")
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def picture_of(text: str) -> ElementTree.Element:
    """The second drawing of a page, the one with the dots."""
    found = re.findall(r'<svg class="plot".*?</svg>\s*</div>', text, flags=re.DOTALL)
    return ElementTree.fromstring(found[0].removesuffix("</div>").strip())


def test_it_says_what_was_folded_what_stays_and_what_it_gained() -> None:
    page = Page(render(report()))
    for words in (
        "3 of 4 BatchNorms are folded",
        "is 1.0e-07; up to 1.0e-04 counts as agreement",
        "net.norm1 net.linear1 backward 1.0e-07",
        "net.kept0 the run did not reach it not-reached",
        "val/loss 2.400000 2.500000 +1.0e-01, more than rounding explains",
        "Parameters 16,651 16,424 -1.4 %",
        "Numbers in buffers 457 0 -100.0 %",
        "66.8 KiB 64.2 KiB",
        "Operations 17 11",
        "Latency, batch of 1,024 1.50 ms 120 \N{MICRO SIGN}s -92.0 %",
        "12.50 times as fast; median of 33 interleaved runs",
        "batch of 1: it takes two.",
        "A Processor (cpu), 1 thread, torch",
    ):
        assert words in page.text


@pytest.mark.parametrize(
    ("made", "headline"),
    [
        (report(0, 0, validation={"original": {}, "folded": {}}), "There was no BatchNorm to fold"),
        (report(0, 2), "No BatchNorm could be folded"),
        (report(1, 0), "The one BatchNorm is folded"),
        (report(5, 0), "All 5 BatchNorms are folded"),
        (report(2, 0, {1: 1.0}), "The folded network does not do what the original does"),
    ],
)
def test_the_headline_is_the_verdict(made: Report, headline: str) -> None:
    assert headline in Page(render(made)).text


def test_metrics_before_reestimation_have_a_column_of_their_own() -> None:
    made = report(reestimated={"batches": 2, "before": {"val/loss": 2.7}})
    assert "as trained re-estimated folded difference val/loss 2.700000 2.400000 2.500000" in Page(render(made)).text


def test_a_page_loads_nothing_and_runs_nothing() -> None:
    page = Page(render(report()))
    assert page.tags.keys().isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form"})
    assert {name for name, _ in page.attributes}.isdisjoint({"src", "href", "style", "onload", "onclick"})
    assert "url(" not in render(report())
    assert "@import" not in render(report())


def test_names_and_reasons_stay_text_whatever_is_in_them() -> None:
    made = report(1, 0, weights=ATTACK, mismatch=ATTACK, moved=[])
    made["folds"][0] |= {"batchnorm": ATTACK, "layers": [ATTACK], "direction": ATTACK}
    made["kept"] = [{"batchnorm": ATTACK, "reason": ATTACK, "code": ATTACK}]
    made["validation"] = {"original": {ATTACK: 1.0}, "folded": {}}
    made["versions"] = {ATTACK: ATTACK, "torch": ATTACK}
    made["exports"] = {ATTACK: {"failure": ATTACK}}
    made["inference"] = INFERENCE | {"not_measured": [ATTACK], "setup": INFERENCE["setup"] | {"hardware": ATTACK}}
    harmless = {**report(1, 1), "exports": {"onnx": {"failure": "no"}}, "mismatch": "no"}
    page, expected = Page(render(made)), Page(render(harmless))
    assert page.tags - Counter(wbr=page.tags["wbr"]) == expected.tags - Counter(wbr=expected.tags["wbr"])
    # Weights, mismatch, fold (3), dot, kept (3), metric, versions (4), export (2), what was not measured, hardware.
    assert page.text.count(ATTACK) == 18


@pytest.mark.parametrize("folds", [1, 20, 500])
def test_the_picture_has_a_dot_for_each_fold_in_the_order_of_the_plan(folds: int) -> None:
    picture = picture_of(render(report(folds, errors={i: 10 ** -(5 + i % 4) for i in range(folds)})))
    dots = picture.findall("circle")
    places = [float(dot.attrib["cx"].rstrip("%")) for dot in dots]
    assert len(dots) == folds
    assert places == sorted(set(places))
    assert all(0 < place < 100 for place in places)
    assert dots[0].findtext("title") == "1: net.norm0, 1.0e-05"
    # A tenth of an error is always as far below.
    heights = [float(dot.attrib["cy"]) for dot in dots]
    steps = [below - above for above, below in pairwise(heights[:4])]
    assert steps == pytest.approx([min(steps, default=0)] * len(steps), abs=0.2)
    assert all(step > 10 for step in steps)
    limit = float(next(line for line in picture.iter("line") if line.attrib["class"] == "tolerance").attrib["y1"])
    assert all(limit < height for height in heights)


def test_what_is_above_the_tolerance_is_told_by_shape_and_words_too() -> None:
    made = report(4, errors={0: 0.0, 1: 1e-2, 2: math.inf, 3: math.nan})
    text = render(made)
    picture = picture_of(text)
    crosses = picture.findall("svg")
    assert [cross.findtext("title") for cross in crosses] == [
        "2: net.norm1, 1.0e-02", "3: net.norm2, inf", "4: net.norm3, nan",
    ]  # fmt: skip
    heights = [float(cross.attrib["y"]) for cross in crosses]
    assert heights[1] == heights[2] < heights[0] < float(picture.findall("circle")[0].attrib["cy"])
    assert "3 of 4 above the tolerance (crosses), the largest is inf" in Page(text).text.replace("nan.", "inf.")
    assert Page(text).text.count(", above the tolerance") == 3


def test_every_cell_of_a_table_has_a_column_with_a_head() -> None:
    page = Page(render(report()))
    heads = [value for name, value in page.attributes if name == "scope"]
    assert heads.count("col") == 4 + 5 + 3 + 6
    assert page.tags["table"] == 4
    assert heads.count("row") == 1 + 5 + 1 + 3


def test_a_page_can_be_drawn_again_from_the_file_of_numbers(tmp_path: Path) -> None:
    made = report(3, errors={0: math.inf, 1: math.nan})
    write_report(made, tmp_path / "folding.json")
    write_html(made, tmp_path / "folding.html")
    again = render(json.loads((tmp_path / "folding.json").read_text()))
    assert again == (tmp_path / "folding.html").read_text(encoding="utf-8")


def test_a_report_of_an_older_version_can_be_drawn_as_well() -> None:
    made = {key: value for key, value in report().items() if key not in ("inference", "reestimated", "exports")}
    assert "3 of 4 BatchNorms are folded" in Page(render(made)).text


def test_a_long_table_is_closed_until_somebody_asks_for_it() -> None:
    attributes = [name for name, _ in Page(render(report(60, 61))).attributes]
    assert attributes.count("open") == 1
