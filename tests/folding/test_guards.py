"""Everything that keeps a BatchNorm: each test is a model that a careless fold would change."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_bnfold.folding import FoldingError, FoldingPlan, fold_batchnorm, plan_folding

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SEQUENCE = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def linear_bn(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.fc(x))


# Hooks.


@pytest.mark.parametrize(
    ("place", "kind", "code"),
    [
        ("0", "register_forward_pre_hook", "other-reader"),
        ("0", "register_forward_hook", "other-reader"),
        ("1", "register_forward_pre_hook", "hook"),
        ("1", "register_forward_hook", "hook"),
    ],
)
def test_hook_on_the_layer_or_the_batchnorm_keeps_it(judge: Judge, place: str, kind: str, code: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    getattr(model.get_submodule(place), kind)(lambda *_: None)
    judge(model, X, kept={"1": code})


def test_hook_that_changes_the_layers_output_keeps_the_batchnorm(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[0].register_forward_hook(lambda module, args, output: output.relu())
    judge(model, X, kept={"1": "no-layer"})


def test_hook_on_a_container_between_keeps_the_batchnorm(judge: Judge) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.BatchNorm1d(4)))
    model[0].register_forward_hook(lambda module, args, output: None)
    judge(model, X, kept={"1.0": "other-reader"})
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.BatchNorm1d(4)))
    model[1].register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    judge(model, X, kept={"1.0": "other-reader"})


def test_hook_that_is_given_the_output_by_keyword_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    inner = net(lambda m, *, h: m.bn(h), bn=nn.BatchNorm1d(4))
    inner.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    model = net(lambda m, x: m.inner(h=m.fc(x)), fc=nn.Linear(3, 4), inner=inner)
    judge(model, X, kept={"inner.bn": "other-reader"})


def test_hook_that_tells_a_block_which_way_to_go_keeps_its_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.bn(h) if m.normalise else h

    def decide(module: Any, args: tuple[Tensor]) -> None:
        module.normalise = bool(args[0].sum() > -1e9)

    model = net(lambda m, x: m.block(x), block=net(forward))
    model.block.register_forward_pre_hook(decide)
    judge(model, X, kept={"block.bn": "python-value"}, others=[(X - 1e10,)])


def test_hook_around_layer_and_batchnorm_does_not_keep_it(judge: Judge) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    judge(model, X, folds={"0.1": ["0.0"]})


def test_hook_on_every_module_keeps_the_batchnorm(judge: Judge) -> None:
    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return output * 2 if isinstance(module, nn.BatchNorm1d) else None

    hook = nn.modules.module.register_module_forward_hook(double)
    try:
        judge(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), X, kept={"1": "hook"})
    finally:
        hook.remove()


def test_hook_that_is_always_called_keeps_the_batchnorm(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model[1].register_forward_hook(lambda module, args, output: output + 1, always_call=True)
    judge(model, X, kept={"1": "hook"})


# The BatchNorm itself.


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


@pytest.mark.parametrize(
    "glance",
    [lambda bn: bn.running_mean.sum(), lambda bn: bn.weight.dtype.itemsize, lambda bn: bn.bias.shape[0],
     lambda bn: bn.running_var.detach()[0], lambda bn: bn.weight.device.index or 2,
     lambda bn: bn.num_batches_tracked + 1],
)  # fmt: skip
def test_statistics_read_elsewhere_keep_the_batchnorm(judge: Judge, net: Any, glance: Callable[[Any], Any]) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x)) * glance(m.bn)), X, kept={"bn": "parameter-read"})


def test_batchnorm_whose_settings_are_read_is_folded(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x)) * m.bn.num_features + m.bn.eps), X, folds={"bn": ["fc"]})


@pytest.mark.parametrize(
    "look",
    [lambda m: isinstance(m.bn, nn.BatchNorm1d), lambda m: type(m.bn).__name__ == "BatchNorm1d",
     lambda m: hasattr(m.bn, "running_mean"), lambda m: len(list(m.parameters())) > 2,
     lambda m: len(m.state_dict()) > 2,
     lambda m: "bn.weight" in dict(m.named_parameters()), lambda m: "BatchNorm" in str(m)],
)  # fmt: skip
def test_model_that_looks_at_its_modules_keeps_its_batchnorm(
    judge: Judge, net: Any, look: Callable[[Any], Any]
) -> None:
    plan = plan_folding(net(lambda m, x: m.bn(m.fc(x)) * (2 if look(m) else 3)), (X.float(),))
    assert [kept.code for kept in plan.kept] in (["structure-read"], ["parameter-read"])
    judge(net(lambda m, x: m.bn(m.fc(x)) * (2 if look(m) else 3)), X, kept={"bn": plan.kept[0].code})


def test_loop_that_treats_batchnorms_in_another_way_is_seen(judge: Judge) -> None:
    class Loop(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for module in self:
                x = module(x).relu() if isinstance(module, nn.BatchNorm1d) else module(x)
            return x

    judge(Loop(nn.Linear(3, 4), nn.BatchNorm1d(4)), X, kept={"1": "structure-read"})


def test_attribute_of_a_batchnorm_that_would_be_gone_keeps_it(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)) if m.bn.weight is not None else x)
    judge(model, X, kept={"bn": "structure-read"})


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
        judge(nn.Sequential(nn.Linear(3, 4), kind(4)), X, kept={"1": "parameter-read"})


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


# Values that somebody else can see.


@dataclass
class Holder:
    tensor: Any


class Slots:
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


KEEPERS = [lambda h: h, lambda h: [h], lambda h: {"a": (1, h)}, Holder, Slots, lambda h: h[0], lambda h: h.view(-1),
           lambda h: h.data, lambda h: h.detach(), nn.Parameter, lambda h: functools.partial(print, h),
           lambda h: lambda: h, lambda h: (part for part in [h]), lambda h: h.untyped_storage()]  # fmt: skip


@pytest.mark.parametrize("keep", KEEPERS)
def test_output_kept_on_self_in_any_wrapping_is_kept(net: Any, keep: Callable[[Tensor], Any]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        vars(m)["kept"] = keep(h)
        return m.bn(h)

    plan = plan_folding(net(forward), (X.float(),))
    assert [kept.code for kept in plan.kept] in (["kept-alive"], ["other-reader"], ["aliased"])


@pytest.mark.parametrize("keep", KEEPERS)
def test_output_returned_in_any_wrapping_is_kept(net: Any, keep: Callable[[Tensor], Any]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.fc(x)
        return m.bn(h), keep(h)

    plan = plan_folding(net(forward), (X.float(),))
    assert [kept.code for kept in plan.kept] in (["kept-alive"], ["other-reader"], ["aliased"])


def test_output_kept_outside_the_model_is_kept(net: Any) -> None:
    kept: list[Tensor] = []
    plan = plan_folding(net(lambda m, x: (kept.append(h := m.fc(x)), m.bn(h))[1]), (X.float(),))
    assert [reason.code for reason in plan.kept] == ["kept-alive"]
    assert kept


def test_output_in_a_reference_cycle_is_not_kept(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        cycle: list[Any] = [h]
        cycle.append(cycle)
        return m.bn(h)

    gc.disable()
    try:
        judge(net(forward), X, folds={"bn": ["fc"]})
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "escape",
    [lambda h: torch.tensor(h.tolist()), lambda h: torch.from_numpy(h.numpy().copy()), lambda h: h.sum().item(),
     lambda h: torch.as_tensor(h.numpy()).sum(), lambda h: torch.from_dlpack(h.__dlpack__()).clone(),
     lambda h: h.data.clone(), lambda h: torch.tensor(bytes(h.untyped_storage())[0]), lambda h: h.abs(),
     lambda h: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(h)).clone(), lambda h: len(str(h)),
     lambda h: copy.deepcopy(h), lambda h: torch.tensor([float(v) for v in h.flatten()]).sum()],
)  # fmt: skip
def test_output_whose_numbers_are_read_before_normalisation_is_kept(
    net: Any, escape: Callable[[Tensor], Any], randomised: Any, agree: Any
) -> None:
    model = randomised(net(lambda m, x: m.bn(h := m.fc(x)) * escape(h))).double().eval()
    plan = plan_folding(model, (X,))
    assert [kept.code for kept in plan.kept] in (["other-reader"], ["aliased"], ["parameter-read"])
    agree(model, plan.apply(model), [(X,), (2 * X,)])


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_output_whose_storage_is_kept_is_kept(net: Any) -> None:
    model = net(lambda m, x: (m.bn(h := m.fc(x)), h.storage()))
    assert [kept.code for kept in plan_folding(model, (X.float(),)).kept] == ["other-reader"]


def test_function_behind_torchs_protocol_that_reads_the_output_is_seen(judge: Judge, net: Any) -> None:
    @torch.overrides.wrap_torch_function(lambda h: (h,))
    def first_number(h: Tensor) -> float:
        return h.tolist()[0][0]  # type: ignore[no-any-return]

    judge(net(lambda m, x: m.bn(h := m.fc(x)) * first_number(h)), X, kept={"bn": "other-reader"})

    @torch.overrides.wrap_torch_function(lambda scale, h: (h,))
    def second_number(scale: float, h: Tensor) -> float:
        return scale * h.tolist()[0][1]  # type: ignore[no-any-return]

    judge(net(lambda m, x: m.bn(h := m.fc(x)) * second_number(2.0, h)), X, kept={"bn": "other-reader"})


# In place.


@pytest.mark.parametrize(
    ("write", "code"),
    [(lambda h: h.relu_(), "no-layer"), (lambda h: h.view(-1).mul_(2), "written"),
     (lambda h: h[:, :2].zero_(), "written"), (lambda h: h.data.abs_(), "written"),
     (lambda h: h.detach().add_(1), "written"), (lambda h: torch.add(h, 1, out=h), "no-layer"),
     (lambda h: h.t().neg_(), "written"), (lambda h: h.__setitem__(0, 0.0), "written"),
     (lambda h: h.copy_(h.flip(0)), "no-layer"), (lambda h: h.set_(h.abs()), "no-layer"),
     (lambda h: torch._foreach_mul_([h], 2.0), "no-layer")],
)  # fmt: skip
def test_output_written_in_place_before_normalisation_is_kept(
    net: Any, write: Callable[[Tensor], Any], code: str, randomised: Any, agree: Any
) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        write(h)
        return m.bn(h)

    model = randomised(net(forward)).double().eval()
    plan = plan_folding(model, (X,))
    assert [kept.code for kept in plan.kept] == [code]
    agree(model, plan.apply(model), [(2 * X,)])


def test_output_written_in_place_after_normalisation_is_folded(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x)).relu_().mul_(2)), X, folds={"bn": ["fc"]})


def test_one_of_two_outputs_of_a_batchnorm_written_in_place_keeps_it(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return m.bn(h).relu_() + m.bn(h)

    # Without the BatchNorm both outputs would be one tensor.
    judge(net(forward), X, kept={"bn": "written"})


def test_normalised_part_written_in_place_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.fc(x).chunk(2, 1)
        return m.bn(a).relu_() + b.relu()

    judge(net(forward, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(2)), X, kept={"bn": "written"})


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


# Layers.


class NoBias(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu())


class OtherWeight(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), self.bias)


class Closure(nn.Linear):
    """Computes in a closure over itself, which a copy shares."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.compute = lambda x: F.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


