"""Weights that are computed anew at every call: torch's parametrizations and their older form, a forward pre-hook.

What such a layer computes from its own parameters alone is the same at every call in eval mode. So it can be baked: the
weight of this moment becomes an ordinary parameter.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

Undo = Callable[[], None]


def is_computing_hook(hook: Any) -> bool:
    """Whether a forward pre-hook does nothing but compute a tensor of its module from others that the module owns."""
    return type(hook) in (WeightNorm, SpectralNorm) or (
        isinstance(hook, prune.BasePruningMethod)
        and type(hook).__call__ is prune.BasePruningMethod.__call__
        and type(hook).apply_mask is prune.BasePruningMethod.apply_mask
    )


def computed_tensors(module: nn.Module) -> dict[str, Any]:
    """The tensors that a module computes anew at every call.

    Args:
        module: Any module.

    Returns:
        By attribute, who computes it: a ``ParametrizationList`` or a forward pre-hook.

    Example:
        >>> list(computed_tensors(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))))
        ['weight']
    """
    computed: dict[str, Any] = {}
    if parametrize.is_parametrized(module):
        computed.update(module._modules["parametrizations"].items())  # type: ignore[union-attr, operator]
    hooks: list[Any] = [hook for hook in module._forward_pre_hooks.values() if is_computing_hook(hook)]
    for hook in hooks:
        computed[hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name] = hook
    return computed


def bake(module: nn.Module) -> Undo:
    """Make ordinary parameters of the tensors that a module computes, with the numbers they have in eval mode.

    Args:
        module: The module; it is changed in place.

    Returns:
        A function that gives the module back what it had, to the bit.

    Example:
        >>> layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> _ = bake(layer)
        >>> sorted(layer.state_dict())
        ['bias', 'weight']
    """
    kind, before = type(module), dict(vars(module))
    data = {parameter: parameter.data for parameter in module.parameters()}
    # What is removed below is removed from copies, so that a way back is to put the originals in their place.
    vars(module).update({key: copy.copy(value) for key, value in before.items() if isinstance(value, dict)})

    def undo() -> None:
        module.__class__ = kind
        vars(module).clear()
        vars(module).update(before)
        for parameter, numbers in data.items():
            parameter.data = numbers

    try:
        baked = {key: _bake_tensor(module, key, source) for key, source in computed_tensors(module).items()}
        if parametrize.is_parametrized(module):
            # Removing them one by one would take the properties off a class that copies of the module share.
            module.__class__ = parametrize.type_before_parametrizations(module)
            del module._modules["parametrizations"]
        _forget_load_hooks(module)
        module._parameters = {**baked, **module._parameters}
    except BaseException:
        undo()
        raise
    return undo


def is_steady(module: nn.Module) -> bool:
    """Whether a module computes the same tensors twice in a row, whatever random numbers Python draws in between.

    Args:
        module: A module that computes tensors at every call.
    """
    found = []
    for _ in range(2):
        undo = bake(module)
        try:
            found.append({key: tensor for key, tensor in module._parameters.items() if tensor is not None})
        finally:
            undo()
        random.random()
    first, second = found
    return all(torch.equal(first[key], second[key]) for key in first)


def _bake_tensor(module: nn.Module, key: str, source: Any) -> nn.Parameter:
    if isinstance(source, nn.Module):
        numbers, originals = _in_eval_mode(source), list(source.parameters())
    else:
        originals = [tensor for name, tensor in module.named_parameters(recurse=False) if name.startswith(f"{key}_")]
        if isinstance(source, WeightNorm):
            remove_weight_norm(module, key)
        elif isinstance(source, SpectralNorm):
            remove_spectral_norm(module, key)
        else:
            prune.remove(module, key)
        numbers = module._parameters.pop(key).detach()  # type: ignore[union-attr]
    return nn.Parameter(numbers.clone(), requires_grad=any(tensor.requires_grad for tensor in originals))


def _forget_load_hooks(module: nn.Module) -> None:
    """Take off what torch leaves on a module: hooks that look for the tensors of a norm in a state dict."""
    hooks = module._load_state_dict_pre_hooks
    for key, wrapped in list(hooks.items()):
        hook = getattr(wrapped, "hook", None)
        is_of_weight_norm = getattr(hook, "__qualname__", "").startswith("weight_norm.<locals>")
        if is_of_weight_norm or isinstance(hook, SpectralNormLoadStateDictPreHook):
            del hooks[key]


def _in_eval_mode(parametrization: nn.Module) -> Tensor:
    """What a parametrization computes in eval mode; its flags and its buffers come out as they went in."""
    flags = {part: part.training for part in parametrization.modules()}
    buffers = {buffer: buffer.clone() for buffer in parametrization.buffers()}
    with torch.no_grad():
        try:
            parametrization.eval()
            # What it gives may be one of the buffers that are put back.
            numbers: Tensor = parametrization().clone()
            return numbers
        finally:
            for part, flag in flags.items():
                part.training = flag
            for buffer, before in buffers.items():
                # A write that changes nothing would still keep a backward pass that is pending from using it.
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
