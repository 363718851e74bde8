"""Plan and model -> folded model, and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import Fold, FoldingError, FoldingPlan, Part, fold_batchnorm, plan_folding
from lit_bnfold.folding.copying import copy_model
from lit_bnfold.folding.rewrite import apply_plan, fold_structure, folded_in_place

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Randomised = Callable[[nn.Module], nn.Module]


def small(bias: bool = True) -> nn.Sequential:
    layers = [nn.Linear(3, 4, bias=bias), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2, bias=bias), nn.BatchNorm1d(2)]
    return nn.Sequential(*layers).double().eval()


def bits(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything of a model, to the bit, and which objects it is made of."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    parts: dict[str, tuple[Any, ...]] = {
        name: (id(t), t.data_ptr(), t.requires_grad, t.dtype, t.stride(), t.detach().clone().flatten().tolist())
        for name, t in tensors.items()
    }
    for name, module in model.named_modules():
        parts[f"{name}()"] = (
            id(module),
            type(module),
            module.training,
            sorted(module.__dict__),
            list(module._parameters),
        )
    return parts


@pytest.mark.parametrize("bias", [True, False])
def test_folding_in_place_keeps_every_parameter_object(randomised: Randomised, agree: Any, bias: bool) -> None:
    model = randomised(small(bias))
    original, weights = copy.deepcopy(model), [model[0].weight, model[3].weight]
    biases = [model[0].bias, model[3].bias]
    assert fold_batchnorm(model, (X,), inplace=True) is model
    assert model[0].weight is weights[0]
    assert model[3].weight is weights[1]
    if bias:
        assert model[0].bias is biases[0]
        assert model[3].bias is biases[1]
    agree(original, model, [(X,), (2 * X[:1],)])


def test_optimizer_goes_on_with_the_folded_parameters(randomised: Randomised) -> None:
    model = randomised(small())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fold_batchnorm(model, (X,), inplace=True)
    before = model[0].weight.detach().clone()
    model(X).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_new_bias_is_trainable_as_the_weight_is(randomised: Randomised, requires_grad: bool) -> None:
    model = randomised(small(bias=False)).requires_grad_(requires_grad)
    folded = fold_batchnorm(model, (X,))
    assert folded[0].bias.requires_grad == folded[0].weight.requires_grad == requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folded_model_keeps_its_dtypes_and_comes_as_close_as_they_allow(
    randomised: Randomised, dtype: torch.dtype
) -> None:
    model = randomised(small())
    folded = fold_batchnorm(copy.deepcopy(model).to(dtype), (X.to(dtype),))
    assert {parameter.dtype for parameter in folded.parameters()} == {dtype}
    with torch.no_grad():
        exact = model(X)
        error = (folded(X.to(dtype)).double() - exact).abs().max() / exact.abs().max()
    assert float(error) < 8 * torch.finfo(dtype).eps


def test_model_of_mixed_dtypes_is_folded(randomised: Randomised) -> None:
    model = randomised(small())
    mixed = nn.Sequential(copy.deepcopy(model[0]).bfloat16(), copy.deepcopy(model[1]).float())
    folded = fold_batchnorm(mixed, (X.bfloat16(),))
    assert isinstance(folded[1], nn.Identity)
    assert folded[0].weight.dtype == torch.bfloat16
    assert folded(X.bfloat16()).dtype == mixed(X.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(folded(X.bfloat16()), mixed(X.bfloat16()), rtol=0.05, atol=0.05)


def test_folded_in_place_gives_everything_back_to_the_bit(randomised: Randomised, agree: Any) -> None:
    for bias in (True, False):
        model = randomised(small(bias))
        plan, before, original = plan_folding(model, (X,)), bits(model), copy.deepcopy(model)
        with folded_in_place(plan, model):
            assert isinstance(model[1], nn.Identity)
            agree(original, model, [(X,)])
        assert bits(model) == before
        assert torch.equal(model(X), original(X))


def test_folded_in_place_gives_everything_back_when_something_raises_inside(randomised: Randomised) -> None:
    model = randomised(small(bias=False))
    plan, before = plan_folding(model, (X,)), bits(model)
    with pytest.raises(ArithmeticError), folded_in_place(plan, model):
        raise ArithmeticError
    assert bits(model) == before


def test_folded_in_place_gives_everything_back_when_the_plan_does_not_fit(randomised: Randomised) -> None:
    model = randomised(small())
    plan, before = plan_folding(model, (X,)), bits(model)
    wrong = FoldingPlan((*plan.folds, Fold("5", (Part("3"),))))
    with pytest.raises(FoldingError), folded_in_place(wrong, model):
        raise AssertionError("not reached")
    assert bits(model) == before


def test_folded_in_place_gives_everything_back_when_a_fold_fails_halfway(
    randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = randomised(small(bias=False))
    plan, before = plan_folding(model, (X,)), bits(model)
    from lit_bnfold.folding import rewrite

    real, left = rewrite.fold_into_outputs, [1]

    def fails(*args: Any, **kwargs: Any) -> Any:
        if not left:
            raise MemoryError
        left.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(rewrite, "fold_into_outputs", fails)
    with pytest.raises(MemoryError), folded_in_place(plan, model):
        raise AssertionError("not reached")
    assert bits(model) == before


def test_fold_that_fails_halfway_leaves_no_layer_half_folded(
    net: Any, randomised: Randomised, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net(lambda m, x: m.bn(m.a(x)) + m.bn(m.b(x)), a=nn.Linear(3, 4), b=nn.Linear(3, 4), bn=nn.BatchNorm1d(4))
    model = randomised(model.double()).eval()
    plan, expected = plan_folding(model, (X,)), model(X)
    from lit_bnfold.folding import rewrite

    real, left = rewrite.fold_into_outputs, [1]

    def fails(*args: Any, **kwargs: Any) -> Any:
        if not left:
            raise MemoryError
        left.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr(rewrite, "fold_into_outputs", fails)
    with pytest.raises(MemoryError):
        plan.apply(model, inplace=True)
    assert torch.equal(model(X), expected)


def test_structure_and_folded_numbers_make_the_folded_model(randomised: Randomised) -> None:
    model = randomised(small(bias=False))
    plan = plan_folding(model, (X,))
    folded, fresh = plan.apply(model), small(bias=False)
    fold_structure(plan, fresh)
    assert str(fresh) == str(folded)
    fresh.load_state_dict(folded.state_dict())
    assert torch.equal(fresh(X), folded(X))


def test_structure_can_be_given_to_a_model_without_numbers(randomised: Randomised) -> None:
    model = randomised(small(bias=False))
    plan = plan_folding(model, (X,))
    folded = plan.apply(model)
    with torch.device("meta"):
        fresh = small(bias=False)
    fold_structure(plan, fresh)
    fresh.load_state_dict(folded.state_dict(), assign=True)
    assert torch.equal(fresh(X), folded(X))


def misfits() -> dict[str, tuple[nn.Module, str]]:
    first = "The plan folds the BatchNorm `1`; the model has"
    return {
        "no batchnorm": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), f"{first} ReLU of that name"),
        "nothing": (nn.Sequential(nn.Linear(3, 4)), f"{first} nothing of that name"),
        "no layer": (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), "folds into the layer `0`; the model has ReLU"),
        "other sizes": (nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4)), "wants 4 out_features of `0`, which has 5"),
    }


@pytest.mark.parametrize("how", [apply_plan, fold_structure])
@pytest.mark.parametrize("case", ["no batchnorm", "nothing", "no layer", "other sizes"])
def test_plan_that_does_not_fit_is_refused_with_the_first_difference(
    case: str, how: Any, randomised: Randomised
) -> None:
    model, message = misfits()[case]
    model = randomised(model)
    before = bits(model)
    with pytest.raises(FoldingError, match=message):
        how(FoldingPlan((Fold("1", (Part("0"),)), Fold("4", (Part("3"),)))), model)
    assert bits(model) == before


def test_plan_that_fits_at_first_and_not_later_changes_nothing(randomised: Randomised) -> None:
    plan = plan_folding(randomised(small()), (X,))
    model = randomised(nn.Sequential(*list(small())[:4], nn.ReLU()))
    before = bits(model)
    for inplace in (False, True):
        with pytest.raises(FoldingError, match="The plan folds the BatchNorm `4`; the model has ReLU of that name"):
            plan.apply(model, inplace=inplace)
        assert bits(model) == before


@pytest.mark.parametrize("channels", [(0, 1, 2, 4), (0, 1, 2, -2), (0, 1, 2), (0, 1, 2, 3, 3)])
def test_plan_with_channels_that_are_not_there_is_refused(channels: tuple[int, ...]) -> None:
    model = small()
    with pytest.raises(FoldingError, match=r"channels|out_features"):
        FoldingPlan((Fold("1", (Part("0", channels),)),)).apply(model)


@pytest.mark.parametrize(
    "fold",
    [Fold("1", (Part("0"),), "sideways"), Fold("1", ()), Fold("1", (Part("0"), Part("0")))],
    ids=["direction", "no layer", "layer twice"],
)
def test_plan_that_was_made_by_hand_and_says_no_fold_is_refused(fold: Fold, randomised: Randomised) -> None:
    model = randomised(small())
    before = bits(model)
    for inplace in (False, True):
        with pytest.raises(FoldingError, match=r"folds the BatchNorm `1`: expected .*, got .*Make a plan"):
            FoldingPlan((fold,)).apply(model, inplace=inplace)
    assert bits(model) == before


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_plan_is_refused_by_a_model_that_got_something_in_the_way_since(randomised: Randomised) -> None:
    plan = plan_folding(randomised(small()), (X,))

    def weight_norm(model: nn.Sequential) -> None:
        nn.utils.parametrizations.weight_norm(model[0])

    def parametrised_batchnorm(model: nn.Sequential) -> None:
        nn.utils.parametrize.register_parametrization(model[4], "bias", nn.Tanh())

    def hook(model: nn.Sequential) -> None:
        model[1].register_forward_hook(lambda *_: None)

    def tie(model: nn.Sequential) -> None:
        model.append(nn.Linear(3, 4).double())
        model[-1].weight = model[0].weight

    def no_statistics(model: nn.Sequential) -> None:
        model[4].running_mean = model[4].running_var = None

    def not_finite(model: nn.Sequential) -> None:
        model[4].running_var[0] = float("nan")

    def to_meta(model: nn.Sequential) -> None:
        model.to("meta")

    for change in (weight_norm, parametrised_batchnorm, hook, tie, no_statistics, not_finite, to_meta):
        model = randomised(small())
        change(model)
        before = list(model.modules())
        for inplace in (False, True):
            with pytest.raises(FoldingError, match=r"The plan folds `[14]`, which has to stay in this model: "):
                plan.apply(model, inplace=inplace)
        with pytest.raises(FoldingError), folded_in_place(plan, model):
            raise AssertionError("not reached")
        assert list(model.modules()) == before
        assert isinstance(model[1], nn.BatchNorm1d)


def padded_behind(padding: Any, **kwargs: Any) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=padding, **kwargs))


class Beside(nn.Module):
    """Two convolutions of the same input, and a BatchNorm beside the first of them."""

    def __init__(self, kernel: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, kernel, **kwargs), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.norm(x) + self.conv(x)


@pytest.mark.parametrize(
    ("planned", "other", "message"),
    [
        (padded_behind(0), padded_behind(1), "`2` pads its input with zeros"),
        (padded_behind("valid"), padded_behind("same"), "`2` pads its input with zeros"),
        (padded_behind(1, padding_mode="reflect"), padded_behind(1), "`2` pads its input with zeros"),
        (Beside(3, padding=1), Beside(2, padding="same"), "no element of what `conv` makes lies on"),
        (Beside(3, padding=2, dilation=2), Beside(3, padding=1, dilation=1, stride=2), "no element of what `conv`"),
        (Beside(1), Beside(3, padding=1), None),
        (padded_behind(0), padded_behind(2, padding_mode="circular"), None),
    ],
)
def test_plan_is_refused_where_a_layer_is_called_otherwise(
    planned: nn.Module, other: nn.Module, message: str | None, randomised: Randomised, agree: Any
) -> None:
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    plan, other = plan_folding(randomised(planned).double(), (x,)), randomised(other).double().eval()
    assert len(plan.folds) == 1
    if message is None:
        agree(other, plan.apply(other), [(x,)])
        return
    before = bits(other)
    for inplace in (False, True):
        with pytest.raises(FoldingError, match=f"has to stay in this model: {message}"):
            plan.apply(other, inplace=inplace)
    assert bits(other) == before


class PaddingNothing(nn.Conv2d):
    """Has a forward of its own, which does not heed its attributes."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias)


