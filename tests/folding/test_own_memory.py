"""What a run does to the model's own parameters and buffers, or gives away of them: the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import FoldingPlan, plan_folding

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ties_by_data(m: Any, x: Tensor) -> Tensor:
    m.dec.weight.data = m.fc.weight.data.t()
    return m.dec(m.bn(m.fc(x)).relu())


def ties_by_memory(m: Any, x: Tensor) -> Tensor:
    m.dec.weight.data.set_(m.fc.weight.data.t())
    return m.dec(m.bn(m.fc(x)).relu())


def exchanges(m: Any, x: Tensor) -> Tensor:
    m.fc.weight.data, m.other.weight.data = m.other.weight.data, m.fc.weight.data
    return m.dec(m.bn(m.fc(x)).relu())


def exchanges_statistics(m: Any, x: Tensor) -> Tensor:
    m.bn.running_mean.data, m.bn.running_var.data = m.bn.running_var.data, m.bn.running_mean.data
    return m.dec(m.bn(m.fc(x)).relu())


def cuts(m: Any, x: Tensor) -> Tensor:
    m.dec.weight.data = m.dec.weight.data[:, :3].clone()
    m.count += 1
    return m.dec(m.bn(m.fc(x))[:, :3].relu())


def resizes(m: Any, x: Tensor) -> Tensor:
    torch.mul(x, 2.0, out=m.scratch)
    m.count += 1
    return m.dec(m.bn(m.fc(x)).relu())


@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
@pytest.mark.parametrize("forward", [ties_by_data, ties_by_memory, exchanges, exchanges_statistics, cuts, resizes])
def test_a_run_that_gives_parameters_other_memory_leaves_the_original_as_it_was(
    forward: Any, net: Any, randomised: Any
) -> None:
    modules = {"fc": nn.Linear(3, 4), "other": nn.Linear(3, 4), "bn": nn.BatchNorm1d(4), "dec": nn.Linear(4, 3)}
    model = randomised(net(forward, **modules).double()).eval()
    model.register_buffer("scratch", torch.zeros(2, 3, dtype=torch.float64))
    model.register_buffer("count", torch.zeros(()))
    before = {name: (each, each.data_ptr(), each.clone()) for name, each in model.state_dict(keep_vars=True).items()}
    plan_folding(model, (X,))
    for name, now in model.state_dict(keep_vars=True).items():
        tensor, address, numbers = before[name]
        assert now is tensor
        assert now.data_ptr() == address or name == "scratch"  # torch has moved it, as the model wanted
        assert torch.equal(now, numbers), name


@pytest.mark.parametrize(
    "give",
    [lambda m: m.fc.weight, lambda m: {"bias": [m.fc.bias]}, lambda m: m.bn.running_mean, lambda m: m.fc.weight.t(),
     lambda m: m.fc.weight.detach()],
)  # fmt: skip
def test_a_parameter_that_is_returned_keeps_the_batchnorm(give: Any, judge: Judge, net: Any) -> None:
    model = net(lambda m, x: (m.bn(m.fc(x)), give(m)))
    plan = plan_folding(model.double().eval(), (X,))
    assert [kept.code for kept in plan.kept] in (["kept-alive"], ["parameter-read"])
    judge(model, X, kept={"bn": plan.kept[0].code})


def test_a_parameter_of_the_layer_behind_it_that_is_returned_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: (m.head(m.bn(x.tanh())), m.head.weight), bn=nn.BatchNorm1d(3), head=nn.Linear(3, 2))
    judge(model, X, kept={"bn": "no-layer"})


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_a_computed_weight_that_is_returned_keeps_the_batchnorm(norm: Any, judge: Judge, net: Any) -> None:
    model = net(lambda m, x: (m.bn(m.fc(x)), m.fc.weight), fc=norm(nn.Linear(3, 4)), bn=nn.BatchNorm1d(4))
    judge(model, X, kept={"bn": "kept-alive"})


def test_an_embedding_whose_table_is_returned_keeps_the_batchnorm(judge: Judge, net: Any) -> None:
    model = net(lambda m, x: (m.bn(m.table(x)), m.table.weight), table=nn.Embedding(9, 4), bn=nn.BatchNorm1d(4))
    judge(model, torch.arange(7), kept={"bn": "kept-alive"}, others=[(torch.arange(3),)])
