"""The arithmetic of folding, against the formula written out."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from lit_bnfold.folding.algebra import (
    add_identity,
    fold_into_inputs,
    fold_into_outputs,
    fold_into_rows,
    round_like,
    rounding_gain,
    scale_and_shift,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def statistics(dtype: torch.dtype = torch.float64, channels: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, weight, bias = torch.randn(3, channels, dtype=torch.float64).to(dtype)
    return mean, torch.rand(channels, dtype=torch.float64).add(0.1).to(dtype), weight, bias


def test_scale_and_shift_are_those_of_the_plain_formula() -> None:
    mean, var, weight, bias = statistics()
    scale, shift = scale_and_shift(mean, var, weight, bias, eps=1e-5)
    for c in range(5):
        plain = float(weight[c]) / math.sqrt(float(var[c]) + 1e-5)
        assert float(scale[c]) == pytest.approx(plain, rel=1e-15)
        assert float(shift[c]) == pytest.approx(float(bias[c]) - float(mean[c]) * plain, rel=1e-14)


@pytest.mark.parametrize("missing", ["weight", "bias", "both"])
def test_a_missing_weight_counts_as_ones_and_a_missing_bias_as_zeros(missing: str) -> None:
    mean, var, weight, bias = statistics()
    given = (None if missing != "bias" else weight, None if missing != "weight" else bias)
    full = (torch.ones(5) if missing != "bias" else weight, torch.zeros(5) if missing != "weight" else bias)
    assert_equal(scale_and_shift(mean, var, *given, 1e-3), scale_and_shift(mean, var, *full, 1e-3))


def test_eps_stays_in() -> None:
    mean, weight, bias = torch.zeros(2), torch.ones(2), torch.zeros(2)
    scale, _ = scale_and_shift(mean, torch.tensor([0.0, 3.0]), weight, bias, eps=1.0)
    assert scale.tolist() == [1.0, 0.5]


def test_batchnorm_in_eval_mode_does_the_same_as_scale_and_shift() -> None:
    mean, var, weight, bias = statistics()
    x = torch.randn(7, 5, dtype=torch.float64)
    expected = torch.nn.functional.batch_norm(x, mean, var, weight, bias, eps=1e-5)
    scale, shift = scale_and_shift(mean, var, weight, bias, 1e-5)
    torch.testing.assert_close(scale * x + shift, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_folded_linear_is_the_linear_followed_by_the_map(with_bias: bool) -> None:
    weight, x = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64) if with_bias else None
    scale, shift = torch.randn(2, 5, dtype=torch.float64)
    folded_weight, folded_bias = fold_into_outputs(weight, bias, scale, shift)
    expected = scale * torch.nn.functional.linear(x, weight, bias) + shift
    torch.testing.assert_close(torch.nn.functional.linear(x, folded_weight, folded_bias), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("statistics_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_is_computed_in_float64_and_rounded_once(dtype: torch.dtype, statistics_dtype: torch.dtype) -> None:
    weight, bias = torch.randn(5, 3).to(dtype), torch.randn(5).to(dtype)
    mean, var, gamma, beta = statistics(statistics_dtype)
    folded_weight, folded_bias = fold_into_outputs(weight, bias, *scale_and_shift(mean, var, gamma, beta, 1e-5))
    scale = gamma.double() * (var.double() + 1e-5).rsqrt()
    shift = beta.double() - mean.double() * scale
    assert folded_weight.dtype == folded_bias.dtype == dtype
    assert torch.equal(folded_weight, (weight.double() * scale[:, None]).to(dtype))
    exact = bias.double() * scale + shift
    spacing = torch.finfo(dtype).eps * exact.abs() if dtype != torch.float64 else 1e-15 * (1 + exact.abs())
    assert bool(((folded_bias.double() - exact).abs() <= spacing).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_would_be_subnormal_become_zero_but_in_float16(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    exact = torch.tensor([tiny, -tiny, tiny * 0.75, -tiny / 2, 0.0, 1.0], dtype=torch.float64)
    small = [tiny * 0.75, -tiny / 2] if dtype is torch.float16 else [0.0, 0.0]
    assert round_like(exact, torch.empty(6, dtype=dtype)).double().tolist() == [tiny, -tiny, *small, 0.0, 1.0]


def test_a_new_bias_has_the_dtype_of_the_weight_and_an_old_one_its_own() -> None:
    weight, scale, shift = torch.randn(5, 3).bfloat16(), torch.ones(5).double(), torch.ones(5).double()
    square = weight[:3]
    for bias, dtype in ((None, torch.bfloat16), (torch.zeros(5), torch.float32)):
        assert fold_into_outputs(weight, bias, scale, shift)[1].dtype == dtype
        assert fold_into_inputs(weight, bias, scale[:3], shift[:3])[1].dtype == dtype
        assert add_identity(square, None if bias is None else bias[:3], scale[:3], shift[:3])[1].dtype == dtype


def test_memory_layout_is_kept() -> None:
    weight, (scale, shift) = torch.randn(3, 5).t(), torch.randn(2, 5).double()
    assert not weight.is_contiguous()
    assert fold_into_outputs(weight, None, scale, shift)[0].stride() == weight.stride()
    assert fold_into_inputs(weight, None, scale[:3], shift[:3])[0].stride() == weight.stride()
    assert fold_into_rows(weight, scale[:3], shift[:3]).stride() == weight.stride()
    kernel = torch.randn(3, 3, 3, 3).to(memory_format=torch.channels_last)
    assert add_identity(kernel, None, scale[:3], shift[:3])[0].stride() == kernel.stride()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_identity_is_added_to_the_tap_in_the_middle(size: int, groups: int) -> None:
    x, weight = torch.randn(2, 6, 8).double(), torch.randn(6, 6 // groups, size).double()
    scale, shift = torch.randn(2, 6).double()
    convolve = functools.partial(torch.nn.functional.conv1d, x, padding=size // 2, groups=groups)
    expected = convolve(weight) + scale[:, None] * x + shift[:, None]
    torch.testing.assert_close(convolve(*add_identity(weight, None, scale, shift)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("residual", [1.0, -2.0])
def test_scaling_of_an_input_that_is_added_goes_to_the_tap_in_the_middle(
    residual: float, groups: int, dtype: torch.dtype
) -> None:
    weight, bias = torch.randn(6, 6 // groups, 3).to(dtype), torch.randn(6).to(dtype)
    scale, shift = torch.randn(2, 6).double()
    folded, _ = fold_into_outputs(weight, bias, scale, shift, groups=groups, residual=residual)
    exact = scale[:, None, None] * weight.double()
    for channel in range(6):
        exact[channel, channel % (6 // groups), 1] += residual * (scale[channel] - 1.0)
    assert folded.dtype == dtype
    assert torch.equal(folded, exact.to(dtype))  # rounded once


def test_input_that_is_added_is_scaled_with_the_output() -> None:
    x, weight, bias = torch.randn(2, 6, 8).double(), torch.randn(6, 6, 5).double(), torch.randn(6).double()
    scale, shift = torch.randn(2, 6).double()
    convolve = functools.partial(torch.nn.functional.conv1d, x, padding=2)
    expected = scale[:, None] * (convolve(weight, bias) - 3.0 * x) + shift[:, None]
    found = convolve(*fold_into_outputs(weight, bias, scale, shift, residual=-3.0)) - 3.0 * x
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_weight_that_overlaps_itself_gets_memory_of_its_own() -> None:
    weight, (scale, shift) = torch.randn(1, 3).expand(5, 3), torch.randn(2, 5).double()
    folded, _ = fold_into_outputs(weight, None, scale, shift)
    torch.testing.assert_close(folded.double(), weight.double() * scale[:, None], rtol=1e-6, atol=0)


def test_rounding_takes_the_device_of_the_pattern() -> None:
    assert round_like(torch.ones(3).double(), torch.empty(3, device="meta")).device.type == "meta"


def test_arguments_are_left_alone() -> None:
    given = [torch.randn(5, 3), torch.randn(5), torch.randn(5).double(), torch.randn(5).double()]
    before = [tensor.clone() for tensor in given]
    fold_into_outputs(*given)
    assert_equal(given, before)


def test_a_transposed_weight_holds_its_outputs_second_and_has_one_group_unless_told() -> None:
    weight, (scale, shift) = torch.randn(3, 5, 2), torch.randn(2, 5).double()
    folded, bias = fold_into_outputs(weight, None, scale, shift, transposed=True)
    assert torch.equal(folded, (weight.double() * scale[:, None]).float())
    assert torch.equal(bias, shift.float())


@pytest.mark.parametrize("most", [1, 4, 9, 10, 1000])
def test_a_weight_of_several_blocks_is_multiplied_whole(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_bnfold.folding.algebra._BLOCK", most)
    weight, (scale, shift) = torch.randn(7, 3), torch.randn(2, 7).double()
    folded, _ = fold_into_outputs(weight, None, scale, shift)
    assert torch.equal(folded, (weight.double() * scale[:, None]).float())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_a_weight_without_numbers_is_none_to_multiply(shape: tuple[int, int]) -> None:
    weight, scale, shift = torch.randn(shape), torch.ones(shape[0]).double(), torch.ones(shape[0]).double()
    folded, bias = fold_into_outputs(weight, None, scale, shift)
    assert folded.shape == shape
    assert bias.tolist() == shift.tolist()


def test_folded_weights_ask_for_no_gradient() -> None:
    weight, scale, shift = torch.randn(5, 3, requires_grad=True), torch.ones(5).double(), torch.zeros(5).double()
    with torch.no_grad():
        folded = fold_into_outputs(weight, None, scale, shift), fold_into_inputs(weight, None, scale[:3], shift[:3])
        folded += (add_identity(weight[:3], None, scale[:3], shift[:3]),)
    assert not any(tensor.requires_grad for pair in folded for tensor in pair)


def test_a_row_of_an_embedding_is_mapped_as_its_output_is() -> None:
    weight, scale, shift = torch.randn(4, 3), torch.randn(3).double(), torch.randn(3).double()
    assert torch.equal(fold_into_rows(weight, scale, shift), (scale * weight.double() + shift).float())


@pytest.mark.parametrize(
    ("mean", "var", "weight", "bias", "expected"),
    [
        (0.0, 1.0, 0.5, 0.0, 1.0),
        (0.0, 1.0 / 4, 3.0, 0.0, 6.0),
        (3.0, 4.0, 1.0, 0.0, 2.5),  # (3 + 2) / 2
        (-3.0, 4.0, -2.0, 3.0, 1.0),  # (3 + 2) / (2 + 3)
        (6.0, 4.0, 1e-6, 0.0, 4.0),  # (6 + 2) / 2, however small what comes out is
        (30.0, 4.0, 2.0, 2.0, 8.0),  # (30 + 2) / (2 + 2)
        (5.0, 1.0, 0.0, 0.0, 1.0),
    ],
)
def test_rounding_errors_grow_by_the_scale_or_by_what_cancels_out(
    mean: float, var: float, weight: float, bias: float, expected: float
) -> None:
    channel = [torch.tensor([number], dtype=torch.float64) for number in (mean, var, weight, bias, 0.0)]
    assert float(rounding_gain(*channel)) == pytest.approx(expected, rel=1e-12)


def test_eps_lessens_how_rounding_errors_grow() -> None:
    channel = [torch.tensor([number], dtype=torch.float64) for number in (0.0, 1e-8, 1.0, 0.0, 0.25)]
    assert float(rounding_gain(*channel)) == pytest.approx(2.0, rel=1e-6)


def assert_equal(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, check_dtype=False)
