"""What can be known of a model before it runs: who owns which tensor, and what stands in the way of a fold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.nn.parameter import is_lazy

from lit_bnfold.folding.graph import BatchNorm, FoldingError, Layer, Obstacle

FOLDABLE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LayerKind:
    """A kind of weight layer that a BatchNorm can be folded into.

    Attributes:
        module: The class of its modules.
        function: What its forward calls, with the arguments ``arguments``.
        channel_axis: Axis of its input and its output that the channels lie on, counted from the end.
        in_channels: Name of the attribute with the number of input channels.
        out_channels: Name of the attribute with the number of output channels.
        transposed: Whether its weight begins with the input channels.
        arguments: Names of the first arguments of ``function``.
    """

    module: type[nn.Module]
    function: Callable[..., Tensor]
    channel_axis: int
    in_channels: str = "in_channels"
    out_channels: str = "out_channels"
    transposed: bool = False
    arguments: tuple[str, ...] = ("input", "weight", "bias")

    @property
    def has_bias(self) -> bool:
        """Whether a module of this kind can have a bias."""
        return "bias" in self.arguments


_TORCHS_FUNCTIONS = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)  # type: ignore[attr-defined]

_STATISTICS = {"weight", "bias", "running_mean", "running_var"}

LAYER_KINDS = (
    LayerKind(nn.Linear, F.linear, -1, "in_features", "out_features"),
    LayerKind(nn.Conv1d, F.conv1d, -2),
    LayerKind(nn.Conv2d, F.conv2d, -3),
    LayerKind(nn.Conv3d, F.conv3d, -4),
    LayerKind(nn.ConvTranspose1d, F.conv_transpose1d, -2, transposed=True),
    LayerKind(nn.ConvTranspose2d, F.conv_transpose2d, -3, transposed=True),
    LayerKind(nn.ConvTranspose3d, F.conv_transpose3d, -4, transposed=True),
    LayerKind(
        nn.Embedding, F.embedding, -1, "num_embeddings", "embedding_dim", transposed=True, arguments=("input", "weight")
    ),
)


def layer_kind(module: nn.Module | None) -> LayerKind | None:
    """The kind of weight layer that a module is; None if it is none."""
    return next((kind for kind in LAYER_KINDS if isinstance(module, kind.module)), None)


class Rest:
    """What is left of a BatchNorm whose forward does more than normalise: its class is a subclass of both."""


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a module counts as a BatchNorm, foldable or not."""
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in module.original_name
    return (isinstance(module, _BatchNorm) and not isinstance(module, Rest)) or is_frozen_batchnorm(module)


def is_frozen_batchnorm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm for inference alone, as detection models have them."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    tensors = own_tensors(module)
    is_named = "BatchNorm" in type(module).__name__ and not isinstance(module, _BatchNorm) and not module._modules
    lengths = {tensor.shape for tensor in tensors.values()}
    return is_named and tensors.keys() == _STATISTICS and len(lengths) == 1 and len(lengths.pop()) == 1


def num_features(module: nn.Module) -> int:
    """Number of channels of a BatchNorm, 0 if it does not tell."""
    mean = own_tensors(module).get("running_mean")
    return int(getattr(module, "num_features", 0 if mean is None else len(mean)))


