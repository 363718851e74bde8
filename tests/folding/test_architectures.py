"""Architectures from their papers, in a few lines each. How many BatchNorms each should fold is counted by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_bnfold.folding import fold_batchnorm, plan_folding


def conv(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(i, o, k, stride, (k - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(o), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """He et al., 2015: two convolutions, the second one added to a projected or plain shortcut."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = conv(i, o, 3, stride), conv(o, o)[:2]
        self.shortcut = conv(i, o, 1, stride)[:2] if stride > 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        y += self.shortcut(x)
        return F.relu_(y)


class PreActivation(nn.Module):
    """He et al., 2016: the first BatchNorm reads the sum of all before, the second one a convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(c), nn.BatchNorm2d(c)
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class Inverted(nn.Module):
    """Sandler et al., 2018: expand, filter each channel, project."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(c, 2 * c, 1), conv(2 * c, 2 * c, 3, groups=2 * c), conv(2 * c, c, 1)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class SiLUBatchNorm(nn.BatchNorm2d):
    """A BatchNorm that carries its activation, as in timm."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.act = nn.SiLU(inplace=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class SameConv(nn.Conv2d):
    """Pads as TensorFlow does, inside its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, 1, 0, 1, self.groups)


class EfficientNetBlock(nn.Module):
    """Tan and Le, 2019: an inverted bottleneck with squeeze and excitation."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(c, 2 * c, 1, bias=False), SiLUBatchNorm(2 * c)
        self.filter, self.norm2 = SameConv(2 * c, 2 * c, 2, groups=2 * c, bias=False), SiLUBatchNorm(2 * c)
        self.squeeze, self.excite = nn.Conv2d(2 * c, 2, 1), nn.Conv2d(2, 2 * c, 1)
        self.project, self.norm3 = nn.Conv2d(2 * c, c, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.filter(self.norm1(self.expand(x))))
        y = y * self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.norm3(self.project(y))


class DenseLayer(nn.Module):
    """Huang et al., 2017: the first BatchNorm reads what every later layer reads too."""

    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))], 1)


class Inception(nn.Module):
    """Szegedy et al., 2015, and one BatchNorm over the branches' concatenation."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.a, self.b = conv(i, 4, 1), nn.Sequential(conv(i, 3, 1), conv(3, 6))
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(i, 2, 1))
        self.c, self.d, self.norm = nn.Conv2d(i, 5, 1), nn.Conv2d(i, 7, 3, padding=1), nn.BatchNorm2d(12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.pool(x), self.norm(torch.cat([self.c(x), self.d(x)], 1))], 1)


class RepVGG(nn.Module):
    """Ding et al., 2021: two convolutions and an identity, each with a BatchNorm."""

    def __init__(self, c: int, groups: int = 1) -> None:
        super().__init__()
        self.dense, self.point = conv(c, c, 3, groups=groups)[:2], conv(c, c, 1, groups=groups)[:2]
        self.identity = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.identity(x))


class IdentityFirst(RepVGG):
    """The same sum in another order: the identity's BatchNorm runs before those that have to be folded before it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.identity(x) + self.dense(x) + self.point(x))


class RepViT(nn.Module):
    """Wang et al., 2024: two depthwise convolutions and their input, with a BatchNorm over the sum."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.dense, self.point = conv(c, c, 3, groups=c)[:2], nn.Conv2d(c, c, 1, groups=c)
        self.norm = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.dense(x) + self.point(x) + x))


class UNet(nn.Module):
    """Ronneberger et al., 2015, with grouped transposed convolutions on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom, self.out = conv(3, 8), conv(8, 16, 3, 2), conv(16, 4)
        self.up = nn.Sequential(nn.ConvTranspose2d(16, 8, 2, 2, groups=2), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        return self.out(torch.cat([y, self.up(self.bottom(y))], 1))


class LinearNorm(nn.Sequential):
    """Graham et al., 2021: Linear on tokens, normalised over all of them at once."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o))

    def forward(self, input: Tensor) -> Tensor:
        y = self[0](input)
        return self[1](y.flatten(0, 1)).reshape_as(y)


