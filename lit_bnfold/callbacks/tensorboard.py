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
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lit_bnfold.callbacks.report import Report, printable
from lit_bnfold.folding import FoldingPlan
from lit_bnfold.folding.algebra import scale_and_shift
from lit_bnfold.folding.graph import ValueGraph
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
    """The loggers of TensorBoard, whichever name Lightning was imported by.

    Args:
        trainer: The Trainer that they belong to. Only its first rank writes: on the others there are none.
    """
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    return [each for each in loggers if any(map(_is_tensorboards, type(each).__mro__))]


def _is_tensorboards(kind: type) -> bool:
    return kind.__name__ == "TensorBoardLogger" and kind.__module__.startswith(("lightning.", "pytorch_lightning."))


def show_in_tensorboard(
    trainer: Trainer,
    report: Report,
    plan: FoldingPlan,
    original: LightningModule | None,
    before: ValueGraph,
    after: ValueGraph,
) -> None:
    """Write a folding into the folders of the TensorBoardLoggers; other loggers get none of this.

    Args:
        trainer: The Trainer, whose first rank writes.
        report: The report.
        plan: What was folded.
        original: A copy of the module before folding, without a Trainer; None if there is none.
        before: What the module did before folding, to be drawn.
        after: What it did when it was folded.
    """
    for logger in tensorboard_loggers(trainer):
        _add_graph(logger, "original", before)
        _add_graph(logger, "folded", after)
        with _run(logger, "") as run:
            # What the logger wrote of the hyperparameters when training began, it wrote for good.
            run.log_hyperparams(logger.hparams, _final_metrics(report), trainer.global_step)
            run.experiment.add_custom_scalars(_layout(report))
        _add_histograms(logger.experiment, report, plan, original, trainer.global_step)
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


def _add_graph(logger: TensorBoardLogger, version: str, graph: ValueGraph) -> None:
    # Loaded late: it takes TensorBoard's own formats.
    from tensorboard.compat.proto.event_pb2 import Event

    from lit_bnfold.callbacks.tensorboard_graph import draw

    with _run(logger, version) as run:
        run.experiment.file_writer.add_event(Event(graph_def=draw(graph).SerializeToString()))


def _add_histograms(
    writer: SummaryWriter, report: Report, plan: FoldingPlan, original: nn.Module | None, step: int
) -> None:
    """Add the errors of all folds, and scale and shift of each BatchNorm that was folded."""
    errors = torch.tensor([fold["max_rel_error"] for fold in report["folds"]], dtype=torch.float64)
    _add_histogram(writer, f"{_NAME}/log10_layer_error", errors.clamp(min=_LEAST_ERROR).log10(), step)
    if original is None:
        return
    modules = dict(original.named_modules())
    for fold in plan.folds:
        batchnorm = modules[fold.batchnorm]
        kind = KINDS.batchnorm(batchnorm)
        assert kind is not None
        with torch.no_grad():
            scale, shift = scale_and_shift(*kind.numbers(batchnorm, fold.eps))
        name = printable(fold.batchnorm)
        _add_histogram(writer, f"{_NAME}/scale/{name}", scale, step)
        _add_histogram(writer, f"{_NAME}/shift/{name}", shift, step)


def _add_histogram(writer: SummaryWriter, tag: str, values: Tensor, step: int) -> None:
    # There is no histogram of nothing, nor of what is no number.
    finite = values[values.isfinite()]
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
    noted = [(fold["batchnorm"], fold["note"]) for fold in folds if "note" in fold]
    if noted:
        parts.append(_table(("BatchNorm", "folded, but"), noted))
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
    return _MARKS.sub(r"\\\1", html.escape(printable(" ".join(text.split()))))
