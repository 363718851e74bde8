"""The table of layers and BatchNorms, and how a project adds to it for one call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from lit_bnfold.folding import BatchNormKind, Kinds, LayerKind, fold_batchnorm, plan_folding
from lit_bnfold.folding.rewrite import make_ordinary

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


@pytest.mark.parametrize(
    "given",
    [{"layers": (nn.Linear,)}, {"layers": (STANDARDISE,)}, {"batchnorms": (PROJECTION,)}, {"layers": PROJECTION}],
)
def test_kinds_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(
        TypeError, match=r"(layers|batchnorms): expected a tuple such as \(\w+Kind\(YourClass, ...\),\)"
    ):
        Kinds(**given)


def test_layer_of_a_project_without_a_weight_stays_out_of_every_fold() -> None:
    class Weightless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.matrix)

    kinds = Kinds(layers=(LayerKind(Weightless, F.linear, channel_axis=-1),))
    plan = plan_folding(nn.Sequential(Weightless(), nn.BatchNorm1d(4), nn.ReLU()).double(), (X,), kinds=kinds)
    assert plan.kept[0].code == "unusual-weight"
    assert "`0` has no tensor that is called `weight`" in plan.kept[0].reason


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


class Perhaps(Projection):
    """Has a bias once somebody gives it one."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        del self.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, getattr(self, "bias", None))


def test_layer_of_a_project_that_has_no_place_for_a_bias_is_given_one(randomised: Any, agree: Any) -> None:
    model = randomised(nn.Sequential(Perhaps(3, 4), nn.BatchNorm1d(4))).double().eval()
    kinds = Kinds(layers=(PROJECTION,))
    original = copy.deepcopy(model)
    plan = plan_folding(model, (X,), kinds=kinds)
    assert [fold.layers for fold in plan.folds] == [("0",)]
    agree(original, plan.apply(model, kinds=kinds), [(X,), (2 * X,)])
    assert "bias" not in model[0]._parameters
    # The way back leaves none either.
    remove = make_ordinary(model[0], PROJECTION)
    assert model[0].bias is not None
    remove()
    assert "bias" not in model[0]._parameters


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


def test_normalisation_of_a_project_over_the_examples_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Standardise(4)).double().eval()
    wrong = BatchNormKind(Standardise, "mean", "variance", "gamma", eps="epsilon", channel_axis=-2)
    x = torch.randn(4, 3, dtype=torch.float64)
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


class Own(nn.Module):
    """A layer of no class that anybody knows, with a function of torch's."""

    def __init__(self, function: Any, *shape: int, bias: bool = True, groups: int = 1) -> None:
        super().__init__()
        self.function, self.stated = function, groups
        self.weight = nn.Parameter(torch.randn(*shape))
        self.bias = nn.Parameter(torch.randn(shape[0])) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        grouped = {} if self.stated == 1 else {"groups": self.stated}
        return self.function(x, self.weight, self.bias, **grouped)


@pytest.mark.parametrize(
    ("function", "weight", "example"),
    [
        (F.linear, (4, 3), (5, 3)),
        (F.conv1d, (4, 3, 2), (5, 3, 6)),
        (F.conv2d, (4, 3, 2, 1), (5, 3, 6, 4)),
        (F.conv_transpose2d, (4, 4, 2, 2), (5, 4, 3, 3)),
    ],
)
def test_module_that_calls_a_function_with_its_own_weight_is_a_layer(
    function: Any, weight: tuple[int, ...], example: tuple[int, ...], judge: Any, randomised: Any, agree: Any
) -> None:
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(example)]
    x = torch.randn(example, dtype=torch.float64)
    model = nn.Sequential(Own(function, *weight), norm(4), nn.Tanh())
    plan = judge(model, x, folds={"1": ["0"]})
    assert plan.folds[0].parts[0].function == function.__name__
    # A plan out of a file finds it as well.
    other = randomised(nn.Sequential(Own(function, *weight), norm(4), nn.Tanh()).double()).eval()
    agree(other, type(plan).from_dict(plan.to_dict()).apply(other), [(x,)])


def test_module_that_is_a_layer_by_its_call_takes_a_batchnorm_forward(judge: Any) -> None:
    judge(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), Own(F.linear, 4, 3)), X, folds={"1": ["2"]})


def test_module_that_calls_without_a_bias_or_with_groups_of_its_own_is_no_layer(judge: Any) -> None:
    judge(nn.Sequential(Own(F.linear, 4, 3, bias=False), nn.BatchNorm1d(4)), X, kept={"1": "own-forward"})
    images = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    model = nn.Sequential(Own(F.conv2d, 4, 2, 1, 1, groups=2), nn.BatchNorm2d(4))
    judge(model, images, kept={"1": "unusual-weight"})


