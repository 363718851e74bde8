"""What folds lead a layer to in float64: what its numbers are measured against, whatever dtype they are rounded to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lit_bnfold.folding.algebra import round_like, scale_and_shift
from lit_bnfold.folding.kinds import Kinds, LayerKind, Normalisation
from lit_bnfold.folding.moved import own_numbers, steps
from lit_bnfold.folding.plan import Fold, FoldingPlan, Part
from lit_bnfold.folding.rewrite import folded_numbers

# Rows of a weight that are compared at a time.
_ROWS = 64


class ExactNumbers:
    """The weight and the bias that folds lead a layer to. They are computed when asked for, and not held.

    Args:
        layer: The layer, before it is folded.
        kind: Its kind.

    Attributes:
        before: Its weight and its bias before it is folded, by attribute.
    """

    def __init__(self, layer: nn.Module, kind: LayerKind) -> None:
        self.kind = kind
        self._layer = layer
        self.before = own_numbers(layer, kind)
        self._steps: list[tuple[Fold, Part, Normalisation]] = []

    def take(self, fold: Fold, part: Part, numbers: Normalisation) -> None:
        """Add a fold behind those that there are.

        Args:
            fold: The fold.
            part: What the layer takes of it.
            numbers: Those of the BatchNorm that is folded.
        """
        self._steps.append((fold, part, numbers))

    def unrounded(self) -> dict[str, Tensor]:
        """Weight and bias by attribute, in float64 and rounded nowhere."""
        return self._after_steps(rounds_between=False)

    def objection_to(self, given: dict[str, Any], unrounded: dict[str, Tensor], slack: float = 0.0) -> str | None:
        """What is wrong with the numbers that a folded layer has: whatever one rounding of each does not explain.

        Args:
            given: Weight and bias of the folded layer, by attribute.
            unrounded: What ``unrounded`` gave.
            slack: How far off they may be beside that, in units of the largest of them.

        Returns:
            The end of a sentence, None if nothing is wrong.
        """
        # Where several are folded, each begins with numbers that the one before has rounded.
        due = self._after_steps(rounds_between=True) if len(self._steps) > 1 else unrounded
        for key, exact in due.items():
            actual = given.get(key)
            if not isinstance(actual, Tensor) or actual.shape != exact.shape:
                return f"has no `{key}` of shape {tuple(exact.shape)}"
            roundings = _roundings(actual.detach(), exact, slack)
            if roundings > 1.0:
                return f"has a `{key}` that is off by {roundings:.1f} roundings to {actual.dtype}, where one is due"
        return None

    def _after_steps(self, *, rounds_between: bool) -> dict[str, Tensor]:
        before = dict(self.before)
        if before["weight"] is None:
            # A BatchNorm without numbers of its own, which takes another one.
            before["weight"] = torch.ones_like(self._layer.running_mean)  # type: ignore[arg-type]
        dtypes = {key: before["weight" if tensor is None else key].dtype for key, tensor in before.items()}  # type: ignore[union-attr]
        numbers = {key: None if tensor is None else tensor.double() for key, tensor in before.items()}
        about = {key: getattr(self._layer, key, None) for key in ("running_mean", "running_var", "eps")}
        about["groups"] = getattr(self._layer, "groups", 1)
        with torch.no_grad():
            for index, (fold, part, batchnorm) in enumerate(self._steps):
                if rounds_between and index > 0:
                    numbers = {key: _rounded(tensor, dtypes[key]) for key, tensor in numbers.items()}
                layer = SimpleNamespace(**{"bias": None} | numbers, **about)
                numbers = dict(folded_numbers(fold.direction, part, layer, self.kind, *scale_and_shift(*batchnorm)))
        return {key: tensor for key, tensor in numbers.items() if tensor is not None}


def exact_numbers(plan: FoldingPlan, modules: dict[str, nn.Module], kinds: Kinds) -> dict[str, ExactNumbers]:
    """What a plan leads each layer to that takes part in it.

    Args:
        plan: The plan.
        modules: The modules of the model, by name, before any is folded.
        kinds: What counts as a layer and as a BatchNorm.
    """
    found: dict[str, ExactNumbers] = {}
    for fold, part, kind, numbers in steps(plan, modules, kinds):
        exact = found.setdefault(part.layer, ExactNumbers(modules[part.layer], kind))
        exact.take(fold, part, numbers)
    return found


def _rounded(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else round_like(tensor, tensor.to(dtype)).double()


def _roundings(actual: Tensor, exact: Tensor, slack: float) -> float:
    """The largest difference in units of what rounding once to the dtype of ``actual`` can make of it, beyond a slack.

    NaN and infinity agree with themselves.
    """
    limits = torch.finfo(actual.dtype)
    least = limits.smallest_normal * (limits.eps if actual.dtype is torch.float16 else 1.0)
    allowed = slack * float(exact.abs().max()) if slack > 0.0 and exact.numel() else 0.0
    largest = 0.0
    # Some rows at a time: there is no need for further copies of a large weight.
    for wide, narrow in zip(exact.split(_ROWS), actual.split(_ROWS), strict=True):
        found, expected = narrow.double(), wide.to(narrow.device)
        # Rounding to the nearest leaves half a unit in the last place, and small numbers become zero.
        one = (limits.eps / 2 * expected.abs()).clamp(min=least)
        agrees = (found == expected) | (found.isnan() & expected.isnan())
        roundings = ((found - expected).abs() - allowed) / one
        roundings = roundings.masked_fill(agrees, 0.0).nan_to_num(nan=torch.inf)
        largest = max(largest, float(roundings.max()) if roundings.numel() else 0.0)
    return largest
