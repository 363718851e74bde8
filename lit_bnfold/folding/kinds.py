"""The layers and the BatchNorms that folding knows, and the table with which a project adds its own for one call."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_STATISTICS = {"weight", "bias", "running_mean", "running_var"}


def check_types(*arguments: tuple[str, Any, Any, str]) -> None:
    """Refuse an argument of another type than it has to be.

    Args:
        *arguments: Of each its name, what was given, the type or types, and words for what is expected.

    Raises:
        TypeError: If one is of another type.
    """
    for name, given, expected, words in arguments:
        if not isinstance(given, expected):
            raise TypeError(f"{name}: expected {words}, got {type(given).__name__}.")


def _check_module_class(module: Any) -> None:
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        raise TypeError(f"module: expected a class of modules such as nn.Linear, got {module!r}.")


@dataclass(frozen=True)
class LayerKind:
    """A kind of weight layer that a BatchNorm can be folded into.

    Its ``weight`` begins with the output channels, followed by the input channels (divided by ``groups``, if the module
    has that attribute) and the kernel; or with the input channels, if it is ``transposed``.

    Attributes:
        module: The class of its modules.
        function: What its forward calls with the module's own weight and bias, with the arguments ``arguments``; one of
            torch's functions, since the run does not see others.
        channel_axis: Axis of its input and its output that the channels lie on; counted from the end if negative.
        in_channels: Name of the attribute with the number of input channels; where it is missing, the weight tells.
        out_channels: Name of the attribute with the number of output channels, likewise.
        transposed: Whether its weight begins with the input channels.
        arguments: Names of the first arguments of ``function``.

    Raises:
        TypeError: If ``module`` is no class of modules.
        ValueError: If ``function`` takes no bias, which a fold needs, and does not look up rows as an Embedding does.

    Example:
        >>> class Projection(nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.size, self.weight = size, nn.Parameter(torch.randn(size, size))
        ...         self.register_parameter("bias", None)
        ...
        ...     def forward(self, x):
        ...         return F.linear(x, self.weight, self.bias)
        >>> kind = LayerKind(Projection, F.linear, channel_axis=-1, in_channels="size", out_channels="size")
    """

    module: type[nn.Module]
    function: Callable[..., Tensor]
    channel_axis: int
    in_channels: str = "in_channels"
    out_channels: str = "out_channels"
    transposed: bool = False
    arguments: tuple[str, ...] = ("input", "weight", "bias")

    def __post_init__(self) -> None:
        _check_module_class(self.module)
        if not self.has_bias and self.function is not F.embedding:
            raise ValueError(f"arguments: expected a 'bias' among those of {self.function}, got {self.arguments}.")

    @property
    def has_bias(self) -> bool:
        """Whether a module of this kind can have a bias; an Embedding adds one to its rows instead."""
        return "bias" in self.arguments

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call of its function, by name.

        Args:
            args: Positional arguments.
            kwargs: Keyword arguments.
        """
        return dict(zip(self.arguments, args, strict=False)) | {**kwargs}

    def channels(self, module: nn.Module) -> tuple[int, int]:
        """Numbers of input and of output channels of a module of this kind.

        Args:
            module: The module.
        """
        if self is NORMALISING:
            number = KINDS.num_features(module)
            return number, number
        named = getattr(module, self.in_channels, None), getattr(module, self.out_channels, None)
        if isinstance(named[0], int) and isinstance(named[1], int):
            return named[0], named[1]
        weight = module.weight
        assert isinstance(weight, Tensor)
        first, second = weight.shape[0], weight.shape[1] * self.groups(module)
        return (first, second) if self.transposed else (second, first)

    def groups(self, module: nn.Module) -> int:
        """Number of groups of channels that do not see each other in a module of this kind; 0 if it does not tell.

        Args:
            module: The module.
        """
        if self.channel_axis == -1:
            return 1
        groups = getattr(module, "groups", 1)
        return groups if isinstance(groups, int) else 0

    def runs_torchs_forward(self, module: nn.Module) -> bool:
        """Whether a module of this kind has the forward that torch gives it, which uses a bias once there is one.

        Args:
            module: The module.
        """
        forwards: Collection[Any] = _FORWARDS if self is NORMALISING else ()
        if self in LAYER_KINDS:
            forwards = [self.module.forward]
        is_replaced = vars(module).keys() & {"forward", "_conv_forward"}
        # The forward of a convolution leaves it to this method what becomes of its weight and its bias.
        has_torchs = getattr(type(module), "_conv_forward", None) is getattr(self.module, "_conv_forward", None)
        return not is_replaced and has_torchs and type(module).forward in forwards


class Normalisation(NamedTuple):
    """The numbers of a BatchNorm: mean, variance, weight and bias, (C,) each, and eps."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def each(self, function: Callable[[Tensor], Tensor]) -> Normalisation:
        """The same with a function of every tensor in its place."""
        weight, bias = (None if tensor is None else function(tensor) for tensor in (self.weight, self.bias))
        return Normalisation(function(self.mean), function(self.var), weight, bias, self.eps)

    def of(self, input: Tensor) -> Tensor:
        """What torch makes with these numbers of an input (N, C, ...), in eval mode."""
        return F.batch_norm(input, self.mean, self.var, self.weight, self.bias, training=False, eps=self.eps)


@dataclass(frozen=True)
class BatchNormKind:
    """A kind of module that does in eval mode what a BatchNorm does, by whatever operations.

    What such a module makes of the example is compared with torch's own ``batch_norm`` when it is recorded; if it does
    something else it stays.

    Attributes:
        module: The class of its modules.
        running_mean: Name of the attribute with the mean of each channel, (C,).
        running_var: Name of the attribute with the variance of each channel, (C,).
        weight: Name of the attribute with the factor of each channel, (C,); it may be missing or None.
        bias: Name of the attribute with the offset of each channel, (C,); it may be missing or None.
        eps: Name of the attribute with what is added to the variance; where it is missing, the usual values are tried.
        channel_axis: Axis of its input that the channels lie on; counted from the end if negative.

    Raises:
        TypeError: If ``module`` is no class of modules.

    Example:
        >>> class Standardise(nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.register_buffer("mean", torch.randn(size))
        ...         self.register_buffer("variance", torch.rand(size))
        ...
        ...     def forward(self, x):
        ...         return (x - self.mean) / self.variance.sqrt()
        >>> kind = BatchNormKind(Standardise, running_mean="mean", running_var="variance", channel_axis=-1)
    """

    module: type[nn.Module]
    running_mean: str = "running_mean"
    running_var: str = "running_var"
    weight: str = "weight"
    bias: str = "bias"
    eps: str = "eps"
    channel_axis: int = 1

    def __post_init__(self) -> None:
        _check_module_class(self.module)

    @property
    def calls_batch_norm(self) -> bool:
        """Whether it normalises by torch's ``batch_norm``, and may do more besides, as torch's own modules do."""
        return issubclass(self.module, _BatchNorm)

    def statistics(self, module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """Mean and variance of each channel of a module, (C,); None where it keeps none.

        Args:
            module: The module.
        """
        return getattr(module, self.running_mean, None), getattr(module, self.running_var, None)

    def numbers(self, module: nn.Module, eps: float | None = None) -> Normalisation:
        """All numbers of a module that keeps statistics.

        Args:
            module: The module.
            eps: Its eps, where it has no attribute for it.
        """
        mean, var = self.statistics(module)
        assert mean is not None
        assert var is not None
        weight, bias = getattr(module, self.weight, None), getattr(module, self.bias, None)
        return Normalisation(mean, var, weight, bias, getattr(module, self.eps, 0.0) if eps is None else eps)


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

KIND_OF_FUNCTION = {
    kind.function: replace(kind, module=nn.Module, in_channels="", out_channels="") for kind in LAYER_KINDS
}
"""What a module of any class is, if it calls such a function with its own weight and bias."""

NORMALISING = LayerKind(
    _BatchNorm,
    F.batch_norm,
    1,
    "num_features",
    "num_features",
    arguments=("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
)
"""A BatchNorm that stays is a layer itself: its weight and its bias can take another BatchNorm."""

_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)

_TORCHS = BatchNormKind(_BatchNorm)
_FROZEN = BatchNormKind(nn.Module)


class Rest:
    """Marks what is left of a BatchNorm that does more than normalise: its class inherits from this and its old one."""

    def __init_subclass__(cls) -> None:
        """Tell nobody: a class that keeps a register of its subclasses shall not find this one in it."""


@dataclass(frozen=True)
class Kinds:
    """What a project adds to the layers and BatchNorms that folding knows, for one call.

    Attributes:
        layers: Further kinds of layers.
        batchnorms: Further kinds of BatchNorms.

    Raises:
        TypeError: If one of them is no tuple or list, or holds something else.

    Example:
        >>> class Standardise(nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.register_buffer("mean", torch.randn(size))
        ...         self.register_buffer("variance", torch.rand(size))
        ...
        ...     def forward(self, x):
        ...         return (x - self.mean) / self.variance.sqrt()
        >>> kinds = Kinds(batchnorms=(BatchNormKind(Standardise, "mean", "variance", channel_axis=-1),))
        >>> from lit_bnfold.folding import fold_batchnorm
        >>> model = nn.Sequential(nn.Linear(3, 5), Standardise(5))
        >>> fold_batchnorm(model, (torch.randn(4, 3),), kinds=kinds)[1]
        Identity()
    """

    layers: tuple[LayerKind, ...] = ()
    batchnorms: tuple[BatchNormKind, ...] = ()

    def __post_init__(self) -> None:
        for name, given, kind in (("layers", self.layers, LayerKind), ("batchnorms", self.batchnorms, BatchNormKind)):
            if not isinstance(given, (tuple, list)) or not all(isinstance(each, kind) for each in given):
                expected = f"a tuple such as ({kind.__name__}(YourClass, ...),)"
                raise TypeError(f"{name}: expected {expected}, got {given!r}.")

    def layer(self, module: nn.Module | None, function: str | None = None) -> LayerKind | None:
        """The kind of weight layer that a module is; None if it is none.

        Args:
            module: The module.
            function: Name of the function that a module of another class calls with its own weight and bias.
        """
        kinds = (*self.layers, *LAYER_KINDS, NORMALISING)
        found = next((kind for kind in kinds if isinstance(module, kind.module)), None)
        if found is None and function is not None and isinstance(getattr(module, "weight", None), nn.Parameter):
            found = next((kind for kind in KIND_OF_FUNCTION.values() if kind.function.__name__ == function), None)
        return found

    def batchnorm(self, module: nn.Module) -> BatchNormKind | None:
        """The kind of BatchNorm that a module is, foldable or not; None if it is none.

        Args:
            module: The module.
        """
        if isinstance(module, Rest):
            return None
        if isinstance(module, torch.jit.ScriptModule):
            return _TORCHS if "BatchNorm" in module.original_name else None
        for kind in self.batchnorms:
            if isinstance(module, kind.module):
                return kind
        if isinstance(module, _BatchNorm):
            return _TORCHS
        return _FROZEN if _is_frozen_batchnorm(module) else None

    def only_normalises(self, module: nn.Module) -> bool:
        """Whether a BatchNorm's forward does nothing besides: it is torch's own, or is compared with that.

        Args:
            module: The module.
        """
        kind = self.batchnorm(module)
        if kind is None or isinstance(module, torch.jit.ScriptModule):
            return False
        return NORMALISING.runs_torchs_forward(module) or not kind.calls_batch_norm

    def num_features(self, module: nn.Module) -> int:
        """Number of channels of a BatchNorm, 0 if it does not tell.

        Args:
            module: The module.
        """
        kind = self.batchnorm(module)
        mean = None if kind is None else kind.statistics(module)[0]
        # Torch takes whatever makes a tensor of that size for `num_features`, such as a list.
        number = mean.numel() if isinstance(mean, Tensor) else getattr(module, "num_features", 0)
        return number if isinstance(number, int) else 0


KINDS = Kinds()
"""What folding knows by itself."""


def _is_frozen_batchnorm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm of a class of its own, as detection models have them for inference alone."""
    if module._modules:
        return False
    tensors = own_tensors(module)
    if tensors.keys() - {"num_batches_tracked"} != _STATISTICS:
        return False
    lengths = {tensors[key].shape for key in _STATISTICS}
    return len(lengths) == 1 and len(lengths.pop()) == 1


def size_of_bias_left_out(module: nn.Module) -> int | None:
    """The length of the bias that a layer of no known class was made without; None for a module that is no such layer.

    It is known by what torch's own layers have as well: a weight (out, in, ...) of the sizes that its attributes name,
    and the bias as a parameter that is None.

    Args:
        module: Any module.
    """
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.dim() < 2 or module._parameters.get("bias", weight) is not None:
        return None
    for names in (("out_features", "in_features"), ("out_channels", "in_channels")):
        if tuple(weight.shape[:2]) == tuple(getattr(module, name, None) for name in names):
            return len(weight)
    return None


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that a module holds itself, by attribute."""
    tensors = {**module._parameters, **module._buffers}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}
