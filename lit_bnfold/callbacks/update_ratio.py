"""How large the updates of the parameters are, measured against the parameters."""

from __future__ import annotations

from math import isfinite, log10

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_bnfold.callbacks.monitor import StepMonitor, check_every_n_steps, steps_to_written

# A float32 has eight digits: what is smaller is a single element that was rounded the other way.
_NOISE = 1e-8


class UpdateRatioMonitor(StepMonitor):
    """Writes how much each step changes each parameter: log10 of the update's spread over the parameter's.

    For each parameter that is trained, ``update_ratio/<name>`` is log10(std(after - before) / std(after)), from the
    parameter before the step and after it. The update is what really happened, with whatever the optimizer adds to the
    gradient: momentum, weight decay, clipping, a scaled or a skipped step. For plain SGD it is the notebook's
    lr * grad.std / data.std. About -3 is a healthy value; far below it a parameter hardly learns, far above it the
    training is rough.

    A parameter is left out of a step that does not change it, or changes all its elements alike, because there the
    logarithm is minus infinity, or changes it by less than 1e-8 of its spread: a bias in front of a BatchNorm, whose
    gradient is rounding noise, has no curve. So is one that is frozen, or that has a single element and no spread.

    It works with any optimizer and with several, with manual optimisation and accumulated gradients, and writes to
    every logger of the Trainer, on rank 0. On the steps that are written it needs memory for two more copies of the
    parameters, one of them for the time of the step, and reads its result from the device once. On the others it does
    nothing but count.

    Args:
        every_n_steps: Steps between two that are written; None, which YAML calls null, for the Trainer's
            ``log_every_n_steps``. The first one is step ``every_n_steps - 1``, counted from 0, on which Lightning
            writes as well.

    Raises:
        TypeError: If that is no int.
        ValueError: If it is below 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[UpdateRatioMonitor()], log_every_n_steps=50, logger=False, accelerator="cpu")
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None:
            check_every_n_steps(every_n_steps)
        super().__init__()
        self.every_n_steps = every_n_steps
        self._before: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def _steps_left(self, trainer: Trainer, step: int) -> int:
        return steps_to_written(trainer, step, self.every_n_steps)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = {
            name: parameter
            for name, parameter in pl_module.named_parameters()
            if parameter.requires_grad and not is_lazy(parameter) and parameter.numel() > 1
        }
        if parameters:
            # A multiplication by one is a copy; `_foreach_clone` is younger than the oldest torch that is supported.
            with torch.no_grad():
                copies = torch._foreach_mul(list(parameters.values()), 1)
            self._before = {name: (p, copy) for (name, p), copy in zip(parameters.items(), copies, strict=True)}

    def _write(self, trainer: Trainer, step: int) -> None:
        ratios = _log10_ratios(self._before)
        if ratios:
            for logger in trainer.loggers:
                logger.log_metrics({f"update_ratio/{name}": ratio for name, ratio in ratios.items()}, step=step)

    def _end(self) -> None:
        self._before = {}


def _log10_ratios(changed: dict[str, tuple[nn.Parameter, Tensor]]) -> dict[str, float]:
    """Return log10(std(after - before) / std(after)) by name, where it is finite."""
    # A module may exchange a parameter's data for data of another shape.
    pairs = {name: pair for name, pair in changed.items() if pair[0].shape == pair[1].shape}
    if not pairs:
        return {}
    after = [parameter.detach() for parameter, _ in pairs.values()]
    updates = torch._foreach_sub(after, [before for _, before in pairs.values()])
    # A loop: to centre all of them with foreach operations, or by segments of one vector, takes two to twelve times as
    # long, and the mean of squares minus the square of the mean loses all digits of a BatchNorm's weights near one.
    spreads = [_spread(tensor).to(after[0].device) for tensor in (*updates, *after)]
    numbers = torch.stack(spreads).tolist()
    ratios = {}
    for name, update, data in zip(pairs, numbers[: len(pairs)], numbers[len(pairs) :], strict=True):
        if update > _NOISE * data and data > 0 and isfinite(update) and isfinite(data):
            ratios[name] = log10(update) - log10(data)
    return ratios


def _spread(tensor: Tensor) -> Tensor:
    """The standard deviation of all elements, in float32 or wider: half precision would round it to three digits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).std()
