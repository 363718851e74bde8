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
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from lit_bnfold.folding.graph import FoldingError
from lit_bnfold.folding.plan import Fold, FoldingPlan, Kept, Part, make_plan
from lit_bnfold.folding.record import Recorder

__all__ = ["Fold", "FoldingError", "FoldingPlan", "Kept", "Part", "fold_batchnorm", "plan_folding"]

_Model = TypeVar("_Model", bound=nn.Module)


def plan_folding(
    model: nn.Module, example_args: Sequence[Any] = (), example_kwargs: Mapping[str, Any] | None = None
) -> FoldingPlan:
    """Find out which BatchNorms of a model can be folded, and why the others cannot; the model is not touched.

    The model is copied, except for its parameters and buffers, and the copy is run once in eval mode without gradients.

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
        'it normalises what `relu` in `0` made, which is no layer'
    """
    twin = _twin(model)
    twin.eval()
    with torch.random.fork_rng(_cuda_devices(model)), torch.no_grad(), Recorder(twin) as recorder:
        try:
            twin(*example_args, **(example_kwargs or {}))
        except Exception as error:
            raise FoldingError(f"The model does not run on the example it was given: {error}") from error
    return make_plan(recorder.graph)


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


def _twin(model: _Model) -> _Model:
    """A copy of the model around the same parameters and buffers; running it leaves no trace in the model."""
    tensors = [*model.parameters(), *model.buffers()]
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        raise FoldingError(f"The model cannot be copied to be run: {error}") from error


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({parameter.get_device() for parameter in model.parameters() if parameter.is_cuda})
