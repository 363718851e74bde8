"""Layers that do more than torch's own with their weights, and those whose weights are no ordinary parameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_bnfold.folding import FoldingError, FoldingPlan, fold_batchnorm, plan_folding

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_weight_written_in_forward_keeps_the_batchnorm(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.fc.weight.mul_(0.5)
        return m.bn(m.fc(x))

    model = net(forward)
    before = model.fc.weight.detach().clone()
    assert [kept.code for kept in plan_folding(model, (X.float(),)).kept] == ["parameter-read"]
    assert torch.equal(model.fc.weight, before)


def test_weight_replaced_in_forward_keeps_the_batchnorm(net: Any) -> None:
    def set_data(m: Any, x: Tensor) -> Tensor:
        m.fc.weight.data = m.fc.weight.data * 0.5
        return m.bn(m.fc(x))

    def set_attribute(m: Any, x: Tensor) -> Tensor:
        m.fc.weight = nn.Parameter(m.fc.weight * 0.5)
        return m.bn(m.fc(x))

    for forward in (set_data, set_attribute):
        model = net(forward)
        weight, before = model.fc.weight, model.fc.weight.detach().clone()
        assert not plan_folding(model, (X.float(),)).folds
        assert model.fc.weight is weight
        assert torch.equal(weight, before)


def test_layer_replaced_in_forward_keeps_the_batchnorm(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.fc = copy.deepcopy(m.fc)
        return m.bn(m.fc(x))

    model = net(forward)
    layer = model.fc
    assert not plan_folding(model, (X.float(),)).folds
    assert model.fc is layer


class NoBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu())


class OtherWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), self.bias)


def test_subclass_that_would_not_use_a_new_bias_keeps_the_batchnorm(judge: Judge) -> None:
    judge(nn.Sequential(NoBias(3, 4, bias=False), nn.BatchNorm1d(4)), X, kept={"1": "own-forward"})
    judge(nn.Sequential(NoBias(3, 4), nn.BatchNorm1d(4)), X, kept={"1": "own-forward"})


def test_layer_that_refuses_a_bias_keeps_the_batchnorm_and_nothing_else(judge: Judge) -> None:
    class Refusing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert self.bias is None
            return F.linear(x, self.weight)

    model = nn.Sequential(Refusing(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    judge(model, X, kept={"1": "own-forward"}, folds={"4": ["3"]})


class Dense(nn.Module):
    """Looks like a Linear and is of no class of torch's, as those of other libraries are."""

    def __init__(self, in_channels: int, out_channels: int, uses_bias: bool) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.uses_bias = in_channels, out_channels, uses_bias
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias if self.uses_bias else None)


def test_layer_of_another_library_gets_a_bias_if_it_would_use_one(judge: Judge) -> None:
    judge(nn.Sequential(Dense(3, 4, uses_bias=True), nn.BatchNorm1d(4)), X, folds={"1": ["0"]})
    judge(nn.Sequential(Dense(3, 4, uses_bias=False), nn.BatchNorm1d(4)), X, kept={"1": "own-forward"})


