"""All benchmarks, or some: ``python tests/benchmarks [NAME ...]``; the tables go into ``results.md`` beside this file.

A benchmark is a module here that has a function ``rows()``: name, target, measured and ratio of each line. Each runs in
a process of its own, one at a time. Those that are not run keep the table that they have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from measuring import HEADER, Row, hardware, versions

HERE = Path(__file__).parent
RESULTS = HERE / "results.md"
CODE = "import importlib, json, sys; print(json.dumps([tuple(r) for r in importlib.import_module(sys.argv[1]).rows()]))"


def names() -> list[str]:
    return [path.stem for path in sorted(HERE.glob("*.py")) if "\ndef rows(" in path.read_text(encoding="utf-8")]


def rows_of(name: str) -> list[Row]:
    """Run one benchmark; what it prints itself goes to the terminal, except for the last line."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", CODE, name], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return [Row(*row) for row in json.loads(run.stdout.splitlines()[-1])]


def section(name: str, rows: list[Row], minutes: float) -> str:
    """What ``results.md`` says of one benchmark."""
    lines = [HEADER, ("---",) * len(HEADER), *(row.cells() for row in rows)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"## {name}\n\n{time.strftime('%Y-%m-%d')}, {hardware()}; {versions()}; {minutes:.1f} minutes.\n\n{table}\n"


def main() -> None:
    known = names()
    chosen = sys.argv[1:] or known
    if not set(chosen) <= set(known):
        sys.exit(f"Expected names of benchmarks, got {', '.join(sorted(set(chosen) - set(known)))}; there are {known}.")
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else ""
    sections = {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in text.split("## ")[1:]}
    failed = []
    for name in chosen:
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        try:
            rows = rows_of(name)
        except subprocess.CalledProcessError as error:
            failed.append(f"{name} ended with {error.returncode}")
            continue
        sections[name] = section(name, rows, (time.monotonic() - start) / 60)
        print(sections[name], flush=True)
        intro = (
            "# Measured\n\nWritten by `python tests/benchmarks`; what each line means stands in the module of its name."
        )
        parts = [sections[each] for each in known if each in sections]
        RESULTS.write_text("\n".join([f"{intro}\n", *parts]), encoding="utf-8")
    if failed:
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()
