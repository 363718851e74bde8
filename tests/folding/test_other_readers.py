"""Whoever else sees or writes a number that a fold would change keeps the BatchNorm."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_bnfold.folding import FoldingPlan, plan_folding

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


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
    judge(net(lambda m, x: (m.bn(h := m.fc(x)), Same.apply(h))), X, kept={"bn": "other-reader"})


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


def test_compiled_function_that_reads_the_output_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    double = torch.compile(lambda h: h * 2, backend="eager")
    judge(net(lambda m, x: m.bn(h := m.fc(x)) + double(h)), X, kept={"bn": "other-reader"})
    torch._dynamo.reset()


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


def test_expanded_output_written_in_place_after_normalisation_is_folded(judge: Judge, net: Any) -> None:
    # Each number of the input stands for three; each of the output's lies in memory once, also of what is left.
    model = net(lambda m, x: m.bn(m.fc(x).unsqueeze(2).expand(-1, -1, 3)).add_(1))
    judge(model, X, folds={"bn": ["fc"]})


def test_statistics_that_are_written_through_an_array_are_put_back(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.bn.num_batches_tracked.numpy()[...] += 1
        return m.bn(m.fc(x))

    model = net(forward).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["parameter-read"]
    assert model.bn.num_batches_tracked == 0
