"""Laws that hold whatever the model is."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import FoldingPlan, fold_batchnorm, plan_folding

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """One of everything: folds of the whole, of a part, into two layers, behind another one, and two that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
        self.both, self.behind = nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False)
        self.c, self.part = nn.Linear(4, 6), nn.BatchNorm1d(3)
        self.block = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6), nn.Dropout())
        self.unused = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.behind(self.both(self.a(x) + self.b(x.tanh()))).relu()
        first, second = self.c(h).chunk(2, 1)
        return self.block(torch.cat([self.part(first), second.sigmoid()], 1))  # type: ignore[no-any-return]


@pytest.fixture
def model(randomised: Callable[[nn.Module], nn.Module]) -> Mixed:
    model = randomised(Mixed().double()).eval()
    assert isinstance(model, Mixed)
    return model


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_folded_model_gives_the_same_outputs(model: Mixed, agree: Any) -> None:
    plan = plan_folding(model, (X,))
    assert [fold.batchnorm for fold in plan.folds] == ["both", "behind", "part"]
    assert {kept.batchnorm: kept.code for kept in plan.kept} == {"block.1": "no-layer", "unused": "not-reached"}
    agree(model, plan.apply(model), [(X,), (3 * X[:1],), (torch.randn(9, 3).double(),)])


def test_folds_and_kept_name_every_batchnorm_once(model: Mixed) -> None:
    plan = plan_folding(model, (X,))
    named = [fold.batchnorm for fold in plan.folds] + [kept.batchnorm for kept in plan.kept]
    assert sorted(named) == sorted(name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d))


def test_folding_twice_is_folding_once(model: Mixed) -> None:
    once = fold_batchnorm(model, (X,))
    twice = fold_batchnorm(once, (X,))
    assert same_bits(once, twice)
    assert str(once) == str(twice)
    assert not plan_folding(once, (X,)).folds


def test_folding_leaves_the_original_alone(model: Mixed) -> None:
    model.block.train()
    model.a.register_forward_pre_hook(lambda *_: None)
    before, text, output = copy.deepcopy(model.state_dict()), str(model), model.eval()(X)
    model.block.train()
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    flags = {name: module.training for name, module in model.named_modules()}
    hooks = {name: list(module._forward_pre_hooks) for name, module in model.named_modules()}
    fold_batchnorm(model, (X,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == parameters
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: list(module._forward_pre_hooks) for name, module in model.named_modules()} == hooks
    assert str(model) == text
    assert torch.equal(model.eval()(X), output)


def test_copy_and_original_share_no_memory(model: Mixed) -> None:
    folded = fold_batchnorm(model, (X,))
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in folded.state_dict().values()}


def test_plan_survives_json(model: Mixed) -> None:
    plan = plan_folding(model, (X,))
    assert FoldingPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_plan_made_on_one_copy_gives_the_same_bits_on_another(model: Mixed) -> None:
    plan = plan_folding(copy.deepcopy(model), (2 * X,))
    assert plan == plan_folding(model, (X[:2],))
    assert same_bits(plan.apply(model), plan.apply(copy.deepcopy(model)))
    assert same_bits(plan.apply(model), plan.apply(copy.deepcopy(model), inplace=True))


def test_folded_model_can_be_copied_pickled_and_saved(model: Mixed) -> None:
    folded = fold_batchnorm(model, (X,))
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(other(X), folded(X))
        assert type(other.both) is nn.Identity
    file = io.BytesIO()
    torch.save(folded.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(folded)
    fresh.load_state_dict(torch.load(file))
    assert same_bits(fresh, folded)


def test_folded_state_does_not_load_into_the_model_that_keeps_its_batchnorms(model: Mixed) -> None:
    folded = fold_batchnorm(model, (X,))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(folded.state_dict())


def test_folded_model_is_of_the_same_class_and_modes(model: Mixed) -> None:
    model.train()
    model.block[2].eval()
    folded = fold_batchnorm(model, (X,))
    assert type(folded) is Mixed
    assert [module.training for module in folded.modules()] == [module.training for module in model.modules()]


def test_folded_model_can_be_trained_scripted_and_exported(model: Mixed) -> None:
    folded = fold_batchnorm(model, (X,))
    folded(X).sum().backward()
    assert all(parameter.grad is not None for name, parameter in folded.named_parameters() if "unused" not in name)
    exported = torch.export.export(folded.eval(), (X,)).module()
    torch.testing.assert_close(exported(X), folded(X), rtol=0, atol=1e-12)


def test_every_fold_follows_its_batchnorm(model: Mixed) -> None:
    # A check that knows nothing of graphs: whatever one BatchNorm's numbers become, the folded model must follow.
    plan = plan_folding(model, (X,))
    for fold in plan.folds:
        changed = copy.deepcopy(model)
        batchnorm = changed.get_submodule(fold.batchnorm)
        batchnorm.running_mean.add_(1.5)
        batchnorm.running_var.mul_(4.0)
        torch.testing.assert_close(plan.apply(changed)(X), changed(X), rtol=0, atol=1e-12)
        assert not torch.allclose(changed(X), model(X))