def test_subclass_that_would_not_use_a_new_bias_keeps_the_batchnorm(judge: Judge) -> None:
    judge(nn.Sequential(NoBias(3, 4, bias=False), nn.BatchNorm1d(4)), X, kept={"1": "own-forward"})
    judge(nn.Sequential(NoBias(3, 4), nn.BatchNorm1d(4)), X, kept={"1": "computed-weight"})


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


def test_closure_over_the_original_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    judge(nn.Sequential(Closure(3, 4), nn.BatchNorm1d(4)), X, kept={"1": "computed-weight"})
    model = net(linear_bn)
    forward = model.fc.forward
    model.fc.forward = lambda x: forward(x)
    judge(model, X, kept={"bn": "computed-weight"})


def test_closure_or_list_that_holds_the_batchnorm_beside_its_registration(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.alias[0](m.fc(x)))
    vars(model)["alias"] = [model.bn]
    judge(model, X, folds={"bn": ["fc"]})
    # A plain function is not copied with the model: what it closes over is the original's.
    model = net(lambda m, x: m.call(m.fc(x)))
    bn = model.bn
    model.call = lambda h: bn(h)
    judge(model, X, kept={"bn": "aliased"})


def test_partial_that_holds_bound_methods_is_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.call(m.fc(x)))
    model.call = functools.partial(model.bn.__call__)
    judge(model, X, folds={"bn": ["fc"]})


def test_module_called_through_its_forward_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    plan = judge(net(lambda m, x: m.bn.forward(m.fc(x))), X, kept={"bn": "parameter-read"})
    assert "`bn.weight` is also read by" in plan.kept[0].reason
    judge(net(lambda m, x: m.bn(m.fc.forward(x))), X, kept={"bn": "no-layer"})
    judge(net(lambda m, x: m.bn(m.fc(x)) + m.fc.forward(x)), X, kept={"bn": "parameter-read"})
    judge(net(lambda m, x: m.bn(m.fc(x)) + m.bn.forward(m.fc(x))), X, kept={"bn": "parameter-read"})


def test_batchnorm_that_is_called_past_its_hooks_as_well_takes_no_other(judge: Judge, net: Any) -> None:
    # The one that stays has no weight yet that somebody could be seen to read.
    model = net(
        lambda m, x: m.bn.forward(m.other(m.bn(x)).relu()),
        bn=nn.BatchNorm1d(3, affine=False),
        other=nn.BatchNorm1d(3, affine=False),
    )
    judge(model, X, kept={"bn": "parameter-read", "other": "parameter-read"})


@pytest.mark.parametrize("bias", [True, False])
def test_function_with_the_weight_of_a_layer_is_no_call_of_it(judge: Judge, net: Any, bias: bool) -> None:
    model = net(
        lambda m, x: m.bn(F.linear(x, m.fc.weight, m.fc.bias)), fc=nn.Linear(3, 4, bias=bias), bn=nn.BatchNorm1d(4)
    )
    judge(model, X, kept={"bn": "no-layer"})


