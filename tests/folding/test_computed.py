"""Weights that are computed at every call: baked on what is folded, left alone on the original."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from lit_bnfold.folding import FoldingPlan, fold_batchnorm, plan_folding
from lit_bnfold.folding.computed import bake
from lit_bnfold.folding.rewrite import fold_structure, folded_in_place

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Noise(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


class Borrowed(nn.Module):
    """Computes with a tensor of somebody else."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.borrowed = [tensor]

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.borrowed[0]


def twice(layer: Any, key: str = "weight") -> Any:
    return parametrize.register_parametrization(layer, key, Twice())


def both(layer: Any) -> Any:
    return twice(parametrizations.weight_norm(layer), "bias")


def pruned(layer: Any) -> Any:
    return prune.random_unstructured(prune.random_unstructured(layer, "weight", 0.3), "bias", 0.5)


FORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "of a project": twice,
    "several": both,
    "weight_norm, old form": nn.utils.weight_norm,
    "spectral_norm, old form": nn.utils.spectral_norm,
    "pruning": pruned,
}
forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@forms
@pytest.mark.parametrize("training", [False, True])
def test_computed_weight_is_baked_and_folded(form: Any, training: bool, randomised: Any, agree: Any) -> None:
    layer = form(nn.Linear(3, 4).double())
    model = randomised(nn.Sequential(nn.ReLU(), layer, nn.BatchNorm1d(4)).double()).train(training)
    before, kind = bits(model), type(layer)
    plan = plan_folding(model, (X,))
    assert [(fold.layers, fold.parts[0].baked) for fold in plan.folds] == [(("1",), True)], str(plan)
    folded = plan.apply(model)
    assert type(folded[1]) is nn.Linear
    assert sorted(folded.state_dict()) == ["1.bias", "1.weight"]
    assert [module.training for module in folded.modules()] == [training] * 4
    assert all(parameter.requires_grad for parameter in folded.parameters())
    # The original keeps its parametrization, its numbers, and what it computes with them.
    assert type(layer) is kind
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    agree(model.eval(), folded.eval(), [(X,), (2 * X[:2],)])
    assert type(fold_batchnorm(model, (X,), inplace=True)[1]) is nn.Linear
    agree(folded, model, [(X,)])


@forms
def test_computed_weight_takes_a_batchnorm_forward_and_is_called_twice(form: Any, randomised: Any, agree: Any) -> None:
    layer = form(nn.Linear(3, 3).double())
    model = randomised(
        nn.Sequential(nn.ReLU(), norm := nn.BatchNorm1d(3), layer, nn.ReLU(), norm, layer).double()
    ).eval()
    folded = fold_batchnorm(model, (X,))
    assert isinstance(folded[1], nn.Identity)
    agree(model, folded, [(X,), (2 * X[:2],)])


@forms
def test_folded_in_place_gives_a_computed_weight_back_to_the_bit(form: Any, randomised: Any, agree: Any) -> None:
    model = randomised(nn.Sequential(form(nn.Linear(3, 4).double()), nn.BatchNorm1d(4)).double()).eval()
    expected, before = model(X).detach(), bits(model)
    layer, kind, parameters = model[0], type(model[0]), list(model.parameters())
    with folded_in_place(plan_folding(model, (X,)), model):
        assert type(layer) is nn.Linear
        torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)
    assert type(layer) is kind
    assert [id(parameter) for parameter in model.parameters()] == [id(parameter) for parameter in parameters]
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model(X), expected)


@forms
def test_structure_for_a_baked_weight_is_an_ordinary_parameter(form: Any, randomised: Any, agree: Any) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(form(nn.Linear(3, 4).double()), nn.BatchNorm1d(4)).double().eval()

    model, other = randomised(build()), build()
    plan = plan_folding(model, (X,))
    fold_structure(FoldingPlan.from_dict(plan.to_dict()), other)
    other.load_state_dict(plan.apply(model).state_dict())
    agree(model, other, [(X,)])


def test_frozen_computed_weight_stays_frozen() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 4)).requires_grad_(False)
    folded = fold_batchnorm(nn.Sequential(layer, nn.BatchNorm1d(4)).eval(), (X.float(),))
    assert not folded[0].weight.requires_grad


def test_failure_while_a_weight_is_computed_changes_nothing() -> None:
    layer = twice(nn.Linear(3, 4))
    layer.parametrizations.weight[0].forward = None
    kind, before = type(layer), bits(layer)
    with pytest.raises(TypeError):
        bake(layer)
    assert type(layer) is kind
    assert list(bits(layer)) == list(before)


def with_parametrization(parametrization: nn.Module) -> Any:
    return nn.Sequential(
        parametrize.register_parametrization(nn.Linear(3, 4), "weight", parametrization), nn.BatchNorm1d(4)
    )


