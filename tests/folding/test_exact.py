"""What folds lead to in float64: against what torch fuses, and which numbers of a layer roundings explain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from lit_bnfold.folding import plan_folding
from lit_bnfold.folding.exact import ExactNumbers, exact_numbers
from lit_bnfold.folding.kinds import KINDS

Randomised = Callable[[nn.Module], nn.Module]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Network(nn.Module):
    """A layer for each direction; `chained` takes three BatchNorms, `second` is a BatchNorm that takes another one."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.chained, self.behind, self.last = (nn.Linear(6, 6), nn.Linear(6, 6), norm(), norm())
        self.ahead, self.beside, self.wide = norm(), norm(), nn.Linear(6, 6)
        self.computed, self.of_computed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), norm()
        self.first, self.second = norm(), nn.BatchNorm1d(6, affine=False)
        self.words, self.of_words = nn.Embedding(5, 6), norm()
        self.around, self.over = nn.Linear(6, 6), norm()

    def forward(self, inputs: Tensor, words: Tensor) -> Tensor:
        hidden = self.last(self.behind(self.chained(self.ahead(self.before(inputs).tanh()))))
        hidden = self.wide(hidden) + self.beside(hidden)
        hidden = self.over(self.around(hidden) + hidden).tanh()
        hidden = self.second(self.first(self.of_computed(self.computed(hidden)).relu()))
        return hidden * self.of_words(self.words(words))


LAYERS = {"chained", "wide", "computed", "second", "words", "around"}


def norm() -> nn.BatchNorm1d:
    return nn.BatchNorm1d(6)


def folded(randomised: Randomised, dtype: torch.dtype) -> tuple[dict[str, ExactNumbers], dict[str, nn.Module]]:
    """What the layers of a network are led to, and the modules of its fold."""
    model = randomised(Network()).to(dtype).eval()
    plan = plan_folding(model, (torch.randn(7, 6).to(dtype), torch.arange(7) % 5))
    assert [kept.batchnorm for kept in plan.kept] == ["second"]
    modules = dict(model.named_modules())
    return exact_numbers(plan, modules, KINDS), dict(plan.apply(model).named_modules())


def given(layer: nn.Module) -> dict[str, Any]:
    return {key: layer._parameters.get(key) for key in ("weight", "bias")}


def objection_to(exact: ExactNumbers, layer: nn.Module) -> str | None:
    return exact.objection_to(given(layer), exact.unrounded())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fold_is_off_by_one_rounding_at_most(dtype: torch.dtype, randomised: Randomised) -> None:
    exact, modules = folded(randomised, dtype)
    assert exact.keys() == LAYERS
    assert {name: objection_to(numbers, modules[name]) for name, numbers in exact.items()} == dict.fromkeys(LAYERS)


@pytest.mark.parametrize("layer", sorted(LAYERS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_of_two_units_in_the_last_place_is_found_in_any_layer(
    dtype: torch.dtype, layer: str, randomised: Randomised
) -> None:
    exact, modules = folded(randomised, dtype)
    numbers = given(modules[layer])
    weight = numbers["weight"].data.view(-1)
    weight[weight.abs().argmax()] *= 1.0 + 2.0 * torch.finfo(dtype).eps
    assert "has a `weight` that is off by" in exact[layer].objection_to(numbers, exact[layer].unrounded())
    # Whoever allows for more gets more.
    assert exact[layer].objection_to(numbers, exact[layer].unrounded(), slack=0.1) is None


def test_what_is_rounded_nowhere_is_what_torch_fuses(randomised: Randomised) -> None:
    conv, conv_norm = nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4)
    linear, linear_norm = nn.Linear(4, 5), nn.BatchNorm1d(5)
    model = nn.Sequential(conv, conv_norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear, linear_norm)
    randomised(model).eval()
    plan = plan_folding(model, (torch.randn(2, 3, 4, 4),))
    exact = exact_numbers(plan, dict(model.named_modules()), KINDS)
    model.double()
    for name, fused in {"0": fuse_conv_bn_eval(conv, conv_norm), "4": fuse_linear_bn_eval(linear, linear_norm)}.items():
        numbers = exact[name].unrounded()
        torch.testing.assert_close(numbers["weight"], fused.weight.data, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(numbers["bias"], fused.bias.data, rtol=1e-12, atol=1e-12)


def test_numbers_of_another_shape_and_numbers_that_are_none_are_found(randomised: Randomised) -> None:
    exact, modules = folded(randomised, torch.float32)
    numbers, chained = given(modules["chained"]), exact["chained"]
    due = chained.unrounded()
    assert chained.objection_to(numbers | {"bias": None}, due) == "has no `bias` of shape (6,)"
    assert chained.objection_to(numbers | {"weight": torch.ones(2, 2)}, due) == "has no `weight` of shape (6, 6)"
    with torch.no_grad():
        numbers["weight"][0, 0] = torch.nan
    assert "is off by inf roundings" in chained.objection_to(numbers, due)


def test_a_weight_that_is_not_a_number_agrees_with_itself(randomised: Randomised) -> None:
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).eval()
    plan = plan_folding(model, (torch.randn(5, 3),))
    with torch.no_grad():
        model[0].weight[1] = torch.tensor([torch.nan, torch.inf, 0.0])
    exact = exact_numbers(plan, dict(model.named_modules()), KINDS)
    assert objection_to(exact["0"], plan.apply(model)[0]) is None