def test_frozen_batchnorm_called_through_its_forward_is_said_to_be_read(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn.forward(m.fc(x)), fc=nn.Linear(3, 4), bn=FrozenBatchNorm1d(4))
    plan = judge(model, X, kept={"bn": "parameter-read"})
    assert "`bn.weight` is also read by" in plan.kept[0].reason


def test_container_called_through_its_forward_is_folded(judge: Judge, net: Any) -> None:
    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    judge(net(lambda m, x: m.block.forward(x), block=block), X, folds={"block.1": ["block.0"]})


def test_layer_that_is_called_but_not_registered_is_no_layer(judge: Judge, net: Any) -> None:
    hidden = [nn.Linear(3, 4).double()]
    judge(net(lambda m, x: m.bn(hidden[0](x)), bn=nn.BatchNorm1d(4)), X, kept={"bn": "no-layer"})


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


def test_vmap_inside_the_model_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: torch.vmap(lambda step: m.bn(m.fc(step)))(x))
    judge(model, SEQUENCE, kept={"bn": "kept-alive"})


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


def test_lazy_model_is_refused_before_its_first_batch_and_folded_after_it(judge: Judge) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()).double()
    with pytest.raises(FoldingError, match=r"`0.weight` is not initialised: run the model on one batch"):
        plan_folding(model, (X,))
    model(X)
    judge(model, X, folds={"1": ["0"]})


# Layout and sizes.


def test_layout_that_a_later_view_relies_on_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    for later in (lambda y: y.view(y.shape[0], -1), lambda y: y.as_strided((3,), (1,)), lambda y: y.view(torch.int64)):
        model = net(lambda m, x, later=later: later(m.bn(m.fc(x).transpose(1, 2))))
        judge(model, SEQUENCE, kept={"bn": "layout"})


def test_layout_that_nobody_relies_on_does_not_keep_the_batchnorm(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x).transpose(1, 2)).relu()), SEQUENCE, folds={"bn": ["fc"]})
    judge(net(lambda m, x: m.bn(m.fc(x)).view(-1)), X, folds={"bn": ["fc"]})


def test_batch_of_one_does_not_hide_that_a_view_mixes_examples_and_channels(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(4, -1).t()))
    judge(model, X[:1], kept={"bn": "not-transparent"}, others=[(X,)])


def test_sequence_of_one_step_does_not_hide_that_a_view_mixes_steps_and_channels(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(x.shape[0], 4, -1)))
    judge(model, SEQUENCE[:, :1], kept={"bn": "not-transparent"}, others=[(SEQUENCE,)])


def test_batch_of_one_through_harmless_views_is_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(-1, 4).view(-1, 4, 1)))
    judge(model, X[:1], folds={"bn": ["fc"]})


def test_batch_without_examples_keeps_the_batchnorm(judge: Judge) -> None:
    judge(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), X[:0], kept={"1": "kept-alive"}, others=[(X,)])


def test_square_batch_does_not_confuse_examples_and_channels(judge: Judge, net: Any) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    model = net(lambda m, x: m.bn(m.fc(x).t()))
    judge(model, x, kept={"bn": "channel-axis"}, others=[(2 * x,)])


def test_old_style_empty_tensor_in_a_concatenation_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(torch.cat([torch.empty(0, dtype=x.dtype), m.fc(x)], 1)))
    judge(model, X, kept={"bn": "not-transparent"})


# Ways to call a model.


def test_inputs_of_every_form_are_taken(judge: Judge, net: Any) -> None:
    judge(net(lambda m, *, x: m.bn(m.fc(x))), kwargs={"x": X}, folds={"bn": ["fc"]}, others=[])
    judge(net(lambda m, d: m.bn(m.fc(d["a"][0]))), {"a": [X]}, folds={"bn": ["fc"]}, others=[({"a": [2 * X[:2]]},)])
    judge(net(lambda m, h: m.bn(m.fc(h.tensor))), Holder(X), folds={"bn": ["fc"]}, others=[(Holder(2 * X[:2]),)])
    judge(net(lambda m, xs: m.bn(m.fc(xs[0])) + len(xs)), [X, X], folds={"bn": ["fc"]}, others=[([2 * X],)])
    judge(
        net(lambda m: m.bn(m.fc(m.x)), x=X, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4)), folds={"bn": ["fc"]}, others=[()]
    )


def test_outputs_of_every_form_are_compared(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: Holder([m.bn(m.fc(x))])), X, folds={"bn": ["fc"]})


def test_recording_works_inside_inference_mode(net: Any, randomised: Any, agree: Any) -> None:
    model = randomised(net(lambda m, x: m.bn(m.fc(x).transpose(1, 2).reshape(-1, 4)))).double().eval()
    with torch.inference_mode():
        plan = plan_folding(model, (SEQUENCE,))
        folded = plan.apply(model)
    assert [fold.batchnorm for fold in plan.folds] == [] or agree(model, folded, [(SEQUENCE,)]) is None
    model = randomised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).double().eval()
    with torch.inference_mode():
        folded = fold_batchnorm(model, (X,))
        agree(model, folded, [(2 * X,)])
    assert isinstance(folded[1], nn.Identity)
    assert not any(parameter.is_inference() for parameter in folded.parameters())
    folded(X).sum().backward()


def test_recording_works_under_autocast(net: Any, randomised: Any) -> None:
    model = randomised(net(lambda m, x: m.bn(m.fc(x)).relu())).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        plan = plan_folding(model, (X.float(),))
        folded = plan.apply(model)
        expected, found = model(X.float()), folded(X.float())
    assert [fold.layers for fold in plan.folds] == [("fc",)]
    assert folded.fc.weight.dtype == torch.float32
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1)


def test_model_in_training_mode_with_mixed_flags_is_folded_as_in_eval_mode(
    net: Any, randomised: Any, agree: Any
) -> None:
    model = randomised(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    )
    model.double().train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    folded = fold_batchnorm(model, (X,))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags == [module.training for module in folded.modules()]
    assert isinstance(folded[1], nn.Identity)
    assert isinstance(folded[4], nn.Identity)
    agree(model.eval(), folded.eval(), [(2 * X,)])


def test_checkpointed_part_of_a_model_is_folded(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda z: m.bn(m.fc(z)), x, use_reentrant=False)  # type: ignore[no-any-return]

    judge(net(forward), X, folds={"bn": ["fc"]})


