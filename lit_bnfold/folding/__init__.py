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

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

from torch import nn

from lit_bnfold.folding.graph import FoldingError, Obstacle
from lit_bnfold.folding.kinds import KINDS, BatchNormKind, Kinds, LayerKind, check_types
from lit_bnfold.folding.plan import Fold, FoldingPlan, Kept, Part
from lit_bnfold.folding.rewrite import fold_model
from lit_bnfold.folding.search import make_plan
from lit_bnfold.folding.trial import in_float64, obstacle_to, run_as_it_is
from lit_bnfold.folding.turn import TURN

__all__ = [
    "BatchNormKind",
    "Fold",
    "FoldingError",
    "FoldingPlan",
    "Kept",
    "Kinds",
    "LayerKind",
    "Part",
    "fold_batchnorm",
    "plan_folding",
]

_Model = TypeVar("_Model", bound=nn.Module)


def plan_folding(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    kinds: Kinds = KINDS,
) -> FoldingPlan:
    """Find out which BatchNorms of a model can be folded, and why the others cannot; the model is not touched.

    The model is copied, except for its parameters and buffers, and the copy is run in eval mode without gradients:
    once as it is and, if anything can be folded, once with each of those BatchNorms moved to where it would be folded.
    If the second run does or gives something else, twice in a row and, if it is not too large, in float64 as well, then
    nothing can be folded.

    Threads that fold at the same time take turns, and another thread may go on running the model. What a thread that
    does something else draws meanwhile from the global random generators of torch, numpy or Python, it may draw again
    afterwards, for they are put back.

    Args:
        model: The model.
        example_args: Positional arguments of a real call: tensors of any shape that the model takes. A batch of at
            least two examples tells more than one of one.
        example_kwargs: Keyword arguments of that call.
        kinds: Classes of your own that are to count as layers or as BatchNorms too.

    Returns:
        The plan. ``print`` shows it as a table.

    Raises:
        FoldingError: If the model cannot be copied or does not run on the example.
        TypeError: If an argument is of another type, such as a tensor in place of ``(tensor,)``.

    Example:
        >>> import torch
        >>> plan = plan_folding(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), (torch.randn(4, 3),))
        >>> plan.kept[0].reason
        'it normalises what `relu` in `0` made, which is no layer; and the output of `1` is returned by the model'
    """
    check_types(
        ("model", model, nn.Module, "an nn.Module"),
        ("example_args", example_args, Sequence, "a sequence of arguments such as (x,)"),
        ("example_kwargs", example_kwargs, (Mapping, type(None)), "a mapping of arguments such as {'x': x}"),
        ("kinds", kinds, Kinds, "Kinds"),
    )
    example = (tuple(example_args), dict(example_kwargs or {}))
    with TURN:
        found = _planned(model, *example, kinds)
        if found.obstacle is not None:
            # Perhaps the model has filled a cache that outlives it, and does less from now on.
            found = _planned(model, *example, kinds)
        if found.obstacle is not None and found.obstacle[0] == "unexplained":
            found = _without_rounding(found, model, *example, kinds)
    return found.plan if found.obstacle is None else found.plan.keeping(*found.obstacle, order=found.order)


def fold_batchnorm(
    model: _Model,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    inplace: bool = False,
    kinds: Kinds = KINDS,
) -> _Model:
    """Fold every BatchNorm that algebra allows into the layers around it.

    Args:
        model: The model, in whatever mode; it is folded as it would run in eval mode.
        example_args: Positional arguments of a real call: tensors of any shape that the model takes.
        example_kwargs: Keyword arguments of that call.
        inplace: Whether to fold ``model`` itself, which nobody may run meanwhile. Otherwise it stays as it is and a
            copy is folded.
        kinds: Classes of your own that are to count as layers or as BatchNorms too.

    Returns:
        The folded model, of the same class, with the training flags it had. What could not be folded is still there;
        ``plan_folding`` tells why. Where a BatchNorm was there is an ``nn.Identity``, which lays its output out in
        memory as the BatchNorm did; or a module that gives zeros, if it was folded into a layer beside it; or, if its
        class does more than normalise, a subclass of that class which leaves the normalisation out, and for which
        ``isinstance`` still says BatchNorm.

    Raises:
        FoldingError: If the model cannot be copied or does not run on the example.
        TypeError: If an argument is of another type, such as a tensor in place of ``(tensor,)``.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
        >>> x = torch.randn(4, 3)
        >>> torch.testing.assert_close(fold_batchnorm(model, (x,))(x), model(x))
    """
    # One turn for both: a plan that was made for the model just now needs no check.
    with TURN:
        plan = plan_folding(model, example_args, example_kwargs, kinds=kinds)
        return fold_model(plan, model, inplace=inplace, kinds=kinds)


class _Found(NamedTuple):
    plan: FoldingPlan
    order: list[str]
    obstacle: Obstacle | None


def _planned(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], kinds: Kinds, *, lends: bool = True
) -> _Found:
    """A plan, the names of all BatchNorms, and what the trial of the plan has found."""
    run = run_as_it_is(model, args, kwargs, kinds, lends=lends)
    plan = make_plan(run.graph)
    obstacle = obstacle_to(plan, run, model, args, kwargs, kinds) if plan.folds else None
    if obstacle is not None and run.has_lent:
        # Perhaps a layer does something else if it has a bias, and had one in the first run alone.
        return _planned(model, args, kwargs, kinds, lends=False)
    return _Found(plan, list(run.graph.batchnorms), obstacle)


def _without_rounding(
    found: _Found, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], kinds: Kinds
) -> _Found:
    """The same without its obstacle, if that is gone in float64: then it was rounding that tipped a decision."""
    exact = in_float64(model, args, kwargs)
    if exact is None:
        return found
    with suppress(FoldingError):
        for _ in range(2):  # caches, here too
            again = _planned(*exact, kinds)
            if again.obstacle is None and _moves(again.plan) == _moves(found.plan):
                return found._replace(obstacle=None)
    return found


def _moves(plan: FoldingPlan) -> list[tuple[str, Any, str]]:
    return [(fold.batchnorm, fold.parts, fold.direction) for fold in plan.folds]
