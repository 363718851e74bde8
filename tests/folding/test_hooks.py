"""Hooks, which see or change what goes by, and what their modules are known by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import FoldingPlan, plan_folding

Judge = Callable[..., FoldingPlan]
X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


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


def test_hook_on_the_gradients_of_the_layer_or_the_batchnorm_keeps_it(judge: Judge) -> None:
    for place, kind, code in (
        (0, "register_full_backward_pre_hook", "other-reader"),
        (1, "register_full_backward_hook", "hook"),
    ):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        getattr(model[place], kind)(lambda *_: None)
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