def test_autograd_function_that_reads_the_output_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:  # type: ignore[override]
            return h * 2

    class Same(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:  # type: ignore[override]
            return h

    judge(net(lambda m, x: m.bn(h := m.fc(x)) + Double.apply(h)), X, kept={"bn": "other-reader"})
    judge(net(lambda m, x: (m.bn(h := m.fc(x)), Same.apply(h))), X, kept={"bn": "kept-alive"})


def test_data_parallel_wrapper_is_folded(judge: Judge) -> None:
    model = nn.DataParallel(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    judge(model, X, folds={"module.1": ["module.0"]})


def test_generator_forward_is_folded(judge: Judge, net: Any) -> None:
    def parts(m: Any, x: Tensor) -> Iterator[Tensor]:
        for part in x.chunk(2):
            yield m.bn(m.fc(part))

    judge(net(lambda m, x: torch.cat(list(parts(m, x)))), X, folds={"bn": ["fc"]}, others=[(2 * X,), (X[:2],)])


def test_module_with_attributes_of_its_inner_module_is_folded(judge: Judge) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)  # type: ignore[no-any-return]

    model = nn.Sequential(Wrapper(nn.Linear(3, 4)), Wrapper(nn.BatchNorm1d(4)))
    judge(model, X, folds={"1.inner": ["0.inner"]})


# What no witness sees.


def test_layer_used_in_another_thread_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(m.fc(x).detach()))
        thread.start()
        thread.join()
        return m.bn(m.fc(x)) + results[0]

    judge(net(forward), X, kept={"bn": "aliased"})


def test_layer_used_inside_a_custom_operation_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    held: list[nn.Module] = []

    @torch.library.custom_op("lit_bnfold_tests::hidden_layer", mutates_args=())
    def hidden_layer(x: Tensor) -> Tensor:
        return held[0](x).detach().clone()  # type: ignore[no-any-return]

    def forward(m: Any, x: Tensor) -> Tensor:
        held[:] = [m.fc]
        return m.bn(m.fc(x)) + hidden_layer(x)

    model = net(forward)
    judge(model, X, kept={"bn": "aliased"})


def test_error_of_an_operation_that_is_caught_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h: Tensor = m.fc(x)
        try:
            return torch.multinomial(h, 1).to(h)
        except RuntimeError:  # Some are negative.
            return m.bn(h)  # type: ignore[no-any-return]

    model = net(forward)
    judge(model, X, kept={"bn": "other-reader"}, others=[(-X,)])


def test_error_that_is_caught_is_a_branch(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        try:
            torch.multinomial(x, 1)
        except RuntimeError:  # Some are negative.
            return m.bn(m.fc(x))  # type: ignore[no-any-return]
        return m.fc(x)  # type: ignore[no-any-return]

    judge(net(forward), X, kept={"bn": "python-value"}, others=[(X.abs(),)])


def test_error_of_a_layer_that_is_caught_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, indices: Tensor) -> Tensor:
        try:
            return m.emb(indices)  # type: ignore[no-any-return]
        except IndexError:
            return m.bn(m.emb(indices % 3))  # type: ignore[no-any-return]

    model = net(forward, emb=nn.Embedding(3, 4), bn=nn.BatchNorm1d(4))
    judge(model, torch.tensor([1, 2, 3]), kept={"bn": "parameter-read"}, others=[(torch.tensor([0, 1, 2]),)])


def test_custom_operation_on_constants_may_give_something_else_next_time(judge: Judge, net: Any) -> None:
    @torch.library.custom_op("lit_bnfold_tests::count", mutates_args=())
    def count(x: Tensor) -> Tensor:
        return x + 1

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.fc(x)) if count(torch.zeros(1)).item() else x  # type: ignore[no-any-return]

    judge(net(forward), X, kept={"bn": "python-value"})


@pytest.mark.parametrize("unheard", [torch._C.DisableTorchFunction, torch._C._DisableTorchDispatch])
def test_weight_that_is_read_where_only_one_witness_hears_keeps_the_batchnorm(
    unheard: Any, judge: Judge, net: Any
) -> None:
    class Below(nn.Linear):
        def forward(self, x: Tensor, below: bool = False) -> Tensor:
            if not below:
                return F.linear(x, self.weight, self.bias)
            # What Python reads is no operation, and what goes straight to the dispatcher is no function of a layer.
            if unheard is torch._C.DisableTorchFunction:
                return x.sum() * self.weight.tolist()[0][0]  # type: ignore[no-any-return]
            return torch.ops.aten.linear(x, self.weight)  # type: ignore[no-any-return]

    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.bn(m.fc(x))
        with unheard():
            return y + m.fc(x, below=True)

    judge(net(forward, fc=Below(3, 4), bn=nn.BatchNorm1d(4)), X, kept={"bn": "aliased"})


def test_custom_operation_that_reads_the_output_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    @torch.library.custom_op("lit_bnfold_tests::double", mutates_args=())
    def double(h: Tensor) -> Tensor:
        return h * 2

    judge(net(lambda m, x: m.bn(h := m.fc(x)) + double(h)), X, kept={"bn": "other-reader"})


