"""The trial of a plan: what no rule foresaw keeps the BatchNorms."""

from __future__ import annotations

import functools
import random
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import BatchNormKind, FoldingError, Kinds, fold_batchnorm, plan_folding
from lit_bnfold.folding.kinds import KINDS, Normalisation
from lit_bnfold.folding.moved import with_batchnorm
from lit_bnfold.folding.plan import Part
from lit_bnfold.folding.search import make_plan
from lit_bnfold.folding.trial import _is_near, obstacle_to, run_as_it_is

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def doubled_elsewhere(h: Tensor) -> Tensor:
    """What another thread makes of a tensor, which no run shows."""
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(h.detach().relu() * 2))
    thread.start()
    thread.join()
    return found[0]


def test_work_of_another_thread_on_a_tensor_between_keeps_the_batchnorm(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        seen = doubled_elsewhere(h)
        return m.bn(h) + seen

    judge(net(forward), X, kept={"bn": "unexplained"})


def test_layer_that_gets_another_input_is_enough_to_keep_the_batchnorm(judge: Any, net: Any) -> None:
    # Nothing of it can be seen in the outputs, which are whole numbers.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        seen = doubled_elsewhere(h)
        return m.head(m.bn(h) + seen).argmax(1) * 0

    model = net(forward, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4), head=nn.Linear(4, 20)).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["unexplained"]


