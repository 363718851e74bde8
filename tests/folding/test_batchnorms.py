"""What counts as a BatchNorm, and which of them can be folded at all."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_bnfold.folding import FoldingPlan, fold_batchnorm, plan_folding

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_batchnorm_left_in_training_mode_is_kept(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.bn.train()
        return m.bn(m.fc(x))

    model = net(forward)
    before = copy.deepcopy(model.double().state_dict())
    # It normalises by its batch, so batches of one are no input.
    judge(model, X, kept={"bn": "batch-statistics"}, others=[(2 * X[:3],)])
    assert list(before) == list(model.state_dict())


def test_running_the_model_in_training_mode_does_not_move_its_statistics(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.bn.train()
        return m.bn(m.fc(x))

    model = net(forward)
    before = copy.deepcopy(model.state_dict())
    plan_folding(model, (X.float(),))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_batchnorm_without_statistics_is_kept(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    judge(model, X, kept={"1": "no-statistics"}, others=[(2 * X,)])


def test_batchnorm_that_is_not_reached_is_kept(judge: Judge, net: Any) -> None:
    plan = judge(net(lambda m, x: m.fc(x)), X, kept={"bn": "not-reached"})
    assert plan.kept[0].reason == "the run did not reach it"


class ReLUBatchNorm(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class CalledBatchNorm(nn.BatchNorm1d):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x).relu()


class PlainBatchNorm(nn.BatchNorm1d):
    """A subclass that changes nothing."""


def test_subclass_that_does_more_keeps_the_rest_and_no_statistics(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), ReLUBatchNorm(4))
    judge(model, X, folds={"1": ["0"]})
    assert isinstance(model[1], ReLUBatchNorm)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    assert (model(X) >= 0).all()
    assert plan_folding(model, (X,)) == FoldingPlan()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(X), model(X))


def test_subclass_that_reads_its_own_statistics_besides_is_kept(judge: Judge) -> None:
    class Peeping(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * self.running_var.mean()

    class Glancing(nn.BatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).to(self.weight.dtype)

    for kind in (Peeping, Glancing):
        judge(nn.Sequential(nn.Linear(3, 4), kind(4)), X, kept={"1": "own-forward"})


def test_subclass_that_holds_another_batchnorm_is_kept(judge: Judge) -> None:
    class Nested(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(4)
            self.inner = nn.BatchNorm1d(4)

        def forward(self, input: Tensor) -> Tensor:
            return self.inner(super().forward(input))

    judge(nn.Sequential(nn.Linear(3, 4), Nested()), X, kept={"1": "own-forward", "1.inner": "behind-batchnorm"})


class FrozenBatchNorm1d(nn.Module):
    """As detection models have it: the statistics are buffers, and the arithmetic is written out."""

    def __init__(self, rectifies: bool = False) -> None:
        super().__init__()
        self.eps, self.rectifies = 1e-3, rectifies
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(4, dtype=torch.float64) + 0.5)

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        output = input * scale + (self.bias - self.running_mean * scale)
        return output.relu() if self.rectifies else output


class Homemade(nn.Module):
    """A BatchNorm of a project's own, by name none."""

    def __init__(self, scales_twice: bool) -> None:
        super().__init__()
        self.scales_twice = scales_twice
        self.weight, self.bias = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        for name, values in (("running_mean", torch.randn(4)), ("running_var", torch.rand(4) + 0.5)):
            self.register_buffer(name, values)
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        numbers = (self.running_mean, self.running_var, self.weight, self.bias)
        y = F.batch_norm(x, *numbers, training=self.training)
        return y * self.weight if self.scales_twice else y


def test_whatever_has_the_tensors_of_a_batchnorm_and_does_what_one_does_is_folded(judge: Judge) -> None:
    judge(nn.Sequential(nn.Linear(3, 4), Homemade(scales_twice=False)), X, folds={"1": ["0"]})
    judge(nn.Sequential(nn.Linear(3, 4), Homemade(scales_twice=True)), X, kept={"1": "own-forward"})


def only_some_rows(norm: Any, x: Tensor, y: Tensor) -> Tensor:
    valid = x.abs().sum(-1) > 0
    return torch.zeros_like(x).index_put((valid,), y[valid])


def only_float32(norm: Any, x: Tensor, y: Tensor) -> Tensor:
    if x.dtype is torch.float64 and x.abs().max() > 1e4:
        raise TypeError("float32 alone")
    return y


def limited_variance(norm: Any, x: Tensor, y: Tensor) -> Tensor:
    numbers = (norm.running_mean, norm.running_var.clamp(max=1.0), norm.weight, norm.bias)
    return F.batch_norm(x, *numbers, training=False)


def told_outside(norm: Any, x: Tensor, y: Tensor) -> Tensor:
    norm.is_large = bool(x.abs().max() > 50)
    return y


