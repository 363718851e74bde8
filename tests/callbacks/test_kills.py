"""Killed at any moment while a training ends: every file is whole, and ``lit-bnfold fold`` finishes the job.

A process trains up to the end of its training and then forks for each moment: the child counts the lines of code that
write files, and dies at the one it is told. So a moment is exact, comes again, and costs no second start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_bnfold.cli import main

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked"),
]

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]

SERVER = '''
import json
import linecache
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import lightning.fabric.utilities.cloud_io as cloud_io
from lightning.pytorch import Callback

import lit_bnfold
import lit_bnfold.callbacks.batchnorm_folding as folding
from lit_bnfold.cli import main

# It runs as many lines as it has time for, and the moments of two children could not be compared.
folding.measure_inference = lambda *args, **kwargs: {}

HERE = Path(lit_bnfold.__file__).parent
FILES = [HERE / "checkpoint.py", HERE / "writing.py", *(HERE / "callbacks").glob("*.py")]
WATCHED = {*map(str, FILES), cloud_io.__file__}
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


class Moments:
    """Counts the lines of the watched files, and ends the process at one of them."""

    def __init__(self, last=None, limit=None):
        self.seen, self.last, self.limit = [], last, limit

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            if len(self.seen) == self.last:
                self.end()
            source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            self.seen.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name, source))
        return self

    def end(self):
        if self.limit is None:
            os.kill(os.getpid(), signal.SIGKILL)
        # The next write beyond that many bytes of a file ends the process in its middle.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))


class Server(Callback):
    """At the end of training, serves one child for each line of the input; a child goes on where training ended."""

    def on_train_end(self, trainer, pl_module):
        for line in sys.stdin:
            asked = json.loads(line)
            shutil.copytree("run", Path(asked["root"]) / "run")
            child = os.fork()
            if child == 0:
                os.chdir(asked["root"])
                Server.moments = Moments(asked.get("moment"), asked.get("limit"))
                sys.settrace(Server.moments)
                return
            print(json.dumps(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])), file=answers)
        os._exit(0)


fit = ["fit", *sys.argv[1:], "--trainer.default_root_dir", "run", "--folding.dirpath", "run/folded"]
main([*fit, "--seed_everything", "1", "--trainer.max_steps", "3"])
Path("run/folded/folded.onnx").write_bytes(b"made of the older weights")
main([*fit, "--trainer.max_steps", "5", "--trainer.callbacks", '[{"class_path": "__main__.Server"}]'])
sys.settrace(None)
Path("moments.json").write_text(json.dumps(Server.moments.seen))
'''


# The process that dies and comes again


@dataclass(frozen=True)
class Files:
    """What lies in a directory after the end of a training, be it a sudden one."""

    root: Path

    @property
    def folded(self) -> Path:
        return self.root / "run" / "folded"

    @property
    def last(self) -> Path:
        return self.root / "run" / "checkpoints" / "last.ckpt"

    @property
    def report(self) -> Any:
        path = self.folded / "folding.json"
        report = json.loads(path.read_text()) if path.exists() else None
        # How fast it is comes out a little different each time.
        return report and {key: value for key, value in report.items() if key != "inference"}

    @property
    def weights(self) -> Any:
        return weights_in(self.folded / "folded.ckpt")

    @property
    def named(self) -> list[Path]:
        """The files under names of their own."""
        return [path for path in self.root.rglob("*") if path.is_file() and path.suffix != ".part"]


def weights_in(path: Path) -> dict[str, Any]:
    state = torch.load(path, weights_only=True)["state_dict"]
    return {key: tensor.tolist() for key, tensor in state.items()}


class Forked:
    """The process that serves the children, which all begin with the files of an older run and a training's end."""

    def __init__(self, root: Path, process: subprocess.Popen[str]) -> None:
        self.root, self._process, self._count = root, process, 0
        self.older = Files(root)
        self.whole = self.end()
        self.moments: list[tuple[str, str, str]] = json.loads((self.whole.root / "moments.json").read_text())

    def end(self, **asked: int) -> Files:
        """Let a child end, at a moment or in the write that follows it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._count += 1
        root = self.root / f"child {self._count}"
        print(json.dumps({"root": str(root), **asked}), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        assert code == (-signal.SIGXFSZ if "limit" in asked else -signal.SIGKILL if asked else 0)
        return Files(root)

    def find(self, function: str, part: str = "") -> list[int]:
        """The moments before a line of a function, of which a part is given."""
        return [number for number, (_, where, line) in enumerate(self.moments) if where == function and part in line]


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    root = tmp_path_factory.mktemp("killed")
    letters = "abcdefghijklmnopqrstuvwxyz"
    (root / "words.txt").write_text("\n".join(letters[i % 23 : i % 23 + 2 + i % 3] for i in range(100)) + "\nzxy\n")
    (root / "server.py").write_text(SERVER)
    options = ["--config", str(Path(__file__).parents[2] / "configs" / "smoke.yaml"), "--data.words", "words.txt"]
    options += ["--trainer.val_check_interval", "3", "--last_checkpoint.every_n_train_steps", "3"]
    options += ["--trainer.logger", "false", *QUIET]
    with (root / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "server.py", *options],
            cwd=root,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        with process:
            try:
                yield Forked(root, process)
            finally:
                print((root / "log.txt").read_text())


# What has to hold


def assert_whole(files: Files, forked: Forked) -> None:
    """Every file under its own name is whole, no checkpoint is lost, and no report tells of another module."""
    for path in files.root.rglob("*.ckpt"):
        torch.load(path, weights_only=True)
    for name in ("best.ckpt", "last.ckpt"):
        states = [weights_in(each.last.with_name(name)) for each in (files, forked.older, forked.whole)]
        assert states[0] in states[1:]
    assert files.weights in (forked.older.weights, forked.whole.weights)
    if files.report is not None:
        told = forked.older if files.report == forked.older.report else forked.whole
        assert files.report == told.report
        assert files.weights == told.weights
    if (files.folded / "folded.onnx").exists():
        assert files.weights == forked.older.weights
    known = {path.relative_to(each.root) for each in (forked.older, forked.whole) for path in each.named}
    assert {path.relative_to(files.root) for path in files.named} <= known


def assert_finished_by_fold(files: Files, forked: Forked) -> None:
    """The command leaves in the same directory what the training would have left there."""
    folded = ["--ckpt_path", files.last, "--output", files.folded]
    with pytest.MonkeyPatch.context() as patch:
        # Seeding leaves them behind, and later tests would see them.
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        main(["fold", *map(str, folded), "--data.words", str(forked.root / "words.txt"), *QUIET])
    assert files.report.pop("weights") == f"checkpoint {files.last}"
    assert files.report | {"weights": "last"} == forked.whole.report
    assert files.weights == forked.whole.weights
    assert {path.name for path in files.folded.iterdir()} == {"folded.ckpt", "folding.html", "folding.json"}


def test_the_older_run_is_another_one(forked: Forked) -> None:
    """Else nobody could tell whose files are left."""
    assert forked.older.weights.keys() == forked.whole.weights.keys()
    assert forked.older.weights != forked.whole.weights
    assert forked.older.report != forked.whole.report
    assert weights_in(forked.older.last) != weights_in(forked.whole.last)
    assert {path.name for path in forked.older.folded.iterdir()} == {
        "folded.ckpt",
        "folding.html",
        "folding.json",
        "folded.onnx",
    }
    assert {path.name for path in forked.whole.folded.iterdir()} == {"folded.ckpt", "folding.html", "folding.json"}


RENAMES = ["last.ckpt", "folded.ckpt", "folding.html", "folding.json"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("renamed", RENAMES)
def test_a_kill_beside_a_renaming_leaves_whole_files_of_one_run(renamed: str, after: bool, forked: Forked) -> None:
    renames = forked.find("whole_file", "part.replace(path)")
    assert len(renames) == len(RENAMES)
    files = forked.end(moment=renames[RENAMES.index(renamed)] + after)
    assert_whole(files, forked)
    done = RENAMES.index(renamed) + after
    assert weights_in(files.last) == weights_in((forked.whole if done >= 1 else forked.older).last)
    assert files.weights == (forked.whole if done >= 2 else forked.older).weights
    # The older report goes before the renaming that would leave it beside a module that it does not tell of.
    reports = {"last.ckpt": forked.older.report, "folding.json": forked.whole.report if after else None}
    assert files.report == reports.get(renamed)
    if done >= 1:
        assert_finished_by_fold(files, forked)


# For each write the function that leads to it, and how many bytes get through.
WRITES = {
    "last.ckpt": ("_save", 1_000),
    "folded.ckpt": ("_write", 1_000),
    "folding.html": ("write_html", 100),
    "folding.json": ("write_report", 100),
}


@pytest.mark.parametrize("written", WRITES)
def test_a_kill_in_the_middle_of_a_write_leaves_whole_files(written: str, forked: Forked) -> None:
    function, limit = WRITES[written]
    files = forked.end(moment=forked.find(function)[0], limit=limit)
    assert_whole(files, forked)
    assert (files.report is None) == (written in ("folding.html", "folding.json"))
    if written != "last.ckpt":
        assert_finished_by_fold(files, forked)


@pytest.mark.long
def test_a_kill_at_any_moment_leaves_whole_files_and_fold_finishes_the_job(forked: Forked) -> None:
    writing = [
        number
        for number, (file, function, _) in enumerate(forked.moments)
        if file in ("checkpoint.py", "writing.py", "cloud_io.py", "last_checkpoint.py")
        or function in ("_write", "write_html", "write_report")
    ]
    others = [number for number, (file, *_) in enumerate(forked.moments) if file != "validation.py"][::20]
    for number in sorted({*writing, *others, *range(0, len(forked.moments), 1_000)}):
        files = forked.end(moment=number)
        assert_whole(files, forked)
        if weights_in(files.last) == weights_in(forked.whole.last):
            assert_finished_by_fold(files, forked)