@pytest.mark.parametrize("attribute", ["stride", "dilation", "padding"])
def test_plan_is_taken_where_a_layer_has_lists_for_its_sizes(
    attribute: str, randomised: Randomised, agree: Any
) -> None:
    model = randomised(Beside(3, padding=1)).double().eval()
    setattr(model.conv, attribute, list(getattr(model.conv, attribute)))
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    plan = plan_folding(model, (x,))
    assert len(plan.folds) == 1
    agree(model, plan.apply(model), [(x,), (2 * x,)])


def test_plan_is_taken_where_a_layer_has_a_forward_of_its_own(randomised: Randomised, agree: Any) -> None:
    model = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), PaddingNothing(4, 4, 3, padding=1))).double().eval()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    plan = plan_folding(model, (x,))
    assert len(plan.folds) == 1
    agree(model, plan.apply(model), [(x,), (2 * x,)])


def test_plan_is_refused_by_a_batchnorm_that_can_take_no_other_since(randomised: Randomised) -> None:
    model = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Tanh())).double().eval()
    plan = plan_folding(model, (X,))
    assert plan.folds[0].layers == ("2",)
    model[2].running_mean = model[2].running_var = None
    with pytest.raises(FoldingError, match="has to stay in this model: it keeps no statistics"):
        plan.apply(model)