def test_module_with_several_weights_is_no_layer(judge: Any, net: Any) -> None:
    class Several(Own):
        def __init__(self) -> None:
            super().__init__(F.linear, 3, 3)
            self.other = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight, self.bias), self.other, self.bias)

    judge(nn.Sequential(Several(), nn.BatchNorm1d(3)), X, kept={"1": "computed-weight"})


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layer_is_one_call_and_lets_nothing_pass(kind: Any, judge: Any, net: Any) -> None:
    model = net(
        lambda m, x: m.after(m.cell(m.before(m.fc(x).transpose(1, 2)).transpose(1, 2))[0].transpose(1, 2)),
        fc=nn.Linear(3, 4), before=nn.BatchNorm1d(4), cell=kind(4, 5, batch_first=True), after=nn.BatchNorm1d(5),
    )  # fmt: skip
    sequence = torch.randn(4, 6, 3, dtype=torch.float64)
    judge(model, sequence, folds={"before": ["fc"]}, kept={"after": "no-layer"})


def test_fixed_filter_is_no_layer_and_in_nobody_s_way(judge: Any) -> None:
    class Blur(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(4, 1, 3, 3) / 9)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, padding=1, groups=4)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), Blur(), nn.BatchNorm2d(4))
    images = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    judge(model, images, folds={"1": ["0"]}, kept={"4": "no-layer"})


@pytest.mark.parametrize(
    "attributes", [{"groups": None}, {"groups": 2}, {"in_features": [3], "out_features": [4]}, {"in_features": 7}]
)
def test_attributes_of_a_module_that_is_a_layer_by_its_call_mean_nothing(attributes: Any, judge: Any) -> None:
    layer = Own(F.linear, 4, 3)
    vars(layer).update(attributes)
    judge(nn.Sequential(layer, nn.BatchNorm1d(4)), X, folds={"1": ["0"]})
    layer = Own(F.linear, 4, 3)
    vars(layer).update(attributes)
    judge(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), layer), X, folds={"1": ["2"]})


def test_linear_layer_with_an_attribute_called_groups_is_folded(judge: Any) -> None:
    class Grouped(nn.Linear):
        groups = 3

    judge(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), Grouped(3, 4)), X, folds={"1": ["2"]})


def test_weight_of_another_rank_than_its_function_wants_is_no_layer(judge: Any, net: Any) -> None:
    class Dot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    model = net(lambda m, x: m.dot(m.bn(m.fc(x))), fc=nn.Linear(3, 3), bn=nn.BatchNorm1d(3), dot=Dot())
    judge(model, X, folds={"bn": ["fc"]})


def test_batchnorm_of_torch_s_may_be_named_too(judge: Any, randomised: Any, agree: Any) -> None:
    class Named(nn.BatchNorm1d):
        pass

    model = randomised(nn.Sequential(nn.Linear(3, 4), Named(4)).double()).eval()
    folded = fold_batchnorm(model, (X,), kinds=Kinds(batchnorms=(BatchNormKind(Named),)))
    assert isinstance(folded[1], nn.Identity)
    agree(model, folded, [(X,)])


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A function that takes part in torch's protocol, with a word of its own for its input."""
    if has_torch_function((x, weight)):
        return handle_torch_function(project, (x, weight), x, weight, bias)  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


class Projecting(Projection):
    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


def test_function_may_call_its_input_as_it_likes(randomised: Any, agree: Any) -> None:
    arguments = ("x", "weight", "bias")
    kinds = Kinds(layers=(LayerKind(Projecting, project, -1, "i", "o", arguments=arguments),))
    model = randomised(nn.Sequential(Projecting(3, 4), nn.BatchNorm1d(4)).double()).eval()
    assert plan_folding(model, (X,), kinds=kinds).folds[0].layers == ("0",)
    agree(model, fold_batchnorm(model, (X,), kinds=kinds), [(X,), (2 * X[:2],)])


@pytest.mark.parametrize("module", ["Linear", nn.Linear(3, 4), int])
def test_kind_of_what_is_no_class_of_modules_is_refused(module: Any) -> None:
    with pytest.raises(TypeError, match=r"module: expected a class of modules such as nn\.Linear, got "):
        LayerKind(module, F.linear, -1)
    with pytest.raises(TypeError, match=r"module: expected a class of modules such as nn\.Linear, got "):
        BatchNormKind(module)