class Inner(nn.Module):
    """Computes with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, weight: Tensor) -> Tensor:
        return self.inner(weight)  # type: ignore[no-any-return]


class Keeping(nn.Module):
    """Keeps what it computes half way."""

    def forward(self, weight: Tensor) -> Tensor:
        self.last = weight * 2
        return self.last + 1


@pytest.mark.parametrize(
    ("parametrization", "reason"),
    [
        (Noise(), "is computed by `randn_like` in `0.parametrizations.weight.0`"),
        (Inner(), "is computed by `linear` in `0.parametrizations.weight.0.inner`"),
        (Keeping(), "is computed from what is still held by somebody after the run"),
    ],
)
def test_weight_that_more_than_its_own_parameters_goes_into_keeps_the_batchnorm(
    parametrization: nn.Module, reason: str
) -> None:
    model = with_parametrization(parametrization).double().eval()
    (kept,) = plan_folding(model, (X,)).kept
    assert kept.code == "computed-weight"
    assert kept.reason.startswith(f"the weight of `0` {reason};")


def test_weight_computed_with_a_number_is_baked_and_folded(judge: Judge) -> None:
    class Shifted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.ones(3, dtype=weight.dtype) * 2

    judge(with_parametrization(Shifted()), X, folds={"1": ["0"]})


def test_weight_computed_from_a_tensor_of_nobody_keeps_the_batchnorm(judge: Judge) -> None:
    judge(with_parametrization(Borrowed(torch.tensor(2.0))), X, kept={"1": "computed-weight"})


def test_weight_computed_from_a_parameter_of_somebody_else_keeps_the_batchnorm(judge: Judge) -> None:
    scale = nn.Parameter(torch.ones(1))
    model = with_parametrization(Borrowed(scale))
    model.register_parameter("scale", scale)
    judge(model, X, kept={"1": "computed-weight"})


def test_weight_computed_from_the_input_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    borrowed = Borrowed(torch.ones(1))

    def forward(m: Any, x: Tensor) -> Tensor:
        m.fc.parametrizations.weight[0].borrowed[0] = x.mean()
        return m.bn(m.fc(x))

    judge(net(forward, fc=with_parametrization(borrowed)[0], bn=nn.BatchNorm1d(4)), X, kept={"bn": "computed-weight"})


def test_original_that_somebody_else_reads_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.fc(x)) * m.fc.parametrizations.weight.original0.sum()

    model = net(forward, fc=parametrizations.weight_norm(nn.Linear(3, 4)), bn=nn.BatchNorm1d(4))
    judge(model, X, kept={"bn": "parameter-read"})


def test_computed_weight_that_somebody_else_reads_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    layer = nn.utils.weight_norm(nn.Linear(3, 4).double())
    model = net(lambda m, x: m.bn(m.fc(x)) * m.fc.weight.sum(), fc=layer, bn=nn.BatchNorm1d(4)).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["parameter-read"]


def test_layer_that_uses_something_else_than_its_computed_weight_keeps_the_batchnorm(judge: Judge) -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * 2, self.bias)

    judge(nn.Sequential(twice(Odd(3, 4)), nn.BatchNorm1d(4)), X, kept={"1": "computed-weight"})
    model = nn.Sequential(nn.utils.weight_norm(Odd(3, 4)), nn.BatchNorm1d(4)).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["computed-weight"]


def test_computed_weight_without_a_bias_in_a_forward_of_its_own_is_tried_with_one(judge: Judge) -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    class Without(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight)

    judge(nn.Sequential(twice(Own(3, 4, bias=False)), nn.BatchNorm1d(4)), X, folds={"1": ["0"]})
    judge(nn.Sequential(twice(Without(3, 4, bias=False)), nn.BatchNorm1d(4)), X, kept={"1": "own-forward"})


def test_original_shared_by_two_layers_keeps_the_batchnorm(judge: Judge) -> None:
    first, second = twice(nn.Linear(4, 4)), twice(nn.Linear(4, 4))
    second.parametrizations.weight.original = first.parametrizations.weight.original
    judge(
        nn.Sequential(first, nn.BatchNorm1d(4), nn.Tanh(), second),
        X.new_ones(5, 4).normal_(),
        kept={"1": "shared-parameter"},
    )


def test_original_shown_by_a_module_around_the_layer_keeps_the_batchnorm(judge: Judge) -> None:
    block = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4))
    block.register_parameter("length", block[0].weight_g)  # What is baked would leave this one behind.
    judge(block, X, kept={"1": "shared-parameter"})


def test_hook_beside_the_one_that_computes_keeps_the_batchnorm() -> None:
    layer = nn.utils.weight_norm(nn.Linear(3, 4).double())
    layer.register_forward_pre_hook(lambda module, args: None)
    model = nn.Sequential(layer, nn.BatchNorm1d(4)).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["other-reader"]


def test_hook_that_computes_in_a_way_of_its_own_keeps_the_batchnorm() -> None:
    class Own(prune.RandomUnstructured):
        def apply_mask(self, module: nn.Module) -> Tensor:
            return super().apply_mask(module) * 2

    class Called(prune.RandomUnstructured):
        def __call__(self, module: nn.Module, inputs: Any) -> None:
            module.weight = self.apply_mask(module) * 2

    for method in (Own, Called):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().eval()
        method.apply(model[0], "weight", amount=0.3)
        assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["other-reader"]


def test_cached_weights_of_another_moment_keep_the_batchnorm() -> None:
    model = nn.Sequential(twice(nn.Linear(3, 4)), nn.BatchNorm1d(4)).double().eval()
    with parametrize.cached():
        model(X)  # From here on, the copies that are recorded get the weight of the original out of the cache.
        assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["computed-weight"]
    assert plan_folding(model, (X,)).folds


# What a later search for wrong folds found.


class Counting(nn.Module):
    """Computes another weight at every call, and keeps count in a way that shows nowhere in the run."""

    def __init__(self, count: Any) -> None:
        super().__init__()
        if isinstance(count, Tensor):
            self.register_buffer("count", count)
        else:
            self.count = count

    def forward(self, weight: Tensor) -> Tensor:
        self.count = self.count + 1
        return weight * self.count


class Drawing(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (1 + random.random())


@pytest.mark.parametrize("parametrization", [Counting(torch.ones(())), Counting(1), Drawing()])
def test_weight_that_is_another_at_every_call_keeps_the_batchnorm(parametrization: nn.Module) -> None:
    layer = nn.Linear(3, 4).double()
    parametrize.register_parametrization(layer, "weight", parametrization, unsafe=True)
    model = nn.Sequential(layer, nn.BatchNorm1d(4)).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["computed-weight"]


def test_weight_that_depends_on_something_the_run_sets_keeps_the_batchnorm(net: Any) -> None:
    class Settings:
        factor = 1.0

    class Scaled(nn.Module):
        def __init__(self, settings: Settings) -> None:
            super().__init__()
            self.settings = settings

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.settings.factor

    def forward(m: Any, x: Tensor) -> Tensor:
        m.settings.factor = 2.0
        # A layer large enough that what `fc` gave is remembered.
        return m.head(m.bn(m.fc(x)))

    settings = Settings()
    layer = parametrize.register_parametrization(nn.Linear(3, 4), "weight", Scaled(settings))
    model = net(forward, fc=layer, bn=nn.BatchNorm1d(4), head=nn.Linear(4, 40), settings=settings).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["unexplained"]


def test_layer_that_computes_another_tensor_too_keeps_the_batchnorm(judge: Judge) -> None:
    class Scaled(nn.Linear):
        def __init__(self, i: int, o: int) -> None:
            super().__init__(i, o)
            self.factor = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.factor)

    judge(nn.Sequential(twice(Scaled(3, 4), "factor"), nn.BatchNorm1d(4)), X, kept={"1": "computed-weight"})
    nested = parametrize.register_parametrization(nn.utils.weight_norm(nn.Linear(3, 4)).double(), "weight_g", Twice())
    model = nn.Sequential(nested, nn.BatchNorm1d(4)).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["computed-weight"]


@forms
def test_baked_layer_can_be_pickled(form: Any) -> None:
    model = nn.Sequential(form(nn.Linear(3, 4).double()), nn.BatchNorm1d(4)).double().eval()
    folded = pickle.loads(pickle.dumps(fold_batchnorm(model, (X,))))
    assert sorted(folded.state_dict()) == ["0.bias", "0.weight"]


def test_buffers_that_a_parametrization_writes_come_out_as_they_went_in() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return weight * 2

    model = nn.Sequential(with_parametrization(Counted())[0], nn.BatchNorm1d(4)).double().eval()
    calls = model[0].parametrizations.weight[0].calls
    before = calls.clone()
    plan_folding(model, (X,))
    assert torch.equal(calls, before)
    put_back = bake(model[0])
    put_back()
    assert torch.equal(calls, before)


@forms
def test_random_numbers_of_python_come_out_as_they_went_in(form: Any) -> None:
    model = nn.Sequential(form(nn.Linear(3, 4).double()), nn.BatchNorm1d(4)).double().eval()
    state = random.getstate()
    assert plan_folding(model, (X,)).folds
    assert random.getstate() == state


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.orthogonal, nn.utils.parametrizations.weight_norm])
def test_planning_does_not_disturb_a_backward_pass_that_is_pending(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Linear(3, 3)), nn.BatchNorm1d(3)).double().eval()
    loss = model(X).sum()
    assert plan_folding(model, (X,)).folds
    loss.backward()
