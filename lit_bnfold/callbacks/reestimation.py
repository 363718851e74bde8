"""The statistics of BatchNorms as true averages over training batches, in place of those that training left.

While a module trains, the statistics are a moving average over changing weights, and after an averaging of weights they
belong to no weights at all. Here they are measured once more with the weights as they are (as ``precise_bn`` of fvcore
does it; Wu and Johnson, 2021, "Rethinking Batch in BatchNorm", section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from lit_bnfold.callbacks.validation import run_training_steps
from lit_bnfold.folding import FoldingError
from lit_bnfold.folding.graph import argument
from lit_bnfold.folding.operations import RECURRENT
from lit_bnfold.layer_sync import SynchronisedBatchNorm

_SYNCHRONISED = (nn.SyncBatchNorm, SynchronisedBatchNorm)

_DROPOUTS = {
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
}

# Where these take the probability of their own dropout, if it is not given by name.
_ATTENTION = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean and spread of each channel over some elements.

    Attributes:
        count: Number of elements of a channel.
        mean: Their mean, (C,), float64 on the CPU.
        squares: The sum of their squared distances from it, (C,), float64 on the CPU.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """The moments of values (B, C, ...), computed in float32 or wider.

        Example:
            >>> Moments.of(torch.tensor([[1.0], [3.0]]))
            Moments(count=2, mean=tensor([2.], dtype=torch.float64), squares=tensor([2.], dtype=torch.float64))
        """
        count = values.numel() // values.shape[1]
        if count == 0:
            return cls.none(values.shape[1])
        values = values.detach().to(torch.promote_types(values.dtype, torch.float32))
        variance, mean = torch.var_mean(values, [0, *range(2, values.dim())], correction=0)
        return cls(count, mean.cpu().double(), variance.cpu().double() * count)

    @classmethod
    def none(cls, channels: int) -> Moments:
        """The moments of no elements at all."""
        return cls(0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both together (Chan, Golub and LeVeque, 1979, equation 2.1)."""
        count = self.count + other.count
        if count == 0:
            return self
        step = (other.mean - self.mean) * (other.count / count)
        squares = self.squares + other.squares + (other.mean - self.mean) * step * self.count
        return Moments(count, self.mean + step, squares)

    @property
    def variance(self) -> Tensor:
        """The unbiased variance, (C,): that is what torch keeps in ``running_var``."""
        return self.squares / (self.count - 1)