@pytest.mark.parametrize(
    "rest",
    [only_some_rows, only_float32, limited_variance, told_outside, lambda norm, x, y: torch.where(x != 0, y, x)],
)
def test_homemade_batchnorm_that_is_more_than_arithmetic_is_kept_and_nothing_else(rest: Any, judge: Judge) -> None:
    class More(Homemade):
        def forward(self, x: Tensor) -> Tensor:
            return rest(self, x, super().forward(x))  # type: ignore[no-any-return]

    zero_row = torch.cat([X[:2], torch.zeros(1, 3).double()])
    for bias in (True, False):
        others = (nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
        model = nn.Sequential(nn.Linear(3, 4, bias=bias), More(scales_twice=False), *others)
        judge(model, X, kept={"1": "own-forward"}, folds={"4": ["3"]}, others=[(zero_row,), (1e3 * X,)])


def test_homemade_batchnorm_that_is_told_more_than_its_input_is_kept_and_nothing_else(judge: Judge, net: Any) -> None:
    class Told(Homemade):
        def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = super().forward(x)
            return y if residual is None else y + residual

    parts = {"a": nn.Linear(3, 4), "norm": Told(scales_twice=False), "b": nn.Linear(4, 4), "bn": nn.BatchNorm1d(4)}
    model = net(lambda m, x: m.bn(m.b(m.norm(m.a(x), residual=m.a(x)))), **parts)
    judge(model, X, kept={"norm": "own-forward"}, folds={"bn": ["b"]})


def test_instance_norm_that_normalises_by_statistics_it_tracked_is_folded(judge: Judge) -> None:
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for tracks in (True, False):
        norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=tracks)
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3.0)
        judge(nn.Sequential(nn.Conv2d(3, 4, 3), norm), images, folds={"1": ["0"]} if tracks else {})


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-12, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_eps_that_stands_in_the_forward_alone_is_found_out(eps: float, dtype: torch.dtype, agree: Any) -> None:
    class HiddenBatchNorm(FrozenBatchNorm1d):
        def __init__(self) -> None:
            super().__init__()
            del self.eps
            self.running_var.uniform_(0.5, 2.0)

        def forward(self, input: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + eps).rsqrt()
            return input * scale + (self.bias - self.running_mean * scale)

    model = nn.Sequential(nn.Linear(3, 4), HiddenBatchNorm(), nn.Tanh()).to(dtype).eval()
    plan = plan_folding(model, (X.to(dtype),))
    assert [(fold.batchnorm, fold.eps) for fold in plan.folds] == [("1", eps)]
    # The statistics of another copy may be others.
    exact = copy.deepcopy(model).double()
    exact[1].running_var.uniform_(1e-12, 1e-6)
    agree(exact, FoldingPlan.from_dict(plan.to_dict()).apply(exact), [(X,)], tolerance=1e-9)


