"""The folding plan: which BatchNorm goes where, and why the others stay. Plain data, fit for JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import nn

from lit_bnfold.folding.graph import FoldingError
from lit_bnfold.folding.kinds import KINDS, Kinds, check_types

_Model = TypeVar("_Model", bound=nn.Module)

# 1: had no checksum.
MANIFEST_VERSION = 2
DIRECTIONS = ("backward", "forward", "parallel")

# Of a value in a message.
_LONGEST = 80

_Schema = dict[str, tuple[type, ...]]


@dataclass(frozen=True)
class Part:
    """What one layer takes of a BatchNorm.

    Attributes:
        layer: Name of the layer.
        channels: The BatchNorm's channel for each channel of the layer, of its outputs or, if the fold is forward, of
            its inputs; -1 where the layer stays as it is. None where channel ``i`` is channel ``i``.
        shift: The share of the shift that this layer takes; in a parallel fold, of the scale as well.
        baked: Whether the layer computes its weight at every call, so that the weight of the moment is made a parameter
            before it takes anything.
        function: Name of the function that the layer calls, if it is a layer by that alone; None if its class tells.
        residual: How often the layer's own input is added to its output before the BatchNorm. The layer takes over
            what scaling that would have changed.

    Example:
        >>> Part("fc", channels=(0, 1, 0, 1)).channels  # each channel of a BatchNorm(2) counts for two of the layer
        (0, 1, 0, 1)
    """

    layer: str
    channels: tuple[int, ...] | None = None
    shift: float = 1.0
    baked: bool = False
    function: str | None = None
    residual: float = 0.0


@dataclass(frozen=True)
class Fold:
    """A BatchNorm that is folded.

    Attributes:
        batchnorm: Name of the BatchNorm.
        parts: The layers that take it, each with what it takes.
        direction: ``backward`` into layers before the BatchNorm, ``forward`` into layers after it, ``parallel`` into a
            layer of the same input that it is added to.
        note: A warning, in a sentence, if its numbers cost many digits; else None.
        eps: What it adds to its variance, if only a run could tell; None where it is an attribute of the module.
        written: Whether what it is added to is written into its output: what is left of it gives zeros in memory of
            their own.
        contiguous: Whether it lays out its output anew in memory, axis after axis: what is left of it does so too, for
            a ``view`` of the output, or of anything made of it, may rely on that.

    Example:
        >>> Fold("bn", (Part("left"), Part("right"))).layers
        ('left', 'right')
    """

    batchnorm: str
    parts: tuple[Part, ...]
    direction: str = "backward"
    note: str | None = None
    eps: float | None = None
    written: bool = False
    contiguous: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that take the BatchNorm."""
        return tuple(part.layer for part in self.parts)


@dataclass(frozen=True)
class Kept:
    """A BatchNorm that stays.

    Attributes:
        batchnorm: Name of the BatchNorm.
        reason: Why it stays, in a sentence.
        code: Why it stays, for programs.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lit_bnfold.folding import plan_folding
        >>> [kept] = plan_folding(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), (torch.randn(4, 3),)).kept
        >>> kept.batchnorm, kept.code
        ('0', 'no-layer')
    """

    batchnorm: str
    reason: str
    code: str