def test_tensor_subclass_with_other_operations_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    class Absolute(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(func, types, args, kwargs or {})
            return result.abs() if func is F.linear else result

    judge(net(lambda m, x: m.bn(m.fc(x.as_subclass(Absolute)))), X, kept={"bn": "kept-alive"})


def test_tensor_subclass_that_changes_nothing_does_not_keep_the_batchnorm(judge: Judge, net: Any) -> None:
    class Named(Tensor):
        pass

    judge(net(lambda m, x: m.bn(m.fc(x.as_subclass(Named))).as_subclass(Tensor)), X, folds={"bn": ["fc"]})


def test_sparse_input_is_folded(judge: Judge, net: Any) -> None:
    judge(net(lambda m, x: m.bn(m.fc(x.to_sparse()))), X, folds={"bn": ["fc"]})


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_scripted_or_traced_submodule_keeps_its_batchnorm(judge: Judge) -> None:
    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double().eval()
    for script in (torch.jit.script, lambda m: torch.jit.trace(m, X)):
        model = nn.Sequential(script(copy.deepcopy(block)), nn.Linear(4, 4), nn.BatchNorm1d(4))
        plan = plan_folding(model.double().eval(), (X,))
        assert {kept.batchnorm: kept.code for kept in plan.kept} == {"0.1": "opaque"}
        assert [fold.batchnorm for fold in plan.folds] == ["2"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_scripted_layer_or_batchnorm_keeps_it() -> None:
    fc, bn = nn.Linear(3, 4).double(), nn.BatchNorm1d(4).double().eval()
    for model in (nn.Sequential(torch.jit.script(fc), bn), nn.Sequential(fc, torch.jit.script(bn))):
        plan = plan_folding(model, (X,))
        assert [kept.batchnorm for kept in plan.kept] == ["1"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)).relu()  # type: ignore[no-any-return]


def test_compiled_submodule_keeps_its_batchnorm_and_recording_compiles_nothing() -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = nn.Sequential(torch.compile(Block().double().eval(), backend=backend), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.double().eval()
    plan = plan_folding(model, (X,))
    assert {kept.batchnorm: kept.code for kept in plan.kept} == {"0._orig_mod.bn": "opaque"}
    assert [fold.batchnorm for fold in plan.folds] == ["2"]
    assert not compiled
    with torch.no_grad():
        model(X)
    assert compiled, "recording must not stop the compiler from compiling later"
    torch._dynamo.reset()


def test_module_that_compiles_itself_is_folded(randomised: Any, agree: Any) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    for warm in (False, True):
        model = randomised(Block()).double().eval()
        original = copy.deepcopy(model)
        model.compile(backend=backend)
        if warm:
            agree(original, model, [(X,)])
        compiled.clear()
        plan = plan_folding(model, (X,))
        assert not compiled
        assert [fold.layers for fold in plan.folds] == [("fc",)]
        agree(original, plan.apply(model), [(2 * X,)])
        plan.apply(model, inplace=True)
        with torch.no_grad():
            torch.testing.assert_close(model(2 * X), original(2 * X), rtol=0, atol=1e-12)
        torch._dynamo.reset()


def test_compiled_function_that_reads_the_output_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    double = torch.compile(lambda h: h * 2, backend="eager")
    judge(net(lambda m, x: m.bn(h := m.fc(x)) + double(h)), X, kept={"bn": "other-reader"})
    torch._dynamo.reset()


def test_model_whose_copy_is_itself_is_refused(net: Any) -> None:
    class Single(nn.Sequential):
        def __deepcopy__(self, memo: Any) -> Single:
            return self

    model = Single(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(FoldingError, match="cannot be copied: its copy holds parts of the model itself"):
        plan_folding(model, (X.float(),))
    assert model.training


def test_model_that_cannot_be_copied_is_refused(net: Any) -> None:
    model = net(linear_bn)
    model.lock = threading.Lock()
    with pytest.raises(FoldingError, match="cannot be copied"):
        plan_folding(model, (X.float(),))


def test_model_that_holds_tensors_of_its_last_run_is_folded(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(m.fc(x))
        m.features = [y.relu()]
        return y

    model = net(forward).double()
    model(X)
    assert model.features[0].grad_fn is not None
    judge(model, X, folds={"bn": ["fc"]})


def test_inputs_that_the_model_takes_apart_are_still_there(net: Any) -> None:
    batch = {"x": X, "rest": [X]}
    model = net(lambda m, b: m.bn(m.fc(b.pop("x"))))
    plan = plan_folding(model.double(), (batch,))
    assert [fold.batchnorm for fold in plan.folds] == ["bn"]
    assert batch["x"] is X


def test_attributes_that_lie_about_the_sizes_keep_the_batchnorm(judge: Judge) -> None:
    for place, name in ((0, "out_features"), (1, "num_features")):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        setattr(model[place], name, 5)
        judge(model, X, kept={"1": "unusual-weight"})


def test_forward_replaced_on_a_layer_without_bias_keeps_the_batchnorm(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4))
    model[0].forward = functools.partial(lambda module, x: F.linear(x, module.weight), model[0])
    judge(model, X, kept={"1": "own-forward"})


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
def test_sparse_weight_keeps_the_batchnorm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse_csr())
    assert [kept.code for kept in plan_folding(model, (X.float(),)).kept] == ["unusual-weight"]


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


def test_weight_borrowed_by_another_layer_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    class Borrower(nn.Linear):
        def __init__(self, lender: nn.Linear) -> None:
            super().__init__(3, 4)
            vars(self)["lender"] = lender

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.lender.weight, self.lender.bias)

    fc = nn.Linear(3, 4)
    model = net(lambda m, x: m.bn(m.fc(x)) + m.borrower(x), fc=fc, borrower=Borrower(fc), bn=nn.BatchNorm1d(4))
    judge(model, X, kept={"bn": "parameter-read"})


def test_copy_of_an_output_that_is_normalised_in_another_part_is_kept(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        copied = h.clone()
        return m.bn(h[:, :2]) + m.bn(copied[:, 2:]) + copied[:, :2]

    judge(net(forward, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(2)), X, kept={"bn": "other-reader"})


def test_one_of_several_views_written_in_place_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b = m.fc(x).chunk(2)
        return m.bn(a).relu_() + m.bn(b)

    # Autograd forbids to write into one of the views that `chunk` gives: the folded model could not be trained.
    judge(net(forward), X[:4], kept={"bn": "written"}, others=[(2 * X[:2],)])


def test_view_of_a_batch_without_examples_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(2 * x.shape[0], 2)), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(2))
    judge(model, X[:0], kept={"bn": "not-transparent"})


def test_batch_of_one_through_two_views_does_not_hide_that_they_mix_examples_and_channels(
    judge: Judge, net: Any
) -> None:
    model = net(lambda m, x: m.bn(m.fc(x).view(-1).view(4, -1).t()))
    judge(model, X[:1], kept={"bn": "not-transparent"}, others=[(X,)])


def test_parameters_look_the_same_while_the_model_is_planned(net: Any) -> None:
    seen: list[Any] = []

    def forward(m: Any, x: Tensor) -> Tensor:
        seen.append([(p.requires_grad, p.is_leaf, type(p), getattr(p, "tag", None)) for p in m.fc.parameters()])
        return m.bn(m.fc(x))

    model = net(forward)
    model.fc.weight.tag = "mine"
    model.fc.bias.requires_grad_(False)
    plan_folding(model, (X.float(),))
    assert seen == 2 * [[(True, True, nn.Parameter, "mine"), (False, True, nn.Parameter, None)]]


def test_expanded_output_written_in_place_after_normalisation_is_kept(judge: Judge, net: Any) -> None:
    # Each number of the output lies in memory once; each of the input's stands for three.
    model = net(lambda m, x: m.bn(m.fc(x).unsqueeze(2).expand(-1, -1, 3)).add_(1))
    judge(model, X, kept={"bn": "written"})


# What a later search for wrong folds found.


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


