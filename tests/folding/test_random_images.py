"""Random networks of convolutions: whatever is folded, the outputs stay, on other inputs and other batch sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_bnfold.folding import plan_folding

CHANNELS = 4
Step = tuple[str, int, int, int]

KINDS = (
    "conv", "conv", "norm", "norm", "norm", "norm", "same_norm", "same_conv", "transposed", "relu", "relu_",
    "silu_norm", "computed_conv",
    "add", "add_", "spread", "spread", "sum_", "sum_",
    "cat", "half", "pool", "upsample", "reflect", "mean", "permute", "linear",
    "identity_branch", "residual", "keep", "move", "move",
)  # fmt: skip


IDENTITY_BRANCHES: tuple[Callable[..., Tensor], ...] = (
    lambda conv, norm, x: conv(x) + norm(x),
    lambda conv, norm, x: conv(x).add_(norm(x)),
    lambda conv, norm, x: (0 + norm(x)).add_(conv(x)),
    lambda conv, norm, x: conv(x) - norm(x),
    lambda conv, norm, x: (norm(x) - conv(x)).neg(),
    lambda conv, norm, x: norm(x).sub_(conv(x)),
    lambda conv, norm, x: sum([norm(x), x, conv(x)]),
)


RESIDUALS: tuple[Callable[..., Tensor], ...] = (
    lambda conv, point, norm, x: norm(conv(x) + x),
    lambda conv, point, norm, x: norm(x - conv(x)),
    lambda conv, point, norm, x: norm(conv(x) - x),
    lambda conv, point, norm, x: norm(point(x) + conv(x) + x),
    lambda conv, point, norm, x: norm(x - (point(x) - conv(x))),
    lambda conv, point, norm, x: norm(sum([conv(x), x, point(x), x])),
    lambda conv, point, norm, x: norm(conv(x) + point(x.cos())),
    lambda conv, point, norm, x: norm((h := point(x)) + conv(h)),
    lambda conv, point, norm, x: norm(norm(conv(x) + x) + x),
)


MOVES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: F.channel_shuffle(x, 2),
    lambda x: F.pixel_shuffle(x.repeat_interleave(4, 1), 2)[..., ::2, 1::2],
    lambda x: F.pixel_unshuffle(x.repeat_interleave(2, 2).repeat_interleave(2, -1), 2)[:, ::4],
    lambda x: F.pad(x, (0, 0, 0, 1), mode="replicate").unfold(2, 2, 1).mean(-1),
    lambda x: F.unfold(x, 1).unflatten(2, x.shape[2:]),
    lambda x: torch.cat([x[:, CHANNELS:], x.rot90(1, (2, 3)).rot90(-1, (2, 3))], 1),
)


SPREADS: tuple[Callable[..., Tensor], ...] = (
    lambda x, y: x + y.mean((2, 3), keepdim=True),
    lambda x, y: y[:1] - x,
    lambda x, y: x + y[:, :, :1],
    lambda x, y: x - y[0, :, :, -1:],
    lambda x, y: x.clone().add_(y.mean(3, keepdim=True)),
    lambda x, y: x[:, :1] + y,
)


class SiLUBatchNorm(nn.BatchNorm2d):
    """A BatchNorm that does more."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