@dataclass(frozen=True)
class FoldingPlan:
    """What to do with every BatchNorm of a model; ``folds`` and ``kept`` together name each exactly once.

    Attributes:
        folds: The BatchNorms that are folded, in the order in which they have to be.
        kept: The BatchNorms that stay.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lit_bnfold.folding import plan_folding
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU())
        >>> plan = plan_folding(model, (torch.randn(4, 3),))
        >>> [(fold.batchnorm, fold.layers) for fold in plan.folds]
        [('1', ('0',))]
        >>> plan.apply(model)[1]
        Identity()
    """

    folds: tuple[Fold, ...] = ()
    kept: tuple[Kept, ...] = ()

    def apply(self, model: _Model, inplace: bool = False, kinds: Kinds = KINDS) -> _Model:
        """Fold a model that has the structure of the one this plan was made for.

        Args:
            model: The model to fold.
            inplace: Whether to fold ``model`` itself. Otherwise it is copied and stays as it is.
            kinds: The layers and BatchNorms that the plan was made with, beside those that folding knows.

        Returns:
            The folded model, of the same class.

        Raises:
            FoldingError: If the plan does not fit the model; then the model is as it was.
            TypeError: If an argument is of another type, such as a class in place of a model.
        """
        from lit_bnfold.folding.rewrite import apply_plan

        check_types(("model", model, nn.Module, "an nn.Module"), ("kinds", kinds, Kinds, "Kinds"))
        return apply_plan(self, model, inplace=inplace, kinds=kinds)

    def keeping(
        self, code: str, reason: str, order: Iterable[str], names: Collection[str] | None = None
    ) -> FoldingPlan:
        """The plan without some of its folds, or without any, and with one more reason for what stays.

        Args:
            code: Why that stays, for programs.
            reason: Why that stays, in a sentence.
            order: Names of all BatchNorms, in the order of the model.
            names: Names of those that stay now; all by default.
        """
        folds = () if names is None else tuple(fold for fold in self.folds if fold.batchnorm not in names)
        kept = {fold.batchnorm: Kept(fold.batchnorm, reason, code) for fold in self.folds if fold not in folds}
        kept |= {each.batchnorm: each for each in self.kept}
        return FoldingPlan(folds, tuple(kept[name] for name in order if name in kept))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain dicts, lists, strings and numbers, fit for JSON, with a checksum of all that.

        Example:
            >>> FoldingPlan((Fold("bn", (Part("fc"),)),)).to_dict()["folds"]  # doctest: +ELLIPSIS
            [{'batchnorm': 'bn', 'parts': [{...}], 'direction': 'backward', 'note': None, 'eps': None}]
        """
        folds = [_fold_to_dict(fold) for fold in self.folds]
        plan = {"version": MANIFEST_VERSION, "folds": folds, "kept": [asdict(kept) for kept in self.kept]}
        return plan | {_CHECKSUM: _checksum(plan)}

    @classmethod
    def from_dict(cls, plan: dict[str, Any]) -> FoldingPlan:
        """The plan that ``to_dict`` made a dict of.

        Args:
            plan: A dict as from ``to_dict``.

        Raises:
            FoldingError: If it is none, was changed after it was made, or is of a version that this package does not
                know; says what is wrong in it.
        """
        version = plan.get("version") if isinstance(plan, dict) else None
        if type(version) is not int or not 1 <= version <= MANIFEST_VERSION:
            is_newer = type(version) is int and version > MANIFEST_VERSION
            remedy = "a newer release wrote it: upgrade lit-bnfold" if is_newer else "take the dict that `to_dict` gave"
            expected = f"a folding plan of version 1 to {MANIFEST_VERSION}"
            got = f"version {_shortened(version)}" if isinstance(plan, dict) else type(plan).__name__
            raise FoldingError(f"Expected {expected}, got {got}; {remedy}.")
        given = _fields(plan, _PLAN if version > 1 else _PLAN_1, "the plan")
        folds = tuple(_fold_from_dict(fold, f"folds[{index}]") for index, fold in enumerate(given["folds"]))
        kept = tuple(Kept(**_fields(each, _KEPT, f"kept[{index}]")) for index, each in enumerate(given["kept"]))
        counts = Counter([*(fold.batchnorm for fold in folds), *(each.batchnorm for each in kept)])
        for name, count in counts.items():
            if count > 1:
                raise _not_a_plan("the plan", "each BatchNorm once", [name] * count)
        if version > 1 and given[_CHECKSUM] != _checksum(plan):
            raise _not_a_plan(f"the plan.{_CHECKSUM}", "the checksum of the rest, which was changed", given[_CHECKSUM])
        return cls(folds, kept)

    def __str__(self) -> str:
        """The plan as a table for people."""
        notes = {fold.batchnorm: f"; {fold.note}" for fold in self.folds if fold.note is not None}
        rows = [
            (fold.batchnorm, f"folded {fold.direction} into {', '.join(fold.layers)}{notes.get(fold.batchnorm, '')}")
            for fold in self.folds
        ]
        rows += [(kept.batchnorm, f"kept: {kept.reason}") for kept in self.kept]
        if not rows:
            return "no BatchNorm"
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {what}" for name, what in rows)


def _checksum(plan: dict[str, Any]) -> str:
    """Of a plan as plain data, in so far as it is not the checksum itself."""
    rest = {key: value for key, value in plan.items() if key != _CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _fold_to_dict(fold: Fold) -> dict[str, Any]:
    return _without_new_fields(asdict(fold) | {"parts": [_part_to_dict(part) for part in fold.parts]})


def _part_to_dict(part: Part) -> dict[str, Any]:
    return _without_new_fields(asdict(part) | {"channels": None if part.channels is None else list(part.channels)})


def _without_new_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Leave out what earlier releases do not know where it says nothing, so that they can take the plan."""
    return {key: value for key, value in given.items() if value or key not in _NEW_FIELDS}


