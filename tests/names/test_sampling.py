"""Names out of a network, whichever version of it, however many, wherever."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import fold_batchnorm
from lit_bnfold.names.model import BatchNormMLP
from lit_bnfold.names.sampling import BLOCK, Sampling, gumbel_noise, in_float64, sample_names

STOI = {character: index for index, character in enumerate(".abcdefghijklmnopqrstuvwxyz")}


@pytest.fixture
def model(randomised: Callable[[nn.Module], nn.Module]) -> BatchNormMLP:
    """A network with logits as spread as those of a trained one."""
    model = BatchNormMLP()
    randomised(model)
    nn.init.constant_(model.net.norm3.weight, 1.0)
    # Names of about ten characters.
    nn.init.constant_(model.net.norm3.bias[0], 1.5)
    return model.eval()


def folded(model: BatchNormMLP) -> BatchNormMLP:
    folded = fold_batchnorm(model, (torch.randint(27, (64, 3)),))
    assert not any(isinstance(module, nn.BatchNorm1d) for module in folded.modules())
    return folded


class Fixed(nn.Module):
    """The same logits after every context."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, contexts: Tensor) -> Tensor:
        return self.logits.expand(len(contexts), -1)


# One seed, one list of names


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5, "prefix": "ma", "min_length": 5}], ids=["plain", "options"]
)
def test_a_network_and_its_folded_version_give_the_same_thousand_names(
    model: BatchNormMLP, seed: int, options: dict[str, Any]
) -> None:
    sampling = Sampling(number=1_000, seed=seed, **options)
    names = sample_names(model.net, STOI, 3, sampling)
    assert sample_names(folded(model).net, STOI, 3, sampling) == names
    assert len(names) == 1_000
    assert len(set(names)) > 300


def test_another_seed_gives_other_names(model: BatchNormMLP) -> None:
    first, second = (set(sample_names(model.net, STOI, 3, Sampling(number=50, seed=seed))) for seed in (1, 2))
    assert len(first & second) < 10
    noise = [next(gumbel_noise(seed, torch.tensor([index]), 27)) for seed, index in ((0, BLOCK), (1, 0))]
    assert not torch.equal(*noise)


def test_a_name_depends_on_its_number_and_not_on_how_many_there_are(model: BatchNormMLP) -> None:
    names = sample_names(model.net, STOI, 3, Sampling(number=2 * BLOCK + 5))
    for number in (1, 7, BLOCK, BLOCK + 1):
        assert sample_names(model.net, STOI, 3, Sampling(number=number)) == names[:number]
    indices = torch.tensor([BLOCK, 3, 2 * BLOCK + 4, 3, 0])
    assert sample_names(model.net, STOI, 3, Sampling(), indices) == [names[index] for index in indices.tolist()]


def test_the_names_are_those_of_the_notebooks_loop(model: BatchNormMLP) -> None:
    """One name at a time, in float32, as one would write it down."""
    itos = dict(enumerate(STOI))
    for index, name in enumerate(sample_names(model.net, STOI, 3, Sampling(number=20, temperature=0.8, prefix="jo"))):
        noises = gumbel_noise(42, torch.tensor([index]), 27)
        context, out = [0, 10, 15], "jo"
        while len(out) < 100:
            logits = model(torch.tensor([context]))[0]
            ix = int((logits / 0.8 + next(noises)[0]).argmax())
            if ix == 0:
                break
            context, out = [*context[1:], ix], out + itos[ix]
        assert name == out


# What is likely, and what is asked for


def test_characters_come_as_often_as_the_softmax_says() -> None:
    logits = torch.tensor([-0.5, 2.0, 0.0, 1.0])
    for temperature in (0.7, 1.0, 3.0):
        sampling = Sampling(number=20_000, temperature=temperature, min_length=1, max_length=2)
        names = sample_names(Fixed(*logits.tolist()), {".": 0, "a": 1, "b": 2, "c": 3}, 1, sampling)
        first = (logits[1:] / temperature).softmax(0)  # A name does not begin with its end.
        second = (logits / temperature).softmax(0)
        for number, character in enumerate("abc"):
            share = sum(name[0] == character for name in names) / 20_000
            assert share == pytest.approx(first[number].item(), abs=4 * 0.5 / 20_000**0.5)
        assert sum(len(name) == 1 for name in names) / 20_000 == pytest.approx(
            second[0].item(), abs=4 * 0.5 / 20_000**0.5
        )