def test_memory_read_behind_torchs_back_keeps_the_batchnorm(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            seen = (h * 2).relu()
        return m.bn(h) + seen

    judge(net(forward), X, kept={"bn": "unexplained"})


@pytest.mark.parametrize("fold", [plan_folding, fold_batchnorm])
def test_argument_of_another_type_is_refused(fold: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(TypeError, match=r"example_args: expected a sequence of arguments such as \(x,\), got Tensor"):
        fold(model, torch.randn(1, 5, 3))
    with pytest.raises(TypeError, match=r"example_kwargs: expected a mapping .*, got str"):
        fold(model, (), "x")
    with pytest.raises(TypeError, match=r"example_kwargs: expected a mapping .*, got Tensor"):
        fold(model, (X,), X)  # whose truth is ambiguous
    with pytest.raises(TypeError, match=r"example_kwargs: expected a mapping .*, got list"):
        fold(model, (X,), [])
    with pytest.raises(TypeError, match=r"model: expected an nn.Module, got function"):
        fold(lambda x: x, (X,))
    with pytest.raises(TypeError, match=r"kinds: expected Kinds, got NoneType"):
        fold(model, (X,), kinds=None)


def test_example_that_cannot_be_copied_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(
        FoldingError, match="example cannot be copied, as each run needs its own: TypeError: cannot pickle"
    ):
        plan_folding(model, ((row for row in X),))


def test_model_of_inference_mode_is_folded(randomised: Any, agree: Any) -> None:
    with torch.inference_mode():
        model = randomised(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()).eval()
    folded = fold_batchnorm(model, (X,))
    assert type(folded[1]) is nn.Identity
    agree(model, folded, [(X,), (2 * X,)])


def test_batchnorm_of_no_channels_is_kept(net: Any) -> None:
    model = net(lambda m, x: m.bn(m.fc(x)), fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4), none=nn.BatchNorm1d(0))
    plan = plan_folding(model.double().eval(), (X,))
    assert [fold.batchnorm for fold in plan.folds] == ["bn"]
    assert [kept.code for kept in plan.kept] == ["not-reached"]


def test_model_that_loads_the_compiler_itself_is_run_again() -> None:
    code = """
        import sys, torch
        from torch import nn
        from lit_bnfold.folding import fold_batchnorm

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

            def forward(self, x):
                return torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.block(x),))

        model = Net().double().eval()
        nn.init.normal_(model.block[1].running_mean)
        x = torch.randn(5, 3, dtype=torch.float64)
        assert "torch._dynamo" not in sys.modules
        folded = fold_batchnorm(model, (x,))
        assert type(folded.block[1]) is nn.Identity
        with torch.no_grad():
            for other in (x, -x):
                torch.testing.assert_close(folded(other), model(other), rtol=0, atol=1e-12)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_example_comes_out_as_it_went_in(net: Any) -> None:
    model = net(lambda m, x, rest: m.bn(m.fc(x.mul_(2).add_(rest.pop()["y"].sub_(1))))).double().eval()
    x, rest = X.clone(), [{"y": X.clone()}]
    assert plan_folding(model, (x, rest)).folds
    assert torch.equal(x, X)
    assert torch.equal(rest[0]["y"], X)


def test_inputs_that_share_memory_do_so_in_the_run(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor, row: Tensor) -> Tensor:
        h = m.bn(x)
        row.add_(1)
        return m.fc(h)

    def example() -> tuple[Tensor, Tensor]:
        return (x := X.clone()), x[0]

    model = net(forward, bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 4)).double().eval()
    assert "written in place by `add_` in the model after it was read" in plan_folding(model, example()).kept[0].reason
    assert plan_folding(model, (X.clone(), X[0].clone())).folds


def test_outputs_that_overflow_do_not_hide_the_others(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        seen = doubled_elsewhere(h)
        return torch.cat([m.bn(h) + seen, x / 0], 1)

    model = net(forward).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["unexplained"]


def test_model_that_draws_random_numbers_is_folded_and_they_come_out_as_they_went_in(net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.fc(x + torch.randn_like(x))) * random.random()

    model = net(forward).double().eval()
    numbers, own = torch.get_rng_state(), random.getstate()
    assert plan_folding(model, (X,)).folds
    assert torch.equal(torch.get_rng_state(), numbers)
    assert random.getstate() == own


def test_model_whose_outputs_overflow_is_folded_all_the_same(net: Any, randomised: Any) -> None:
    model = randomised(net(lambda m, x: torch.cat([m.bn(m.fc(x)), x / 0, x.log()], 1)).double()).eval()
    assert plan_folding(model, (X,)).folds


def test_model_that_flips_a_decision_by_rounding_is_folded(net: Any, randomised: Any) -> None:
    # One of many outputs jumps, as the winner of a tie does.
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.bn(m.fc(x))
        return torch.cat([h.flatten(), h.flatten()[:1] * 0], 0)

    model = randomised(net(forward)).eval()
    assert plan_folding(model, (X.float(),)).folds


@pytest.mark.parametrize("channels", [None, (2, -1, 0, 1)])
@pytest.mark.parametrize("shift", [1.0, 0.0, 2.0])
@pytest.mark.parametrize(("shape", "axis"), [((5, 4), -1), ((5, 4, 2, 3), -3), ((5, 6, 4), -1)])
def test_moved_batchnorm_maps_the_channels_it_is_told_to(
    channels: tuple[int, ...] | None, shift: float, shape: tuple[int, ...], axis: int
) -> None:
    features = 4 if channels is None else 3
    mean, var, weight, bias = (torch.rand(features, dtype=torch.float64) + 0.1 for _ in range(4))
    numbers = Normalisation(mean, var, weight, bias, 0.5)
    move = with_batchnorm(lambda x: x, "backward", numbers, Part("", channels, shift), axis)
    x = torch.randn(shape, dtype=torch.float64)
    moved = move(x).movedim(axis, -1)
    assert move(x).stride() == x.stride()
    scale = weight / (var + 0.5).sqrt()
    for position, channel in enumerate(range(4) if channels is None else channels):
        column = x.movedim(axis, -1)[..., position]
        expected = column if channel < 0 else column * scale[channel] + shift * (bias - mean * scale)[channel]
        torch.testing.assert_close(moved[..., position], expected, rtol=0, atol=1e-12)


def test_run_that_fails_once_batchnorms_are_gone_keeps_them(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        assert isinstance(m.bn, nn.BatchNorm1d)
        return m.bn(m.fc(x))

    model = net(forward).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["structure-read"]
    assert isinstance(fold_batchnorm(model, (X,)).bn, nn.BatchNorm1d)


def test_input_that_only_an_erased_batchnorm_reads_at_first_is_the_same_input(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.bn(x)
        y = torch.ones(3, dtype=x.dtype) + 1
        return m.fc(h) + m.other(x + y)

    model = net(forward, bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 4), other=nn.Linear(3, 4))
    judge(model, X, folds={"bn": ["fc"]})


def test_inputs_that_share_memory_come_out_as_they_went_in(net: Any) -> None:
    model = net(lambda m, x, y: m.bn(m.fc(x.add_(1))) + y.sum()).double().eval()
    rows = torch.randn(5, 6, dtype=torch.float64)
    before = rows.clone()
    assert plan_folding(model, (rows[:, :3], rows[:, 3:])).folds
    assert torch.equal(rows, before)


def test_random_numbers_of_numpy_come_out_as_they_went_in(net: Any) -> None:
    numpy = pytest.importorskip("numpy")
    model = net(lambda m, x: m.bn(m.fc(x)) * numpy.random.rand()).double().eval()
    numpy.random.seed(3)
    assert plan_folding(model, (X,)).folds
    drawn = numpy.random.rand()
    numpy.random.seed(3)
    assert numpy.random.rand() == drawn


def test_part_of_numpy_that_draws_is_loaded_by_models_that_draw_from_it_alone() -> None:
    code = """
        import sys, torch
        from torch import nn
        from lit_bnfold.folding import fold_batchnorm

        class Noisy(nn.Sequential):
            def forward(self, x):
                import numpy.random
                return super().forward(x) * numpy.random.rand()

        layers, x = (nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.randn(5, 3)
        nn.init.normal_(layers[1].running_mean)
        was_loaded = "numpy.random" in sys.modules  # numpy 1 loads all of itself
        assert type(fold_batchnorm(nn.Sequential(*layers), (x,))[1]) is nn.Identity
        assert ("numpy.random" in sys.modules) == was_loaded
        assert type(fold_batchnorm(Noisy(*layers), (x,))[1]) is nn.Identity
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_buffer_that_counts_inside_a_normalisation_of_a_project_is_put_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("variance", torch.rand(4) + 0.2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return (x - self.mean) / self.variance.sqrt()

    kinds = Kinds(batchnorms=(BatchNormKind(Counting, "mean", "variance"),))
    model = nn.Sequential(nn.Linear(3, 4), Counting()).double().eval()
    assert plan_folding(model, (X,), kinds=kinds).folds
    assert model[1].calls == 0


# What real networks made of it.


def test_cache_that_outlives_the_model_does_not_keep_the_batchnorm(net: Any) -> None:
    @functools.lru_cache
    def positions(n: int) -> Tensor:
        return torch.arange(n).cos().double()

    model = net(lambda m, x: m.bn(m.fc(x)) + positions(4)).double().eval()
    assert plan_folding(model, (X,)).folds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decision_that_rounding_tips_does_not_keep_the_batchnorm(dtype: torch.dtype, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.bn(m.fc(x).view(len(x), 4, 2).mean(2))
        # All scores are nearly the same, and the largest one decides about everything.
        best = (h * 1e-5 + 7).sum(1).argmax()
        return x.roll(int(best.shape == ()) * 0, 0).index_select(0, best.view(1)) * 3

    model = net(forward, fc=nn.Linear(3, 8), bn=nn.BatchNorm1d(4)).to(dtype).eval()
    with torch.no_grad():
        model.bn.running_mean.fill_(1e2)
        model.fc.bias.fill_(1e2)
    assert plan_folding(model, (torch.randn(64, 3, dtype=dtype),)).folds


@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda h: h.to("meta"), lambda h: h.to(torch.complex128)])
def test_outputs_of_any_kind_are_waited_for(change: Any, net: Any) -> None:
    model = net(
        lambda m, x: change(m.head(m.bn(m.fc(x)).relu())),
        fc=nn.Linear(3, 4),
        bn=nn.BatchNorm1d(4),
        head=nn.Linear(4, 2),
    )
    assert plan_folding(model.double().eval(), (X,)).folds


def test_layer_that_reads_a_sparse_tensor_is_folded() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval()
    assert plan_folding(model, (torch.eye(6).to_sparse(),)).folds


def test_numbers_that_are_none_are_not_near_others() -> None:
    expected = torch.tensor([1.0, 2.0, float("inf")])
    assert _is_near(expected, torch.tensor([1.0, 2.0, 5.0]))
    assert not _is_near(expected, torch.tensor([1.0, float("nan"), float("inf")]))
    assert not _is_near(expected, torch.full((3,), float("inf")))
    assert _is_near(torch.full((2,), float("nan")), torch.zeros(2))
    assert not _is_near(torch.tensor([1.0 + 1.0j]), torch.tensor([1.0 - 1.0j]))
    large = torch.tensor([1e300, 1.0], dtype=torch.float64)
    assert _is_near(large, large + 1.0)
    assert not _is_near(large, large / 10)
    assert not _is_near(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]).double())


