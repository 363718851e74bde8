"""What is measured while a module validates: its value graph, its outputs and each of its folded layers.

The witnesses ride along with a validation run as callbacks and look at the first batch of each validation loader, while
the module does with its networks whatever its own ``validation_step`` does.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_bnfold.folding import Fold, FoldingPlan, LayerKind, Part
from lit_bnfold.folding.kinds import KINDS
from lit_bnfold.folding.moved import Function, moves, with_its_numbers
from lit_bnfold.folding.record import Recorder, tensors_in
from lit_bnfold.folding.search import make_plan
from lit_bnfold.metrics import OutputError

if TYPE_CHECKING:
    from typing_extensions import Self


class OutermostCall(NamedTuple):
    """A call of a module that no other module made."""

    module: nn.Module
    output: Any


class Witness(Callback):
    """Watches a module on the first batch of each validation loader.

    As a context manager it makes sure that nothing is being watched any longer, also after an exception.

    Args:
        pl_module: The module.

    Attributes:
        batches: The batches that were watched.
        calls: The outermost module calls that they led to.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self.pl_module = pl_module
        self.batches: list[Any] = []
        self.calls: list[OutermostCall] = []
        self._watching = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.close()

    def watch(self) -> None:
        """Begin to watch whatever the module does next in this thread."""
        self._watching.enter_context(_outermost_calls(self.pl_module, self.calls))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begin to watch, if this is the first batch of a loader."""
        if batch_idx == 0:
            self.batches.append(batch)
            self.watch()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop watching."""
        self.conclude(batch_idx, dataloader_idx)

    def conclude(self, batch_idx: int, dataloader_idx: int) -> None:
        """End a batch.

        Args:
            batch_idx: Its number within its loader.
            dataloader_idx: The number of the loader.
        """
        self._watching.close()