def swapped(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    shape = h.shape
    return m.bn(h.t().reshape(shape).t().reshape(shape)).tanh()


def swapped_beside_an_axis_of_size_1(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    shape = (*h.shape, 1)
    return m.bn(h.t().reshape(shape).squeeze(-1).t().reshape(shape).squeeze(-1)).tanh()


@pytest.mark.parametrize(
    ("forward", "examples", "channels"),
    [
        (swapped, 4, 4),
        (swapped, 2, 2),
        (swapped_beside_an_axis_of_size_1, 4, 4),
    ],
)
def test_reshapes_that_only_as_many_examples_as_channels_make_nothing_of_are_seen_through(
    forward: Any, examples: int, channels: int, judge: Judge, net: Any
) -> None:
    model = net(forward, fc=nn.Linear(3, channels), bn=nn.BatchNorm1d(channels))
    judge(model, torch.randn(examples, 3, dtype=torch.float64), kept={"bn": "not-transparent"})


def axes_joined_in_between(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    n, c = h.shape[:2]
    return m.bn(h.transpose(0, 1).reshape(n, c, -1).transpose(0, 1).reshape(h.shape)).tanh()


def test_unflattening_says_itself_what_it_does(judge: Judge) -> None:
    model = nn.Sequential(nn.Linear(3, 32), nn.Unflatten(1, (8, 2, 2)), nn.BatchNorm2d(8), nn.ReLU())
    judge(model, torch.randn(2, 3, dtype=torch.float64), folds={"2": ["0"]})


def channels_split_in_between(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x).mean((2, 3))
    return m.bn(h.t().reshape(-1, 2, 2).permute(1, 2, 0).reshape(*h.shape, 1, 1)).tanh()


def stacked_anew(m: Any, x: Tensor) -> Tensor:
    h = torch.stack(m.conv(x).unbind(0), 1)
    c, n = h.shape[:2]
    return m.bn(torch.stack(h.reshape(n, c, -1).unbind(0), 1).reshape(x.shape[0], c, *x.shape[2:])).tanh()


def flattened_and_unflattened(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    for _ in range(2):
        h = h.transpose(0, 1).flatten(0, 1).unflatten(0, (len(x), 4))
    return m.bn(h).tanh()


def examples_and_steps_swapped(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)[:, :3]
    return m.three(h.permute(2, 1, 0, 3).reshape(len(x), 3, *x.shape[2:])).tanh()


def examples_and_pixels_swapped(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x[..., :1])[:, :3]
    return m.three(h.squeeze(3).permute(2, 1, 0).reshape(len(x), 3, 2, 2)).tanh()


def sliced_behind(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)
    n, c = h.shape[:2]
    return m.narrow(h.view(c, n, -1)[:, :2]).tanh()


def rows_as_examples(m: Any, x: Tensor) -> Tensor:
    return m.bn(m.conv(x).flatten(1).reshape(x.shape[2], 4, -1, 1)).tanh()


def flattened_with_the_channels_first(m: Any, x: Tensor) -> Tensor:
    h = m.conv(x)[:, :3].permute(1, 2, 3, 0).flatten(0, 2).t()
    return m.three(h.reshape(x.shape[2], 3, 1, -1)).tanh()


def stacked_along_another_axis(m: Any, x: Tensor) -> Tensor:
    h = torch.stack(m.conv(x)[:, :3].permute(3, 0, 2, 1).flatten(1).unbind(0), 1)
    return m.three(h.reshape(len(x) ** 2, 3, -1, 1)).tanh()


@pytest.mark.parametrize(
    ("forward", "norm"),
    [
        (rows_as_examples, "bn"),
        (flattened_with_the_channels_first, "three"),
        (stacked_along_another_axis, "three"),
        (axes_joined_in_between, "bn"),
        (channels_split_in_between, "bn"),
        (stacked_anew, "bn"),
        (flattened_and_unflattened, "bn"),
        (examples_and_steps_swapped, "three"),
        (examples_and_pixels_swapped, "three"),
        (sliced_behind, "narrow"),
    ],
)
def test_reshape_that_may_mix_axes_that_are_equally_long_by_chance_keeps_the_batchnorm(
    forward: Any, norm: str, judge: Judge, net: Any
) -> None:
    norms = {"bn": nn.BatchNorm2d(4), "three": nn.BatchNorm2d(3), "narrow": nn.BatchNorm1d(2)}
    model = net(forward, conv=nn.Conv2d(3, 4, 1), **{norm: norms[norm]})
    example = torch.randn(4, 3, 4, 2, dtype=torch.float64)
    # With another number of examples, some of these do not even run.
    judge(model, example, kept={norm: "not-transparent"}, others=[(example.cos(),)])


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.bn(m.conv(x).view(*x.shape[:1], 4, -1).unsqueeze(-1)).tanh(),
        lambda m, x: m.bn(m.conv(x).view(4, len(x), -1).view(len(x), 4, *x.shape[2:])).tanh(),
        lambda m, x: m.bn(m.conv(x).transpose(2, 3).contiguous().mean(3, keepdim=True)).tanh(),
        lambda m, x: m.bn(m.conv(x).mean((2, 3)).view(len(x), -1)[..., None, None]).tanh(),
        lambda m, x: m.bn(m.conv(x).flatten(2).transpose(1, 2).transpose(1, 2)[..., None]).tanh(),
    ],
)
def test_reshapes_that_move_nothing_fold_with_as_many_examples_as_channels(
    forward: Any, judge: Judge, net: Any
) -> None:
    model = net(forward, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    judge(model, torch.randn(4, 3, 5, 2, dtype=torch.float64), folds={"bn": ["conv"]})


def test_flattening_as_many_examples_as_channels_says_itself_what_it_does(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.conv(x).mean((2, 3), keepdim=True).flatten(1)).tanh()

    model = net(forward, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm1d(4))
    judge(model, torch.randn(4, 3, 2, 2, dtype=torch.float64), folds={"bn": ["conv"]})


def test_reshape_of_other_axes_than_as_many_examples_and_channels_is_folded(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.conv(x).view(len(x), 4, -1)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm1d(4))
    judge(model, torch.randn(4, 3, 2, 3, dtype=torch.float64), folds={"bn": ["conv"]})


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(m.bn(x.tanh()).transpose(1, 2).flatten(1)),
        lambda m, x: m.fc(m.bn(x.tanh()).transpose(1, 2).reshape(len(x), -1)),
    ],
)
def test_features_with_axes_on_both_sides_of_the_channels_keep_the_batchnorm(
    forward: Any, judge: Judge, net: Any
) -> None:
    # A linear layer takes them from images of 5 x 2 and of 2 x 5 pixels, and means other channels by each.
    model = net(forward, bn=nn.BatchNorm2d(3), fc=nn.Linear(30, 4))
    wide, high = torch.randn(2, 3, 5, 2, dtype=torch.float64), torch.randn(2, 3, 2, 5, dtype=torch.float64)
    judge(model, wide, kept={"bn": "no-layer"}, others=[(high,)])
    assert "has the channels and other axes in one" in plan_folding(model, (wide,)).kept[0].reason


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, z: m.bn(m.fc(z).unflatten(1, m.sizes).transpose(1, 2)).tanh(),
        lambda m, z: m.bn(m.fc(z).view(len(z), *m.sizes).transpose(1, 2)).tanh(),
    ],
)
def test_features_that_become_axes_on_both_sides_of_the_channels_keep_the_batchnorm(
    forward: Any, judge: Judge, net: Any
) -> None:
    model = net(forward, bn=nn.BatchNorm2d(3), fc=nn.Linear(4, 30))
    model.sizes = (5, 3, 2)
    judge(model, torch.randn(7, 4, dtype=torch.float64), kept={"bn": "not-transparent"})


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(m.bn(x).flatten(1)[:, :8]),
        lambda m, x: m.fc(m.bn(x).reshape(len(x), -1)[:, :8]),
        lambda m, x: m.fc(m.bn(x).flatten(1).split(8, 1)[0]),
    ],
)
def test_slice_of_an_axis_that_channels_share_with_pixels_keeps_the_batchnorm(
    forward: Any, judge: Judge, net: Any
) -> None:
    # Of images of four pixels it holds two channels, and of larger ones a part of the first.
    model = net(forward, bn=nn.BatchNorm2d(3), fc=nn.Linear(8, 4))
    small, large = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(5, 3, 4, 3, dtype=torch.float64)
    plan = judge(model, small, kept={"bn": "no-layer"}, others=[(large,)])
    assert "has the channels and other axes in one" in plan.kept[0].reason


def test_features_with_axes_on_one_side_of_the_channels_fold(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.fc(m.bn(x).permute(0, 2, 3, 1).flatten(1)), bn=nn.BatchNorm2d(3), fc=nn.Linear(30, 4))
    judge(model, torch.randn(2, 3, 5, 2, dtype=torch.float64), folds={"bn": ["fc"]})


