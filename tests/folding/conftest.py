"""What the tests of folding share: small models made of a function, and a judge of plans and outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import FoldingPlan, plan_folding
from lit_bnfold.folding.tensors import tensors_in


class Net(nn.Module):
    """Modules by keyword, and a forward given as a function of the net and its inputs."""

    def __init__(self, function: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        for name, module in (modules or {"fc": nn.Linear(3, 4), "bn": nn.BatchNorm1d(4)}).items():
            setattr(self, name, module)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


@pytest.fixture
def net() -> type[Net]:
    return Net


@pytest.fixture
def judge(randomised: Callable[[nn.Module], nn.Module]) -> Callable[..., FoldingPlan]:
    """Plans a model, checks the plan, and checks that every way to fold leaves the outputs as they were."""

    def judge(
        model: nn.Module,
        *example: Any,
        folds: Mapping[str, Sequence[str]] | None = None,
        kept: Mapping[str, str] | None = None,
        others: Sequence[tuple[Any, ...]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        read: Callable[[Any], Any] = lambda output: output,
    ) -> FoldingPlan:
        randomised(model.double()).eval()
        plan = plan_folding(model, example, kwargs)
        assert {fold.batchnorm: fold.layers for fold in plan.folds} == {k: tuple(v) for k, v in (folds or {}).items()}
        assert {reason.batchnorm: reason.code for reason in plan.kept} == dict(kept or {}), str(plan)
        inputs = [example, *([other_inputs(example, n) for n in (1, 2, 7)] if others is None else others)]
        agree(model, plan.apply(model), inputs, kwargs, read)
        # In place too: code that holds on to the modules of the original then meets folded ones.
        expected = [_run(model, args, kwargs, read) for args in inputs]
        plan.apply(model, inplace=True)
        _compare([_run(model, args, kwargs, read) for args in inputs], expected)
        return plan

    return judge


def other_inputs(example: Sequence[Any], batch_size: int) -> tuple[Any, ...]:
    """Inputs of other values and another batch size."""
    return tuple(
        torch.randn(batch_size, *value.shape[1:], dtype=value.dtype) if isinstance(value, Tensor) else value
        for value in example
    )


def agree(
    model: nn.Module,
    folded: nn.Module,
    inputs: Sequence[tuple[Any, ...]],
    kwargs: Mapping[str, Any] | None = None,
    read: Callable[[Any], Any] = lambda output: output,
    tolerance: float = 1e-12,
) -> None:
    """Assert that two models give the same outputs."""
    expected = [_run(model, args, kwargs, read) for args in inputs]
    _compare([_run(folded, args, kwargs, read) for args in inputs], expected, tolerance)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, read: Callable[[Any], Any]) -> Any:
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors_in(read(model(*args, **(kwargs or {}))))]


def _compare(found: list[list[Tensor]], expected: list[list[Tensor]], tolerance: float = 1e-12) -> None:
    assert [len(outputs) for outputs in found] == [len(outputs) for outputs in expected]
    for ours, theirs in zip((t for out in found for t in out), (t for out in expected for t in out), strict=True):
        scale = float(theirs.abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance * max(scale, 1.0))


@pytest.fixture(name="agree")
def _agree() -> Callable[..., None]:
    return agree