def test_plan_is_refused_by_a_model_that_is_folded_already(randomised: Randomised) -> None:
    model = randomised(small())
    plan = plan_folding(model, (X,))
    with pytest.raises(FoldingError, match="`1`; the model has Identity of that name"):
        plan.apply(plan.apply(model))


def test_batchnorm_is_gone_wherever_the_model_holds_it(net: Any, randomised: Randomised, agree: Any) -> None:
    bn = nn.BatchNorm1d(4)
    model = net(lambda m, x: m.again[0](m.fc(x)), fc=nn.Linear(3, 4), first=bn, second=bn)
    vars(model)["again"] = (bn,)
    model = randomised(model.double()).eval()
    folded = fold_batchnorm(model, (X,))
    assert folded.first is folded.second is folded.again[0]
    assert type(folded.first) is nn.Identity
    assert not any("first" in name or "second" in name for name in folded.state_dict())
    agree(model, folded, [(X,)])


def test_weight_that_is_not_contiguous_keeps_its_layout(randomised: Randomised, agree: Any) -> None:
    model = randomised(small())
    model[0].weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64).t())
    folded = fold_batchnorm(model, (X,))
    assert folded[0].weight.stride() == model[0].weight.stride() == (1, 4)
    agree(model, folded, [(X,)])


