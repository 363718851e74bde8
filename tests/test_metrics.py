"""The metric that compares two versions of a model, against plain torch and over simulated ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_bnfold.metrics import OutputError

INF, NAN = float("inf"), float("nan")


def outputs(seed: int, shape: tuple[int, ...] = (5, 7), dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (original + 0.3 * noise).to(dtype), original.to(dtype)


def error_of(folded: list[float], original: list[float]) -> dict[str, float]:
    error = OutputError()
    error.update(torch.tensor(folded), torch.tensor(original))
    return {key: value.item() for key, value in error.compute().items()}


def over_two_ranks(here: list[tuple[Tensor, Tensor]], there: list[tuple[Tensor, Tensor]]) -> OutputError:
    """A metric that has seen the batches `here`, on one of two ranks of which the other has seen those `there`."""
    other = OutputError()
    for batch in there:
        other.update(*batch)

    def gather(state: Tensor, group: object) -> list[Tensor]:
        name = next(name for name, value in metric.metric_state.items() if value is state)
        return [state, other.metric_state[name]]

    metric = OutputError(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    for batch in here:
        metric.update(*batch)
    return metric


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (2, 3, 4, 5)])
def test_output_error_is_that_of_plain_torch_in_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    error = OutputError()
    batches = [outputs(seed, shape, dtype) for seed in range(3)]
    for batch in batches:
        error.update(*batch)
    folded, original = (torch.stack(tensors).double() for tensors in zip(*batches, strict=True))
    max_abs = (folded - original).abs().max()
    assert error.compute()["max_abs"].item() == pytest.approx(max_abs.item(), rel=1e-6)
    assert error.compute()["max_rel"].item() == pytest.approx((max_abs / original.abs().max()).item(), rel=1e-6)


def test_output_error_sees_differences_that_float32_would_not() -> None:
    error = OutputError()
    error.update(torch.tensor(1.0 + 1e-12, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    assert error.compute()["max_abs"].item() == pytest.approx(1e-12, rel=1e-3)


def test_the_scale_of_the_outputs_is_that_of_all_batches() -> None:
    error = OutputError()
    error.update(torch.tensor([1.5]), torch.tensor([1.0]))
    error.update(torch.tensor([4.0]), torch.tensor([4.0]))
    assert error.compute() == {"max_abs": 0.5, "max_rel": 0.125}


@pytest.mark.parametrize(
    ("folded", "original", "max_abs", "max_rel"),
    [
        ([0.0], [0.0], 0.0, 0.0),
        ([1.0], [0.0], 1.0, INF),
        ([NAN, 1.5], [NAN, 1.0], 0.5, 0.5),
        ([INF, -INF, 1.5], [INF, -INF, 1.0], 0.5, 0.5),
        ([NAN, 1.0], [1.0, 1.0], INF, INF),
        ([1.0, 1.0], [NAN, 1.0], INF, INF),
        ([INF, 1.0], [1.0, 1.0], INF, INF),
        ([1.0, 1.0], [INF, 1.0], INF, INF),
        ([INF, 1.0], [-INF, 1.0], INF, INF),
        ([NAN, 1.0], [INF, 1.0], INF, INF),
        ([NAN], [NAN], 0.0, 0.0),
        ([], [], 0.0, 0.0),
    ],
)
def test_nan_and_infinity_agree_with_themselves_alone(
    folded: list[float], original: list[float], max_abs: float, max_rel: float
) -> None:
    assert error_of(folded, original) == {"max_abs": max_abs, "max_rel": max_rel}


@pytest.mark.parametrize(
    ("folded", "original", "max_abs"),
    [
        # Float32 does not tell these two apart.
        (torch.tensor([3, 2**24 + 1]), torch.tensor([3, 2**24]), 1.0),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1.0),
        (torch.tensor([3 + 4j]), torch.tensor([0 + 0j]), 5.0),
    ],
)
def test_output_error_takes_every_kind_of_number(folded: Tensor, original: Tensor, max_abs: float) -> None:
    error = OutputError()
    error.update(folded, original)
    assert error.compute()["max_abs"].item() == max_abs


def test_outputs_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 7\) from the folded model and \(5, 1\) from the original"):
        OutputError().update(torch.zeros(5, 7), torch.zeros(5, 1))


@pytest.mark.parametrize("swapped", [False, True])
def test_two_ranks_give_what_one_rank_gives_that_sees_all(swapped: bool) -> None:
    batches = [outputs(seed) for seed in range(4)]
    alone = OutputError()
    for batch in batches:
        alone.update(*batch)
    ranks = (batches[:1], batches[1:])
    together = over_two_ranks(*(reversed(ranks) if swapped else ranks))
    assert together.compute() == alone.compute()


def test_merging_two_metrics_is_seeing_all_batches() -> None:
    alone, first, second = OutputError(), OutputError(), OutputError()
    for metric, seed in [(first, 0), (second, 1), (alone, 0), (alone, 1)]:
        metric.update(*outputs(seed))
    first.merge_state(second)
    assert first.compute() == alone.compute()


def test_calling_the_metric_gives_the_value_of_one_batch_and_keeps_all() -> None:
    metric, last, everything = OutputError(), OutputError(), OutputError()
    metric(*outputs(0))
    value = metric(*outputs(1))
    last.update(*outputs(1))
    everything.update(*outputs(0))
    everything.update(*outputs(1))
    assert value == last.compute()
    assert metric.compute() == everything.compute()


def test_a_reset_metric_begins_again() -> None:
    metric, fresh = OutputError(), OutputError()
    metric.update(*outputs(0))
    metric.reset()
    metric.update(*outputs(1))
    fresh.update(*outputs(1))
    assert metric.compute() == fresh.compute()


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_large_output_is_compared_to_its_end(odd: float) -> None:
    """It is compared in pieces, and in another way where not every number is finite."""
    original = torch.ones(3, 100_000)
    folded = original.clone()
    original[0, 0], folded[2, 99_998], original[2, 99_999] = 4.0, 3.0, 8.0
    folded[0, 0], folded[2, 99_999] = 4.0, 8.0
    error = OutputError()
    error.update(folded, original)
    assert {key: float(value) for key, value in error.compute().items()} == {"max_abs": 2.0, "max_rel": 0.25}
    original[1, 7] = folded[1, 7] = odd
    error.update(folded, original)
    assert {key: float(value) for key, value in error.compute().items()} == {"max_abs": 2.0, "max_rel": 0.25}
    folded[1, 7] = 1.0
    error.update(folded, original)
    assert float(error.compute()["max_abs"]) == torch.inf
