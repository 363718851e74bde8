"""The folded module as files that run without its code: ``folded.onnx`` and ``folded.pt2``.

A file is written beside its place, run there on batches of other sizes than the one it was made with, and compared with
the folded module; only then it gets its name. All of that happens on the CPU, where everybody can load it.
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils import _pytree as pytree

from lit_bnfold.folding import FoldingError
from lit_bnfold.folding.copying import copy_model
from lit_bnfold.metrics import OutputError
from lit_bnfold.writing import whole_file

Export = Literal["onnx", "torch_export"]
FILES = {"onnx": "folded.onnx", "torch_export": "folded.pt2"}
"""What each export is called as a file."""

NO_CALL = "validation does not call the module itself, as `self(x)` does, and it has no `example_input_array`"
"""Why there is no call of a module that could be repeated."""

_EXTRAS = ("onnx", "onnxruntime", "onnxscript")

# An example of more rows than that shows nothing more.
_MOST_ROWS = 8

# Characters of an error that are passed on.
_REASON_LENGTH = 300

# Seconds that another process may take to load a program and run it.
_PATIENCE = 600

_RUN_PROGRAM = """
import sys
import torch
from torch.utils import _pytree as pytree

program, calls, answers = sys.argv[1:]
with open(program, "rb") as file:
    module = torch.export.load(file).module()
outputs = []
with torch.no_grad():
    for leaves, structure in torch.load(calls, weights_only=True):
        args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(structure))
        found = pytree.tree_leaves(module(*args, **kwargs))
        outputs.append([leaf for leaf in found if isinstance(leaf, torch.Tensor)])