def test_layer_of_another_library_that_does_something_else_with_a_bias_keeps_no_other_batchnorm(judge: Judge) -> None:
    class AddingIt(Dense):
        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x, self.weight)
            return y if self.bias is None else y + self.bias

    layers = (nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    judge(nn.Sequential(AddingIt(3, 4, uses_bias=True), *layers), X, folds={"3": ["2"]})
    judge(nn.Sequential(AddingIt(3, 4, uses_bias=True), nn.BatchNorm1d(4)), X, kept={"1": "no-layer"})


def test_whatever_else_has_a_weight_and_no_bias_is_given_none(judge: Judge) -> None:
    class Mixture(nn.Module):
        """One matrix per expert, (experts, in, out); a bias would be added to each of their outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 3, 4
            self.weight = nn.Parameter(torch.randn(2, 3, 4))
            self.register_parameter("bias", None)

        def forward(self, x: Tensor) -> Tensor:
            experts = torch.einsum("ni,eio->eno", x, self.weight)
            return (experts if self.bias is None else experts + self.bias[:, None]).sum(0)

    judge(nn.Sequential(Mixture(), nn.Linear(4, 4), nn.BatchNorm1d(4)), X, folds={"2": ["1"]})


class SamePadding(nn.Conv1d):
    """Leaves the forward to torch, which leaves the convolution itself to this method."""

    def __init__(self, uses_bias: bool) -> None:
        super().__init__(3, 4, 2, bias=False)
        self.uses_bias = uses_bias

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv1d(F.pad(input, (1, 0)), weight, bias if self.uses_bias else None)


def test_convolution_that_leaves_out_the_bias_below_its_forward_keeps_the_batchnorm(judge: Judge) -> None:
    x = torch.randn(5, 3, 7).double()
    patched = nn.Conv1d(3, 4, 2, bias=False)
    patched._conv_forward = lambda input, weight, bias: F.conv1d(input, weight)
    for layer in (SamePadding(uses_bias=False), patched):
        others = (nn.ReLU(), nn.Conv1d(4, 2, 3), nn.BatchNorm1d(2))
        model = nn.Sequential(layer, nn.BatchNorm1d(4), *others)
        judge(model, x, kept={"1": "own-forward"}, folds={"4": ["3"]})
    judge(nn.Sequential(SamePadding(uses_bias=True), nn.BatchNorm1d(4)), x, folds={"1": ["0"]})


class Biasless(nn.Linear):
    """A bias that it is given is in its parameters, and nobody sees it there."""

    bias = None


def test_class_that_hides_the_bias_of_a_fold_keeps_the_batchnorm(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    model[0].__class__ = Biasless
    judge(model, X, kept={"1": "own-forward"})


def test_subclass_that_calls_linear_in_its_forward_is_folded(judge: Judge) -> None:
    judge(nn.Sequential(Scaled(3, 4), nn.BatchNorm1d(4)), X, folds={"1": ["0"]})


def test_subclass_that_computes_its_weight_keeps_the_batchnorm(judge: Judge) -> None:
    judge(nn.Sequential(OtherWeight(3, 4), nn.BatchNorm1d(4)), X, kept={"1": "computed-weight"})


def test_module_called_through_its_forward_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    plan = judge(net(lambda m, x: m.bn.forward(m.fc(x))), X, kept={"bn": "parameter-read"})
    assert "`bn.weight` is also read by" in plan.kept[0].reason
    judge(net(lambda m, x: m.bn(m.fc.forward(x))), X, kept={"bn": "no-layer"})
    judge(net(lambda m, x: m.bn(m.fc(x)) + m.fc.forward(x)), X, kept={"bn": "parameter-read"})
    judge(net(lambda m, x: m.bn(m.fc(x)) + m.bn.forward(m.fc(x))), X, kept={"bn": "parameter-read"})


@pytest.mark.parametrize("bias", [True, False])
def test_function_with_the_weight_of_a_layer_is_no_call_of_it(judge: Judge, net: Any, bias: bool) -> None:
    model = net(
        lambda m, x: m.bn(F.linear(x, m.fc.weight, m.fc.bias)), fc=nn.Linear(3, 4, bias=bias), bn=nn.BatchNorm1d(4)
    )
    judge(model, X, kept={"bn": "no-layer"})


def test_container_called_through_its_forward_is_folded(judge: Judge, net: Any) -> None:
    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    judge(net(lambda m, x: m.block.forward(x), block=block), X, folds={"block.1": ["block.0"]})


def test_layer_that_is_called_but_not_registered_is_no_layer(judge: Judge, net: Any) -> None:
    hidden = [nn.Linear(3, 4).double()]
    judge(net(lambda m, x: m.bn(hidden[0](x)), bn=nn.BatchNorm1d(4)), X, kept={"bn": "no-layer"})


class Wrapper(nn.Module):
    """Shows the weight of a part of it as its own, as code does that wants to look like a layer from outside."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.linear, self.reads = nn.Linear(3, 4), reads
        self.weight, self.bias = self.linear.weight, self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.weight[0] if self.reads else x)  # type: ignore[no-any-return]


def test_weight_that_a_module_around_the_layer_shows_as_its_own_is_folded(judge: Judge) -> None:
    model = nn.Sequential(Wrapper(), nn.BatchNorm1d(4))
    judge(model, X, folds={"1": ["0.linear"]})
    assert model[0].weight is model[0].linear.weight
    folded = fold_batchnorm(nn.Sequential(Wrapper(), nn.BatchNorm1d(4)).double(), (X,))
    assert folded[0].weight is folded[0].linear.weight


def test_weight_that_a_module_around_the_layer_reads_or_one_beside_it_owns_keeps_the_batchnorm(judge: Judge) -> None:
    judge(nn.Sequential(Wrapper(reads=True), nn.BatchNorm1d(4)), X, kept={"1": "parameter-read"})
    model = nn.Sequential(Wrapper(), nn.BatchNorm1d(4), nn.PReLU())
    model[2].register_parameter("tied", model[0].linear.bias)
    judge(model, X, kept={"1": "shared-parameter"})


class Constrained(nn.Linear):
    """Limits the norm of its rows, as published models of EEG do."""

    max_norm = 1.0


class ConstrainedByItself(Constrained):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, self.max_norm)
        return super().forward(x)


