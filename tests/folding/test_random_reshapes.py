"""Axes that are equally long by chance: what is folded on such an example is right where they are not."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_bnfold.folding import plan_folding

KINDS = ("permute", "permute", "reshape", "reshape", "reshape", "flatten", "unflatten", "narrow", "mean", "stack")
Step = tuple[str, Any]


class Path(nn.Module):
    """Steps between two modules; the sizes of a reshape are products of those of the images (N, C, H, W)."""

    def __init__(self, first: nn.Module, steps: list[Step], last: nn.Module, channels: int) -> None:
        super().__init__()
        self.first, self.steps, self.last, self.channels = first, steps, last, channels

    def forward(self, images: Tensor) -> Tensor:
        h = self.first(images.tanh())
        sizes = {"n": len(images), "c": self.channels, "h": images.shape[2], "w": images.shape[3]}
        for step in self.steps:
            h = take(h, step, sizes)
        return self.last(h).tanh()


def take(h: Tensor, step: Step, sizes: dict[str, int]) -> Tensor:
    kind, argument = step
    if kind == "permute":
        return h.permute(argument)
    if kind == "reshape":
        return h.reshape([math.prod(sizes[axis] for axis in axes) for axes in argument])
    if kind == "flatten":
        return h.flatten(*sorted(argument))
    if kind == "unflatten":
        axis, axes = argument
        return h.unflatten(axis, [math.prod(sizes[each] for each in part) for part in axes])
    if kind == "narrow":
        return h.narrow(argument, 0, min(h.shape[argument], 2))
    if kind == "mean":
        return h.mean(argument, keepdim=True)
    return torch.stack(h.unbind(argument[0]), argument[1])


def random_step(rng: random.Random, rank: int) -> Step:
    kind = rng.choice(KINDS)
    if kind == "permute":
        return kind, rng.sample(range(rank), rank)
    if kind == "reshape":
        return kind, in_groups(rng, "nchw", rng.randint(2, 5))
    axis = rng.randrange(rank)
    if kind == "unflatten":
        return kind, (axis, in_groups(rng, rng.sample("nchw", rng.randint(2, 3)), 2))
    return kind, (axis, rng.randrange(rank)) if kind in ("stack", "flatten") else axis


def in_groups(rng: random.Random, axes: Sequence[str], count: int) -> list[list[str]]:
    groups: list[list[str]] = [[] for _ in range(count)]
    for axis in rng.sample(axes, len(axes)):
        rng.choice(groups).append(axis)
    return groups


def into_a_layer(h: Tensor, channels: int) -> nn.Module | None:
    """A layer that can come behind the steps."""
    if h.shape[-1] == channels:
        return nn.Linear(channels, 3)
    is_image = h.dim() in (3, 4) and h.shape[1] == channels
    return (nn.Conv1d, nn.Conv2d)[h.dim() - 3](channels, 3, 1) if is_image else None


def into_a_batchnorm(h: Tensor, channels: int) -> nn.Module | None:
    """A BatchNorm that can."""
    if h.dim() not in (2, 3, 4) or h.shape[1] != channels:
        return None
    return nn.BatchNorm2d(channels) if h.dim() == 4 else nn.BatchNorm1d(channels)


def random_path(rng: random.Random, sizes: dict[str, int], ends: Callable[..., nn.Module | None]) -> Path | None:
    """Steps that can be taken with these sizes; None where they come to no end."""
    h, steps = torch.empty(list(sizes.values())), []
    for _ in range(rng.randint(2, 6)):
        step = random_step(rng, h.dim())
        try:
            h = take(h, step, sizes)
        except RuntimeError:  # A reshape to another number of elements.
            continue
        steps.append(step)
    channels = sizes["c"]
    last = ends(h, channels)
    if last is None:
        return None
    first = nn.Conv2d(channels, channels, 1) if ends is into_a_batchnorm else nn.BatchNorm2d(channels)
    return Path(first, steps, last, channels)


def tried_and_folded(seed: int, ends: Callable[..., nn.Module | None], paths: int, randomised: Any) -> tuple[int, int]:
    """Fold random paths, and compare them on images of other sizes."""
    rng, tried, folded = random.Random(seed), 0, 0
    while tried < paths:
        few = rng.sample((2, 3, 4, 6, 8), rng.choice((1, 2, 2, 3)))
        sizes = {axis: rng.choice(few) for axis in "nchw"}
        path = random_path(rng, sizes, ends)
        if path is None:
            continue
        tried += 1
        model = randomised(path).double().eval()
        plan = plan_folding(model, (torch.randn(list(sizes.values()), dtype=torch.float64),))
        if plan.folds:
            folded += 1
            compare(model, plan.apply(model), sizes, rng)
    return tried, folded


def compare(model: Path, folded: nn.Module, sizes: dict[str, int], rng: random.Random) -> None:
    for _ in range(8):
        other = [rng.randint(1, 8), sizes["c"], rng.randint(1, 8), rng.randint(1, 8)]
        images = torch.randn(other, dtype=torch.float64)
        with torch.no_grad():
            try:
                expected = model(images)
            except (RuntimeError, ValueError):  # These sizes are not for it.
                continue
            message = f"{model.steps}, folded with {sizes}, differs on {other}"
            torch.testing.assert_close(folded(images), expected, rtol=0, atol=1e-9, msg=message)


@pytest.mark.parametrize("ends", [into_a_batchnorm, into_a_layer])
def test_random_paths_over_equally_long_axes_give_the_same_on_other_sizes(ends: Any, randomised: Any) -> None:
    tried, folded = tried_and_folded(1, ends, 400, randomised)
    assert folded > tried / 10


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
@pytest.mark.parametrize("ends", [into_a_batchnorm, into_a_layer])
def test_thousands_of_random_paths_do(ends: Any, seed: int, randomised: Any) -> None:
    tried, folded = tried_and_folded(seed, ends, 5_000, randomised)
    assert folded > tried / 10