class Census:
    """Counts a model's modules and tensors, and finds the obstacles that no run has to show.

    Args:
        model: The model, in any state.

    Raises:
        FoldingError: If a lazy module of it has not met its first batch.

    Attributes:
        names: Each module with its name, the first one in ``named_modules()``.
        hooked: The modules that carry a forward hook or a forward pre-hook.
        owned: The parameters and buffers that each module holds itself, by attribute.
        tensors: Each parameter and buffer with its first name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        everywhere = _global_forward_hooks or _global_forward_pre_hooks
        self.hooked = {m for m in self.names if everywhere or m._forward_hooks or m._forward_pre_hooks}
        self.owned = {module: own_tensors(module) for module in self.names}
        self.tensors: dict[Tensor, str] = {}
        self._owners: dict[Tensor, list[str]] = defaultdict(list)
        for module, name in self.names.items():
            for key, tensor in self.owned[module].items():
                self._owners[tensor].append(_join(name, key))
                self.tensors.setdefault(tensor, _join(name, key))
        self._refuse_lazy()
        seals = {root: seal for root in self.names if (seal := _seal(root)) is not None}
        self._sealed = {module: seal for root, seal in seals.items() for module in root.modules()}

    def _refuse_lazy(self) -> None:
        for tensor, name in self.tensors.items():
            if is_lazy(tensor):
                raise FoldingError(f"`{name}` is not initialised: run the model on one batch before folding it.")

    def layer(self, module: nn.Module, kind: LayerKind) -> Layer:
        """The facts about a weight layer."""
        return Layer(
            in_channels=getattr(module, kind.in_channels),
            out_channels=getattr(module, kind.out_channels),
            channel_axis=kind.channel_axis,
            kernel=tuple(getattr(module, "kernel_size", ())),
            takes_inputs=not kind.transposed,
            parameters=tuple(self.tensors[tensor] for tensor in self.owned[module].values()),
            obstacle=self._common_obstacle(module) or self._weight_obstacle(module),
        )

    def batchnorm(self, module: nn.Module) -> BatchNorm:
        """The facts about a BatchNorm."""
        return BatchNorm(
            num_features=num_features(module),
            only_normalises=only_normalises(module),
            parameters=tuple(self.tensors[tensor] for tensor in self.owned[module].values()),
            obstacle=self._common_obstacle(module) or _batchnorm_obstacle(module),
        )

    def _common_obstacle(self, module: nn.Module) -> Obstacle | None:
        if module in self._sealed:
            return self._sealed[module]
        if module in self.hooked:
            return "hook", f"`{self.names[module]}` carries a forward hook, which could see or change what would move"
        return None

    def _weight_obstacle(self, module: nn.Module) -> Obstacle | None:
        tensors, name = self.owned[module], self.names[module]
        for key in ("weight", "bias"):
            is_computed = getattr(module, key, None) is not None and module._parameters.get(key) is None
            if key not in tensors and (key == "weight" or is_computed):
                return "computed-weight", f"the {key} of `{name}` is computed anew at every call"
        if getattr(module, "max_norm", None) is not None:
            return "computed-weight", f"`{name}` limits the norm of its rows at every call"
        for key, tensor in tensors.items():
            if type(tensor) is not nn.Parameter or tensor.layout is not torch.strided or tensor.is_meta:
                return "unusual-weight", f"`{_join(name, key)}` is not an ordinary parameter"
            if tensor.dtype not in FOLDABLE_DTYPES:
                return "unusual-weight", f"`{_join(name, key)}` is of {tensor.dtype}, which cannot be scaled"
            others = [owner for owner in self._owners[tensor] if owner != _join(name, key)]
            if others:
                return "shared-parameter", f"`{_join(name, key)}` is also `{others[0]}`"
        return None


def _batchnorm_obstacle(module: nn.Module) -> Obstacle | None:
    tensors = own_tensors(module)
    if "running_mean" not in tensors or "running_var" not in tensors:
        return "no-statistics", "it keeps no running statistics and normalises by those of each batch"
    if getattr(module, "affine", False) and ("weight" not in tensors or "bias" not in tensors):
        return "computed-weight", "its weight is computed anew at every call"
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return "own-forward", "it is called in a way of its own, which would not notice that its class has changed"
    if any(is_batchnorm(part) for part in module.modules() if part is not module):
        return "own-forward", f"its class {type(module).__name__} holds other BatchNorms"
    if any(tensor.is_meta for tensor in tensors.values()):
        return "unusual-weight", "its statistics are on the meta device and hold no numbers"
    if tensors["running_mean"].shape != (num_features(module),):
        return "unusual-weight", "it has not as many channels as its attributes say"
    if not all(is_plain(tensor) for tensor in tensors.values()):
        return "unusual-weight", "its statistics or its weight are of a tensor subclass, which may mean other numbers"
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()) or bool(
        (tensors["running_var"] < 0).any()
    ):
        return "not-finite", "its statistics or its weight hold infinities, NaNs or negative variances"
    return None


def only_normalises(module: nn.Module) -> bool:
    """Whether a BatchNorm's forward does nothing besides: it is torch's own, or was compared with that."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    is_torchs = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return (is_torchs and "forward" not in vars(module)) or is_frozen_batchnorm(module)


def _seal(module: nn.Module) -> Obstacle | None:
    """Why nothing inside a module may be touched, if that is so."""
    if isinstance(module, torch.jit.ScriptModule):
        return "opaque", "it is part of a ScriptModule, whose structure is fixed"
    # An OptimizedModule keeps the module it compiled as `_orig_mod`. `Module.compile` leaves the module as it is, and
    # what it compiles checks by itself whether the module has changed since.
    if "_orig_mod" in module._modules:
        return "opaque", "it is part of a compiled module; fold the model before compiling it"
    return None


def is_plain(tensor: Tensor) -> bool:
    """Whether operations on a tensor are torch's own; a subclass may give them another meaning."""
    kind = type(tensor)
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    return function in _TORCHS_FUNCTIONS and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a module holds itself, by attribute."""
    tensors = {**module._parameters, **module._buffers}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


def _join(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key
