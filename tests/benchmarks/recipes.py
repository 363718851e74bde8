"""What the recipes in ``configs/`` come to: the time they take, their validation and test losses, over several seeds.

Run it with ``python tests/benchmarks/recipes.py``, which takes some 20 minutes; it prints its table with hardware and
versions, and draws ``.github/pictures/recipes.svg``, the picture of the README.

Each training is a process of its own, ``lit-bnfold fit --config configs/<recipe>.yaml --seed_everything <seed>``, and
its time begins when the process does: Python, torch and Lightning are loaded, the words are read, and at the end the
network is folded and proven. The recipes take turns, so that a slow minute of the machine is not one recipe's alone.
Time is that of the processor, which on an idle machine is the time that passes, since each process has one thread; the
time that passed is in the table as well. All recipes train the same network of 16,651 parameters. They were chosen by
their validation losses; the test losses are computed once, when all trainings are done.

What else was tried, with two to seven seeds: ``fast`` in batches of 1,024 with 1,246 steps ends at 2.1005 and 2.1020,
with 1,424 at 2.0966 to 2.0989, for a longer time; in batches of 2,048 with 624 steps at 2.1035 to 2.1057; of 4,096
with 357 steps at 2.1013 to 2.1049; of 512 and 256 it needs as many epochs, which take longer. ``best`` in batches of
2,048 with 100 and 115 epochs ends at 2.0783 and 2.0759 in the mean, for a longer time; of 4,096 with 80 epochs at
2.0749 with other batches; of 8,192 at 2.0756; a weight decay of 0.03 gives 2.0769, of 0.04 2.0776, of 0.05, as it is,
2.0755, of 0.06 2.0751, of 0.07 2.0778; a peak of 0.1 2.0767. Two seeds of one recipe differ by 0.001, as most of
these do.

How much of the notebook's time that is depends on the machine: the notebook's steps are so small that all their time is
that of Python and of calls, and a processor that is slower at these makes the recipes with large batches look better.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from measuring import Row, show  # the module beside this one
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / ".github" / "pictures" / "recipes.svg"
COLOURS = {"notebook": "#d1242f", "fast": "#1a7f37", "best": "#0969da"}

# What is asked: parts of the notebook's time, and losses.
ASKED: list[tuple[str, str, Callable[[Iterable[float]], float], float]] = [
    ("fast", "part", max, 0.07),
    ("best", "part", statistics.mean, 0.45),
    ("fast", "val_loss", max, 2.105),
    ("best", "val_loss", statistics.mean, 2.078),
    ("best", "test_loss", statistics.mean, 2.08),
]

# Each recipe with its seeds, in the order of the runs.
ORDER = [
    ("best", 1), ("fast", 1), ("fast", 2), ("notebook", 1), ("fast", 3), ("fast", 4), ("best", 2), ("fast", 5),
    ("fast", 6), ("best", 3), ("fast", 7),
]  # fmt: skip


@dataclass
class Training:
    """One training: its seconds, its losses, and how its validation loss fell."""

    recipe: str
    seed: int
    processor: float
    passed: float
    val_loss: float
    curve: list[tuple[float, float]]  # processor seconds since the process began, and the loss then
    test_loss: float = float("nan")
    part: float = float("nan")  # of the notebook's processor seconds


def train(recipe: str, seed: int, root: Path) -> Training:
    config = ROOT / "configs" / f"{recipe}.yaml"
    before, start = children_time(), time.time()
    lit_bnfold("fit", "--config", str(config), "--seed_everything", str(seed), "--trainer.default_root_dir", str(root))
    processor, passed = children_time() - before, time.time() - start
    [directory] = (root / "lightning_logs").iterdir()
    report = json.loads((directory / "folding.json").read_text(encoding="utf-8"))
    events = EventAccumulator(str(directory)).Reload().Scalars("val/loss")
    curve = [((event.wall_time - start) * processor / passed, event.value) for event in events]
    return Training(recipe, seed, processor, passed, report["validation"]["original"]["val/loss"], curve)


def test_loss(root: Path) -> float:
    [checkpoint] = root.glob("lightning_logs/*/checkpoints/last.ckpt")
    said = lit_bnfold("test", "--ckpt_path", str(checkpoint), "--trainer.enable_progress_bar", "false")
    found = re.search(r"test/loss\D*([\d.]+)", said)
    assert found, said
    return float(found.group(1))


def lit_bnfold(*arguments: str) -> str:
    command = [sys.executable, "-m", "lit_bnfold", *arguments]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.run(command, cwd=ROOT, check=True, **quiet).stdout


def children_time() -> float:
    """Processor seconds of all processes that this one has waited for."""
    times = os.times()
    return times.children_user + times.children_system


def trainings(order: Sequence[tuple[str, int]] = ORDER) -> list[Training]:
    with tempfile.TemporaryDirectory() as directory:
        roots = [Path(directory, f"{recipe}-{seed}") for recipe, seed in order]
        done = []
        for (recipe, seed), root in zip(order, roots, strict=True):
            done.append(train(recipe, seed, root))
            print(done[-1].recipe, seed, f"{done[-1].processor:.1f} s, val {done[-1].val_loss:.4f}", file=sys.stderr)
        for training, root in zip(done, roots, strict=True):
            training.test_loss = test_loss(root)
    return done


def rows() -> Iterator[Row]:
    """Train, draw the picture, and tell what each recipe comes to; ratios are parts of the notebook's time."""
    done = trainings()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw(done), encoding="utf-8")
    by_recipe = {recipe: [each for each in done if each.recipe == recipe] for recipe in COLOURS}
    notebook = statistics.mean(each.processor for each in by_recipe["notebook"])
    for recipe, several in by_recipe.items():
        for each in several:
            each.part = each.processor / notebook
            measured = f"val/loss {each.val_loss:.4f}, test/loss {each.test_loss:.4f}, {each.processor:.1f} s"
            yield Row(f"{recipe}, seed {each.seed}", "", f"{measured} ({each.passed:.1f} passed)", each.part)
    names = {"part": "part of the notebook's time", "val_loss": "val/loss", "test_loss": "test/loss"}
    for recipe, key, combine, target in ASKED:
        found = combine(getattr(each, key) for each in by_recipe[recipe])
        name = f"{recipe}, {'mean' if combine is statistics.mean else 'largest'} {names[key]}"
        yield Row(name, f"<= {target}", f"{found:.4f}", found)


def draw(done: Sequence[Training]) -> str:
    """Return the picture of time against validation loss as an SVG: a line for each training, a dot for its end."""

    def x(seconds: float) -> float:
        return round(60 + 640 * log(seconds / 5) / log(400 / 5), 1)

    def y(loss: float) -> float:
        return round(340 - 300 * (loss - 2.05) / (2.32 - 2.05), 1)

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("recipes.svg.jinja").render(trainings=done, colours=COLOURS, x=x, y=y)


def main() -> None:
    show(rows())


if __name__ == "__main__":
    main()
