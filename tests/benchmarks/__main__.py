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

# What runs in the process of a benchmark; whatever else it prints does not begin so.
MARK = "row: "
CODE = f"""
import importlib, json, sys
for row in importlib.import_module(sys.argv[1]).rows():
    print("{MARK}" + json.dumps(tuple(row)), flush=True)
"""


def names() -> list[str]:
    return [path.stem for path in sorted(HERE.glob("*.py")) if "\ndef rows(" in path.read_text(encoding="utf-8")]


def rows_of(name: str) -> list[Row]:
    """Run one benchmark, and print each line when it is there."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command, environment = [sys.executable, "-c", CODE, name], {**os.environ, "PYTHONPATH": path}
    rows = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                rows.append(Row(*json.loads(line.removeprefix(MARK))))
                print("  ".join(rows[-1].cells()), flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return rows


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
        intro = (
            "# Measured\n\nWritten by `python tests/benchmarks`; what each line means stands in the module of its name."
        )
        parts = [sections[each] for each in known if each in sections]
        RESULTS.write_text("\n".join([f"{intro}\n", *parts]), encoding="utf-8")
    if failed:
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    main()
