"""The trial of a plan: what no rule foresaw keeps the BatchNorms."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import BatchNormKind, Kinds, fold_batchnorm, plan_folding
from lit_bnfold.folding.kinds import Normalisation
from lit_bnfold.folding.moved import with_batchnorm
from lit_bnfold.folding.plan import Part

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_work_of_another_thread_on_a_tensor_between_keeps_the_batchnorm(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, found = m.fc(x), []
        thread = threading.Thread(target=lambda: found.append(h.detach().relu() * 2))
        thread.start()
        thread.join()
        return m.bn(h) + found[0]

    judge(net(forward), X, kept={"bn": "unexplained"})


def test_layer_that_gets_another_input_is_enough_to_keep_the_batchnorm(judge: Any, net: Any) -> None:
    # Nothing of it can be seen in the outputs, which are whole numbers.
    def forward(m: Any, x: Tensor) -> Tensor:
        h, found = m.fc(x), []
        thread = threading.Thread(target=lambda: found.append(h.detach().relu() * 2))
        thread.start()
        thread.join()
        return m.head(m.bn(h) + found[0]).argmax(1) * 0

    model = net(forward, fc=nn.Linear(3, 4), bn=nn.BatchNorm1d(4), head=nn.Linear(4, 20)).double().eval()
    assert [kept.code for kept in plan_folding(model, (X,)).kept] == ["unexplained"]


def test_memory_read_behind_torchs_back_keeps_the_batchnorm(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            seen = (h * 2).relu()
        return m.bn(h) + seen

    judge(net(forward), X, kept={"bn": "unexplained"})


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
        h, found = m.fc(x), []
        thread = threading.Thread(target=lambda: found.append(h.detach().relu() * 2))
        thread.start()
        thread.join()
        return torch.cat([m.bn(h) + found[0], x / 0], 1)

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
