"""The table of layers and BatchNorms, and how a project adds to it for one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_bnfold.folding import BatchNormKind, Kinds, LayerKind, fold_batchnorm, plan_folding

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Projection(nn.Module):
    """A layer that inherits from none of torch's."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.i, self.o = i, o
        self.weight = nn.Parameter(torch.randn(o, i))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class WithoutBias(Projection):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Doubled(Projection):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight, self.bias)


class Standardise(nn.Module):
    """A normalisation of the last axis, with words of its own and by operations of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(size))
        self.register_buffer("variance", torch.rand(size) + 0.2)
        self.gamma = nn.Parameter(torch.randn(size))
        self.epsilon = 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / (self.variance + self.epsilon).sqrt() * self.gamma


class Clipped(Standardise):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(min=-0.1)


PROJECTION = LayerKind(Projection, F.linear, channel_axis=-1, in_channels="i", out_channels="o")
STANDARDISE = BatchNormKind(
    Standardise, running_mean="mean", running_var="variance", weight="gamma", eps="epsilon", channel_axis=-1
)


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3)])
def test_classes_of_a_project_are_folded_in_the_call_that_names_them(shape: tuple[int, ...], agree: Any) -> None:
    model = nn.Sequential(Projection(3, 4), Standardise(4), nn.Tanh(), nn.Linear(4, 2), Standardise(2)).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    kinds = Kinds(layers=(PROJECTION,), batchnorms=(STANDARDISE,))
    plan = plan_folding(model, (x,), kinds=kinds)
    assert {fold.batchnorm: fold.layers for fold in plan.folds} == {"1": ("0",), "4": ("3",)}
    folded = fold_batchnorm(model, (x,), kinds=kinds)
    assert isinstance(folded[1], nn.Identity)
    agree(model, folded, [(x,), (torch.randn_like(x[:2]),)])
    agree(model, plan.apply(model, kinds=kinds), [(x,)])
    # Nothing is left of it in the next call.
    assert plan_folding(model, (x,)) == type(plan)()


def test_class_of_a_project_takes_a_batchnorm_forward(randomised: Any, agree: Any) -> None:
    model = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), Projection(3, 4)).double()).eval()
    kinds = Kinds(layers=(PROJECTION,))
    assert not plan_folding(model, (X,)).folds
    folded = fold_batchnorm(model, (X,), kinds=kinds)
    assert isinstance(folded[1], nn.Identity)
    agree(model, folded, [(X,), (2 * X,)])


@pytest.mark.parametrize("layer", [WithoutBias(3, 4), Doubled(3, 4)])
def test_layer_of_a_project_that_does_not_do_what_it_is_said_to_keeps_the_batchnorm(
    layer: Any, randomised: Any
) -> None:
    model = randomised(nn.Sequential(layer, nn.BatchNorm1d(4)).double()).eval()
    plan = plan_folding(model, (X,), kinds=Kinds(layers=(PROJECTION,)))
    assert [kept.code for kept in plan.kept] == ["own-forward" if isinstance(layer, WithoutBias) else "computed-weight"]


def test_normalisation_of_a_project_that_does_something_else_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Clipped(4)).double().eval()
    plan = plan_folding(model, (X,), kinds=Kinds(batchnorms=(STANDARDISE,)))
    assert [kept.code for kept in plan.kept] == ["own-forward"]


def test_normalisation_of_a_project_over_another_axis_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Standardise(4)).double().eval()
    wrong = BatchNormKind(Standardise, "mean", "variance", "gamma", eps="epsilon", channel_axis=1)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    assert [kept.code for kept in plan_folding(model, (x,), kinds=Kinds(batchnorms=(wrong,))).kept] == ["own-forward"]


def test_kind_of_layer_that_takes_no_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a 'bias' among those"):
        LayerKind(Projection, F.linear, channel_axis=-1, arguments=("input", "weight"))


def test_batchnorm_inside_a_normalisation_of_a_project_is_not_reached() -> None:
    class Holder(Standardise):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            self.inner = nn.BatchNorm1d(size)

        def forward(self, x: Tensor) -> Tensor:
            return x.relu() + self.inner(x)

    model = nn.Sequential(nn.Linear(3, 4), Holder(4)).double().eval()
    plan = plan_folding(model, (X,), kinds=Kinds(batchnorms=(STANDARDISE,)))
    assert [kept.code for kept in plan.kept] == ["own-forward", "not-reached"]
