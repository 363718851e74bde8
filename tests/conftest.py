"""Fixtures of every test: one thread, one seed, and BatchNorms whose statistics are worth folding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def randomised() -> Callable[[nn.Module], nn.Module]:
    """Gives every BatchNorm of a model random statistics; a fresh one is nearly the identity and proves nothing."""
    return randomise_batchnorms


def randomise_batchnorms(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model
