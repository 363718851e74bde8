"""The two runs behind a plan: one of the model as it is, one with the plan tried out.

The second run is of a copy whose folded BatchNorms are gone, while torch's own ``batch_norm`` runs right where the plan
puts each: behind, before or beside its layers. If that does something else than the first run, the first has not shown
everything, and nothing is folded.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_bnfold.folding.computed import bake, computed_tensors
from lit_bnfold.folding.graph import FoldingError, Obstacle, ValueGraph
from lit_bnfold.folding.kinds import Kinds, Normalisation
from lit_bnfold.folding.plan import FoldingPlan, Part
from lit_bnfold.folding.record import Recorder, tensors_in
from lit_bnfold.folding.rewrite import copy_model, erase, stand_in
from lit_bnfold.folding.transparent import UNTOUCHED

_Model = TypeVar("_Model", bound=nn.Module)
Function = Callable[..., Tensor]


class Run(NamedTuple):
    """What one run of a model did, and what it gave."""

    graph: ValueGraph
    output: Any


def run_as_it_is(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], kinds: Kinds) -> Run:
    """Run a copy of a model in eval mode.

    Args:
        model: The model; running its copy leaves no trace in it.
        args: Positional arguments of the call; the run gets copies.
        kwargs: Keyword arguments of the call, likewise.
        kinds: What counts as a layer and as a BatchNorm.

    Returns:
        What it did.

    Raises:
        FoldingError: If the model cannot be copied or does not run on the arguments.
    """
    twin = _twin(model)
    return _run(twin, Recorder(twin, kinds), args, kwargs)


def obstacle_to(
    plan: FoldingPlan, first: Run, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], kinds: Kinds
) -> Obstacle | None:
    """Try a plan out.

    Args:
        plan: The plan.
        first: The run that the plan was made of.
        model: The model; it is copied once more.
        args: Positional arguments of that run.
        kwargs: Keyword arguments of that run.
        kinds: What counts as a layer and as a BatchNorm.

    Returns:
        What is in the way of the plan as a whole; None if the model does the same with it.
    """
    twin = _twin(model)
    modules = dict(twin.named_modules())
    moved = _moved_functions(plan, modules, kinds)
    baked = [name for name in moved if computed_tensors(modules[name])]
    for name in baked:
        bake(modules[name])
    for fold in plan.folds:
        erase(modules[fold.batchnorm], fold.direction, kinds)
    # This time no layer is lent a bias, so that a forward which asks whether there is one is found out as well.
    recorder = Recorder(twin, kinds, lends_bias=False, instead=moved)
    erased = {fold.batchnorm: fold.direction != "parallel" for fold in plan.folds}
    try:
        second = _run(twin, recorder, args, kwargs)
    except FoldingError:
        second = None
    if second is None or second.graph.outline(erased) != first.graph.outline(erased, baked):
        reason = "the model looks at its modules, and does something else once BatchNorms of it are `nn.Identity`"
        return "structure-read", reason
    if not _agree(first.output, second.output):
        reason = "the model gives something else when it is folded, for a reason that its run does not show"
        return "unexplained", reason
    return None


def with_batchnorm(direction: str, layer: Function, numbers: Normalisation, part: Part, channel_axis: int) -> Function:
    """A layer and the BatchNorm that goes into it, by torch's own batch norm and not by our algebra.

    Args:
        direction: Whether the BatchNorm comes behind the layer (``backward``), before it or beside it.
        layer: The layer as a function of its input, of any shape, and whatever else it takes.
        numbers: The BatchNorm's.
        part: What the layer takes of the BatchNorm.
        channel_axis: Axis of the layer's input and output that the channels lie on.

    Returns:
        A function of the same arguments.
    """
    numbers = numbers.each(Tensor.detach)

    def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if direction == "backward":
            return _normalise(layer(input, *args, **kwargs), numbers, part, channel_axis)
        normalised = _normalise(input, numbers, part, channel_axis)
        if direction == "forward":
            return layer(normalised, *args, **kwargs)
        return layer(input, *args, **kwargs) + normalised

    return run


def _normalise(output: Tensor, numbers: Normalisation, part: Part, channel_axis: int) -> Tensor:
    axis = channel_axis % output.dim()
    mean, var, weight, bias, eps = numbers.each(lambda tensor: tensor.to(output.device))
    if part.channels is None and part.shift == 1.0 and axis == 1:
        return F.batch_norm(output, mean, var, weight, bias, training=False, eps=eps)
    rows = output.movedim(axis, -1)  # (..., C)
    channels = torch.tensor(part.channels or range(rows.shape[-1]), device=output.device)
    mean, var, weight, bias, eps = numbers.each(lambda tensor: tensor.to(output.device)[channels.clamp(min=0)])

    def normalise(rows: Tensor) -> Tensor:
        flat = rows.reshape(-1, rows.shape[-1])  # (..., C) -> (N, C)
        return F.batch_norm(flat, mean, var, weight, bias, training=False, eps=eps).view(rows.shape)

    normalised = normalise(rows)
    if part.shift != 1.0:
        normalised = normalised - (1.0 - part.shift) * normalise(torch.zeros_like(rows))
    normalised = torch.where(channels == UNTOUCHED, rows, normalised).movedim(-1, axis)
    # Laid out in memory as the layer does it, on which a later `view` may rely.
    return torch.empty_like(output).copy_(normalised)


def _moved_functions(
    plan: FoldingPlan, modules: Mapping[str, nn.Module], kinds: Kinds
) -> dict[str, Callable[[Function], Function]]:
    """For each layer that takes part in a fold, what its function is to become, by the layer's name."""
    moves: dict[str, list[Callable[[Function], Function]]] = {}
    for fold in plan.folds:
        kind = kinds.batchnorm(modules[fold.batchnorm])
        assert kind is not None
        numbers = kind.numbers(modules[fold.batchnorm])
        for part in fold.parts:
            layer_kind = kinds.layer(modules[part.layer])
            assert layer_kind is not None
            axis = layer_kind.channel_axis

            def move(
                function: Function, fold: Any = fold, numbers: Any = numbers, part: Part = part, axis: int = axis
            ) -> Function:
                return with_batchnorm(fold.direction, function, numbers, part, axis)

            moves.setdefault(part.layer, []).append(move)
    return {name: _one_after_the_other(several) for name, several in moves.items()}


