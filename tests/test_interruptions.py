"""Stopped at any moment by any means, ``lit-bnfold fit`` goes on and ends with the bits of a run that nobody stopped.

A process that has imported everything forks for each command, so a trial costs no import. What a child prints, and how
it ends, is what a user would see of ``lit-bnfold``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked and looked at in /proc")

SERVER = """
import atexit
import json
import os
import queue
import signal
import sys
import threading
import time
from pathlib import Path

import lightning.fabric.utilities.cloud_io as cloud_io
import torch
import torch.utils.tensorboard
from lines import Lines
from tensorboard.summary.writer import event_file_writer

import lit_bnfold
import lit_bnfold.cli
from lit_bnfold.__main__ import run

torch.set_num_threads(1)
# In so far as they write files, decide what is in them, or share something with the thread that writes them.
WATCHED = {cloud_io.__file__, *map(str, Path(lit_bnfold.__file__).parent.rglob("*.py"))}
WATCHED |= {event_file_writer.__file__, queue.__file__, threading.__file__}
WATCHED -= {str(path) for path in (Path(lit_bnfold.__file__).parent / "folding").glob("*.py")}
answers = os.fdopen(os.dup(1), "w", buffering=1)


def begin(asked):
    os.chdir(asked["root"])
    # Not on a disk that is about to be full.
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, number in ((log, 1), (log, 2), (os.open(os.devnull, os.O_RDONLY), 0)):
        os.dup2(stream, number)
    # A shell starts what runs in the background deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "uid" in asked:
        os.setgroups([])
        os.setgid(asked["uid"])
        os.setuid(asked["uid"])
    sys.argv = ["lit-bnfold", *asked["args"]]
    if "timed" in asked:
        atexit.register(lambda: Path("seconds.txt").write_text(str(time.process_time())))
    if "line" in asked:
        lines = Lines(WATCHED, asked["line"], asked["signum"])
        atexit.register(lambda: Path("lines.txt").write_text(str(lines.seen)) if asked["line"] == 0 else None)
        sys.settrace(lines)


# What is done once in a process is done, and the children are so much faster.
os.dup2(2, 1)
lit_bnfold.cli.main([*sys.argv[1:], "--trainer.default_root_dir", "warm"])

for request in sys.stdin:
    child = os.fork()
    if child == 0:
        begin(json.loads(request))
        run()
        sys.exit()
    print(child, file=answers)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)
"""


# The commands and what they leave


class Commands:
    """Runs commands in forked processes, one after the other."""

    def __init__(self, root: Path, process: subprocess.Popen[str]) -> None:
        self.root, self._process = root, process

    def run(
        self, root: Path, *args: object, during: Callable[[int], None] = lambda child: None, **asked: int
    ) -> tuple[int, str]:
        """Run one command in a directory, and do something to its process meanwhile; gives its end and its words."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        log = self.root / "log.txt"
        request = {"root": str(root), "log": str(log), "args": [*map(str, args)], **asked}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        during(int(self._process.stdout.readline()))
        code = int(self._process.stdout.readline())
        return code, log.read_text()


@pytest.fixture(scope="module")
def commands(lines: type) -> Iterator[Commands]:
    # Not in pytest's own directory, which the next session closes to other users, whatever goes on in it.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        root = Path(directory).resolve()
        letters = "abcdefghijklmnopqrstuvwxyz"
        (root / "words.txt").write_text(
            "\n".join(letters[i % 23 : i % 23 + 2 + i % 3] for i in range(100)) + "\nz\nx\nzx\nzxy\n"
        )
        (root / "server.py").write_text(SERVER)
        imports = "from __future__ import annotations\nimport os, sys\n"
        (root / "lines.py").write_text(imports + inspect.getsource(lines))
        # Another user reads the words and finds the way to its directory.
        root.chmod(0o755)
        with (
            (root / "server.txt").open("w") as log,
            subprocess.Popen(
                [sys.executable, "server.py", *RECIPES[0].args(root / "words.txt")],
                cwd=root,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            ) as process,
        ):
            yield Commands(root, process)


@dataclass(frozen=True)
class Recipe:
    """One way to train: what is folded, and whether what is resumed lies in a directory of its own."""

    weights: str
    logger: bool

    def args(self, words: Path) -> list[str]:
        """What is saved and what is validated falls together at some steps, and the best of them is in the middle."""
        args = [
            "fit",
            "--config",
            str(Path(__file__).parents[1] / "configs" / "smoke.yaml"),
            "--data.words",
            str(words),
        ]
        args += ["--data.batch_size", "4", "--model.lr", "1", "--model.milestones", "[17]", "--trainer.max_steps", "24"]
        args += ["--trainer.val_check_interval", "4", "--last_checkpoint.every_n_train_steps", "6"]
        args += ["--folding.weights", self.weights, "--trainer.enable_progress_bar", "false"]
        args += ["--trainer.enable_model_summary", "false"]
        return args if self.logger else [*args, "--trainer.logger", "false"]