def test_copy_of_a_model_whose_copy_shares_parameters_is_refused() -> None:
    class Shallow(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Shallow:
            other = Shallow(nn.Linear(3, 4))
            other[0].weight = self[0].weight
            return other

    with pytest.raises(FoldingError, match="its copy holds parts of the model itself"):
        copy_model(Shallow(nn.Linear(3, 4)))


def test_copy_that_forgets_its_mode_is_put_into_it(net: Any, randomised: Randomised, agree: Any) -> None:
    class Forgetful(nn.Sequential):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return Forgetful(*copy.deepcopy(list(self), memo))

    layers = Forgetful(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    model = randomised(nn.Sequential(layers, nn.Tanh()).double()).eval()
    folded = fold_batchnorm(model, (X,))
    assert isinstance(folded[0][3], nn.BatchNorm1d)
    assert not any(module.training for module in folded.modules())
    agree(model, folded, [(X,), (X[:2],)])


class Sharing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}
        self.second = self.first
        self.filled: dict[str, Any] = {"numbers": [1.0], "first": self.first}
        self.filled["itself"] = self.filled
        self.again = self.filled
        self.by_layer: dict[nn.Module, Any] = {}
        self.empty: list[Any] = []
        self.layer = nn.Linear(2, 2)
        self.by_layer[self.layer] = [2.0]
        self.same = [self.layer, self.layer.weight, self.first]
        self.name = "odd"


class Odd(Sharing):
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.name = self.name + self.layer.__class__.__name__


@pytest.mark.parametrize("kind", [Sharing, Odd])
def test_copies_share_what_the_originals_share(kind: type[Sharing]) -> None:
    original = kind()
    copied = copy_model(nn.Sequential(original, nn.ReLU()))[0]
    assert copied.first is copied.second is copied.same[2] is copied.filled["first"]
    assert copied.first is not original.first
    assert copied.filled is copied.again is copied.filled["itself"] is not original.filled
    assert copied.filled["numbers"] == original.filled["numbers"]
    assert copied.filled["numbers"] is not original.filled["numbers"]
    assert copied.by_layer == {copied.layer: [2.0]}
    assert copied.by_layer[copied.layer] is not original.by_layer[original.layer]
    assert copied.same[0] is copied.layer is not original.layer
    assert copied.same[1] is copied.layer.weight
    assert copied.empty == []
    assert copied.empty is not original.empty
    assert copied.name == ("odd" if kind is Sharing else "oddLinear")


def test_copy_shares_no_memory_with_the_original_through_other_references(net: Any, randomised: Randomised) -> None:
    model = randomised(net(lambda m, x: m.bn(m.fc(x))).double()).eval()
    model.gammas, model.weights = [model.bn.weight], [model.fc.weight]
    folded = fold_batchnorm(model, (X,))
    assert folded.gammas[0].data_ptr() != model.bn.weight.data_ptr()
    assert folded.weights[0] is folded.fc.weight
    assert folded.fc.weight.data_ptr() != model.fc.weight.data_ptr()


def test_shared_part_is_whole_when_a_class_that_copies_itself_looks_at_it() -> None:
    class Peeking(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            inner = copy.deepcopy(self.inner, memo)
            assert inner.weight.shape == (2, 2)
            return Peeking(inner)

    shared = nn.Linear(2, 2)
    copied = copy_model(nn.ModuleDict({"a": nn.Sequential(shared), "z": nn.Sequential(Peeking(shared))}))
    assert copied["a"][0] is copied["z"][0].inner


def test_batchnorm_that_got_a_weight_says_that_it_has_one(randomised: Randomised, agree: Any) -> None:
    model = randomised(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False)).double()).eval()
    expected = model(X)
    with folded_in_place(plan_folding(model, (X,)), model):
        assert model[2].affine
    assert not model[2].affine
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(fold_batchnorm(model, (X,)))
    torch.testing.assert_close(converted[2].weight.double(), fold_batchnorm(model, (X,))[2].weight)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


