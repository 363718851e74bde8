"""What can be known of a model before it runs: who owns which tensor, and what stands in the way of a fold."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.nn.parameter import is_lazy

from lit_bnfold.folding.algebra import rounding_gain, squares_around
from lit_bnfold.folding.computed import computed_tensors, is_computing_hook
from lit_bnfold.folding.graph import BatchNorm, FoldingError, Layer, Obstacle
from lit_bnfold.folding.kinds import (
    KIND_OF_FUNCTION,
    NORMALISING,
    BatchNormKind,
    Kinds,
    Normalisation,
    own_tensors,
)
from lit_bnfold.folding.tensors import is_plain

_WITHOUT_FLOAT64 = ("mps",)
_ON_APPLE = "is on an Apple GPU, which has no float64: fold the model on the CPU"

_FOLDABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class _Gains(NamedTuple):
    """How many times larger rounding errors are behind a BatchNorm, and where a layer takes over a residual."""

    largest: float
    of_residual: float


_NO_GAINS = _Gains(1.0, 1.0)


class Census:
    """Counts a model's modules and tensors, and finds the obstacles that no run has to show.

    Args:
        model: The model, in any state.
        kinds: What counts as a layer and as a BatchNorm.

    Raises:
        FoldingError: If a lazy module of it has not met its first batch.

    Attributes:
        names: Each module with its name, the first one in ``named_modules()``.
        hooked: The modules that carry a hook, other than one that computes their weight.
        owned: The parameters and buffers that each module holds itself, by attribute.
        tensors: Each parameter and buffer with its first name.
        layer_kinds: The kind of each weight layer.
        batchnorm_kinds: The kind of each BatchNorm, foldable or not.
        computed: For each layer that computes tensors of its own anew at every call, their attributes, and who does it:
            the ``ParametrizationList`` or a forward pre-hook.
    """

    def __init__(self, model: nn.Module, kinds: Kinds) -> None:
        self.kinds = kinds
        self.names = {module: name for name, module in model.named_modules()}
        everywhere = _global_forward_hooks or _global_forward_pre_hooks
        everywhere = everywhere or _global_backward_hooks or _global_backward_pre_hooks
        self.hooked = {module for module in self.names if everywhere or _is_hooked(module)}
        self.owned = {module: own_tensors(module) for module in self.names}
        self.tensors: dict[Tensor, str] = {}
        self._owners: dict[Tensor, list[tuple[str, str]]] = defaultdict(list)
        for module, name in self.names.items():
            for key, tensor in self.owned[module].items():
                self._owners[tensor].append((name, key))
                self.tensors.setdefault(tensor, _join(name, key))
        self._refuse_lazy()
        self.layer_kinds = {module: layer for module in self.names if (layer := kinds.layer(module)) is not None}
        self.batchnorm_kinds = {module: kind for module in self.names if (kind := kinds.batchnorm(module)) is not None}
        self.computed = {module: computed for module in self.layer_kinds if (computed := computed_tensors(module))}
        seals = {root: seal for root in self.names if (seal := _seal(root)) is not None}
        self._sealed = {module: seal for root, seal in seals.items() for module in root.modules()}

    def _refuse_lazy(self) -> None:
        for tensor, name in self.tensors.items():
            if is_lazy(tensor):
                raise FoldingError(f"`{name}` is not initialised: run the model on one batch before folding it.")

    def layer(self, module: nn.Module, function: str | None = None) -> Layer:
        """The facts about a weight layer, or about a BatchNorm as one.

        Args:
            module: The layer.
            function: Name of the function that it calls, if it is a layer by that alone.
        """
        if module not in self.layer_kinds and (found := self.kinds.layer(module, function)) is not None:
            self.layer_kinds[module] = found
        kind = self.layer_kinds[module]
        computed = self.computed.get(module, {})
        # Who else reads the statistics of a BatchNorm normalises by them, and should know of its new weight and bias.
        is_whole = kind is NORMALISING
        plain = [tensor for key, tensor in self.owned[module].items() if is_whole or key in ("weight", "bias")]
        obstacle = self._common_obstacle(module) or self._weight_obstacle(module)
        if is_whole:
            obstacle = obstacle or self.batchnorms[module].obstacle or self._as_layer_obstacle(module)
        weight = self.owned[module].get("weight")
        in_channels, out_channels = (0, 0) if obstacle is not None else kind.channels(module)
        return Layer(
            function=kind.function.__name__ if kind is KIND_OF_FUNCTION.get(kind.function) else None,
            in_channels=in_channels,
            out_channels=out_channels,
            channel_axis=kind.channel_axis,
            kernel=tuple(getattr(module, "kernel_size", ()) if weight is None else weight.shape[2:]),
            takes_inputs=not kind.transposed,
            parameters=tuple(self.tensors[tensor] for tensor in plain),
            computed=tuple(computed),
            originals=tuple(self.tensors[tensor] for tensor in self._originals(module)),
            obstacle=obstacle,
        )

    @cached_property
    def batchnorms(self) -> dict[nn.Module, BatchNorm]:
        """The facts about each BatchNorm."""
        obstacles = {
            module: self._common_obstacle(module) or self._batchnorm_obstacle(module, kind)
            for module, kind in self.batchnorm_kinds.items()
        }
        gains = self._gains([module for module, obstacle in obstacles.items() if obstacle is None])
        obstacles |= {module: _numbers_obstacle(gain.largest) for module, gain in gains.items()}
        return {
            module: BatchNorm(
                num_features=self.kinds.num_features(module),
                channel_axis=self.batchnorm_kinds[module].channel_axis,
                parameters=tuple(self.tensors[tensor] for tensor in self.owned[module].values()),
                gain=gains.get(module, _NO_GAINS).largest,
                obstacle=obstacle,
                residual_gain=gains.get(module, _NO_GAINS).of_residual,
            )
            for module, obstacle in obstacles.items()
        }

    def _gains(self, modules: Sequence[nn.Module]) -> dict[nn.Module, _Gains]:
        """How much larger rounding errors are behind each BatchNorm; NaN where its numbers are none.

        All BatchNorms of a device are looked at in one go, since they are many and small.
        """
        gains: dict[nn.Module, _Gains] = {}
        by_device: dict[torch.device, list[nn.Module]] = defaultdict(list)
        for module in modules:
            by_device[next(iter(self.owned[module].values())).device].append(module)
        for together in by_device.values():
            numbers = [_filled(_numbers(self.batchnorm_kinds[module], module)) for module in together]
            columns = torch.stack([torch.cat(several).detach().double() for several in zip(*numbers, strict=True)])
            is_sound = columns.isfinite().all(0) & (columns[1] >= 0)  # of (5, channels of all)
            of_channels = torch.where(is_sound, rounding_gain(*columns), math.nan)
            lengths = [len(mean) for mean, *_ in numbers]
            largest = torch.stack(
                [gain.amax() if len(gain) else gain.new_ones(()) for gain in of_channels.split(lengths)]
            )
            mean, var, weight, _, eps = columns
            owner = torch.repeat_interleave(torch.tensor(lengths, device=columns.device))
            squares = columns.new_zeros(2, len(lengths)).index_add_(1, owner, squares_around(mean, var, weight, eps))
            of_residual = (squares[0] / squares[1]).sqrt()
            found = (_Gains(*both) for both in torch.stack([largest, of_residual], 1).tolist())
            gains.update(zip(together, found, strict=True))
        return gains

    def _common_obstacle(self, module: nn.Module) -> Obstacle | None:
        if module in self._sealed:
            return self._sealed[module]
        if module in self.hooked:
            return "hook", f"`{self.names[module]}` carries a hook, which could see or change what would move"
        return None

    def _originals(self, module: nn.Module) -> list[Tensor]:
        """What the tensors that a layer computes can be computed from: everything it owns that is not plainly used."""
        computed = self.computed.get(module, {})
        if not computed:
            return []
        sources = [part for source in computed.values() if isinstance(source, nn.Module) for part in source.modules()]
        tensors = [tensor for part in sources for tensor in self.owned[part].values()]
        return tensors + [tensor for key, tensor in self.owned[module].items() if key not in ("weight", "bias")]

    def _weight_obstacle(self, module: nn.Module) -> Obstacle | None:
        name, computed = self.names[module], self.computed.get(module, {})
        for key in {"weight", "bias"} - self.owned[module].keys() - computed.keys():
            is_missing = key == "weight" and self.layer_kinds[module] is not NORMALISING
            if is_missing and key not in vars(module) and not hasattr(type(module), key):
                return "unusual-weight", f"`{name}` has no tensor that is called `weight`"
            if is_missing or (module._parameters.get(key) is None and getattr(module, key, None) is not None):
                return "computed-weight", f"the {key} of `{name}` is computed anew at every call"
        if computed.keys() - {"weight", "bias"}:
            return "computed-weight", f"`{name}` computes more than its weight and its bias at every call"
        if self.layer_kinds[module].function is F.embedding and getattr(module, "max_norm", None) is not None:
            return "computed-weight", f"`{name}` limits the norm of its rows at every call"
        used = {tensor for key, tensor in self.owned[module].items() if key in ("weight", "bias")}
        for tensor in (*used, *self._originals(module)):
            called = self.tensors[tensor]
            is_parameter = type(tensor) is nn.Parameter or (tensor not in used and type(tensor) is Tensor)
            if not is_parameter or tensor.layout is not torch.strided or tensor.is_meta:
                return "unusual-weight", f"`{called}` is not an ordinary parameter"
            if tensor.device.type in _WITHOUT_FLOAT64:
                return "unusual-weight", f"`{called}` {_ON_APPLE}"
            if tensor in used and tensor.dtype not in _FOLDABLE_DTYPES:
                return "unusual-weight", f"`{called}` is of {tensor.dtype}, which cannot be scaled"
            if len(self._owners[tensor]) > 1:
                # A module around the layer can reach its weight in any case, and keeps the same one.
                around = () if computed else ("", *names_around(name))
                owners = [_join(*owner) for owner in self._owners[tensor] if owner[0] == name or owner[0] not in around]
                if len(owners) > 1:
                    return "shared-parameter", f"`{owners[0]}` is also `{owners[1]}`"
        return None

    def _as_layer_obstacle(self, module: nn.Module) -> Obstacle | None:
        if not self.kinds.only_normalises(module) and len(self.owned[module].keys() & {"weight", "bias"}) < 2:
            name = self.names[module]
            return (
                "own-forward",
                f"`{name}` has no weight and no bias, and a forward of its own that might not use them",
            )
        return None

    def _batchnorm_obstacle(self, module: nn.Module, kind: BatchNormKind) -> Obstacle | None:
        mean, var = kind.statistics(module)
        if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
            return "no-statistics", "it keeps no statistics, and normalises by those of each batch or by others"
        own, numbers = set(self.owned[module].values()), kind.numbers(module)
        used = [tensor for tensor in numbers if isinstance(tensor, Tensor)]
        is_short = getattr(module, "affine", False) and (numbers.weight is None or numbers.bias is None)
        if is_short or not own.issuperset(used) or not isinstance(numbers.eps, (int, float)):
            return "computed-weight", "its weight or its statistics are computed anew at every call"
        if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
            return "own-forward", "its `forward` or its `__call__` is replaced, and would go on normalising"
        if any(vars(base).get("__slots__") for base in type(module).__mro__):
            return (
                "own-forward",
                f"its class {type(module).__name__} has `__slots__`, and nothing can take its place",
            )
        if any(part in self.batchnorm_kinds for part in module.modules() if part is not module):
            return "own-forward", f"its class {type(module).__name__} holds other BatchNorms"
        if any(tensor.is_meta for tensor in used):
            return "unusual-weight", "its statistics are on the meta device and hold no numbers"
        if any(tensor.device.type in _WITHOUT_FLOAT64 for tensor in used):
            return "unusual-weight", f"it {_ON_APPLE}"
        shape = (self.kinds.num_features(module),)
        if any(tensor.shape != shape for tensor in used):
            return "unusual-weight", "it has another number of channels than its attributes say"
        if not all(is_plain(tensor) for tensor in self.owned[module].values()):
            return (
                "unusual-weight",
                "its statistics or its weight are of a tensor subclass, which may mean other numbers",
            )
        return None


def _numbers(kind: BatchNormKind, module: nn.Module) -> Normalisation:
    # Which eps it is where no attribute tells, the run will show; here, torch's will do.
    return kind.numbers(module, None if hasattr(module, kind.eps) else 1e-5)


def _numbers_obstacle(gain: float) -> Obstacle | None:
    if math.isnan(gain):
        return "not-finite", "its statistics or its weight hold infinities, NaNs or negative variances"
    return None


def _filled(numbers: Normalisation) -> tuple[Tensor, ...]:
    """The numbers of a BatchNorm with C channels, each (C,)."""
    mean, var, weight, bias, eps = numbers
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    return mean, var, weight, bias, torch.full_like(mean, eps, dtype=torch.float64)


def _is_hooked(module: nn.Module) -> bool:
    """Whether a module carries a hook that sees or changes what goes in or out of it, or the gradients of that."""
    hooks = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or not all(map(is_computing_hook, module._forward_pre_hooks.values()))


def _seal(module: nn.Module) -> Obstacle | None:
    """Why nothing inside a module may be touched, if that is so."""
    if isinstance(module, torch.jit.ScriptModule):
        return "opaque", "it is part of a ScriptModule, whose structure is fixed"
    # An OptimizedModule keeps the module it compiled as `_orig_mod`. `Module.compile` leaves the module as it is, and
    # what it compiles checks by itself whether the module has changed since.
    if "_orig_mod" in module._modules:
        return "opaque", "it is part of a compiled module; fold the model before compiling it"
    return None


def names_around(name: str) -> list[str]:
    """The names of the modules around one, outermost first, without the model itself.

    Args:
        name: Its name.

    Example:
        >>> names_around("net.block.conv")
        ['net', 'net.block']
    """
    return [name[:end] for end, letter in enumerate(name) if letter == "."]


def _join(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key