@pytest.mark.parametrize("direction", ["backward", "forward"])
def test_fold_that_would_overflow_float16_is_kept(direction: str) -> None:
    norm = nn.BatchNorm1d(3, eps=1e-12)
    layer = nn.Linear(3, 3).half()
    layers = [layer, norm] if direction == "backward" else [nn.ReLU(), norm, layer]
    model = nn.Sequential(*layers).eval()
    assert plan_folding(model, (X.half(),)).folds
    norm.running_var.fill_(1e-12)
    layer.weight.data.mul_(1e-3)
    norm.running_mean.fill_(0.5)
    assert [kept.code for kept in plan_folding(model, (X.half(),)).kept] == ["not-finite"]


def test_a_call_that_fails_and_is_caught_is_tried_out_like_any_other(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with suppress(RuntimeError):
            m.other(x[:, :2])
        return m.block(x)  # type: ignore[no-any-return]

    block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    judge(net(forward, other=nn.Linear(3, 4), block=block), X, folds={"block.1": ["block.0"]})


def test_frozen_batchnorms_give_the_same_bits_in_both_runs(net: Any) -> None:
    class FrozenBatchNorm(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(size) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x * (self.weight / (self.running_var + 1e-5).sqrt()) + (
                self.bias - self.running_mean * self.weight / (self.running_var + 1e-5).sqrt()
            )

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.bn(m.fc(x))
        # The order of what is all but equal decides about what is returned.
        return x[(h.sum(1) * 1e3).sin().argsort()]

    model = net(forward, fc=nn.Linear(3, 4), bn=FrozenBatchNorm(4)).eval()
    run = run_as_it_is(model, (X.float(),), {}, KINDS)
    assert obstacle_to(make_plan(run.graph), run, model, (X.float(),), {}, KINDS) is None
    assert plan_folding(model, (torch.randn(300, 3),)).folds


def test_input_that_is_read_beside_what_an_erased_batchnorm_makes_of_it_is_one_input(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.relu()
        return m.fc(torch.cat([m.bn(h), h], 1))

    judge(net(forward, bn=nn.BatchNorm1d(3), fc=nn.Linear(6, 4)), X, folds={"bn": ["fc"]})
