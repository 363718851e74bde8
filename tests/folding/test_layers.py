"""Every kind of layer in the table takes a BatchNorm, with and without groups and bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import FoldingPlan, plan_folding
from lit_bnfold.folding.kinds import LAYER_KINDS

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = [kind.module for kind in LAYER_KINDS if "Conv" in kind.module.__name__]


def test_the_table_holds_what_the_tests_below_try() -> None:
    assert {kind.module for kind in LAYER_KINDS} == {nn.Linear, nn.Embedding, *CONVOLUTIONS}
    assert len(CONVOLUTIONS) == 6


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_takes_the_batchnorm_behind_it(kind: Any, bias: bool, groups: int, judge: Any) -> None:
    rank = int(kind.__name__[-2])
    model = nn.Sequential(kind(4, 8, 3, stride=2, groups=groups, bias=bias), NORMS[rank](8))
    judge(model, torch.randn(2, 4, *[5] * rank, dtype=torch.float64), folds={"1": ["0"]})


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution_takes_the_batchnorm_before_it_unless_it_is_transposed(kind: Any, groups: int, judge: Any) -> None:
    rank = int(kind.__name__[-2])
    model = nn.Sequential(NORMS[rank](4), kind(4, 8, 3, groups=groups), nn.ReLU())
    is_transposed = "Transpose" in kind.__name__
    wanted = {"kept": {"0": "no-layer"}} if is_transposed else {"folds": {"0": ["1"]}}
    judge(model, torch.randn(2, 4, *[5] * rank, dtype=torch.float64), **wanted)


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_embedding_takes_the_batchnorm_behind_it(padding_idx: int | None, judge: Any, net: Any) -> None:
    model = net(
        lambda m, x: m.bn(m.table(x).transpose(1, 2)),
        table=nn.Embedding(7, 5, padding_idx=padding_idx),
        bn=nn.BatchNorm1d(5),
    )
    others = [(torch.randint(0, 7, (n, 3)),) for n in (1, 4)]
    judge(model, torch.tensor([[0, 1, 6], [2, 3, 0]]), folds={"bn": ["table"]}, others=others)


def test_embedding_that_limits_its_norm_keeps_the_batchnorm(net: Any) -> None:
    model = net(lambda m, x: m.bn(m.table(x)), table=nn.Embedding(7, 5, max_norm=1.0), bn=nn.BatchNorm1d(5)).eval()
    plan = plan_folding(model, (torch.tensor([0, 1, 6]),))
    assert [kept.code for kept in plan.kept] == ["computed-weight"]


def test_batchnorm_goes_forward_into_several_layers_at_once(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x.relu())
        return m.a(y).tanh() + m.b(y).mean((2, 3), keepdim=True) + m.c(y.permute(0, 2, 3, 1)).sum()

    model = net(
        forward,
        bn=nn.BatchNorm2d(4),
        a=nn.Conv2d(4, 3, 3),
        b=nn.Conv2d(4, 3, 1, groups=1),
        c=nn.Linear(4, 2, bias=False),
    )
    judge(model, torch.randn(2, 4, 5, 5, dtype=torch.float64), folds={"bn": ["a", "b", "c"]})


def test_flattened_channels_go_forward_as_runs_of_features(judge: Any) -> None:
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))
    judge(model, torch.randn(2, 3, 2, 2, dtype=torch.float64), folds={"1": ["3"]})


def test_input_of_the_batchnorm_that_is_overwritten_before_the_layer_reads_is_kept(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x.relu()
        y = m.bn(h)
        h.add_(1.0)
        return m.fc(y).tanh() + h.sum()

    model = net(forward, bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 3))
    plan = judge(model, torch.randn(5, 3).double(), kept={"bn": "no-layer"})
    assert "is written in place by `add_` in the model after it was read" in plan.kept[0].reason


def test_layer_that_also_reads_something_else_keeps_the_batchnorm_before_it(judge: Any, net: Any) -> None:
    model = net(lambda m, x: m.fc(m.bn(x.relu())) + m.fc(x), bn=nn.BatchNorm1d(3), fc=nn.Linear(3, 3))
    judge(model, torch.randn(5, 3).double(), kept={"bn": "no-layer"})


@pytest.mark.parametrize(
    "forward",
    [lambda m, x: m.fc(m.bn(x.relu()).reshape(-1, 4)),
     lambda m, x: m.fc(m.bn(x.relu()).reshape(x.shape[0], -1).reshape(-1, 4))],
)  # fmt: skip
def test_sequence_of_one_step_that_would_be_mixed_with_the_channels_is_kept(forward: Any, judge: Any, net: Any) -> None:
    others = [(torch.randn(3, 4, 2).double(),), (torch.randn(2, 4, 3).double(),)]
    model = net(forward, bn=nn.BatchNorm1d(4), fc=nn.Linear(4, 3))
    judge(model, torch.randn(3, 4, 1).double(), kept={"bn": "no-layer"}, others=others)


def test_tokens_of_one_step_that_would_be_mixed_with_the_channels_are_kept(judge: Any, net: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.bn(m.fc(x).reshape(x.shape[0], -1).reshape(x.shape[0], 4, -1))

    model = net(forward, bn=nn.BatchNorm1d(4), fc=nn.Linear(4, 4))
    judge(
        model, torch.randn(3, 1, 4).double(), kept={"bn": "not-transparent"}, others=[(torch.randn(3, 2, 4).double(),)]
    )


def test_part_of_a_batchnorm_that_calls_batch_norm_itself_keeps_it(judge: Any) -> None:
    class Standardising(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            ones = torch.ones(4, dtype=input.dtype)
            return nn.functional.batch_norm(input, ones, 2 * ones).relu()

    class WithPart(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(4)
            self.part = Standardising()

        def forward(self, input: Tensor) -> Tensor:
            return self.part(super().forward(input))

    judge(nn.Sequential(nn.Linear(3, 4), WithPart()), torch.randn(5, 3).double(), kept={"1": "own-forward"})


def test_class_that_keeps_a_register_of_its_subclasses_sees_none_of_ours(judge: Any) -> None:
    register = []

    class Registered(nn.BatchNorm1d):
        def __init_subclass__(cls, key: str) -> None:
            register.append(key)

    class Rectifying(Registered, key="mine"):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    judge(nn.Sequential(nn.Linear(3, 4), Rectifying(4)), torch.randn(5, 3).double(), folds={"1": ["0"]})
    assert register == ["mine"]


def test_layer_that_does_something_else_without_a_bias_keeps_the_batchnorm(judge: Any) -> None:
    class Asking(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            plain = nn.functional.linear(input, self.weight, self.bias)
            return plain if self.bias is not None else plain * 2

    others = (nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = nn.Sequential(Asking(3, 4, bias=False), nn.BatchNorm1d(4), *others)
    judge(model, torch.randn(5, 3).double(), kept={"1": "no-layer"}, folds={"4": ["3"]})


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_kernel_of_even_size_has_no_middle_for_a_batchnorm_beside_it(judge: Any, net: Any) -> None:
    model = net(lambda m, x: m.c(x) + m.bn(x), c=nn.Conv1d(4, 4, 2, padding="same"), bn=nn.BatchNorm1d(4))
    judge(model, torch.randn(2, 4, 6).double(), kept={"bn": "other-reader"})


def test_channels_last_weights_stay_so(randomised: Any) -> None:
    model = randomised(
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    ).eval()
    plan = plan_folding(model, (torch.randn(2, 4, 5, 5),))
    folded = plan.apply(model)
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert plan_folding(folded, (torch.randn(2, 4, 5, 5),)) == FoldingPlan()