class GraphWitness(Witness):
    """Records what the unfolded module does, for a plan.

    Args:
        pl_module: The module before it is folded.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        super().__init__(pl_module)
        self._recorder: Recorder | None = None

    def watch(self) -> None:
        """Begin to watch whatever the module does next in this thread."""
        # Made late, when the weights are loaded, and before other hooks are there that it would take for the module's.
        self._recorder = self._recorder or Recorder(self.pl_module)
        self._watching.enter_context(_old_objects_set_aside())
        super().watch()
        self._watching.enter_context(self._recorder)

    def plan(self) -> FoldingPlan:
        """The plan for what was watched."""
        assert self._recorder is not None
        return make_plan(self._recorder.graph)


class LayerWitness(Witness):
    """Compares each folded layer with the BatchNorms applied after the unfolded layer, on the same inputs.

    On the batches behind the first it counts calls: the plan is for modules that are called as on the first one.

    Args:
        pl_module: The module before it is folded.
        plan: The plan by which it is going to be folded.

    Attributes:
        errors: The error of each layer that takes part in a fold, by name.
        stray: A sentence about the first batch that took another path; None if none did.
    """

    def __init__(self, pl_module: LightningModule, plan: FoldingPlan) -> None:
        super().__init__(pl_module)
        modules = dict(pl_module.named_modules())
        self._moves = moves(plan, modules, KINDS)
        self._as_before = {
            part.layer: with_its_numbers(modules[part.layer], _kind(modules[part.layer], part))
            for fold in plan.folds
            for part in fold.parts
        }
        self.errors = {name: OutputError() for name in self._moves}
        self._recorder: Recorder | None = None
        self.stray: str | None = None
        self._plan = plan
        self._counted = {name: modules[name] for fold in plan.folds for name in (fold.batchnorm, *fold.layers)}
        self._counts: Counter[str] = Counter()
        self._usual: dict[tuple[str, str], tuple[int, int]] = {}
        self._counting = ExitStack()

    def __enter__(self) -> Self:
        for name, module in self._counted.items():
            hook = module.register_forward_pre_hook(lambda *_, name=name: self._counts.update([name]))
            self._counting.callback(hook.remove)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._counting.close()
        super().__exit__(kind, error, trace)

    def conclude(self, batch_idx: int, dataloader_idx: int) -> None:
        """End a batch, and compare how often each layer and its BatchNorm were called."""
        super().conclude(batch_idx, dataloader_idx)
        for fold in self._plan.folds:
            for layer in fold.layers:
                calls = (self._counts[layer], self._counts[fold.batchnorm])
                usual = self._usual.setdefault((layer, fold.batchnorm), calls) if any(calls) else calls
                # A loop may run more often on another batch; the proportion stays.
                if calls[0] * usual[1] != calls[1] * usual[0] and self.stray is None:
                    self.stray = (
                        f"batch {batch_idx} of validation loader {dataloader_idx} calls `{layer}` {calls[0]} times and "
                        f"`{fold.batchnorm}` {calls[1]} times, unlike the first batch"
                    )
        self._counts.clear()

    def watch(self) -> None:
        """Begin to watch whatever the module does next in this thread."""
        self._recorder = self._recorder or Recorder(self.pl_module, plans=False, instead=self._compared)
        super().watch()
        self._watching.enter_context(self._recorder)

    def _compared(self, name: str, function: Function) -> Function:
        """The function of a layer, whose output is compared with that of the unfolded layer and its BatchNorms."""
        if name not in self._moves:
            return function
        expected = self._moves[name](self._as_before[name](function))

        def run(*args: Any, **kwargs: Any) -> Tensor:
            output = function(*args, **kwargs)
            self.errors[name].to(output.device).update(output, expected(*args, **kwargs))
            return output

        return run

    def error_of(self, fold: Fold) -> dict[str, float]:
        """The largest error of the layers of a fold, infinite if one of them was not called."""
        if not all(self.errors[layer].update_called for layer in fold.layers):
            return {"max_abs": math.inf, "max_rel": math.inf}
        errors = [self.errors[layer].compute() for layer in fold.layers]
        return {key: max(float(error[key]) for error in errors) for key in ("max_abs", "max_rel")}


def _kind(layer: nn.Module, part: Part) -> LayerKind:
    kind = KINDS.layer(layer, part.function)
    assert kind is not None
    return kind


@contextmanager
def _old_objects_set_aside() -> Iterator[None]:
    """Let the garbage collector, which the recorder asks what outlives a batch, look at what is made in here alone.

    To look at everything that a process has loaded takes longer than many a validation.
    """
    if gc.get_freeze_count() > 0:  # Somebody else has set objects aside, and wants to keep them there.
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _outermost_calls(root: nn.Module, calls: list[OutermostCall]) -> Iterator[None]:
    depth = 0

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            calls.append(OutermostCall(module, output))

    with ExitStack() as hooks:
        for module in root.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                hooks.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def output_error(plan: FoldingPlan, original: Witness, folded: Witness) -> dict[str, float] | None:
    """Compare what the outermost module calls gave before and after folding.

    Only calls that hold all of every fold they touch count: between a layer and its BatchNorm the two versions differ,
    and rightly.

    Args:
        plan: The plan by which the module was folded.
        original: Who watched the unfolded module.
        folded: Who watched the folded one.

    Returns:
        ``max_abs``, and ``max_rel`` in units of the largest output, both infinite if the outputs are not of the same
        shapes; None if there was nothing to compare, or if the two did not watch the same batches.
    """
    if not _same(original.batches, folded.batches) or len(original.calls) != len(folded.calls):
        return None
    error, compared = OutputError(), False
    names = {module: name for name, module in original.pl_module.named_modules()}
    for before, after in zip(original.calls, folded.calls, strict=True):
        if _holds_folds(names[before.module], plan):
            pairs = list(zip_longest(tensors_in(before.output), tensors_in(after.output)))
            if any(a is None or b is None or a.shape != b.shape for a, b in pairs):
                return {"max_abs": math.inf, "max_rel": math.inf}
            for expected, output in pairs:
                if expected.is_floating_point() or expected.is_complex():
                    error.to(output.device).update(output, expected)
                    compared = True
    return {key: float(value) for key, value in error.compute().items()} if compared else None


def _same(first: Any, second: Any) -> bool:
    pairs = list(zip_longest(tensors_in(first), tensors_in(second)))
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def _holds_folds(name: str, plan: FoldingPlan) -> bool:
    prefix = f"{name}." if name else ""
    inside = [[part.startswith(prefix) for part in (fold.batchnorm, *fold.layers)] for fold in plan.folds]
    return any(map(all, inside)) and not any(any(parts) and not all(parts) for parts in inside)