class Program(nn.Module):
    """Steps over a list of images; each reads one or two of them, by their place from the end, and adds one.

    Args:
        steps: The kind of each step, which images it reads, and a number that decides its details.
    """

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = steps
        self.shared_conv = nn.Conv2d(CHANNELS, CHANNELS, 1)
        self.shared_norm = nn.BatchNorm2d(CHANNELS)
        self.parts = nn.ModuleDict({f"s{number}": self.build(*step) for number, step in enumerate(steps)})

    def build(self, kind: str, first: int, second: int, detail: int) -> nn.Module:
        groups, bias, size = (1, 2, CHANNELS)[detail % 3], detail % 2 == 0, (1, 3)[detail // 3 % 2]
        mode = ("zeros", "reflect", "replicate", "circular")[detail // 6 % 4]
        if kind == "conv":
            return nn.Conv2d(CHANNELS, CHANNELS, size, 1, size // 2, groups=groups, bias=bias, padding_mode=mode)
        if kind == "transposed":
            return nn.ConvTranspose2d(CHANNELS, CHANNELS, size, 1, size // 2, groups=groups, bias=bias)
        if kind == "norm":
            return nn.BatchNorm2d(CHANNELS, affine=bias)
        if kind == "silu_norm":
            return SiLUBatchNorm(CHANNELS)
        if kind == "linear":
            return nn.Linear(CHANNELS, CHANNELS, bias=bias)
        if kind == "identity_branch":
            conv = nn.Conv2d(CHANNELS, CHANNELS, size, 1, size // 2, groups=groups, bias=bias)
            return nn.ModuleList([conv, nn.BatchNorm2d(CHANNELS)])
        if kind == "residual":
            conv = nn.Conv2d(CHANNELS, CHANNELS, size, 1, size // 2, groups=groups, bias=bias, padding_mode=mode)
            return nn.ModuleList([conv, nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS)])
        if kind == "computed_conv":
            conv = nn.Conv2d(CHANNELS, CHANNELS, size, 1, size // 2, bias=bias, padding_mode=mode)
            return nn.utils.parametrizations.weight_norm(conv) if detail % 2 else nn.utils.spectral_norm(conv)
        return nn.Identity()

    def forward(self, image: Tensor) -> list[Tensor]:
        images, kept = [image], []
        for number, (kind, first, second, detail) in enumerate(self.steps):
            part: Any = self.parts[f"s{number}"]
            x, y = images[-1 - first % len(images)], images[-1 - second % len(images)]
            if kind in ("conv", "transposed", "norm", "silu_norm", "computed_conv"):
                x = part(x)
            elif kind == "same_conv":
                x = self.shared_conv(x)
            elif kind == "same_norm":
                x = self.shared_norm(x)
            elif kind == "relu":
                x = F.relu(x)
            elif kind == "relu_":
                x = F.relu_(x + 0.0 if x is image else x)
            elif kind == "add":
                x = x + y if detail % 2 else x - 2 * y
            elif kind == "spread":
                x = SPREADS[detail % len(SPREADS)](x, y)
            elif kind == "add_":
                x = x.clone().add_(y)
            elif kind == "sum_":
                # Into what a layer has just made, or into memory of its own.
                is_made = x is images[-1] and number > 0 and self.steps[number - 1][0] in ("conv", "transposed")
                x = x if is_made else x.clone()
                x += y
            elif kind == "cat":
                x = torch.cat([x[:, : CHANNELS // 2], y[:, CHANNELS // 2 :]], 1)
            elif kind == "half":
                left, right = x.chunk(2, detail % 2 + 1)
                x = torch.cat([right, left], detail % 2 + 1)
            elif kind == "pool":
                x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=detail % 2 == 0)
            elif kind == "upsample":
                x = F.avg_pool2d(F.interpolate(x, scale_factor=2, mode=("nearest", "bilinear")[detail % 2]), 2)
            elif kind == "reflect":
                x = F.pad(x, (1, 0, 0, 1), mode="reflect")[..., :-1, 1:]
            elif kind == "mean":
                x = x.mean((2, 3), keepdim=True).expand(x.shape).clone()  # A later write needs memory of its own.
            elif kind == "permute":
                x = x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
            elif kind == "linear":
                x = part(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            elif kind == "move":
                x = MOVES[detail % len(MOVES)](x)
            elif kind == "identity_branch":
                x = IDENTITY_BRANCHES[detail % len(IDENTITY_BRANCHES)](*part, x)
            elif kind == "residual":
                x = RESIDUALS[detail % len(RESIDUALS)](*part, x)
            elif kind == "keep":
                kept.append(x)
            images.append(x)
        return [*kept, images[-1]]


steps = st.lists(
    st.tuples(st.sampled_from(KINDS), st.sampled_from((0, 0, 0, 0, 1, 2)), st.integers(0, 3), st.integers(0, 23)),
    min_size=2,
    max_size=9,
)


def check(program: list[Step], randomised: Any) -> int:
    torch.manual_seed(0)
    model = randomised(Program(program)).double().eval()
    plan = plan_folding(model, (torch.randn(2, CHANNELS, 4, 5, dtype=torch.float64),))
    # The trial of a plan is the last line of defence: it should never have to find what the rules have missed.
    assert not {kept.code for kept in plan.kept} & {"unexplained", "structure-read"}
    names = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert sorted([fold.batchnorm for fold in plan.folds] + [kept.batchnorm for kept in plan.kept]) == sorted(names)
    rounded = copy.deepcopy(model).float()
    narrow = plan_folding(rounded, (torch.randn(2, CHANNELS, 4, 5),))
    assert [fold.batchnorm for fold in narrow.folds] == [fold.batchnorm for fold in plan.folds], str(narrow)
    folded = plan.apply(model)
    for batch_size, scale in ((1, 1.0), (2, -3.0), (5, 0.1)):
        image = scale * torch.randn(batch_size, CHANNELS, 4, 5, dtype=torch.float64)
        if batch_size == 2:  # Laid out otherwise.
            image = image.mT.contiguous().mT
        with torch.no_grad():
            for ours, theirs in zip(folded(image.clone()), model(image.clone()), strict=True):
                size = max(1.0, float(theirs.abs().max()))
                torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-10 * size)
    return len(plan.folds)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(program=steps)
def test_folding_a_random_network_of_convolutions_changes_nothing(program: list[Step], randomised: Any) -> None:
    check(program, randomised)


@pytest.mark.long
def test_folding_thousands_of_random_networks_of_convolutions_changes_nothing(randomised: Any) -> None:
    folds = 0

    @settings(max_examples=4000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(program=steps)
    def run(program: list[Step]) -> None:
        nonlocal folds
        folds += check(program, randomised)

    run()
    print(f"{folds} folds in 4000 networks")