def test_batchnorm_that_is_only_nearly_one_is_kept() -> None:
    class NearlyBatchNorm(FrozenBatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 1.0005

    model = nn.Sequential(nn.Linear(3, 4), NearlyBatchNorm()).float().eval()
    assert [kept.code for kept in plan_folding(model, (X.float(),)).kept] == ["own-forward"]


def test_frozen_batchnorm_is_folded_if_it_does_what_a_batchnorm_does(judge: Judge) -> None:
    judge(nn.Sequential(nn.Linear(3, 4), FrozenBatchNorm1d(), nn.ReLU()), X, folds={"1": ["0"]})
    judge(nn.Sequential(nn.Linear(3, 4), FrozenBatchNorm1d(rectifies=True)), X, kept={"1": "own-forward"})


def test_class_with_a_call_of_its_own_is_kept(judge: Judge) -> None:
    judge(nn.Sequential(nn.Linear(3, 4), CalledBatchNorm(4)), X, kept={"1": "own-forward"})


def test_subclass_that_keeps_torchs_forward_is_folded(judge: Judge) -> None:
    judge(nn.Sequential(nn.Linear(3, 4), PlainBatchNorm(4)), X, folds={"1": ["0"]})


def test_forward_replaced_on_the_batchnorm_keeps_it(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].forward = functools.partial(lambda module, x: nn.BatchNorm1d.forward(module, x) * 2, model[1])
    judge(model, X, kept={"1": "own-forward"})


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_batchnorm_that_is_not_finite_is_kept(name: str, number: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    getattr(model[1], name).data[0] = number
    assert [kept.code for kept in plan_folding(model, (X.float(),)).kept] == ["not-finite"]


def test_negative_variance_keeps_the_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].running_var.data[0] = -1.0
    assert [kept.code for kept in plan_folding(model, (X.float(),)).kept] == ["not-finite"]


def test_computed_weight_of_the_batchnorm_keeps_it(judge: Judge) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    nn.utils.parametrize.register_parametrization(model[1], "weight", Double())
    judge(model, X, kept={"1": "computed-weight"})


def test_batchnorm_called_with_other_tensors_than_its_own_is_kept(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.func.functional_call(m.bn, {"weight": torch.ones(4).double()}, (m.fc(x),))

    judge(net(forward), X, kept={"bn": "computed-weight"})


def test_batchnorm_that_is_called_past_its_hooks_as_well_takes_no_other(judge: Judge, net: Any) -> None:
    # The one that stays has no weight yet that somebody could be seen to read.
    model = net(
        lambda m, x: m.bn.forward(m.other(m.bn(x)).relu()),
        bn=nn.BatchNorm1d(3, affine=False),
        other=nn.BatchNorm1d(3, affine=False),
    )
    judge(model, X, kept={"bn": "parameter-read", "other": "parameter-read"})


def test_frozen_batchnorm_called_through_its_forward_is_said_to_be_read(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn.forward(m.fc(x)), fc=nn.Linear(3, 4), bn=FrozenBatchNorm1d(4))
    plan = judge(model, X, kept={"bn": "parameter-read"})
    assert "`bn.weight` is also read by" in plan.kept[0].reason


def test_batchnorm_of_a_tensor_subclass_is_kept() -> None:
    class Doubled(Tensor):
        """Stands for twice the numbers that it holds."""

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.batch_norm:
                return 2 * super().__torch_function__(func, types, args, kwargs or {}).as_subclass(Tensor)
            return super().__torch_function__(func, types, args, kwargs or {})

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    model[1].weight = nn.Parameter(torch.ones(4).as_subclass(Doubled))
    assert [kept.code for kept in plan_folding(model, (X.float(),)).kept] == ["unusual-weight"]


class ForgetsItsEps(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_batchnorm_that_normalises_with_another_eps_than_its_own_is_folded_with_that(
    dtype: torch.dtype, randomised: Any, agree: Any
) -> None:
    model = randomised(nn.Sequential(nn.Linear(3, 4), ForgetsItsEps(4, eps=1e-1)).double()).eval()
    plan = plan_folding(copy.deepcopy(model).to(dtype), (X.to(dtype),))
    assert [fold.eps for fold in plan.folds] == [1e-5]
    agree(model, plan.apply(model), [(X,)])


def test_batchnorm_that_normalises_with_another_eps_than_its_own_takes_no_other(judge: Judge) -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3), ForgetsItsEps(3, eps=1e-1), nn.Tanh())
    judge(model, X, folds={"2": ["1"]}, kept={"1": "no-layer"})


def test_batchnorm_whose_eps_changes_from_call_to_call_is_kept(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.bn(m.fc(x))
        m.bn.eps = 0.5
        h = h + m.bn(m.other(x))
        m.bn.eps = 1e-5
        return h

    model = net(forward, fc=nn.Linear(3, 4), other=nn.Linear(3, 4), bn=nn.BatchNorm1d(4))
    judge(model, X, kept={"bn": "own-forward"})


def test_batchnorm_whose_eps_the_model_sets_is_folded_with_that(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.bn.eps = 0.5
        return m.bn(m.fc(x))

    assert judge(net(forward), X, folds={"bn": ["fc"]}).folds[0].eps == 0.5


def test_frozen_batchnorm_with_a_channel_that_never_varied_is_folded(agree: Any) -> None:
    class DeadBatchNorm(FrozenBatchNorm1d):
        def __init__(self) -> None:
            super().__init__()
            del self.eps
            self.running_var[0] = 0.0

        def forward(self, input: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            return input * scale + (self.bias - self.running_mean * scale)

    model = nn.Sequential(nn.Linear(3, 4), DeadBatchNorm()).double().eval()
    folded = fold_batchnorm(model, (X,))
    assert isinstance(folded[1], nn.Identity)
    agree(model, folded, [(X,)], tolerance=1e-9)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.clamp(-100, 100), lambda x: x.clamp(-1, 1) if bool(x.abs().max() > 1e3) else x, torch.nan_to_num],
)
def test_frozen_batchnorm_that_treats_large_inputs_in_another_way_is_kept(change: Any, judge: Judge) -> None:
    class LimitedBatchNorm(FrozenBatchNorm1d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(change(input))

    is_kept = change is not torch.nan_to_num  # infinities are none of our business
    kept, folds = ({"1": "own-forward"}, {}) if is_kept else ({}, {"1": ["0"]})
    judge(nn.Sequential(nn.Linear(3, 4), LimitedBatchNorm()), X, kept=kept, folds=folds, others=[(1e5 * X,)])


def test_batchnorm_whose_class_has_slots_is_kept(judge: Judge) -> None:
    class Slotted(nn.BatchNorm1d):
        __slots__ = ("extra",)

    judge(nn.Sequential(nn.Linear(3, 4), Slotted(4)), X, kept={"1": "own-forward"})


def test_batchnorm_that_refuses_other_attributes_is_folded(judge: Judge) -> None:
    class Refusing(nn.BatchNorm1d):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise AttributeError(name)
            super().__setattr__(name, value)

    judge(nn.Sequential(nn.Linear(3, 4), Refusing(4)), X, folds={"1": ["0"]})
