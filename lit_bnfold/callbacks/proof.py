"""What is measured while a module validates: its value graph, its outputs and each of its folded layers.

The witnesses ride along with a validation run as callbacks and look at the first batch of each validation loader, while
the module does with its networks whatever its own ``validation_step`` does.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import zip_longest
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lit_bnfold.folding import Fold, FoldingPlan
from lit_bnfold.folding.exact import exact_numbers
from lit_bnfold.folding.graph import ValueGraph
from lit_bnfold.folding.kinds import KINDS, LayerKind
from lit_bnfold.folding.moved import Function, moves, with_numbers
from lit_bnfold.folding.record import Recorder
from lit_bnfold.folding.search import make_plan
from lit_bnfold.folding.tensors import tensors_in
from lit_bnfold.metrics import OutputError

if TYPE_CHECKING:
    from typing_extensions import Self


# In float64 nothing is rounded that could matter: what is left is some ten digits better than this.
_EXACT_TOLERANCE = 1e-6

# Of a larger batch, the layers compare so many examples, which show as much; its outputs are compared whole.
_MOST_EXAMPLES = 1024


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
        batches: The tensors of the batches that were watched, as they were before: a step may write into its batch.
        is_of_an_example: Whether that is one example, because there was no batch.
        calls: The outermost module calls that they led to.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self.pl_module = pl_module
        self.batches: list[list[Tensor]] = []
        self.is_of_an_example = False
        self.calls: list[OutermostCall] = []
        self._recorder: Recorder | None = None
        self._calls_in_first_batch: int | None = None
        self._watching = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.close()

    def note(self, batch: Any) -> None:
        """Note what is about to be run.

        Args:
            batch: A batch, of whatever form.
        """
        self.batches.append([tensor.detach().clone() for tensor in tensors_in(batch)])

    def watch(self) -> None:
        """Begin to watch whatever the module does next in this thread."""
        self._watching.enter_context(_outermost_calls(self.pl_module, self.calls))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Begin to watch, if this is the first batch of a loader."""
        if batch_idx == 0:
            self.note(batch)
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

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching: what was written since then is put back next, and not by the module."""
        self._watching.close()

    def conclude(self, batch_idx: int, dataloader_idx: int) -> None:
        """End a batch.

        Args:
            batch_idx: Its number within its loader.
            dataloader_idx: The number of the loader.
        """
        self._watching.close()
        if self._recorder is not None and self._calls_in_first_batch is None:
            self._calls_in_first_batch = len(self._recorder.graph.calls)

    @property
    def first_batch(self) -> ValueGraph:
        """What the module did with the first batch that was watched."""
        assert self._recorder is not None
        graph = self._recorder.graph
        return replace(graph, calls=graph.calls[: self._calls_in_first_batch])


class GraphWitness(Witness):
    """Records what the unfolded module does, for a plan.

    Args:
        pl_module: The module before it is folded.
        lends: Whether layers that have no bias may be asked whether they would use one.
    """

    def __init__(self, pl_module: LightningModule, *, lends: bool = True) -> None:
        super().__init__(pl_module)
        self._lends = lends

    @property
    def has_lent(self) -> bool:
        """Whether a layer was asked that."""
        return self._recorder is not None and self._recorder.has_lent

    def watch(self) -> None:
        """Begin to watch whatever the module does next in this thread."""
        # Made late, when the weights are loaded, and before other hooks are there that it would take for the module's.
        self._recorder = self._recorder or Recorder(self.pl_module, lends=self._lends)
        self._watching.enter_context(_old_objects_set_aside())
        super().watch()
        self._watching.enter_context(self._recorder)

    def plan(self) -> FoldingPlan:
        """The plan for what was watched."""
        assert self._recorder is not None
        return make_plan(self._recorder.graph)


class LayerWitness(Witness):
    """Compares each folded layer with the BatchNorms applied after the unfolded layer, on the same inputs.

    It does so in the module's own arithmetic, where all that can be asked for is agreement within its roundings. So it
    looks at two things more, for some examples of each batch that it watches: whether the fold is right when nothing is
    rounded, in float64, and whether the numbers of the layer are those of that fold, rounded once. Together they find
    an error of a thousandth in bfloat16 too, if only it is larger than a rounding of the weights.

    On the batches behind the first it counts calls: the plan is for modules that are called as on the first one.

    Args:
        pl_module: The module before it is folded.
        plan: The plan by which it is going to be folded.
        tolerance: The largest error that counts as agreement in these two, in units of the largest number. None allows
            for roundings alone.

    Attributes:
        errors: The error of each layer that takes part in a fold, by name.
        exact_errors: The same in float64.
        stray: A sentence about the first batch that took another path; None if none did.
    """

    def __init__(self, pl_module: LightningModule, plan: FoldingPlan, tolerance: float | None = None) -> None:
        super().__init__(pl_module)
        modules = dict(pl_module.named_modules())
        self._moves = moves(plan, modules, KINDS)
        self._exact = exact_numbers(plan, modules, KINDS)
        self._tolerance = tolerance
        self.errors = {name: OutputError().to(_device(pl_module)) for name in self._moves}
        self.exact_errors = {name: OutputError().to(_device(pl_module)) for name in self._moves}
        self._wrong_numbers: dict[str, str] = {}
        self._checked: set[str] = set()
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
        self._checked.clear()
        super().watch()
        self._watching.enter_context(self._recorder)

    def _compared(self, name: str, function: Function) -> Function:
        """The function of a layer, whose output is compared with that of the unfolded layer and its BatchNorms."""
        if name not in self._moves:
            return function
        exact = self._exact[name]
        kind, before = exact.kind, with_numbers(exact.kind, exact.before)
        expected = self._moves[name](before(function))

        def run(*args: Any, **kwargs: Any) -> Tensor:
            output = function(*args, **kwargs)
            input = kwargs["input"] if "input" in kwargs else args[0]
            few = _examples(input, kind, _MOST_EXAMPLES)
            compared = output if few is input else output[: len(few)]
            self.errors[name].update(compared, with_numbers(kind, {"input": few})(expected)(*args, **kwargs))
            if name not in self._checked:
                self._checked.add(name)
                self._check(name, function, args, kwargs)
            return output

        return run

    def _check(self, name: str, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the numbers that a folded layer was called with, and in float64 what they were rounded from."""
        exact = self._exact[name]
        given = exact.kind.given(args, kwargs)
        wide = _in_float64(function)
        # Some tens of rows, or two images, for float64 is slow.
        examples = 64 if given["input"].dim() == 2 else 2
        few = with_numbers(exact.kind, {"input": _widened(_examples(given["input"], exact.kind, examples))})
        unrounded = exact.unrounded()
        objection = exact.objection_to(given, unrounded, self._tolerance or 0.0)
        if objection is not None:
            self._wrong_numbers.setdefault(name, objection)
        with torch.no_grad():
            output = few(with_numbers(exact.kind, unrounded)(wide))(*args, **kwargs)
            # Not both at once: in float64, the numbers of a layer are large.
            unrounded.clear()
            before = with_numbers(exact.kind, exact.before)
            expected = few(self._moves[name](before(wide)))(*args, **kwargs)
        self.exact_errors[name].update(output, expected)

    def objection(self) -> str | None:
        """What is wrong beside the errors, in a sentence; None if nothing is.

        It is a batch that took another path, or something about a fold that roundings do not explain.

        To be called on all ranks: it takes the largest errors of all of them.
        """
        off = {name: _computed(error)["max_rel"] for name, error in self.exact_errors.items()}
        if self.stray is not None:
            return self.stray
        for name, wrong in self._wrong_numbers.items():
            return f"the folded layer `{name}` {wrong}"
        for name, error in off.items():
            if not error <= max(_EXACT_TOLERANCE, self._tolerance or 0.0):
                return f"in float64 the folded layer `{name}` is off by {error:.2e} of its largest value"
        return None

    def error_of(self, fold: Fold) -> dict[str, float]:
        """The largest error of the layers of a fold, infinite if one of them was called on no rank."""
        errors = [_computed(self.errors[layer]) for layer in fold.layers]
        if not all(_on_any_rank(self.errors[layer].update_called, self.pl_module) for layer in fold.layers):
            return {"max_abs": math.inf, "max_rel": math.inf}
        return {key: max(error[key] for error in errors) for key in ("max_abs", "max_rel")}


