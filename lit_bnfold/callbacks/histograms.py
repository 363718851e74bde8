"""How activations, gradients and weights are distributed, and how many tanh units are saturated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric

from lit_bnfold.callbacks.monitor import StepMonitor, check_every_n_steps
from lit_bnfold.callbacks.tensorboard import tensorboard_loggers

# Beyond it the slope of tanh is below 0.06: hardly any gradient passes. The threshold is the notebook's.
_SATURATED = 0.97

# Elements of a tensor that a histogram is made of. It is a prime, so that the elements taken from a larger tensor do
# not all lie in the same few of its rows or columns.
_SAMPLE = 65_521

# TensorBoard draws 30.
_BINS = 64

# Their output holds the same numbers as their input.
_REARRANGING = (nn.Identity, nn.Flatten, nn.Unflatten)


class HistogramMonitor(StepMonitor):
    """Writes histograms of activations, gradients and weights to TensorBoard, and the share of saturated tanh units.

    On a step that is chosen, ``activations/<module>`` shows what each leaf module returned when it was first called,
    ``gradients/<parameter>`` the gradients right before the optimizer's step, before they are clipped,
    ``weights/<parameter>`` the parameters after it, and the number ``saturated/<module>``, from 0 to 1, the share of an
    ``nn.Tanh`` module's outputs beyond 0.97 or below -0.97. Hooks are on for the chosen steps only, and what they see
    they leave as it is.

    A histogram is made of at most 65,521 elements, evenly spread over the tensor, and of the finite ones alone; a
    complex number counts as two. Modules that are compiled or scripted show no activations, because a hook would have
    them compiled again, and optimizers that are stepped behind Lightning's back no gradients. The notebook's network
    takes about 15 ms a time.

    Args:
        every_n_steps: Steps between two that are chosen. Steps 1, 10, 100 and so on below that are chosen as well,
            because most happens at the beginning. Step 1 is written under 0, as Lightning does.
        modules: The names of the module classes to show activations of, such as ``["Tanh"]``; a subclass goes by the
            names of its bases too. By default all leaf modules.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``every_n_steps`` is below 1.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = HistogramMonitor(every_n_steps=1_000, modules=["Linear", "Tanh"])
        >>> trainer = Trainer(callbacks=[monitor], logger=False, accelerator="cpu")
    """

    def __init__(self, every_n_steps: int = 10_000, modules: Sequence[str] | None = None) -> None:
        check_every_n_steps(every_n_steps)
        if isinstance(modules, str):
            raise TypeError(f"modules: expected a list of class names, got {modules!r}; pass [{modules!r}].")
        super().__init__()
        self.every_n_steps = every_n_steps
        self.modules = None if modules is None else list(modules)
        self._module: LightningModule | None = None
        self._handles: list[RemovableHandle] = []
        self._histograms: dict[str, Tensor] = {}
        self._scalars: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if nothing can be written, or none of the classes is there.

        Raises:
            ValueError: If no leaf module is of a class in ``modules``.
        """
        if not tensorboard_loggers(trainer):
            rank_zero_warn("HistogramMonitor writes nothing: it needs a TensorBoardLogger, and this Trainer has none.")
        if self.modules and not any(True for _ in self._chosen_modules(pl_module)):
            raise ValueError(
                f"modules: expected class names of leaf modules of {type(pl_module).__name__}, got {self.modules}; "
                f"there are {sorted({type(module).__name__ for _, module in _leaf_modules(pl_module)})}."
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Take the gradients of this optimizer's parameters; those of others are not complete."""
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in pl_module.named_parameters():
            if id(parameter) in owned and parameter.grad is not None:
                self._take(f"gradients/{name}", parameter.grad)

    def _steps_left(self, trainer: Trainer, step: int) -> int:
        if not tensorboard_loggers(trainer):
            return self.every_n_steps
        done = step + 1
        power = 1
        while power < done:
            power *= 10
        steps_left = -done % self.every_n_steps
        return min(steps_left, power - done) if power < self.every_n_steps else steps_left

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module = pl_module
        for name, module in self._chosen_modules(pl_module):
            self._handles.append(module.register_forward_hook(partial(self._see, name)))

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if f"activations/{name}" in self._histograms:
            return
        tensors = [each for each in tree_leaves(output) if isinstance(each, Tensor)]
        for number, tensor in enumerate(tensors):
            self._take(f"activations/{name}/{number}" if number else f"activations/{name}", tensor)
        if isinstance(module, nn.Tanh) and isinstance(output, Tensor) and output.numel() > 0:
            with torch.no_grad():
                self._scalars[f"saturated/{name}"] = (output.abs() > _SATURATED).float().mean()

    def _take(self, tag: str, tensor: Tensor) -> None:
        if tensor.layout == torch.strided and not tensor.is_nested and tensor.numel() > 1:
            # At once: what follows may change the tensor in place.
            self._histograms[tag] = _sample(tensor)

    def _write(self, trainer: Trainer, step: int) -> None:
        assert self._module is not None
        for name, parameter in self._module.named_parameters():
            if not is_lazy(parameter):
                self._take(f"weights/{name}", parameter)
        histograms = {tag: values[values.isfinite()] for tag, values in _on_cpu(self._histograms).items()}
        for logger in tensorboard_loggers(trainer):
            for tag, values in histograms.items():
                if values.numel() > 0:
                    logger.experiment.add_histogram(tag, values.numpy(), step, bins=_BINS)
            for tag, share in self._scalars.items():
                logger.experiment.add_scalar(tag, share.item(), step)

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._histograms, self._scalars, self._module = [], {}, {}, None

    def _chosen_modules(self, pl_module: LightningModule) -> Iterator[tuple[str, nn.Module]]:
        for name, module in _leaf_modules(pl_module):
            if self.modules is None or any(each.__name__ in self.modules for each in type(module).__mro__):
                yield name, module


def _leaf_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules without children that a hook can watch, by name; one with two names comes once."""
    opaque = tuple(
        f"{name}." if name else ""
        for name, each in module.named_modules()
        if isinstance(each, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule, Metric))
        or each._compiled_call_impl is not None
    )
    for name, each in module.named_modules():
        is_leaf = name and not any(True for _ in each.children())
        if is_leaf and not isinstance(each, _REARRANGING) and not f"{name}.".startswith(opaque):
            yield name, each


@torch.no_grad()
def _sample(tensor: Tensor) -> Tensor:
    """Return at most `_SAMPLE` elements of a tensor, (N,), as a float32 copy."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat = tensor.detach().reshape(-1)
    count = flat.numel()
    if count > _SAMPLE:
        flat = flat[torch.arange(_SAMPLE, device=flat.device) * count // _SAMPLE]
    return flat.to(torch.float32, copy=True)


def _on_cpu(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring the samples to the CPU, with one transfer for all of a device instead of one for each."""
    on_cpu: dict[str, Tensor] = {}
    for device in {sample.device for sample in samples.values()}:
        there = {tag: sample for tag, sample in samples.items() if sample.device == device}
        together = torch.cat(list(there.values())).cpu()
        on_cpu.update(zip(there, together.split([sample.numel() for sample in there.values()]), strict=True))
    return on_cpu