# What a plan looks like as plain data: the types of each field. What has a default can be left out, as plans of older
# releases do that knew nothing of it. A field that is not here says something that this release would not heed.
_NUMBER = (float, int)
_CHECKSUM = "sha256"
_PLAN_1: _Schema = {"version": (int,), "folds": (list, tuple), "kept": (list, tuple)}
_PLAN: _Schema = _PLAN_1 | {_CHECKSUM: (str,)}
_FOLD: _Schema = {
    "batchnorm": (str,),
    "parts": (list, tuple),
    "direction": (str,),
    "note": (str, type(None)),
    "eps": (*_NUMBER, type(None)),
    "written": (bool,),
    "contiguous": (bool,),
}
_PART: _Schema = {
    "layer": (str,),
    "channels": (list, type(None)),
    "shift": _NUMBER,
    "baked": (bool,),
    "function": (str, type(None)),
    "residual": _NUMBER,
}
_KEPT: _Schema = {"batchnorm": (str,), "reason": (str,), "code": (str,)}
_NEW_FIELDS = {"residual": 0.0, "written": False, "contiguous": False}
_DEFAULTS = {"note": None, "eps": None, "baked": False, "function": None} | _NEW_FIELDS


def _fields(given: Any, schema: _Schema, place: str) -> dict[str, Any]:
    """The fields of a dict, each of one of the types that the schema has for it."""
    if not isinstance(given, dict):
        raise _not_a_plan(place, "a dict", given)
    unknown = [key for key in given if key not in schema]
    if unknown:
        raise _not_a_plan(place, f"nothing but {', '.join(schema)}", unknown[0])
    found = _DEFAULTS | given
    for key, types in schema.items():
        if key not in found:
            raise _not_a_plan(place, f"the key {key!r}", sorted(given))
        # A bool is an int to Python, and no number here.
        if type(found[key]) not in types:
            raise _not_a_plan(f"{place}.{key}", " or ".join(each.__name__ for each in types), found[key])
    return {key: found[key] for key in schema}


def _not_a_plan(place: str, expected: str, found: Any) -> FoldingError:
    return FoldingError(
        f"Expected a dict as `FoldingPlan.to_dict` gives it; {place}: expected {expected}, found {_shortened(found)}. "
        "Take the plan as it was written, or fold the model again with this release."
    )


def _shortened(found: Any) -> str:
    """A value as it is written in Python, cut where it gets long."""
    try:
        said = repr(found)
    except ValueError:  # Python writes no number of more than some thousand digits.
        said = f"{type(found).__name__} with a number that is too long to write"
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."


def _fold_from_dict(given: Any, place: str) -> Fold:
    fold = _fields(given, _FOLD, place)
    if fold["direction"] not in DIRECTIONS:
        raise _not_a_plan(f"{place}.direction", f"one of {', '.join(DIRECTIONS)}", fold["direction"])
    parts = tuple(_part_from_dict(part, f"{place}.parts[{index}]") for index, part in enumerate(fold["parts"]))
    names = [part.layer for part in parts]
    if not parts or len(set(names)) < len(names) or fold["batchnorm"] in names:
        raise _not_a_plan(f"{place}.parts", f"layers beside {fold['batchnorm']!r}, each once", names)
    if fold["written"] and fold["direction"] != "parallel":
        raise _not_a_plan(f"{place}.written", "False where the fold is not parallel", True)
    eps = None if fold["eps"] is None else _finite(fold["eps"], f"{place}.eps")
    if eps is not None and eps < 0.0:
        raise _not_a_plan(f"{place}.eps", "a number from 0 on", eps)
    return Fold(**fold | {"parts": parts, "eps": eps})


def _part_from_dict(given: Any, place: str) -> Part:
    part = _fields(given, _PART, place)
    channels = part["channels"]
    if channels is not None and not all(type(each) is int and -1 <= each <= sys.maxsize for each in channels):
        raise _not_a_plan(f"{place}.channels", "numbers of channels, or -1", channels)
    shares = {key: _finite(part[key], f"{place}.{key}") for key in ("shift", "residual")}
    return Part(**part | {"channels": None if channels is None else tuple(channels)} | shares)


def _finite(number: float, place: str) -> float:
    # An int can be larger than any float.
    if not abs(number) <= sys.float_info.max:
        raise _not_a_plan(place, "a finite number", number)
    return float(number)