def test_the_noise_is_standard_gumbel() -> None:
    noises = gumbel_noise(0, torch.arange(BLOCK), 27)
    noise = torch.stack([next(noises) for _ in range(20)])
    assert noise.dtype == torch.float64
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.02)
    assert abs(torch.corrcoef(noise[:2].flatten(1))[0, 1]) < 0.03


def test_a_temperature_near_zero_takes_the_likeliest_character(model: BatchNormMLP) -> None:
    names = sample_names(model.net, STOI, 3, Sampling(number=30, temperature=1e-9, max_length=12))
    assert len(set(names)) == 1


def test_a_name_does_not_end_before_its_least_length_and_is_cut_off_at_its_largest() -> None:
    stoi = {".": 0, "a": 1}
    ends, never_ends = Fixed(9.0, 0.0), Fixed(-99.0, 0.0)
    assert set(sample_names(ends, stoi, 1, Sampling(number=9, min_length=4))) >= {"aaaa"}
    assert min(map(len, sample_names(ends, stoi, 1, Sampling(number=99, min_length=4)))) == 4
    assert min(map(len, sample_names(ends, stoi, 1, Sampling(number=99, prefix="aa")))) == 2
    assert min(map(len, sample_names(ends, stoi, 1, Sampling(number=99)))) == 1
    assert sample_names(never_ends, stoi, 1, Sampling(number=2)) == ["a" * 100] * 2
    assert sample_names(never_ends, stoi, 1, Sampling(number=2, prefix="aa", max_length=2)) == ["aa"] * 2


def test_a_largest_length_only_cuts(model: BatchNormMLP) -> None:
    names = sample_names(model.net, STOI, 3, Sampling(number=50))
    assert sample_names(model.net, STOI, 3, Sampling(number=50, max_length=4)) == [name[:4] for name in names]


# What it works on and leaves alone


def test_sampling_leaves_the_network_and_the_random_numbers_as_they_were(model: BatchNormMLP) -> None:
    model.train()
    model.net.norm2.eval()
    flags = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    names = sample_names(model.net, STOI, 3, Sampling(number=10))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert sample_names(model.eval().net, STOI, 3, Sampling(number=10)) == names


def test_a_network_in_bfloat16_is_sampled_with_the_weights_it_has(model: BatchNormMLP) -> None:
    model.bfloat16()
    names = sample_names(model.net, STOI, 3, Sampling(number=200))
    assert model.net.linear1.weight.dtype == torch.bfloat16
    assert in_float64(model.net)(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.float64
    assert sample_names(model.float().net, STOI, 3, Sampling(number=200)) == names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_names(model: BatchNormMLP) -> None:
    names = sample_names(model.net, STOI, 3, Sampling(number=1_000))
    assert sample_names(model.cuda().net, STOI, 3, Sampling(number=1_000)) == names


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"^Expected finite logits"):
        sample_names(Fixed(0.0, value), {".": 0, "a": 1}, 1, Sampling())


# What makes no sense


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"number": 0}, ValueError, "number: expected at least 1 name, got 0; pass a positive number."),
        ({"number": 2.0}, TypeError, "number: expected an int, got 2.0; pass a whole number."),
        ({"seed": "x"}, TypeError, "seed: expected an int, got 'x'; pass a whole number."),
        ({"temperature": 0}, ValueError, "temperature: expected a finite number above 0, got 0; try 1."),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number above 0, got -1.0; try 1."),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number above 0, got nan; try 1."),
        ({"temperature": float("inf")}, ValueError, "temperature: expected a finite number above 0, got inf; try 1."),
        ({"min_length": 0}, ValueError, "min_length: expected at least 1 character, got 0."),
        (
            {"min_length": 101},
            ValueError,
            "max_length: expected at least the 101 characters that min_length and prefix ask for, got 100.",
        ),
        (
            {"prefix": "abc", "max_length": 2},
            ValueError,
            "max_length: expected at least the 3 characters that min_length and prefix ask for, got 2.",
        ),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Sampling(**options)


@pytest.mark.parametrize(("prefix", "unknown"), [("Zoë", ["Z", "ë"]), ("a.b", ["."]), (" a", [" "])])
def test_a_prefix_of_other_characters_is_refused(model: BatchNormMLP, prefix: str, unknown: list[str]) -> None:
    message = f"prefix: {prefix!r} has {unknown}, which no word has; use the 26 characters of the words."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sample_names(model.net, STOI, 3, Sampling(prefix=prefix))