RECIPES = [Recipe(weights, logger) for weights in ("last", "best") for logger in (True, False)]


@dataclass(frozen=True)
class Outcome:
    """What a training has left, in so far as it must not depend on how often it was stopped."""

    last: dict[str, Any]
    best: dict[str, Any]
    folded: dict[str, Any]
    report: dict[str, Any]


def latest_directory(root: Path) -> Path:
    runs = [path.parents[1] for path in root.rglob("checkpoints/last.ckpt")]
    return max(runs, key=lambda run: (run / "checkpoints" / "last.ckpt").stat().st_mtime)


def outcome(root: Path) -> Outcome:
    directory = latest_directory(root)
    last = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    report = json.loads((directory / "folding.json").read_text())
    [saved] = [state for key, state in last["callbacks"].items() if "monitor" in key]
    best = torch.load(root / saved["best_model_path"], weights_only=True)
    folded = torch.load(directory / "folded.ckpt", weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    # Where the weights came from is told in another way, and how fast they are comes out differently each time.
    told = {key: value for key, value in report.items() if key not in ("weights", "inference", "best_score")}
    return Outcome(
        {key: last[key] for key in kept} | {"score": saved["best_model_score"]},
        {key: best[key] for key in kept},
        folded["state_dict"],
        told,
    )


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two outcomes differ, be it by one bit."""
    if isinstance(one, Outcome):
        one, other = vars(one), vars(other)
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [each for key in one for each in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [
            each
            for number, pair in enumerate(zip(one, other, strict=True))
            for each in differences(*pair, f"{name}.{number}")
        ]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if same else [name]


@dataclass
class Trial:
    """A training that was disturbed, what it said about that, and everything that was not as it has to be."""

    how: str
    code: int = 0
    said: str = ""
    is_hit: bool = False
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.how}: it ended with {self.code}, {self.wrong or 'all well'}"


class Training:
    """Trains by one recipe, undisturbed once, and then as often as it is disturbed."""

    def __init__(self, commands: Commands, recipe: Recipe) -> None:
        self.commands, self.recipe = commands, recipe
        self.args = recipe.args(commands.root / "words.txt")
        # The process that forks may still be starting.
        commands.run(self.new_root("help"), "--help")
        root = self.new_root("whole")
        code, said = commands.run(root, *self.args)
        assert code == 0, said
        self.whole = outcome(root)
        assert self.whole.best["global_step"] == 12
        self.names = {path.name for path in files_in(root)}

    @cached_property
    def seconds(self) -> float:
        """How long it computes until all is done; to end the process afterwards takes longer than that."""
        root = self.new_root("timed")
        self.commands.run(root, *self.args, timed=1)
        return float((root / "seconds.txt").read_text())

    @cached_property
    def lines(self) -> int:
        """How many lines of the watched files run."""
        root = self.new_root("traced")
        self.commands.run(root, *self.args, line=0, signum=0)
        return int((root / "lines.txt").read_text())

    def new_root(self, name: str) -> Path:
        root = self.commands.root / f"{name} {self.recipe.weights} {'with' if self.recipe.logger else 'without'} logger"
        root.mkdir()
        return root

    def disturb(self, root: Path, trial: Trial, **how: Any) -> None:
        """Run it, or go on with it, into a disturbance, and see what that has left."""
        again = ["--ckpt_path", "last"] if saved_in(root) else []
        trial.code, trial.said = self.commands.run(root, *self.args, *again, **how)
        trial.is_hit |= not is_done(trial)
        trial.wrong += [f"half written: {path}" for path in unreadable(root)]
        unknown = {path.name for path in files_in(root) if path.suffix != ".part"} - self.names
        # Event files have the time in their names.
        trial.wrong += [f"unknown file: {name}" for name in unknown if not name.startswith("events.out")]

    def judge(self, root: Path, trial: Trial, sentence: str) -> None:
        """See what it has said: the sentence, if it was not done."""
        if "Traceback" in trial.said:
            trial.wrong.append(f"a traceback: {trial.said}")
        if trial.code == 0 and not is_done(trial):
            trial.wrong.append(f"the code of a success: {trial.said}")
        if not is_done(trial) and not re.search(sentence, trial.said):
            trial.wrong.append(f"no sentence: {trial.said}")

    def go_on(self, root: Path, trial: Trial, **who: int) -> None:
        """Do what a user does next, and compare."""
        was_saved = bool(saved_in(root))
        code, said = self.commands.run(root, *self.args, "--ckpt_path", "last", **who)
        if not was_saved:
            if code != 1 or "lit-bnfold: Found no lightning_logs/*/checkpoints/last.ckpt in" not in said:
                trial.wrong.append(f"nothing to go on from: {said}")
            code, said = self.commands.run(root, *self.args, **who)
        offered = re.search(rf"To fold the {self.recipe.weights} checkpoint: lit-bnfold (fold .*)", said)
        if offered:
            output = ["--output", latest_directory(root)]
            code, said = self.commands.run(root, *shlex.split(offered[1]), *output, **who)
        if code != 0:
            trial.wrong.append(f"it does not go on: {said}")
            return
        trial.wrong += [f"half written in the end: {path}" for path in unreadable(root)]
        trial.wrong += [f"another {name}" for name in differences(outcome(root), self.whole)]


def is_done(trial: Trial) -> bool:
    """Whether it came to its end before it was disturbed, or all the same."""
    return re.search("^Wrote folded|folded nothing", trial.said, re.MULTILINE) is not None


def files_in(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]


def saved_in(root: Path) -> list[Path]:
    return list(root.rglob("checkpoints/last.ckpt"))


READ: dict[str, Callable[[Path], object]] = {
    ".ckpt": lambda path: torch.load(path, weights_only=True),
    ".json": lambda path: json.loads(path.read_text()),
    ".html": lambda path: path.read_text().index("</html>"),
}


def unreadable(root: Path) -> list[Path]:
    """The files that are not whole, under names of whole ones."""
    return [path for path in files_in(root) if not is_readable(path)]


def is_readable(path: Path) -> bool:
    try:
        if path.name == "config.yaml":
            # What is written last.
            return "ckpt_path" in yaml.safe_load(path.read_text())
        READ.get(path.suffix, Path.stat)(path)
    # A damaged file can end the reading in any way.
    except Exception:
        return False
    return True


@pytest.fixture(scope="module")
def trainings(commands: Commands) -> Callable[[Recipe], Training]:
    return cache(partial(Training, commands))


# What disturbs


def after(seconds: float, act: Callable[[int], None]) -> Callable[[int], None]:
    """Does something to a process when it has computed for a while, if it still runs."""

    def during(child: int) -> None:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            # What others do on this machine does not move the moment.
            while cpu_seconds(child) < seconds:
                time.sleep(0.003)
            act(child)

    return during


def cpu_seconds(process: int) -> float:
    """How long a process has computed; infinite when it has ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    if fields[0] == "Z":
        return math.inf
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def limit_files(child: int) -> None:
    """Let no file become longer than a small checkpoint; a full disk fails in the same way, with another number."""
    resource.prlimit(child, resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))


