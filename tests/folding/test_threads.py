"""Folding in several threads at once: what comes out is what one thread gives, to the bit."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch

from lit_bnfold.folding import FoldingError, FoldingPlan, fold_batchnorm, plan_folding

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

ROUNDS = [pytest.param(15, id="short"), pytest.param(300, id="long", marks=pytest.mark.long)]


class Noisy(nn.Module):
    """Draws random numbers in eval mode too, from all three generators of the process."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(3, width), nn.BatchNorm1d(width)
        self.norm = nn.utils.parametrizations.weight_norm(nn.Linear(width, 4))
        self.last, self.kept = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        noise = random.random() + numpy.random.rand() + torch.rand(())
        h = self.last(self.norm(self.bn(self.fc(x)).relu()))
        return self.kept((h + noise).tanh())  # type: ignore[no-any-return]


@pytest.fixture
def noisy(randomised: Callable[[nn.Module], nn.Module]) -> Callable[[int], nn.Module]:
    return lambda width: randomised(Noisy(width).double()).eval()


@pytest.fixture(autouse=True)
def _many_turns() -> Iterator[None]:
    """Let the threads take turns a thousand times as often as they usually do."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(usual)


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """What functions give that begin at the same moment, each in a thread of its own."""
    barrier, given = threading.Barrier(len(tasks)), [None] * len(tasks)

    def run(place: int, task: Callable[[], Any]) -> None:
        barrier.wait(60)
        try:
            given[place] = task()
        except BaseException as error:
            given[place] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=run, args=each) for each in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failure = next((each for each in given if isinstance(each, BaseException)), None)
    if failure is not None:
        raise failure
    return given


def process_state() -> dict[str, Any]:
    """What belongs to all threads and is another thing for as long as a model is recorded."""
    return {
        "torch": torch.random.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": repr(numpy.random.get_state()),
        "stance": torch._dynamo.eval_frame._stance.stance,
        "dispatch": _python_dispatch.is_in_torch_dispatch_mode(),
    }


def assert_same_bits(found: nn.Module, expected: nn.Module) -> None:
    assert str(found) == str(expected)
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_two_models_are_folded_at_once(rounds: int, noisy: Callable[[int], nn.Module]) -> None:
    models = [noisy(4), noisy(7)]
    plans = [plan_folding(model, (X,)) for model in models]
    assert [[fold.batchnorm for fold in plan.folds] for plan in plans] == [["bn", "last"]] * 2
    expected = [plan.apply(model) for plan, model in zip(plans, models, strict=True)]
    before = process_state()
    for _ in range(rounds):
        found = at_once(*(lambda model=model: fold_batchnorm(model, (X,)) for model in models))
        for each, other in zip(found, expected, strict=True):
            assert_same_bits(each, other)
    assert process_state() == before


@pytest.mark.parametrize("rounds", ROUNDS)
def test_two_threads_fold_copies_of_one_model(rounds: int, noisy: Callable[[int], nn.Module]) -> None:
    model = noisy(4)
    expected = fold_batchnorm(model, (X,))
    for _ in range(rounds):
        for found in at_once(*2 * [lambda: fold_batchnorm(model, (X,))]):
            assert_same_bits(found, expected)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_two_threads_that_fold_one_model_in_place_fold_it_once(rounds: int, noisy: Callable[[int], nn.Module]) -> None:
    plan = plan_folding(noisy(4), (X,))
    for _ in range(rounds):
        model = noisy(4)
        expected = plan.apply(model)
        found = at_once(*2 * [lambda model=model: fold_batchnorm(model, (X,), inplace=True)])
        assert found == [model, model]
        assert_same_bits(model, expected)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_plan_that_two_threads_apply_in_place_is_refused_to_one(
    rounds: int, noisy: Callable[[int], nn.Module]
) -> None:
    plan = plan_folding(noisy(4), (X,))

    def apply(model: nn.Module) -> str:
        try:
            plan.apply(model, inplace=True)
        except FoldingError as error:
            return str(error)
        return ""

    for _ in range(rounds):
        model = noisy(4)
        expected = plan.apply(model)
        none, refusal = sorted(at_once(*2 * [lambda model=model: apply(model)]))
        assert none == ""
        assert "the model has Identity of that name" in refusal
        assert_same_bits(model, expected)


@pytest.mark.parametrize("rounds", ROUNDS)
def test_a_model_that_another_thread_runs_is_folded_and_gives_the_other_thread_what_it_gave(
    rounds: int, randomised: Callable[[nn.Module], nn.Module]
) -> None:
    modules = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2)
    model = randomised(nn.Sequential(*modules).double()).eval()
    expected, output = fold_batchnorm(model, (X,)), model(X)
    folded = threading.Event()

    def fold() -> list[nn.Module]:
        try:
            return [fold_batchnorm(model, (X,)) for _ in range(rounds)]
        finally:
            folded.set()

    def run() -> list[Tensor]:
        outputs = [model(X)]
        while not folded.is_set():
            outputs.append(model(X))
        return outputs

    found, outputs = at_once(fold, run)
    assert all(torch.equal(each, output) and each.requires_grad for each in outputs)
    for each in found:
        assert_same_bits(each, expected)


def test_a_model_that_folds_another_one_does_not_wait_for_itself(
    randomised: Callable[[nn.Module], nn.Module],
) -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
            assert [fold.batchnorm for fold in plan_folding(inner, (X,)).folds] == ["1"]
            return self.bn(self.fc(x))  # type: ignore[no-any-return]

    plan = plan_folding(randomised(Folding().double()), (X,))
    assert isinstance(plan, FoldingPlan)
