"""The package as a whole: what is imported when, by what names, and who may know what."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lit_bnfold

ROOT = Path(lit_bnfold.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_by(path: Path) -> set[str]:
    """The modules that a file imports when it is imported, not those that only a type checker or a call imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.Import):
            names.update(alias.name for alias in statement.names)
        if isinstance(statement, ast.ImportFrom):
            package = ["lit_bnfold", *path.relative_to(ROOT).parts]
            base = ".".join(package[: -statement.level]) + "." if statement.level else ""
            names.add(base + (statement.module or ""))
    return names


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh process has loaded when it has run some code."""
    code += "\nimport sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(run.stdout.splitlines()[-1].split())


# What takes long to load and only some commands use. Lightning itself needs rich and torch's compiler.
OF_SOME_COMMANDS = {"jinja2", "onnx", "onnxruntime", "onnxscript", "tensorboard", "torch.utils.tensorboard"}
OF_LIGHTNING = {"jsonargparse", "lightning", "lightning_utilities", "pytorch_lightning", "torchmetrics"}


def test_folding_loads_torch_and_nothing_of_lightning() -> None:
    code = "import lit_bnfold.folding, lit_bnfold; from lit_bnfold import fold_batchnorm, plan_folding"
    loaded = loaded_after(code)
    assert "lit_bnfold.folding.search" in loaded
    assert loaded & (OF_LIGHTNING | OF_SOME_COMMANDS | {"rich", "torch._dynamo"}) == set()


def test_help_loads_nothing_that_only_some_commands_use() -> None:
    code = """
import lit_bnfold.cli
try:
    lit_bnfold.cli.main(["--help"])
except SystemExit:
    pass
"""
    loaded = loaded_after(code)
    assert {"lightning", "jsonargparse"} < loaded
    assert loaded & (OF_SOME_COMMANDS | {"pytorch_lightning", "torch.distributed.checkpoint"}) == set()


def test_folding_imports_torch_and_the_standard_library_alone() -> None:
    files = sorted((ROOT / "folding").glob("*.py"))
    assert len(files) > 4
    for path in files:
        foreign = {
            name
            for name in imported_by(path)
            if name.split(".")[0] not in {"torch", *sys.stdlib_module_names}
            and not name.startswith("lit_bnfold.folding")
        }
        assert foreign == set(), name_of(path)


# The house, ground floor first: a file imports only from its own floor or from one below.
FLOORS = [
    "folding/", "layer_sync.py", "metrics.py", "sharded.py", "reading.py", "writing.py", "copying.py", "checkpoint.py",
    "callbacks/", "names/", "parser.py", "fold_command.py", "cli.py",
]  # fmt: skip


def test_every_file_imports_from_its_own_floor_or_from_one_below() -> None:
    def floor(module: str) -> int:
        path = module.removeprefix("lit_bnfold").replace(".", "/").strip("/")
        return next(
            (number for number, start in enumerate(FLOORS) if f"{path}/".startswith(start.replace(".py", "/"))), -1
        )

    for path in FILES:
        name = name_of(path)
        if name in ("__init__.py", "__main__.py"):
            continue
        own = floor("lit_bnfold." + name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        assert own >= 0, f"{name} stands on no floor"
        higher = {each for each in imported_by(path) if each.startswith("lit_bnfold") and floor(each) > own}
        assert higher == set(), name


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "lit_bnfold",
            "fold_batchnorm plan_folding load_folded BatchNormFolding HistogramMonitor UpdateRatioMonitor "
            "NamesDataModule BatchNormMLP FoldingError",
        ),
        ("lit_bnfold.folding", "fold_batchnorm plan_folding FoldingPlan Fold Kept FoldingError"),
        ("lit_bnfold.callbacks", "BatchNormFolding HistogramMonitor UpdateRatioMonitor"),
        ("lit_bnfold.names", "NamesDataModule BatchNormMLP"),
        ("lit_bnfold.metrics", "OutputError"),
        ("lit_bnfold.cli", "main"),
    ],
)
def test_every_public_name_can_be_imported(module: str, names: str) -> None:
    loaded = importlib.import_module(module)
    for name in names.split():
        assert getattr(loaded, name).__doc__, name
        assert name in dir(loaded)


def test_all_names_of_the_package_exist_and_no_others() -> None:
    assert {name for name in lit_bnfold.__all__ if getattr(lit_bnfold, name) is None} == set()
    assert set(dir(lit_bnfold)) == set(lit_bnfold.__all__)
    tree = ast.parse(Path(lit_bnfold.__file__).read_text(encoding="utf-8"))
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "lit_bnfold" in (node.module or "")
    ]
    for_types = {(alias.asname, node.module) for node in imports for alias in node.names}
    assert for_types == set(lit_bnfold._HOME.items())
    with pytest.raises(AttributeError, match="no attribute 'fold_everything'"):
        _ = lit_bnfold.fold_everything


# An attribute that begins with one underscore, of something that belongs to Lightning.
PRIVATE = re.compile(r"\b(trainer|pl_module|module|loop|connector|strategy|logger|callback|datamodule)s?\._[a-z]\w*")
# What torch itself keeps under such names on its modules is torch's affair.
OF_TORCH = re.compile(r"\._(parameters|buffers|modules|non_persistent_buffers_set|\w+_hooks\w*|compiled_call_impl)\b")
KNOWN = re.compile(r"_logger_connector|_checkpoint_connector|_callback_connector|_data_connector|_DummyExperiment")
IMPORTED = re.compile(
    r"from (lightning|pytorch_lightning)\S* import (.*\W)?_\w|from (lightning|pytorch_lightning)\S*\._\w"
)


def private_names(source: str) -> list[str]:
    found = [match.group() for pattern in (KNOWN, IMPORTED) for match in pattern.finditer(source)]
    return found + [match.group() for match in PRIVATE.finditer(source) if not OF_TORCH.search(match.group())]


def test_private_names_of_lightning_are_used_in_one_file_only() -> None:
    users = {name_of(path): found for path in FILES if (found := private_names(path.read_text(encoding="utf-8")))}
    assert users.keys() == {"callbacks/validation.py"}, users


def test_the_search_for_private_names_finds_them() -> None:
    lines = ("trainer._run()", "x = pl_module._trainer", "loop._results", "trainer.strategy._lightning_module")
    imports = ("from lightning.pytorch.loops import _Loop", "from lightning.pytorch.callbacks import A, _B")
    assert all(private_names(line) for line in (*lines, *imports))
    assert not private_names("module._buffers\nmodule._forward_hooks\ntrainer.fit_loop.epoch_loop")