class LeViTAttention(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.qkv, self.proj = LinearNorm(c, 3 * c), LinearNorm(c, c)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(F.hardswish(y.transpose(1, 2).reshape(b, n, c)))


class ConformerConvolution(nn.Module):
    """Gulati et al., 2020: the BatchNorm follows the depthwise convolution."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.batchnorm = nn.LayerNorm(c), nn.BatchNorm1d(c)
        self.point1, self.point2 = nn.Conv1d(c, 2 * c, 1), nn.Conv1d(c, c, 1)
        self.depth = nn.Conv1d(c, c, 3, padding=1, groups=c)

    def forward(self, x: Tensor) -> Tensor:
        y = F.glu(self.point1(self.norm(x).transpose(1, 2)), 1)
        return x + self.point2(F.silu(self.batchnorm(self.depth(y)))).transpose(1, 2)


class SharedBlocks(nn.Module):
    """Arik and Pfister, 2019: a Linear shared by all steps, with a BatchNorm of its own at each."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.shared, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(steps))
        self.own = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return sum(own(norm(self.shared(x)).relu()) for norm, own in zip(self.norms, self.own, strict=True))


IMAGE = (2, 4, 8, 8)

# Each with the shape of its input, the folds in each direction, and the number of BatchNorms that stay.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int], int]] = {
    # The stem, two in each of two blocks, and the projection of the second.
    "ResNet": (lambda: nn.Sequential(conv(4, 8), Residual(8, 8), Residual(8, 12, 2)), IMAGE, {"backward": 6}, 0),
    # In each block the second one; the first ones and the last read sums that go on elsewhere.
    "pre-activation ResNet": (
        lambda: nn.Sequential(PreActivation(4), PreActivation(4), nn.BatchNorm2d(4), nn.ReLU()),
        IMAGE, {"backward": 2}, 3,
    ),
    "MobileNetV2": (lambda: nn.Sequential(conv(4, 4), Inverted(4), Inverted(4)), IMAGE, {"backward": 7}, 0),
    "EfficientNet block": (lambda: EfficientNetBlock(4), IMAGE, {"backward": 3}, 0),
    "DenseNet": (lambda: nn.Sequential(DenseLayer(4, 3), DenseLayer(7, 3)), IMAGE, {"backward": 2}, 2),
    # One in each of four convolutions, and the one over the concatenation of two more.
    "Inception": (lambda: Inception(4), IMAGE, {"backward": 5}, 0),
    "RepVGG": (lambda: nn.Sequential(RepVGG(4), RepVGG(4, 2)), IMAGE, {"backward": 4, "parallel": 2}, 0),
    "RepVGG, identity first": (lambda: IdentityFirst(4), IMAGE, {"backward": 2, "parallel": 1}, 0),
    # That of the convolution, and the one over the sum into both and the centre tap of one of them.
    "RepViT": (lambda: nn.Sequential(RepViT(4), RepViT(4)), IMAGE, {"backward": 4}, 0),
    "U-Net": (UNet, (2, 3, 8, 8), {"backward": 4}, 0),
    "PointNet": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 9, 1), nn.BatchNorm1d(9),
            nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(9, 5), nn.BatchNorm1d(5),
        ),
        (2, 3, 20), {"backward": 3}, 0,
    ),
    "tabular MLP that begins with BatchNorm": (
        lambda: nn.Sequential(
            nn.BatchNorm1d(6), nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)
        ),
        (5, 6), {"forward": 2}, 0,
    ),
    # A layer with three BatchNorms behind it keeps them; the first one goes forward into it, as all its calls read it.
    "TabNet-like shared blocks": (lambda: SharedBlocks(3), (5, 6), {"forward": 1, "backward": 3}, 3),
    "LeViT-like attention": (
        lambda: nn.Sequential(LeViTAttention(4), LeViTAttention(4)), (2, 5, 4), {"backward": 4}, 0
    ),
    "conformer convolution": (lambda: ConformerConvolution(6), (2, 7, 6), {"backward": 1}, 0),
    "convolutions without padding": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.BatchNorm2d(6),
                              nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)),
        IMAGE, {"forward": 2}, 0,
    ),
    "padding that adds no zeros": (
        lambda: nn.Sequential(*(
            layer
            for mode in ("reflect", "replicate", "circular", "zeros")
            for layer in (nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode), nn.ReLU())
        )),
        IMAGE, {"forward": 3}, 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture_folds_as_counted_by_hand(name: str, judge: Any, randomised: Any) -> None:
    build, shape, folds, kept = ARCHITECTURES[name]
    model, x = randomised(build()).double().eval(), torch.randn(shape, dtype=torch.float64)
    plan = plan_folding(model, (x,))
    assert Counter(fold.direction for fold in plan.folds) == folds, str(plan)
    assert len(plan.kept) == kept, str(plan)
    judge(model, x, folds={f.batchnorm: f.layers for f in plan.folds}, kept={k.batchnorm: k.code for k in plan.kept})


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "times"), [(torch.float32, 4.0), (torch.bfloat16, 1.5)])
def test_architecture_loses_no_digits(name: str, dtype: torch.dtype, times: float, randomised: Any) -> None:
    build, shape, _, _ = ARCHITECTURES[name]
    model, x = randomised(build()).to(dtype).eval(), torch.randn(64, *shape[1:], dtype=dtype)
    with torch.no_grad():
        folded = fold_batchnorm(model, (x,))(x).double()
        plain, exact = model(x).double(), model.double()(x.double())
    allowed = times * (plain - exact).square().mean().sqrt()
    assert (folded - exact).square().mean().sqrt() <= allowed + torch.finfo(dtype).eps * exact.abs().max()