def test_plan_that_makes_no_sense_is_refused(randomised: Randomised) -> None:
    def changed(**changes: Any) -> dict[str, Any]:
        plan = FoldingPlan((Fold("1", (Part("0"),)),)).to_dict()
        fold = plan["folds"][0]
        part = changes.pop("part", None)
        plan["folds"] = [fold | changes | ({"parts": [fold["parts"][0] | part]} if part else {})]
        return plan

    twice = changed()
    twice["folds"] *= 2
    good = changed()["folds"][0]["parts"][0]
    bad = [
        twice, changed(parts=[]), changed(parts=changed()["folds"][0]["parts"] * 2), changed(batchnorm="0"),
        changed(eps=-1.0), changed(eps=float("inf")), changed(part={"shift": float("nan")}),
        changed(part={"channels": "0123"}), changed(part={"channels": [0.5, 1.0, 2.0, 3.0]}),
        changed(part={"channels": [float("inf")] * 4}), changed(part={"channels": ""}),
        changed(part={"channels": [0, 1, 2, 3.0]}), changed(parts=[good, good | {"layer": "2", "shift": math.nan}]),
    ]  # fmt: skip
    for plan in bad:
        with pytest.raises(FoldingError):
            FoldingPlan.from_dict(plan)
    # The message names the place.
    for plan, place in (
        (changed(part={"shift": 10**400}), r"folds\[0\]\.parts\[0\]\.shift: expected a finite number, found 1000"),
        (changed(part={"baked": 1}), r"folds\[0\]\.parts\[0\]\.baked: expected bool, found 1"),
        (changed(eps=True), r"folds\[0\]\.eps: expected float or int or NoneType, found True"),
        (changed(later=1), r"folds\[0\]: expected nothing but batchnorm, .*, found 'later'"),
        (changed() | {"version": True}, "folding plan of version 1 to 2, got version True"),
        (changed() | {"kept": [{"batchnorm": "1", "reason": "", "code": ""}]}, "each BatchNorm once"),
    ):
        with pytest.raises(FoldingError, match=place):
            FoldingPlan.from_dict(plan)


@pytest.mark.parametrize(
    "folds",
    [
        (Fold("1", (Part("0"),)), Fold("1", (Part("0"),))),
        (Fold("1", (Part("0"),)), Fold("4", (Part("1"),))),
        (Fold("1", (Part("1"),)),),
        (Fold("1", (Part("4"),), "parallel"),),
    ],
)
def test_plan_that_wants_a_batchnorm_twice_or_where_it_cannot_go_is_refused(
    folds: tuple[Fold, ...], randomised: Randomised
) -> None:
    model = randomised(small())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FoldingError):
        FoldingPlan(folds).apply(model, inplace=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert isinstance(model[1], nn.BatchNorm1d)


def test_plan_that_goes_forward_into_an_embedding_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(FoldingError, match="takes it backward alone"):
        FoldingPlan((Fold("1", (Part("0"),), "forward"),)).apply(model)