@contextlib.contextmanager
def full_disk(root: Path, room: int) -> Iterator[Callable[[int], None]]:
    """A small disk, which can be filled up to some bytes while a process runs."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=755", "tmpfs", root], check=True)
    filler = root / "filler"

    def fill(child: int) -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4_096))
        os.truncate(filler, max(0, filler.stat().st_size - room))

    try:
        yield fill
    finally:
        filler.unlink(missing_ok=True)


def forbid(root: Path, child: int) -> None:
    """Take away the permission to write."""
    for path in (root, *root.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            path.chmod(0o555 if path.is_dir() else 0o444)


def allow(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
SENTENCES = {
    signal.SIGKILL: "",
    signal.SIGTERM: r"^lit-bnfold: stopped by SIGTERM\.$",
    signal.SIGINT: r"^(lit-bnfold: stopped by Ctrl-C\.|Detected KeyboardInterrupt, attempting graceful shutdown.*)$",
}
NOT_WRITTEN = (
    r"^lit-bnfold: \[Errno \d+\] (No space left on device|File too large|Permission denied): '.*'\. "
    r"(Make room for it|Allow it), or choose another place\.$"
)
TRIALS = 50


def report(trials: Sequence[Trial]) -> None:
    """Give the numbers, and every loss."""
    codes = Counter(trial.code for trial in trials)
    hit = sum(trial.is_hit for trial in trials)
    losses = [trial for trial in trials if trial.wrong]
    print(f"{len(trials)} trials, {hit} hit, ends: {dict(codes)}, losses: {len(losses)}", *losses, sep="\n")
    assert not losses


@pytest.mark.long
@pytest.mark.parametrize("signum", SIGNALS)
def test_fifty_signals_at_random_moments_lose_nothing(
    signum: signal.Signals, trainings: Callable[[Recipe], Training]
) -> None:
    """At moments of time, and at lines of what writes files and folds; each third training is stopped twice."""
    rng, trials = random.Random(signum), []
    for number in range(TRIALS):
        training = trainings(RECIPES[number % len(RECIPES)])
        root, trial = training.new_root(f"{signum} {number}"), Trial(f"{signum.name} {training.recipe}")
        for _ in range(1 + (number % 3 == 2)):
            if rng.random() < 0.6:
                seconds = rng.uniform(0, training.seconds)
                trial.how += f", after {seconds:.3f} s"
                training.disturb(root, trial, during=after(seconds, lambda child: os.kill(child, signum)))
            else:
                line = rng.randint(1, training.lines)
                trial.how += f", at line {line}"
                training.disturb(root, trial, line=line, signum=int(signum))
            if signum != signal.SIGKILL:
                training.judge(root, trial, "(?m)" + SENTENCES[signum])
        training.go_on(root, trial)
        print(number, trial)
        trials.append(trial)
        shutil.rmtree(root)
    report(trials)


def can_mount(root: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "tmpfs", root]
    done = (
        shutil.which("mount") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    if done:
        subprocess.run(["umount", root], check=True)
    return done


@pytest.mark.long
def test_a_disk_that_is_full_at_a_random_moment_loses_nothing(
    trainings: Callable[[Recipe], Training], tmp_path: Path
) -> None:
    if not can_mount(tmp_path):
        pytest.skip("no right to mount a small disk")
    rng, trials = random.Random(1), []
    for number in range(TRIALS):
        training = trainings(RECIPES[number % len(RECIPES)])
        seconds, room = rng.uniform(0, training.seconds), rng.choice([0, 4_096, 16_384])
        trial = Trial(f"full but {room} bytes, {training.recipe}, after {seconds:.3f} s")
        root = training.new_root(f"full {number}")
        try:
            with full_disk(root, room) as fill:
                training.names.add("filler")
                training.disturb(root, trial, during=after(seconds, fill))
            training.judge(root, trial, "(?m)" + NOT_WRITTEN)
            training.go_on(root, trial)
        finally:
            subprocess.run(["umount", root], check=True)
        print(number, trial)
        trials.append(trial)
    report(trials)


@pytest.mark.long
def test_a_directory_that_must_not_be_written_from_a_random_moment_on_loses_nothing(
    trainings: Callable[[Recipe], Training],
) -> None:
    # Permissions do not bind root.
    who = {"uid": 65_534} if os.getuid() == 0 else {}
    rng, trials = random.Random(2), []
    for number in range(TRIALS):
        training = trainings(RECIPES[number % len(RECIPES)])
        seconds = rng.uniform(0, training.seconds)
        trial = Trial(f"forbidden, {training.recipe}, after {seconds:.3f} s")
        root = training.new_root(f"forbidden {number}")
        if who:
            os.chown(root, *[who["uid"]] * 2)
        training.disturb(root, trial, during=after(seconds, partial(forbid, root)), **who)
        allow(root)
        training.judge(root, trial, "(?m)" + NOT_WRITTEN)
        training.go_on(root, trial, **who)
        print(number, trial)
        trials.append(trial)
    report(trials)


# The short form


def test_a_training_that_is_stopped_says_so_and_goes_on(trainings: Callable[[Recipe], Training]) -> None:
    """Once by SIGTERM, then by a disk that is as good as full."""
    training = trainings(RECIPES[2])
    root, trial = training.new_root("short"), Trial("SIGTERM and a limit")

    def terminate(child: int) -> None:
        wait_for(root, "config.yaml")
        os.kill(child, signal.SIGTERM)

    def limit(child: int) -> None:
        wait_for(root, "version_1/config.yaml" if saved_in(root) else "config.yaml")
        limit_files(child)

    training.disturb(root, trial, during=terminate)
    training.judge(root, trial, "(?m)" + SENTENCES[signal.SIGTERM])
    training.disturb(root, trial, during=limit)
    training.judge(root, trial, "(?m)" + NOT_WRITTEN)
    training.go_on(root, trial)
    report([trial])


def wait_for(root: Path, name: str) -> None:
    """Wait for a file of a training that has begun."""
    deadline = time.monotonic() + 60
    while not list(root.rglob(name)) and time.monotonic() < deadline:
        time.sleep(0.01)