class Limit(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.renorm(weight, 2, 0, Constrained.max_norm)


def test_limit_of_the_norm_is_baked_if_a_parametrization_computes_it(judge: Judge) -> None:
    judge(nn.Sequential(ConstrainedByItself(3, 4), nn.BatchNorm1d(4)), X, kept={"1": "parameter-read"})
    layer = Constrained(3, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Limit())
    judge(nn.Sequential(layer, nn.BatchNorm1d(4)), X, folds={"1": ["0"]})


def test_one_module_under_two_names_is_folded_once(judge: Judge, net: Any) -> None:
    bn = nn.BatchNorm1d(4)
    model = net(lambda m, x: m.second(m.fc(x)), fc=nn.Linear(3, 4), first=bn, second=bn)
    judge(model, X, folds={"first": ["fc"]})


def test_shared_block_called_twice_is_folded(judge: Judge, net: Any) -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    judge(net(lambda m, x: m.a(m.b(x)), a=block, b=block), X, folds={"a.1": ["a.0"]})


def test_lent_weights_keep_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        lent = {"weight": torch.ones(4, 3).double(), "bias": torch.ones(4).double()}
        return m.bn(torch.func.functional_call(m.fc, lent, (x,)))

    judge(net(forward), X, kept={"bn": "computed-weight"})


def test_layer_of_another_dtype_is_kept_if_it_cannot_be_scaled() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].weight = nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))
    model[0].bias = None
    real = torch.randn(5, 3, dtype=torch.complex64)
    with pytest.raises(FoldingError, match="does not run"):
        plan_folding(model, (real,))


def test_quantised_layer_is_no_layer() -> None:
    class Quantised(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 4)
            del self.weight
            self.register_buffer("weight", torch.ones(4, 3, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight.to(x.dtype), self.bias)

    plan = plan_folding(nn.Sequential(Quantised(), nn.BatchNorm1d(4)), (X.float(),))
    assert [kept.code for kept in plan.kept] == ["unusual-weight"]


def test_integer_layer_keeps_the_batchnorm() -> None:
    class Integer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.to(torch.int64), self.weight, self.bias).float()

    model = nn.Sequential(Integer(3, 4), nn.BatchNorm1d(4))
    model[0].weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int64), requires_grad=False)
    model[0].bias = nn.Parameter(torch.ones(4, dtype=torch.int64), requires_grad=False)
    plan = plan_folding(model, (X.float(),))
    assert [kept.code for kept in plan.kept] == ["not-transparent"]


def test_buffer_for_a_weight_keeps_the_batchnorm(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].register_buffer("weight", weight)
    judge(model, X, kept={"1": "unusual-weight"})


def test_meta_model_keeps_its_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to("meta")
    plan = plan_folding(model, (torch.empty(5, 3, device="meta"),))
    assert [kept.code for kept in plan.kept] == ["unusual-weight"]


def test_frozen_parameters_are_folded_and_stay_frozen(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)).requires_grad_(False)
    judge(model, X, folds={"1": ["0"]})
    assert not model[0].weight.requires_grad
    assert not model[0].bias.requires_grad


def test_attributes_of_a_layer_that_lie_about_its_sizes_keep_the_batchnorm(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].out_features = 5
    judge(model, X, kept={"1": "unusual-weight"})


@pytest.mark.parametrize("size", [[4], (4,), torch.Size([4]), None, 5])
def test_attributes_for_sizes_that_are_no_numbers_or_that_nobody_needs_are_no_obstacle(size: Any, judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model[1].num_features = size
    if not isinstance(size, int):
        model[3].in_features = size
        model[0].out_features = size
    judge(model, X, folds={"1": ["0"]})


def test_forward_replaced_on_a_layer_without_bias_keeps_the_batchnorm(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    model[0].forward = functools.partial(lambda module, x: F.linear(x, module.weight), model[0])
    judge(model, X, kept={"1": "own-forward"})


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_sparse_weight_keeps_the_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse_csr())
    assert [kept.code for kept in plan_folding(model, (X.float(),)).kept] == ["unusual-weight"]


@pytest.mark.parametrize("kind", [nn.Module, nn.Embedding])
def test_lookup_that_limits_its_norm_by_the_call_keeps_the_batchnorm_and_the_numbers(kind: Any) -> None:
    class Lookup(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(*((7, 4) if kind is nn.Embedding else ()))
            self.weight = nn.Parameter(torch.randn(7, 4) * 3)

        def forward(self, index: Tensor) -> Tensor:
            return F.embedding(index, self.weight, max_norm=1.0)

    model = nn.Sequential(Lookup(), nn.BatchNorm1d(4)).double().eval()
    before = copy.deepcopy(model.state_dict())
    assert [kept.code for kept in plan_folding(model, (torch.arange(6),)).kept] == ["computed-weight"]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_sizes_that_are_no_longer_true_keep_the_batchnorm_before_them(side: str, judge: Judge) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4))
    setattr(model[1], f"{side.removesuffix('puts')}_features", 7)
    plan = judge(model, X, kept={"0": "no-layer"})
    assert f"`1` has another number of {side} than its attributes say" in plan.kept[0].reason