torch.save(outputs, answers)
"""


def check_extras(exports: Sequence[str]) -> None:
    """Make sure that what the exports need is installed.

    Args:
        exports: The exports.

    Raises:
        ModuleNotFoundError: If it is not; says how to install it.
    """
    missing = [name for name in _EXTRAS if find_spec(name) is None] if "onnx" in exports else []
    if missing:
        raise ModuleNotFoundError(
            f"Exporting to ONNX needs {' and '.join(missing)}, not installed here: pip install 'lit-bnfold[onnx]'",
            name=missing[0],
        )


@dataclass(frozen=True)
class ExampleCall:
    """The arguments of a call of a module's ``forward``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: Any) -> ExampleCall:
        """The call that an ``example_input_array`` stands for: a dict holds keywords, a tuple positions."""
        if isinstance(example, dict):
            return cls((), example)
        return cls(example if isinstance(example, tuple) else (example,), {})

    @property
    def batch_size(self) -> int:
        """Length of the first axis of the first tensor that has one.

        Raises:
            FoldingError: If there is none.
        """
        for leaf in pytree.tree_leaves((self.args, self.kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim() > 0:
                return len(leaf)
        raise FoldingError("its arguments hold no tensor with a batch axis")

    @property
    def has_one_batch_axis(self) -> bool:
        """Whether all tensors begin with an axis of the same length, and at least one of them has an axis."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return len({len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0}) == 1

    def map(self, function: Callable[[Tensor], Tensor]) -> ExampleCall:
        """The call with something done to each of its tensors."""
        args, kwargs = pytree.tree_map_only(Tensor, function, (self.args, self.kwargs))
        return ExampleCall(args, kwargs)

    def of_size(self, rows: int) -> ExampleCall:
        """The call with so many rows in its batch: the first ones, again and again if there are too few."""
        size = self.batch_size
        if size == 0:
            raise FoldingError("its batch is empty")
        return self.map(lambda tensor: tensor[torch.arange(rows) % size] if _has_batch(tensor, size) else tensor)

    def dynamic_shapes(self, module: torch.nn.Module) -> dict[str, Any]:
        """For each argument of ``module.forward`` by its name, which of its axes may vary."""
        size, batch = self.batch_size, torch.export.Dim("batch")
        arguments = dict(signature(module.forward).bind(*self.args, **self.kwargs).arguments)
        shapes: dict[str, Any] = pytree.tree_map(
            lambda leaf: {0: batch} if isinstance(leaf, Tensor) and _has_batch(leaf, size) else None, arguments
        )
        return shapes


def _has_batch(tensor: Tensor, size: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == size


@contextmanager
def first_call(module: torch.nn.Module) -> Iterator[list[ExampleCall]]:
    """Note the first call of a module.

    Args:
        module: The module.

    Yields:
        A list that the first call is put into, with its tensors copied to the CPU. If there is none, it holds the
        module's ``example_input_array`` in the end, if it has one.
    """
    calls: list[ExampleCall] = []

    def add(call: ExampleCall) -> None:
        # Validation may run in inference mode, whose tensors cannot be exported.
        with torch.inference_mode(False):
            calls.append(call.map(lambda tensor: tensor.detach().to("cpu", copy=True)))

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            add(ExampleCall(args, kwargs))

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
        example = getattr(module, "example_input_array", None)
        if not calls and example is not None:
            add(ExampleCall.of(example))
    finally:
        hook.remove()


def export_files(
    exports: Sequence[str],
    trainer: Trainer,
    folded: LightningModule | None,
    calls: Sequence[ExampleCall],
    directory: Path,
    tolerance: float,
    tell: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Write the files of a folded module, each when it has been run and agrees. To be called on all ranks.

    Args:
        exports: Which ones.
        trainer: The Trainer, whose first rank writes.
        folded: A copy of the folded module, in eval mode; None if it cannot be copied.
        calls: A call of it to make the files from; the first one is taken.
        directory: Where the files go.
        tolerance: Largest error of an output that counts as agreement, in units of the largest output.
        tell: Is told what begins; an export may take a minute.

    Returns:
        For each export ``max_abs`` and ``max_rel``, the error of the outputs, or ``failure``, the reason for which its
        file is not there.
    """
    results: dict[str, dict[str, Any]] = {}
    for export in exports:
        path = directory / FILES[export]
        tell(f"exporting {path.name} and running it")
        if trainer.is_global_zero:
            # What lies there was made of other weights than the `folded.ckpt` beside it.
            path.unlink(missing_ok=True)
        try:
            with whole_file(path, trainer) as part:
                if trainer.is_global_zero:
                    results[export] = _export(export, folded, calls, part, tolerance)
        except Exception as error:
            results[export] = {"failure": reason_of(error)}
    broadcast: dict[str, dict[str, Any]] = trainer.strategy.broadcast(results)
    return broadcast


def _export(
    export: str, folded: LightningModule | None, calls: Sequence[ExampleCall], part: Path, tolerance: float
) -> dict[str, float]:
    if folded is None:
        raise FoldingError("the folded module cannot be copied")
    if not calls:
        raise FoldingError(NO_CALL)
    _check_names(folded)
    module = folded if folded.device.type == "cpu" else copy_model(folded).cpu()
    # At least two, since torch takes an axis of length 1 for one that never varies.
    call = calls[0].of_size(min(max(calls[0].batch_size, 2), _MOST_ROWS))
    write, run = (_write_onnx, _run_onnx) if export == "onnx" else (_write_program, _run_program)
    with quietly(), torch.random.fork_rng(devices=[]), torch.no_grad():
        checks = _checks(module, call)
        write(module, call, call.dynamic_shapes(module), part)
        answers = run(part, [check.call for check in checks])
    return _error(checks, answers, tolerance)


def _check_names(module: torch.nn.Module) -> None:
    """Refuse names that end a string in Python: torch writes a program in it, with the names between quotes."""
    for name in (*dict(module.named_modules()), *module.state_dict()):
        if '"' in name or "\\" in name or any(ord(each) < ord(" ") for each in name):
            raise FoldingError(
                f"the name of `{ascii(name)[1:-1]}` has quotes or line breaks, which torch takes for code"
            )


class _Check(NamedTuple):
    """A call, and the tensors that the folded module makes of it."""

    call: ExampleCall
    expected: list[Tensor]


def _checks(module: torch.nn.Module, call: ExampleCall) -> list[_Check]:
    """Calls of other batch sizes than that of ``call``."""
    larger, single = call.of_size(call.batch_size + 1), call.of_size(1)
    checks = [_Check(larger, _outputs(module, larger))]
    # Some modules compare examples with each other, and take no single one.
    with suppress(Exception):
        checks.append(_Check(single, _outputs(module, single)))
    return checks


def _error(checks: list[_Check], answers: list[list[Tensor]], tolerance: float) -> dict[str, float]:
    # Only the first rank is here, and must not wait for the others.
    error = OutputError(sync_on_compute=False)
    for check, answer in zip(checks, answers, strict=True):
        if [tensor.shape for tensor in check.expected] != [tensor.shape for tensor in answer]:
            size = check.call.batch_size
            raise FoldingError(f"for a batch of {size} it gives outputs of other shapes than the folded module")
        for expected, exported in zip(check.expected, answer, strict=True):
            error.update(exported, expected)
    errors = {key: float(value) for key, value in error.compute().items()}
    if not errors["max_rel"] <= tolerance:
        raise FoldingError(
            f"its outputs are off by {errors['max_rel']:.2e} of the largest one, more than the tolerance of "
            f"{tolerance:.2e}"
        )
    return errors


def _outputs(module: torch.nn.Module, call: ExampleCall) -> list[Tensor]:
    """The tensors that a call gives, in the order that torch flattens them in."""
    return [leaf for leaf in pytree.tree_leaves(_run(module, call)) if isinstance(leaf, Tensor)]


def _run(module: torch.nn.Module, call: ExampleCall) -> Any:
    # Some modules write into what they are given.
    own = call.map(Tensor.clone)
    return module(*own.args, **own.kwargs)


def _write_program(module: torch.nn.Module, call: ExampleCall, shapes: dict[str, Any], part: Path) -> None:
    program = torch.export.export(module, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)
    with part.open("wb") as file:
        torch.export.save(program, file)


def _run_program(part: Path, calls: list[ExampleCall]) -> list[list[Tensor]]:
    """Run a program in a process that knows nothing of the module's code."""
    with tempfile.TemporaryDirectory() as directory:
        asked, answered = Path(directory) / "calls.pt", Path(directory) / "answers.pt"
        flat = [pytree.tree_flatten((call.args, call.kwargs)) for call in calls]
        torch.save([(leaves, pytree.treespec_dumps(structure)) for leaves, structure in flat], asked)
        command = [sys.executable, "-c", _RUN_PROGRAM, str(part), str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise FoldingError(f"a fresh process cannot run it and says: {said[-1]}")
        answers: list[list[Tensor]] = torch.load(answered, weights_only=True)
    return answers


def _write_onnx(module: torch.nn.Module, call: ExampleCall, shapes: dict[str, Any], part: Path) -> None:
    program = torch.onnx.export(
        module,
        call.args,
        kwargs=call.kwargs,
        dynamic_shapes=shapes,
        output_names=_output_names(module, call),
        dynamo=True,
    )
    assert program is not None
    program.save(part, external_data=False)


def _output_names(module: torch.nn.Module, call: ExampleCall) -> list[str]:
    """A name for each output: that of its place in what ``forward`` returns."""
    leaves, _ = pytree.tree_flatten_with_path(_run(module, call))
    places = [re.sub(r"\W+", "_", pytree.keystr(path)).strip("_") for path, leaf in leaves if isinstance(leaf, Tensor)]
    # A graph has each name once, and those of its inputs are the arguments' own.
    taken = {*call.kwargs, *inspect.signature(module.forward).parameters}
    return [
        "output" if not place else f"output_{place}" if place.isdigit() or place in taken else place for place in places
    ]


def _run_onnx(part: Path, calls: list[ExampleCall]) -> list[list[Tensor]]:
    # This way it needs no types, which it has not, and nobody pays for it who exports nothing.
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal errors only
    session = onnxruntime.InferenceSession(str(part), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    answers = []
    for call in calls:
        leaves = [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
        feed = {name: leaf.numpy() for name, leaf in zip(names, leaves, strict=True)}
        answers.append([torch.from_numpy(output) for output in session.run(None, feed)])
    return answers


def reason_of(error: BaseException) -> str:
    """The error that began it all, in one line without a full stop: exporters wrap theirs, and tell long stories."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = shorten(str(error).strip().removesuffix("."), _REASON_LENGTH, placeholder=" ...")
    return said if isinstance(error, FoldingError) else f"{type(error).__name__}: {said}"


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what exporters have to say from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