# What a run cannot see without being told.


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: 2 if m.fc.bias is None else 1,
        lambda m: len(list(m.fc.parameters())),
    ],
)
def test_model_that_asks_whether_its_layer_has_a_bias_keeps_the_batchnorm(ask: Any, judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)) * ask(m), fc=nn.Linear(3, 4, bias=False), bn=nn.BatchNorm1d(4))
    judge(model, X, kept={"bn": "structure-read"})


@pytest.mark.parametrize("ask", [lambda m: m.second.weight is None, lambda m: not m.second.affine])
def test_model_that_asks_whether_a_batchnorm_has_a_weight_keeps_the_one_before_it(
    ask: Any, judge: Judge, net: Any
) -> None:
    parts = {"first": nn.BatchNorm1d(3), "second": nn.BatchNorm1d(3, affine=False)}
    model = net(lambda m, x: m.second(m.first(x)).tanh() * (2 if ask(m) else 1), **parts)
    judge(model, X, kept={"first": "structure-read", "second": "no-layer"})


@torch.library.custom_op("lit_bnfold_tests::positive", mutates_args=())
def positive(x: Tensor) -> Tensor:
    """The positive numbers of a tensor, so many as there are."""
    return x[x > 0].clone()


def packed(x: Tensor) -> Any:
    lengths = 1 + (x[:2, 0] > 0).long() * 2
    return nn.utils.rnn.pack_padded_sequence(x[:3].expand(2, -1, -1), lengths, batch_first=True, enforce_sorted=False)


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")
@pytest.mark.parametrize(
    "gate",
    [
        lambda x: len(positive(x)) > 0,
        lambda x: x.relu().to_sparse()._nnz() > 0,
        lambda x: len(x.relu().to_sparse().coalesce().values()) > 0,
        lambda x: x.relu().to_sparse().coalesce().indices().shape[1] > 0,
        lambda x: x.relu().to_sparse()._values().numel() > 0,
        lambda x: x.relu().to_sparse()._indices().numel() > 0,
        lambda x: x.relu().to_sparse_csr().col_indices().numel() > 0,
        lambda x: x.relu().to_sparse_csr().values().numel() > 0,
        lambda x: x.relu().to_sparse_csc().row_indices().numel() > 0,
        lambda x: torch.sparse_coo_tensor((x[:1] > 0).long() * 3, x[0]).shape[0] > 2,
        lambda x: packed(x).data.shape[0] > 2,
        lambda x: len(packed(x).batch_sizes) > 1,
        lambda x: torch._nested_tensor_from_mask_left_aligned(x[None], (x[:, 0] > 0)[None]),
        lambda x: torch.quantize_per_tensor_dynamic(x.float(), torch.quint8, False).q_zero_point() < 5,
        lambda x: torch.FloatTensor([x.sum()]) > 0,
        lambda x: torch.LongTensor([x.sum().long() + 1]) > 0,
    ],
)
def test_decision_on_what_an_operation_tells_of_its_numbers_keeps_the_batchnorm(
    gate: Callable[[Tensor], Any], judge: Judge, net: Any
) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)) if gate(x) else m.fc(x), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4))
    judge(model, X.abs(), kept={"bn": "python-value"}, others=[(-X.abs(),)])


def test_split_at_places_in_a_tensor_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x, at: m.bn(m.fc(x).tensor_split(at, 1)[1]), fc=nn.Linear(3, 10), bn=nn.BatchNorm1d(3))
    judge(model, X, torch.tensor([2, 5]), kept={"bn": "python-value"}, others=[(X, torch.tensor([4, 7]))])


@pytest.mark.parametrize(
    "make",
    [
        lambda h: torch.tensor([h]),
        lambda h: torch.as_tensor([[h]]),
        lambda h: torch.asarray([h]),
        lambda h: h.new_tensor([h]),
        lambda h: h.new([h]),
        lambda h: torch.DoubleTensor([h]),
    ],
)
def test_tensor_of_a_list_of_tensors_reads_them(make: Callable[[Tensor], Tensor], judge: Judge, net: Any) -> None:
    # It has no part in the output of the example.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        return torch.where(x.sum() > 0, m.bn(h), make(h))

    model, x = net(forward, fc=nn.Linear(3, 1), bn=nn.BatchNorm1d(1)), X[:1].abs()
    judge(model, x, kept={"bn": "other-reader"}, others=[(-x,)])


class Deciding(nn.Module):
    """Takes its path as others have told it."""

    def __init__(self, told: dict[str, bool]) -> None:
        super().__init__()
        self.fc, self.bn, self.told = nn.Linear(3, 4), nn.BatchNorm1d(4), told

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x)) if self.told["normalise"] else self.fc(x)


def test_decision_that_comes_through_an_attribute_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.block.told["normalise"] = bool(x.sum() > 0)
        return m.block(x)

    judge(net(forward, block=Deciding({})), X.abs(), kept={"block.bn": "python-value"}, others=[(-X.abs(),)])


def test_decision_by_an_attribute_of_what_is_called_past_its_hooks_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.outer.block.told["normalise"] = bool(x.sum() > 0)
        return m.outer(x)

    outer = net(lambda m, x: m.block.forward(x), block=Deciding({}))
    judge(net(forward, outer=outer), X.abs(), kept={"outer.block.bn": "python-value"}, others=[(-X.abs(),)])


class Skipped(nn.BatchNorm1d):
    """Normalises if it is told to."""

    normalises = True

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.normalises else input.clone()


class Repeating(nn.Linear):
    """Computes if it is told to."""

    computes = True

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.computes else input[:, :1].expand(-1, 4)


def test_decision_inside_the_batchnorm_or_the_layer_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.block[1].normalises = m.block[0].computes = bool(x.sum() > 0)
        return m.block(x)

    for block in (nn.Sequential(nn.Linear(3, 4), Skipped(4)), nn.Sequential(Repeating(3, 4), nn.BatchNorm1d(4))):
        judge(net(forward, block=block), X.abs(), kept={"block.1": "python-value"}, others=[(-X.abs(),)])


def test_decision_between_two_calls_of_one_module_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    part = net(lambda m, x: m.fc(x) if x.shape[1] == 3 else m.bn(x))

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.part(x)
        return m.part(h if bool(x.sum() > 0) else h.relu())

    judge(net(forward, part=part), X.abs(), kept={"part.bn": "python-value"}, others=[(-X.abs(),)])