def _one_after_the_other(moves: Sequence[Callable[[Function], Function]]) -> Callable[[Function], Function]:
    def move(function: Function) -> Function:
        for each in moves:
            function = each(function)
        return function

    return move


def _run(twin: nn.Module, recorder: Recorder, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Run:
    args, kwargs = _copy_example((args, kwargs))
    twin.eval()
    with _random_numbers_kept(twin), torch.no_grad(), _nothing_compiled(), recorder:
        try:
            # What the run gives lives until the recorder is closed: whatever it holds back counts as held by somebody.
            output = twin(*args, **kwargs)
        except Exception as error:
            raise FoldingError(f"The model does not run on the example it was given: {error}") from error
    return Run(recorder.graph, output)


def _copy_example(example: Any) -> Any:
    """A copy for one run, which may write into its inputs or empty its dicts and lists."""
    tensors = list({id(tensor): tensor for tensor in tensors_in(example)}.values())
    owners = Counter(map(_memory, tensors))
    # Inputs that share memory are left together.
    memo = {id(t): t.detach().clone() if owners[_memory(t)] == 1 and type(t) is Tensor else t for t in tensors}
    return copy.deepcopy(example, memo)


def _memory(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def _agree(expected: Any, found: Any) -> bool:
    """Whether two runs gave the same numbers, up to what rounding can grow to."""
    return all(
        first is not None and second is not None and _is_near(first, second)
        for first, second in zip_longest(tensors_in(expected), tensors_in(found))
    )


def _is_near(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return True
    # On average, since rounding may flip a decision here or there; a fold that is wrong moves more than that.
    error, scale = (found - expected).double().square(), expected.double().square()
    finite = error.isfinite() & scale.isfinite()
    error, scale = error[finite].mean(), scale[finite].mean()
    return not bool(error.sqrt() > torch.finfo(expected.dtype).eps ** 0.5 * scale.sqrt())


def _twin(model: _Model) -> _Model:
    """A copy of the model around the memory of its parameters and buffers; running it leaves no trace in the model."""
    # Stand-ins, so that code which holds on to the model's own tensors, as a closure does, can be told apart.
    return copy_model(model, {id(tensor): stand_in(tensor) for tensor in (*model.parameters(), *model.buffers())})


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    devices = sorted({parameter.get_device() for parameter in model.parameters() if parameter.is_cuda})
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)


def _nothing_compiled() -> AbstractContextManager[Any]:
    # Setting the stance loads the compiler; where that is not loaded, nothing is compiled.
    compiler = sys.modules.get("torch._dynamo")
    return nullcontext() if compiler is None else torch.compiler.set_stance("force_eager")