def _computed(error: OutputError) -> dict[str, float]:
    """What was measured on all ranks; of those that measured nothing it counts as no error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric OutputError was called before")
        return {key: float(value) for key, value in error.compute().items()}


def _device(module: nn.Module) -> torch.device:
    """Where a module is, and its ranks meet."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _on_any_rank(flag: bool, module: nn.Module) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    flags = torch.tensor([float(flag)], device=_device(module))
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


def _in_float64(function: Function) -> Function:
    """The function of a layer, computed in float64 whatever it is given."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        device = next(iter(tensors_in((args, kwargs)))).device.type
        with torch.autocast(device, enabled=False):
            return function(*map(_widened, args), **{key: _widened(value) for key, value in kwargs.items()})

    return run


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _examples(input: Tensor, kind: LayerKind, most: int) -> Tensor:
    """The first examples of a layer's input; the input itself if it has no more, or is a single one."""
    axes_of_one = max(0, -kind.channel_axis)
    return input[:most] if input.dim() > axes_of_one and len(input) > most else input


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
    # Every rank takes part in each of these questions, whatever its own answer is.
    module, pairs = original.pl_module, _pairs_of_outputs(plan, original, folded)
    if _on_any_rank(pairs is None, module):
        return None
    pairs = pairs or []
    if _on_any_rank(any(a is None or b is None or a.shape != b.shape for a, b in pairs), module):
        return {"max_abs": math.inf, "max_rel": math.inf}
    error = OutputError().to(_device(module))
    numbers = [(a, b) for a, b in pairs if a.is_floating_point() or a.is_complex()]
    for expected, output in numbers:
        error.update(output, expected)
    computed = _computed(error)
    return computed if _on_any_rank(bool(numbers), module) else None


def _pairs_of_outputs(plan: FoldingPlan, original: Witness, folded: Witness) -> list[tuple[Any, Any]] | None:
    """The tensors of both versions' outputs; None if the two did not watch the same batches and calls."""
    if not _same(original.batches, folded.batches) or len(original.calls) != len(folded.calls):
        return None
    names = {module: name for name, module in original.pl_module.named_modules()}
    return [
        pair
        for before, after in zip(original.calls, folded.calls, strict=True)
        if _holds_folds(names[before.module], plan)
        for pair in zip_longest(tensors_in(before.output), tensors_in(after.output))
    ]


def _same(first: Any, second: Any) -> bool:
    pairs = list(zip_longest(tensors_in(first), tensors_in(second)))
    return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def _holds_folds(name: str, plan: FoldingPlan) -> bool:
    prefix = f"{name}." if name else ""
    inside = [[part.startswith(prefix) for part in (fold.batchnorm, *fold.layers)] for fold in plan.folds]
    return any(map(all, inside)) and not any(any(parts) and not all(parts) for parts in inside)
