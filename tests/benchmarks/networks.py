"""Networks as large as well-known ones, in few lines; images (N, 3, H, W) in, logits (N, 1000) out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def conv(i: int, o: int, k: int, stride: int = 1, groups: int = 1, act: Callable[[], nn.Module] | None = None) -> list:
    """The layers of a convolution, its BatchNorm and perhaps an activation."""
    layers = [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return layers if act is None else [*layers, act()]


def logits(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000)]


class Residual(nn.Module):
    """Adds what some layers make of images to the images, or to a projection of them, and rectifies the sum."""

    def __init__(self, i: int, o: int, stride: int, body: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)
        self.shortcut = nn.Sequential(*(conv(i, o, 1, stride) if stride > 1 or i != o else []))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


def resnet(*blocks: nn.Module, width: int) -> nn.Module:
    stem = [*conv(3, 64, 7, 2, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, *logits(width)).eval()


def resnet18() -> nn.Module:
    """He et al., 2015."""
    blocks = []
    for i, o in pairwise([64, 64, 128, 256, 512]):
        for c, stride in ((i, 2 if i != o else 1), (o, 1)):
            blocks.append(Residual(c, o, stride, conv(c, o, 3, stride, act=nn.ReLU) + conv(o, o, 3)))
    return resnet(*blocks, width=512)


def resnet50() -> nn.Module:
    """He et al., 2015."""
    blocks, i = [], 64
    for m, count, first in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for stride in (first, *[1] * (count - 1)):
            body = conv(i, m, 1, act=nn.ReLU) + conv(m, m, 3, stride, act=nn.ReLU) + conv(m, 4 * m, 1)
            blocks.append(Residual(i, 4 * m, stride, body))
            i = 4 * m
    return resnet(*blocks, width=2048)


class Squeeze(nn.Module):
    """Weighs each channel by what a small network makes of the averages of all (Hu et al., 2017)."""

    def __init__(self, c: int, m: int, gate: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, m, 1), nn.ReLU(), nn.Conv2d(m, c, 1), gate())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.net(x)


class Inverted(nn.Module):
    """Expands to m channels, filters each by itself, and projects (Sandler et al., 2018)."""

    def __init__(
        self, i: int, m: int, o: int, k: int, stride: int, act: Callable[[], nn.Module], squeeze: nn.Module | None
    ) -> None:
        super().__init__()
        expansion = conv(i, m, 1, act=act) if m != i else []
        between = [] if squeeze is None else [squeeze]
        self.body = nn.Sequential(*expansion, *conv(m, m, k, stride, m, act), *between, *conv(m, o, 1))
        self.adds = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet_v2() -> nn.Module:
    """Sandler et al., 2018, with activations in place, as torchvision has them."""
    act = partial(nn.ReLU6, inplace=True)
    layers, i = conv(3, 32, 3, 2, act=act), 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for times, o, count, first in stages:
        for stride in (first, *[1] * (count - 1)):
            layers.append(Inverted(i, times * i, o, 3, stride, act, None))
            i = o
    return nn.Sequential(*layers, *conv(i, 1280, 1, act=act), *logits(1280)).eval()


def mobilenet_v3() -> nn.Module:
    """The large one of Howard et al., 2019."""
    layers, i = conv(3, 16, 3, 2, act=nn.Hardswish), 16
    for k, m, o, squeezes, act, stride in (
        (3, 16, 16, 0, nn.ReLU, 1), (3, 64, 24, 0, nn.ReLU, 2), (3, 72, 24, 0, nn.ReLU, 1), (5, 72, 40, 1, nn.ReLU, 2),
        (5, 120, 40, 1, nn.ReLU, 1), (5, 120, 40, 1, nn.ReLU, 1), (3, 240, 80, 0, nn.Hardswish, 2),
        (3, 200, 80, 0, nn.Hardswish, 1), (3, 184, 80, 0, nn.Hardswish, 1), (3, 184, 80, 0, nn.Hardswish, 1),
        (3, 480, 112, 1, nn.Hardswish, 1), (3, 672, 112, 1, nn.Hardswish, 1), (5, 672, 160, 1, nn.Hardswish, 2),
        (5, 960, 160, 1, nn.Hardswish, 1), (5, 960, 160, 1, nn.Hardswish, 1),
    ):  # fmt: skip
        layers.append(Inverted(i, m, o, k, stride, act, Squeeze(m, m // 4, nn.Hardsigmoid) if squeezes else None))
        i = o
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, *conv(i, 960, 1, act=nn.Hardswish), *head).eval()


def efficientnet_b0() -> nn.Module:
    """Tan and Le, 2019."""
    layers, i = conv(3, 32, 3, 2, act=nn.SiLU), 32
    for times, k, o, count, first in (
        (1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1), (6, 5, 192, 4, 2),
        (6, 3, 320, 1, 1),
    ):  # fmt: skip
        for stride in (first, *[1] * (count - 1)):
            m = times * i
            layers.append(Inverted(i, m, o, k, stride, nn.SiLU, Squeeze(m, i // 4, nn.Sigmoid)))
            i = o
    return nn.Sequential(*layers, *conv(i, 1280, 1, act=nn.SiLU), *logits(1280)).eval()


class LinearNorm(nn.Sequential):
    """Linear on tokens (N, T, i), normalised over all of them at once."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(nn.Linear(i, o, bias=False), nn.BatchNorm1d(o))

    def forward(self, input: Tensor) -> Tensor:
        y = self[0](input)
        return self[1](y.flatten(0, 1)).reshape_as(y)


class Attention(nn.Module):
    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, LinearNorm(c, 3 * c), LinearNorm(c, c)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, c / heads)
        return self.proj(F.hardswish(y.transpose(1, 2).reshape(n, t, c)))


class LeViT(nn.Module):
    """Four convolutions, then attention on 1 / 256 as many tokens, without the steps that make tokens fewer.

    Graham et al., 2021.
    """

    def __init__(self, width: int = 192, depth: int = 8) -> None:
        super().__init__()
        widths = [3, width // 8, width // 4, width // 2, width]
        self.stem = nn.Sequential(*(x for i, o in pairwise(widths) for x in conv(i, o, 3, 2, act=nn.Hardswish)))
        self.attention = nn.ModuleList(Attention(width, width // 32) for _ in range(depth))
        self.mlp = nn.ModuleList(
            nn.Sequential(LinearNorm(width, 2 * width), nn.Hardswish(), LinearNorm(2 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, 1000))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)  # (N, T, width)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(x.mean(1))


def levit() -> nn.Module:
    return LeViT().eval()


def randomised(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics as training might; fresh ones hardly do anything."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def batchnorms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def images(batch_size: int, size: int = 224) -> Tensor:
    return torch.randn(batch_size, 3, size, size)
