"""What the README says of the package is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_code_of_a_batchnorm_that_stays_is_in_the_table_and_no_other() -> None:
    package = ROOT / "lit_bnfold"
    paths = [*(package / "folding").glob("*.py"), package / "callbacks" / "batchnorm_folding.py"]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    raised = re.findall(r'_StaysError\(\s*"([a-z-]+)"', sources)
    returned = re.findall(r'return "([a-z-]+)", ', sources)
    added = re.findall(r'_add_obstacle\(\s*facts,\s*"([a-z-]+)"', sources)
    rows = "\n".join(line.split("|")[1] for line in README.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([a-z-]+)`", rows)) == {*raised, *returned, *added}


def test_it_is_short_and_sets_up_in_two_commands() -> None:
    assert len(README.splitlines()) <= 120
    commands = [line for line in README.splitlines() if line.startswith("pip install")]
    assert commands == ["pip install . && lit-bnfold fit", "pip install -e '.[dev]' && pytest"]


def test_every_config_it_names_is_there() -> None:
    for name in re.findall(r"configs/\w+\.yaml", README):
        assert (ROOT / name).is_file()


def test_every_picture_it_shows_is_there_and_small() -> None:
    pictures = re.findall(r'<img src="([^"]+)"', README)
    assert len(pictures) == 3
    for name in pictures:
        content = (ROOT / name).read_bytes()
        assert content.startswith(b"<svg " if name.endswith(".svg") else b"\x89PNG")
        assert len(content) < 200_000
