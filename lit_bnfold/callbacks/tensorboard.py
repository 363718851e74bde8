"""The folding in TensorBoard: both graphs, both columns of metrics in one chart, histograms and the plan as text.

TensorBoard shows one graph for each run, and keeps the hyperparameters that a run began with. So what is written here
goes into runs of its own, in folders beside the logger's events: ``folding``, ``folding/original``, ``folding/folded``.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from inspect import signature
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_bnfold.callbacks.export import Call, quietly, reason_of
from lit_bnfold.callbacks.inference import obstacle_to_running, runnable_copy, undisturbed
from lit_bnfold.callbacks.report import Report
from lit_bnfold.folding import FoldingError
from lit_bnfold.folding.algebra import scale_and_shift
from lit_bnfold.folding.kinds import KINDS

if TYPE_CHECKING:
    # Whoever has another logger does not have to wait for it to load.
    from torch.utils.tensorboard import SummaryWriter

# A folder of this name beside the logger's events, and what all tags begin with.
_NAME = "folding"

# Stands in a histogram of logarithms for an error of 0; half a unit in the last place of float64 is larger.
_LEAST_ERROR = 1e-17

# Characters that Markdown gives a meaning.
_MARKS = re.compile(r"([\\`*_{}\[\]()#+!|~])")

# Rows of the table of folds; the rest is in `folding.html`.
_MOST_ROWS = 100


def tensorboard_loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    """The loggers of TensorBoard on the process that writes; none on the others."""
    return [each for each in trainer.loggers if isinstance(each, TensorBoardLogger)] if trainer.is_global_zero else []


def show_in_tensorboard(
    trainer: Trainer,
    report: Report,
    original: LightningModule | None,
    folded: LightningModule | None,
    calls: Sequence[Call],
) -> None:
    """Write a folding into the folders of the TensorBoardLoggers; other loggers get none of this.

    Args:
        trainer: The Trainer, whose first rank writes.
        report: The report.
        original: A copy of the module before folding, without a Trainer; None if there is none.
        folded: The folded module, without a Trainer; None if there is none.
        calls: A call of the module to draw the graphs by; the first one is taken.
    """
    loggers = tensorboard_loggers(trainer)
    if not loggers:
        return
    graphs = _graphs(trainer, original, folded, calls)
    for logger in loggers:
        _add_graphs(logger, graphs)
        with _run(logger, "") as run:
            # What the logger wrote of the hyperparameters when training began, it wrote for good.
            run.log_hyperparams(logger.hparams, _final_metrics(report), trainer.global_step)
            run.experiment.add_custom_scalars(_layout(report))
        _add_histograms(logger.experiment, report, original, trainer.global_step)
        logger.experiment.add_text(f"{_NAME}/plan", markdown(report), trainer.global_step)


@contextmanager
def _run(logger: TensorBoardLogger, version: str) -> Iterator[TensorBoardLogger]:
    """A run of its own in a folder beside the events of a logger."""
    run = TensorBoardLogger(logger.log_dir, name=_NAME, version=version, default_hp_metric=False)
    try:
        yield run
    finally:
        run.experiment.close()


def _final_metrics(report: Report) -> dict[str, float]:
    # Without the folder's name, so that the chart of both versions does not find them as well.
    every = {f"{version}/{key}": each for version, run in report["validation"].items() for key, each in run.items()}
    return {key: each for key, each in every.items() if math.isfinite(each)}


def _layout(report: Report) -> dict[str, dict[str, list[Any]]]:
    """One chart for each metric, with a point for each version.

    The curve of the training would lie beside them, not lead to them: TensorBoard smooths it, but not single points.
    """
    validation = report["validation"]
    charts = {}
    for key in validation["original"]:
        tags = [f"{_NAME}/{version}/{key}" for version in validation]
        # TensorBoard takes them for regular expressions.
        charts[key] = ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]
    return {"BatchNorm folding": charts}


def _graphs(
    trainer: Trainer, original: LightningModule | None, folded: LightningModule | None, calls: Sequence[Call]
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """For each version what was traced and the inputs for it; none if one version cannot be traced."""
    obstacle = obstacle_to_running(trainer, calls)
    if original is None or folded is None:
        obstacle = "the module cannot be copied"
    elif obstacle is None:
        call = calls[0].of_size(1) if calls[0].has_one_batch_axis else calls[0]
        call = call.map(lambda tensor: tensor.to(folded.device))
        with undisturbed():
            try:
                return {"original": _traced(trainer, original, call), "folded": _traced(trainer, folded, call)}
            except Exception as error:
                obstacle = reason_of(error)
    assert obstacle is not None
    _tell_of_no_graph(obstacle)
    return {}


def _traced(trainer: Trainer, pl_module: LightningModule, call: Call) -> tuple[Any, tuple[Any, ...]]:
    arguments = signature(pl_module.forward).bind(*call.args, **call.kwargs)
    if arguments.kwargs:
        raise FoldingError(f"its forward takes {', '.join(arguments.kwargs)} by keyword only")
    module = runnable_copy(pl_module)
    assert module is not None
    # Tracing reads every property, also those that a LightningModule has with a Trainer only.
    module.trainer = trainer
    # What add_graph would trace by itself it would also run once more, to compare.
    return torch.jit.trace(module, arguments.args, strict=False, check_trace=False), arguments.args


def _add_graphs(logger: TensorBoardLogger, graphs: dict[str, tuple[Any, tuple[Any, ...]]]) -> None:
    try:
        for version, graph in graphs.items():
            with _run(logger, version) as run, quietly():
                # What add_graph does, with other names.
                definition, metadata = _pytorch_graph().graph(*graph)
                _unwrap(definition)
                run.experiment.file_writer.add_graph((definition, metadata))
    except Exception as error:
        # Not everything that can be traced can be drawn.
        _tell_of_no_graph(reason_of(error))


def _pytorch_graph() -> Any:
    # Whoever has another logger does not have to wait for it to load.
    return import_module("torch.utils.tensorboard._pytorch_graph")


def _unwrap(definition: Any) -> None:
    """Take from all names what they have in common: TensorBoard would show one closed box with everything in it.

    Args:
        definition: A GraphDef. The path of a node's name is that of its module, each under its class.
    """
    scopes = [node.name.split("/")[:-1] for node in definition.node if node.op not in ("IO Node", "prim::Constant")]
    common = reduce(_shared, scopes) if scopes else []

    def unwrapped(name: str) -> str:
        path = name.split("/")
        return "/".join(path[len(_shared(path[:-1], common)) :])

    for node in definition.node:
        node.name = unwrapped(node.name)
        node.input[:] = [unwrapped(name) for name in node.input]


def _shared(one: list[str], other: list[str]) -> list[str]:
    """What two paths begin with."""
    return [part for part, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def _tell_of_no_graph(obstacle: str) -> None:
    rank_zero_info(f"TensorBoard shows no graph of the folding: {obstacle}.")


def _add_histograms(writer: SummaryWriter, report: Report, original: nn.Module | None, step: int) -> None:
    """Add the errors of all folds, and scale and shift of each BatchNorm that was folded."""
    errors = torch.tensor([fold["max_rel_error"] for fold in report["folds"]], dtype=torch.float64)
    _add_histogram(writer, f"{_NAME}/log10_layer_error", errors.clamp(min=_LEAST_ERROR).log10(), step)
    modules = {} if original is None else dict(original.named_modules())
    for fold in report["folds"] if modules else ():
        batchnorm = modules[fold["batchnorm"]]
        kind = KINDS.batchnorm(batchnorm)
        assert kind is not None
        scale, shift = scale_and_shift(*kind.numbers(batchnorm))
        _add_histogram(writer, f"{_NAME}/scale/{fold['batchnorm']}", scale, step)
        _add_histogram(writer, f"{_NAME}/shift/{fold['batchnorm']}", shift, step)


def _add_histogram(writer: SummaryWriter, tag: str, values: Tensor, step: int) -> None:
    # There is no histogram of nothing, nor of what is no number.
    finite = values.detach()[values.isfinite()]
    if len(finite):
        writer.add_histogram(tag, finite, step)


def markdown(report: Report) -> str:
    r"""The plan as a table in Markdown, with every name escaped.

    Args:
        report: A report.

    Returns:
        A sentence, a table of the folds and one of what stays, each of at most 100 rows.

    Example:
        >>> fold = {"batchnorm": "norm_1", "layers": ["linear"], "direction": "backward", "max_rel_error": 1e-7}
        >>> print(markdown({"folds": [fold], "kept": []}))
        1 of 1 BatchNorms folded.
        <BLANKLINE>
        | BatchNorm | folded into | direction | relative error |
        | --- | --- | --- | --- |
        | norm\_1 | linear | backward | 1.0e-07 |
    """
    folds, kept = report["folds"], report["kept"]
    parts = [f"{len(folds)} of {len(folds) + len(kept)} BatchNorms folded."]
    if folds:
        head = ("BatchNorm", "folded into", "direction", "relative error")
        cells = [
            (fold["batchnorm"], " + ".join(fold["layers"]), fold["direction"], f"{fold['max_rel_error']:.1e}")
            for fold in folds
        ]
        parts.append(_table(head, cells))
    if kept:
        reasons = [(each["batchnorm"], each["reason"], each["code"]) for each in kept]
        parts.append(_table(("BatchNorm", "stays because", "code"), reasons))
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_escaped(cell) for cell in row] for row in rows[:_MOST_ROWS])]
    more = [f"\n\nand {len(rows) - _MOST_ROWS} more, see `folding.html`"] if len(rows) > _MOST_ROWS else []
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "".join(more)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, whatever is in it."""
    return _MARKS.sub(r"\\\1", html.escape(" ".join(text.split())))