def test_block_that_is_called_twice_with_a_decision_in_between_is_folded(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.block(x)
        return m.block(h) if bool(x.sum() > 0) else h

    block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    judge(net(forward, block=block), X.abs(), folds={"block.1": ["block.0"]}, others=[(-X.abs(),)])


class Times(nn.Module):
    """A parametrization whose factor others set."""

    factor = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def test_decision_inside_a_parametrization_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    times, block = Times(), nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    nn.utils.parametrize.register_parametrization(block[0], "weight", times)

    def forward(m: Any, x: Tensor) -> Tensor:
        m.times.factor = 2.0 if bool(x.sum() > 0) else 1.0
        return m.block(x)

    judge(net(forward, times=times, block=block), X.abs(), kept={"block.1": "python-value"}, others=[(-X.abs(),)])


def test_private_attribute_that_changes_is_no_decision(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.block._calls = float(x.sum())
        return m.block(x)

    judge(net(forward, block=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), X, folds={"block.1": ["block.0"]})


def test_attribute_that_changes_after_the_path_was_taken_is_no_decision(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.block(x)
        m.block.told["normalise"] = float(y.sum())
        return y

    judge(net(forward, block=Deciding({"normalise": True})), X, folds={"block.bn": ["block.fc"]})


def test_attribute_that_changes_where_nothing_is_decided_keeps_nothing(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls = getattr(m, "calls", 0) + 1
        return m.bn(m.fc(x))

    judge(net(forward, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4)), X, folds={"bn": ["fc"]})


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.fc(m.bn(x).permute(0, 2, 1, 3).flatten(2).flatten(1)),
        lambda m, x: m.fc(m.bn(x).permute(0, 2, 1, 3).flatten(1, 2).flatten(1)),
        lambda m, x: m.fc(torch.cat([column.flatten(1) for column in m.bn(x).unbind(3)], 1)),
    ],
)
def test_channels_between_rows_and_columns_keep_the_batchnorm_however_they_came_there(
    forward: Any, judge: Judge, net: Any
) -> None:
    # Images of two rows and those of three have as many features.
    model = net(forward, bn=nn.BatchNorm2d(4), fc=nn.Linear(48, 3))
    wide, square = torch.randn(3, 4, 2, 6, dtype=torch.float64), torch.randn(3, 4, 3, 4, dtype=torch.float64)
    judge(model, wide, kept={"bn": "no-layer"}, others=[(square,)])


def test_squeeze_of_an_axis_that_is_longer_in_the_example_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    # An image of one column loses that axis, and what is left is taken for one image without a batch.
    model = net(lambda m, x: m.conv(m.bn(x).squeeze(3)).tanh(), bn=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    image, column = torch.randn(5, 4, 8, 8, dtype=torch.float64), torch.randn(4, 4, 4, 1, dtype=torch.float64)
    judge(model, image, kept={"bn": "no-layer"}, others=[(column,)])


def test_join_of_scalars_behind_channels_is_no_axis_around_them(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: m.fc(torch.stack(m.bn(x)[0, :, 0].unbind(0))), bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 2))
    judge(model, torch.randn(5, 3, 4, dtype=torch.float64), folds={"bn": ["fc"]})


class Counting(nn.Module):
    """Like a metric, whose hash is that of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __hash__(self) -> int:
        return hash((type(self), self.count))

    def __eq__(self, other: object) -> bool:
        return self is other

    def forward(self, x: Tensor) -> float:
        self.count += 1
        return float(x.sum())


def test_module_whose_hash_changes_in_the_run_is_known_all_the_same(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.block(x) * m.metric(x)

    def model(metric: Counting) -> nn.Module:
        return net(forward, metric=metric, block=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).double().eval()

    judge(model(Counting()), X, folds={"block.1": ["block.0"]})
    # Where a hash falls in a table is chance, and another one for each class.
    metrics = (type(f"Counting{number}", (Counting,), {})() for number in range(80))
    assert all(plan_folding(model(metric), (X,)).folds for metric in metrics)


class Hashed(nn.Sequential):
    """Has a hash of its own, which stays."""

    def __hash__(self) -> int:
        return 7

    def __eq__(self, other: object) -> bool:
        return self is other


def test_hook_on_a_module_with_a_hash_of_its_own_is_noticed(judge: Judge) -> None:
    def model() -> nn.Sequential:
        return nn.Sequential(Hashed(nn.Linear(3, 4)), nn.BatchNorm1d(4))

    judge(model(), X, folds={"1": ["0.0"]})
    hooked = model()
    hooked[0].register_forward_hook(lambda *_: None)
    judge(hooked, X, kept={"1": "other-reader"})


def test_batchnorm_with_a_hash_of_its_own_is_folded(judge: Judge) -> None:
    class Hashable(nn.BatchNorm1d):
        __hash__, __eq__ = Hashed.__hash__, Hashed.__eq__  # type: ignore[assignment]

    judge(nn.Sequential(nn.Linear(3, 4), Hashable(4)), X, folds={"1": ["0"]})


class Merging(nn.Linear):
    """Takes a low-rank update into its weight when it is put into eval mode, as adapters do."""

    def __init__(self, *sizes: int, in_place: bool) -> None:
        super().__init__(*sizes)
        self.in_place, self.is_merged = in_place, False

    def train(self, mode: bool = True) -> Merging:
        if self.is_merged is mode:
            update = -1.0 if mode else 1.0
            if self.in_place:
                self.weight.data += update
            else:
                self.weight.data = self.weight.data + update
            self.is_merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("in_place", [True, False])
def test_model_that_merges_its_weights_in_eval_mode_is_not_touched(in_place: bool, randomised: Any) -> None:
    model = randomised(nn.Sequential(Merging(3, 4, in_place=in_place), nn.BatchNorm1d(4)).double()).train()
    weight = model[0].weight.clone()
    plan = plan_folding(model, (X,))
    assert torch.equal(model[0].weight, weight)
    assert [kept.code for kept in plan.kept] == ["parameter-read"]


def test_statistics_that_are_written_through_an_array_are_put_back(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.bn.num_batches_tracked.numpy()[...] += 1
        return m.bn(m.fc(x))

    model = net(forward).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["parameter-read"]
    assert model.bn.num_batches_tracked == 0


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


def test_a_float_of_zero_is_something_that_is_added(judge: Judge, net: Any) -> None:
    model = net(lambda m, x, t=0.0: m.bn(m.fc(x) + t))
    judge(model, X, kept={"bn": "not-transparent"}, others=[(X, 1.0)])
    judge(net(lambda m, x: m.bn(sum([m.fc(x)]))), X, folds={"bn": ["fc"]})


def test_a_multiple_that_is_added_could_be_another_one(judge: Judge, net: Any) -> None:
    bn, fc = nn.BatchNorm1d(3), nn.Linear(3, 2)
    model = net(lambda m, x, a=2.0: m.fc(torch.add(m.bn(x), m.bn(-x), alpha=a)), bn=bn, fc=fc)
    plan = judge(model, X, kept={"bn": "no-layer"}, others=[(X, 3.0)])
    assert "adds a multiple" in plan.kept[0].reason


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_sizes_that_are_no_longer_true_keep_the_batchnorm_before_them(side: str, judge: Judge) -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4))
    setattr(model[1], f"{side.removesuffix('puts')}_features", 7)
    plan = judge(model, X, kept={"0": "no-layer"})
    assert f"`1` has another number of {side} than its attributes say" in plan.kept[0].reason


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


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensor_beside_a_fold_is_nobodys_concern(judge: Judge, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        torch.nested.nested_tensor([x, x[:1]], layout=torch.strided)
        return m.bn(m.fc(x))

    judge(net(forward), X, folds={"bn": ["fc"]})