class Reestimation(Callback):
    """Measures the statistics of a module's BatchNorms over training batches, when a validation has ended.

    The module's own ``training_step`` is run. What a BatchNorm is given in all the batches counts as one large batch:
    mean and unbiased variance over all its elements, on all ranks. Its training flags are those of training, so every
    BatchNorm normalises by each batch, as the layers behind it are used to, and never by the statistics that are about
    to be replaced. A BatchNorm that is in eval mode then, because it is frozen, stays as it is. Dropout is off, as it
    is when the statistics are used: it would make the variances larger (Li et al., 2019, "Understanding the Disharmony
    between Dropout and Batch Normalization by Variance Shift").

    Args:
        pl_module: The module, with the training flags that it trains with.
        batches: How many batches of each rank to measure, or all if there are fewer.

    Attributes:
        batches: The number of batches; after a measurement, that of the batches measured on this rank.
        moments: What was measured, by the name of the BatchNorm, without those that no batch reached; None before.
    """

    def __init__(self, pl_module: LightningModule, batches: int) -> None:
        self._flags = _flags_of_training(pl_module)
        self.batches = batches
        self.moments: dict[str, Moments] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        self.measure(trainer, pl_module)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the training batches and measure; the module and the Trainer come out as they went in.

        Args:
            trainer: A Trainer in ``fit`` or in ``validate``; all ranks of it.
            pl_module: Its module.

        Raises:
            FoldingError: If there is no training batch, or ``training_step`` cannot be run on one.
        """
        observed = {name: Moments.none(len(module.running_mean)) for name, module in _batchnorms(pl_module).items()}
        with _synchronised_batchnorms(pl_module, observed):
            watching = _Observer(pl_module, observed)
            self.batches = run_training_steps(trainer, pl_module, self.batches, self._flags, watching)
        if _sum_over_ranks(trainer, torch.tensor([self.batches], dtype=torch.float64)).item() == 0:
            raise FoldingError(
                "There is no training batch left to re-estimate BatchNorm statistics from: the training data can be "
                "read only once. Set `reestimate_batches` to 0, or give a loader that can be read again."
            )
        pooled = {name: _over_ranks(trainer, moments) for name, moments in observed.items()}
        # Of a single element there is no variance.
        self.moments = {name: moments for name, moments in pooled.items() if moments.count > 1}

    def to_dict(self) -> dict[str, Any]:
        """What was done, for the report: the number of batches of this rank, and the names of the BatchNorms."""
        return {"batches": self.batches, "batchnorms": list(self.moments or ())}

    @contextmanager
    def applied(self, pl_module: LightningModule, keep: Callable[[], bool]) -> Iterator[None]:
        """Give the module the statistics that were measured, and put its own back in the end.

        Args:
            pl_module: The module.
            keep: Asked in the end; whether the measured statistics stay.
        """
        assert self.moments is not None
        batchnorms = _batchnorms(pl_module)
        statistics = {name: (batchnorms[name].running_mean, batchnorms[name].running_var) for name in self.moments}
        before = {name: [numbers.clone() for numbers in own] for name, own in statistics.items()}
        try:
            with torch.no_grad():
                for name, (mean, variance) in statistics.items():
                    mean.copy_(self.moments[name].mean)
                    variance.copy_(self.moments[name].variance)
            yield
        finally:
            if not keep():
                with torch.no_grad():
                    for name, own in statistics.items():
                        for tensor, numbers in zip(own, before[name], strict=True):
                            tensor.copy_(numbers)


def _flags_of_training(pl_module: LightningModule) -> dict[nn.Module, bool]:
    """The training flags as they are; for a module that is in eval mode those that its ``train`` would set."""
    flags = {module: module.training for module in pl_module.modules()}
    if pl_module.training:
        return flags
    try:
        pl_module.train()
        return {module: module.training for module in pl_module.modules()}
    finally:
        for module, flag in flags.items():
            module.training = flag


def _batchnorms(pl_module: LightningModule) -> dict[str, Any]:
    """The BatchNorms with statistics, by name."""
    modules: dict[str, Any] = dict(pl_module.named_modules())
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


class _Observer(TorchFunctionMode):
    """Sees what is normalised by the statistics of a batch, whatever a BatchNorm does around that; lets dropout rest.

    Args:
        pl_module: The module.
        observed: Where the moments are added up, by the name of the BatchNorm.
    """

    def __init__(self, pl_module: LightningModule, observed: dict[str, Moments]) -> None:
        super().__init__()
        self._observed = observed
        self._names = {
            id(module.running_mean): name
            for name, module in _batchnorms(pl_module).items()
            if not isinstance(module, _SYNCHRONISED)
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return argument(args, kwargs, 0, "input")
        if func is F.batch_norm:
            self._see(*args, **kwargs)
        if func in _ATTENTION or func in RECURRENT:
            args, kwargs = _without_dropout(func, args, kwargs)
        return func(*args, **kwargs)

    def _see(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        *_: Any,
        **__: Any,
    ) -> None:
        name = self._names.get(id(running_mean))
        if name is not None and training:
            self._observed[name] += Moments.of(input)


def _without_dropout(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of attention or of a recurrent layer, with a dropout of 0."""
    # In a recurrent layer it comes behind the first flag, which is that of the biases, and the number of layers.
    flags = (index for index, each in enumerate(args) if isinstance(each, bool))
    place = _ATTENTION[function] if function in _ATTENTION else next(flags, len(args)) + 2
    kwargs = {key: 0.0 if key in ("dropout_p", "dropout") else value for key, value in kwargs.items()}
    return args if place >= len(args) else (*args[:place], 0.0, *args[place + 1 :]), kwargs


@contextmanager
def _synchronised_batchnorms(pl_module: LightningModule, observed: dict[str, Moments]) -> Iterator[None]:
    """Observe the BatchNorms that normalise over several ranks: for that they do not call ``batch_norm``."""

    def see(name: str, batchnorm: Any, args: Any) -> None:
        if batchnorm.training:
            observed[name] += Moments.of(args[0])

    with ExitStack() as hooks:
        for name, module in _batchnorms(pl_module).items():
            if isinstance(module, _SYNCHRONISED):
                hooks.callback(module.register_forward_pre_hook(partial(see, name)).remove)
        yield


def _over_ranks(trainer: Trainer, moments: Moments) -> Moments:
    """The moments of what all ranks have seen."""
    if trainer.world_size == 1:
        return moments
    count = torch.tensor(moments.count, dtype=torch.float64)
    total = _sum_over_ranks(trainer, count)
    mean = _sum_over_ranks(trainer, moments.mean * count) / total.clamp(min=1)
    squares = _sum_over_ranks(trainer, moments.squares + count * (moments.mean - mean).square())
    return Moments(int(total), mean, squares)


def _sum_over_ranks(trainer: Trainer, numbers: Tensor) -> Tensor:
    """The sum of float64 numbers of any shape over all ranks, on the CPU."""
    if trainer.world_size == 1:
        return numbers
    summed: Tensor = trainer.strategy.reduce(numbers.to(trainer.strategy.root_device, copy=True), reduce_op="sum")
    return summed.cpu()
