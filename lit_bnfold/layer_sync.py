"""BatchNorm over the examples of all processes, on any device: torch's ``SyncBatchNorm`` trains on GPUs alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch.plugins.layer_sync import LayerSync
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverProcesses(torch.autograd.Function):
    """The sum of every process's tensor. Each one's is in the losses of all, and so its gradient is a sum as well."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _all_reduced(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduced(gradient)


def _all_reduced(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


class SynchronisedBatchNorm(_BatchNorm):
    """Normalises by the examples of all processes while it trains, and as any other BatchNorm while it does not."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise a batch (N, C, ...), of which every process has a part, of whatever size.

        Raises:
            ValueError: If all parts together have a single number per channel.
        """
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        axes = [0, *range(2, input.dim())]
        x = input.to(torch.promote_types(input.dtype, torch.float32))  # (N, C, ...)
        count = x.new_full((1,), x.numel() / x.size(1))
        total, count = _sum_over_processes(torch.cat([x.sum(axes), count])).split([x.size(1), 1])
        if count <= 1:
            raise ValueError(f"Expected more than one number per channel over all processes, got {tuple(input.shape)}.")
        mean = total / count  # (C,)
        centred = x - _per_channel(mean, x)
        var = _sum_over_processes(centred.square().sum(axes)) / count  # (C,)
        if self.running_mean is not None:
            self._follow(mean, var * count / (count - 1))
        scale = (var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        y = centred * _per_channel(scale, x)
        return (y if self.bias is None else y + _per_channel(self.bias, x)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        """Take the moments (C,) of a batch into the running statistics."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)


class _SynchronisedBatchNorm1d(SynchronisedBatchNorm, nn.BatchNorm1d): ...


class _SynchronisedBatchNorm2d(SynchronisedBatchNorm, nn.BatchNorm2d): ...


class _SynchronisedBatchNorm3d(SynchronisedBatchNorm, nn.BatchNorm3d): ...


_SYNCHRONISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: _SynchronisedBatchNorm1d,
    nn.BatchNorm2d: _SynchronisedBatchNorm2d,
    nn.BatchNorm3d: _SynchronisedBatchNorm3d,
}
_ORIGINALS = {synchronised: original for original, synchronised in _SYNCHRONISED.items()}


def _sum_over_processes(tensor: Tensor) -> Tensor:
    return cast(Tensor, _SumOverProcesses.apply(tensor))  # type: ignore[no-untyped-call]


def _per_channel(numbers: Tensor, x: Tensor) -> Tensor:
    """Numbers (C,) in the shape in which they broadcast over x (N, C, ...)."""
    return numbers.view(-1, *[1] * (x.dim() - 2))


class AnyDeviceSyncBatchNorm(LayerSync):
    """Lets the BatchNorms of a module normalise by the examples of all processes while it trains.

    For a Trainer's ``plugins``, with a strategy of the ddp family. So the same training comes out of two processes as
    out of one with batches of twice the size, up to rounding. Lightning's own ``sync_batchnorm=True`` is faster, but
    needs GPUs. After training each BatchNorm is again of the class that it was.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(logger=False, accelerator="cpu", plugins=[AnyDeviceSyncBatchNorm()])
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Make every BatchNorm of torch's classes one that looks at all processes, in place.

        Args:
            model: The module that is trained.

        Returns:
            The same.
        """
        _change_classes(model.modules(), _SYNCHRONISED)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undo ``apply``.

        Args:
            model: The module that was trained.

        Returns:
            The same.
        """
        _change_classes(model.modules(), _ORIGINALS)
        return model


@contextmanager
def ordinary_batchnorms(model: nn.Module) -> Iterator[None]:
    """Have a module that ``AnyDeviceSyncBatchNorm`` was applied to be what it was before, for a while.

    Args:
        model: The module. A BatchNorm that is none any more in the end stays what it has become.
    """
    synchronised = [module for module in model.modules() if type(module) in _ORIGINALS]
    _change_classes(synchronised, _ORIGINALS)
    try:
        yield
    finally:
        _change_classes(synchronised, _SYNCHRONISED)


def _change_classes(modules: Iterable[nn.Module], classes: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    for module in modules:
        module.__class__ = classes.get(type(module), type(module))
