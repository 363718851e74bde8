"""Folding BatchNorms into their neighbours, with torch alone.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from lit_bnfold.folding import fold_batchnorm, plan_folding
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ReLU())
    >>> print(plan_folding(model, (torch.randn(4, 3),)))
    1  folded backward into 0
    >>> fold_batchnorm(model, (torch.randn(4, 3),))
    Sequential(
      (0): Linear(in_features=3, out_features=2, bias=True)
      (1): Identity()
      (2): ReLU()
    )
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from lit_bnfold.folding.graph import FoldingError, ValueGraph
from lit_bnfold.folding.plan import Fold, FoldingPlan, Kept, Part
from lit_bnfold.folding.record import Recorder, tensors_in
from lit_bnfold.folding.rewrite import copy_model, disguise, stand_in
from lit_bnfold.folding.search import make_plan

__all__ = ["Fold", "FoldingError", "FoldingPlan", "Kept", "Part", "fold_batchnorm", "plan_folding"]

_Model = TypeVar("_Model", bound=nn.Module)


def plan_folding(
    model: nn.Module, example_args: Sequence[Any] = (), example_kwargs: Mapping[str, Any] | None = None
) -> FoldingPlan:
    """Find out which BatchNorms of a model can be folded, and why the others cannot; the model is not touched.

    The model is copied, except for its parameters and buffers, and the copy is run in eval mode without gradients:
    once as it is and, if anything can be folded, once with those BatchNorms looking like ``nn.Identity``.

    Args:
        model: The model.
        example_args: Positional arguments of a real call: tensors of any shape that the model takes. A batch of at
            least two examples tells more than one of one.
        example_kwargs: Keyword arguments of that call.

    Returns:
        The plan. ``print`` shows it as a table.

    Raises:
        FoldingError: If the model cannot be copied or does not run on the example.

    Example:
        >>> plan = plan_folding(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), (torch.randn(4, 3),))
        >>> plan.kept[0].reason
        'it normalises what `relu` in `0` made, which is no layer; and the output of `1` is returned by the model'
    """
    example = (tuple(example_args), dict(example_kwargs or {}))
    graph = _record(_twin(model), *example)
    plan = make_plan(graph)
    if plan.folds and not _runs_alike(plan, graph, _twin(model), *example):
        reason = "the model looks at its modules, and does something else once BatchNorms of it are `nn.Identity`"
        folded = {fold.batchnorm: Kept(fold.batchnorm, reason, "structure-read") for fold in plan.folds}
        kept = folded | {kept.batchnorm: kept for kept in plan.kept}
        plan = FoldingPlan(kept=tuple(kept[name] for name in graph.batchnorms))
    return plan


def fold_batchnorm(
    model: _Model,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    inplace: bool = False,
) -> _Model:
    """Fold every BatchNorm that algebra allows into the layers around it.

    Args:
        model: The model, in whatever mode; it is folded as it would run in eval mode.
        example_args: Positional arguments of a real call: tensors of any shape that the model takes.
        example_kwargs: Keyword arguments of that call.
        inplace: Whether to fold ``model`` itself. Otherwise it stays as it is and a copy is folded.

    Returns:
        The folded model, of the same class, with the training flags it had. What could not be folded is still there;
        ``plan_folding`` tells why.

    Raises:
        FoldingError: If the model cannot be copied or does not run on the example.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
        >>> x = torch.randn(4, 3)
        >>> torch.testing.assert_close(fold_batchnorm(model, (x,))(x), model(x))
    """
    plan = plan_folding(model, example_args, example_kwargs)
    folded: _Model = plan.apply(model, inplace=inplace)  # type: ignore[assignment]
    return folded


def _record(twin: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, lends_bias: bool = True) -> ValueGraph:
    """What one run in eval mode does; a dict or a list that the model empties is a copy."""
    args, kwargs = copy.deepcopy((args, kwargs), {id(tensor): tensor for tensor in tensors_in((args, kwargs))})
    twin.eval()
    recorder = Recorder(twin, lends_bias=lends_bias)
    with torch.random.fork_rng(_cuda_devices(twin)), torch.no_grad(), _nothing_compiled(), recorder:
        try:
            # What the run gives lives until the recorder is closed: whatever it holds back counts as held by somebody.
            _output = twin(*args, **kwargs)
        except Exception as error:
            raise FoldingError(f"The model does not run on the example it was given: {error}") from error
    return recorder.graph


def _runs_alike(
    plan: FoldingPlan, graph: ValueGraph, twin: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Whether a model whose folded BatchNorms look like ``nn.Identity`` does the same as before.

    It does not if it asks what class a module is of, for one, or counts its parameters.
    """
    names = {fold.batchnorm for fold in plan.folds}
    disguise(names, twin)
    try:
        # This time no layer is lent a bias, so that a forward which asks whether there is one is found out as well.
        return _record(twin, args, kwargs, lends_bias=False).outline(names) == graph.outline(names)
    except FoldingError:
        return False


def _twin(model: _Model) -> _Model:
    """A copy of the model around the memory of its parameters and buffers; running it leaves no trace in the model."""
    # Stand-ins, so that code which holds on to the model's own tensors, as a closure does, can be told apart.
    return copy_model(model, {id(tensor): stand_in(tensor) for tensor in (*model.parameters(), *model.buffers())})


def _nothing_compiled() -> AbstractContextManager[Any]:
    # Setting the stance loads the compiler; where that is not loaded, nothing is compiled.
    compiler = sys.modules.get("torch._dynamo")
    return nullcontext() if compiler is None else torch.compiler.set_stance("force_eager")


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({parameter.get_device() for parameter in model.parameters() if parameter.is_cuda})
