"""The two runs behind a plan: one of the model as it is, one with the plan tried out.

The second run is of a copy whose folded BatchNorms are gone, while torch's own ``batch_norm`` runs right where the plan
puts each: behind, before or beside its layers. If that does or gives something else than the first run, the first has
not shown everything, and nothing is folded. The second run need not compute what the layers make of the same input
again, as far as there is room to remember it; that every layer gets the same input says more than equal outputs would.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_bnfold.folding.algebra import scale_and_shift
from lit_bnfold.folding.computed import bake, computed_tensors, is_steady
from lit_bnfold.folding.copying import copy_model, twin_of
from lit_bnfold.folding.graph import FoldingError, Obstacle, ValueGraph, named
from lit_bnfold.folding.kinds import Kinds, LayerKind
from lit_bnfold.folding.moved import Function, moves
from lit_bnfold.folding.plan import Fold, FoldingPlan
from lit_bnfold.folding.record import Recorder
from lit_bnfold.folding.rewrite import erase, make_ordinary
from lit_bnfold.folding.tensors import address_of, is_plain, stride_of, tensors_in

# Below it float16 has less than two digits, and there is a weight of a BatchNorm that hardly counts.
_FEW_DIGITS, _HARDLY = torch.finfo(torch.float16).smallest_normal / 32, 1e-3

# A copy of so many numbers in float64 takes 1 GiB.
_MOST_NUMBERS = 2**27


class Run(NamedTuple):
    """What one run of a model did, what it gave, what its layers took and gave, and whether one was lent a bias."""

    graph: ValueGraph
    output: Any
    tape: Tape
    has_lent: bool


class Take(NamedTuple):
    """What a layer was given and made of it in one call; None where there was no room to keep it."""

    layer: str
    stride: tuple[int, ...]  # of the input, on which that of the output may depend
    input: Tensor | None
    output: Tensor | None


class Tape:
    """What the layers of a run were given and made of it, call by call, as far as there is room.

    Attributes:
        room: Bytes that may still be kept.
        agrees: Whether all that has been played was given the same inputs in the same order.
    """

    def __init__(self) -> None:
        self.room = 0
        self.agrees = True
        self._takes: list[Take] = []
        self._played = 0

    def record(self, name: str, layer: Function) -> Function:
        """A layer that does what it does, and is recorded, unless it is a BatchNorm."""
        if layer is F.batch_norm:
            return layer

        def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            place, take = len(self._takes), Take(name, stride_of(input), self._kept(input), None)
            # The call may fail, and the model catch that.
            self._takes.append(take)
            output = layer(input, *args, **kwargs)
            self._takes[place] = take._replace(output=self._kept(output))
            return output

        return run

    def play(self, name: str, layer: Function, *, computes: bool) -> Function:
        """A layer that gives what it gave when it was recorded, and is computed where that was not kept."""
        if layer is F.batch_norm:
            return layer

        def run(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            take = self._takes[self._played] if self._played < len(self._takes) else Take("", (), None, None)
            self._played += 1
            self.agrees &= take.layer == name and (take.input is None or _is_near(take.input, input))
            if computes or take.output is None or take.stride != stride_of(input):
                return layer(input, *args, **kwargs)
            return take.output

        return run

    def _kept(self, tensor: Tensor) -> Tensor | None:
        size = tensor.numel() * tensor.element_size()
        if size > self.room:
            return None
        self.room -= size
        return tensor.clone()


def run_as_it_is(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], kinds: Kinds, *, lends: bool = True
) -> Run:
    """Run a copy of a model in eval mode.

    Args:
        model: The model; running its copy leaves no trace in it.
        args: Positional arguments of the call; the run gets copies.
        kwargs: Keyword arguments of the call, likewise.
        kinds: What counts as a layer and as a BatchNorm.
        lends: Whether a layer without a bias may be lent one, to see whether it would use that of a fold.

    Returns:
        What it did.

    Raises:
        FoldingError: If the model cannot be copied or does not run on the arguments.
    """
    is_loaded = _is_compiler_loaded()
    try:
        run = _recorded(model, args, kwargs, kinds, lends=lends)
    except FoldingError:
        if is_loaded or not _is_compiler_loaded():
            raise
    else:
        if is_loaded or not _is_compiler_loaded():
            return run
    # The model has loaded the compiler itself, as `torch.cond` does, and that then began to compile what was watched.
    # There is nothing else yet that it could forget.
    torch.compiler.reset()
    return _recorded(model, args, kwargs, kinds, lends=lends)


def _recorded(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], kinds: Kinds, *, lends: bool) -> Run:
    twin = twin_of(model)
    tape = Tape()
    recorder = Recorder(twin, kinds, lends=lends, evens=True, instead=tape.record)
    # As much as the layer with the most numbers needs in float64, which is what folding in place may need as well. The
    # recorder has refused lazy parameters, which have no numbers yet.
    tape.room = 8 * max((parameter.numel() for parameter in model.parameters()), default=0)
    try:
        return Run(recorder.graph, _run(twin, recorder, args, kwargs), tape, recorder.has_lent)
    except FoldingError:
        if not recorder.has_lent:
            raise
    # Perhaps a layer has refused the bias that it was lent.
    return _recorded(model, args, kwargs, kinds, lends=False)


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
    twin = twin_of(model)
    modules = dict(twin.named_modules())
    for fold in plan.folds:
        if _leaves_float16(fold, modules, kinds):
            return "not-finite", f"folding `{fold.batchnorm}` leads to larger or smaller numbers than float16 holds"
    moved = moves(plan, modules, kinds)
    baked = [name for name in moved if computed_tensors(modules[name])]
    with _random_numbers_kept(twin) if baked else nullcontext():
        for name in baked:
            if not is_steady(modules[name]):
                return "computed-weight", f"`{name}` computes another weight at every call"
            bake(modules[name])
    for fold in plan.folds:
        erase(modules[fold.batchnorm], fold, kinds)
        for part in fold.parts:
            _lend_parameters(modules[part.layer], kinds.layer(modules[part.layer], part.function))

    leaving_out: list[str] = []

    def instead(name: str, layer: Function) -> Function:
        # A baked weight may be another than that of the first run: what it makes of the input is computed.
        played = first.tape.play(name, layer, computes=name in baked)
        if name not in moved:
            return played
        return _called_with_its_own(modules[name], moved[name](played), lambda: leaving_out.append(name))

    recorder = Recorder(twin, kinds, plans=False, evens=True, instead=instead)
    erased = {fold.batchnorm: fold.direction != "parallel" for fold in plan.folds}
    try:
        output = _run(twin, recorder, args, kwargs)
        does_the_same = recorder.graph.outline(erased) == first.graph.outline(erased, baked)
    except FoldingError:
        does_the_same = False
    if not does_the_same:
        reason = "the model looks at its modules, and does something else once it is folded"
        return "structure-read", reason
    if leaving_out:
        return "own-forward", f"`{leaving_out[0]}` is called without the weight and the bias that a fold gives it"
    if not first.tape.agrees or not _agree(first.output, output):
        reason = "the model computes something else when it is folded, for a reason that its run does not show"
        return "unexplained", reason
    return None


def _lend_parameters(layer: nn.Module, kind: LayerKind | None) -> None:
    """Give a layer the bias that a fold gives it, so that whoever asks whether there is one is found out.

    Those with a forward of their own had one in the first run, and have none now.
    """
    assert kind is not None
    if kind.runs_torchs_forward(layer):
        make_ordinary(layer, kind)


def _called_with_its_own(module: nn.Module, layer: Function, object_to: Callable[[], None]) -> Function:
    """A layer that objects to a call without a weight or a bias that its module has."""
    own = [tensor for key in ("weight", "bias") if (tensor := module._parameters.get(key)) is not None]

    def run(*args: Any, **kwargs: Any) -> Tensor:
        given = set(map(id, (*args, *kwargs.values())))
        if not given.issuperset(map(id, own)):
            object_to()
        return layer(*args, **kwargs)

    return run


def _leaves_float16(fold: Fold, modules: Mapping[str, Any], kinds: Kinds) -> bool:
    """Whether a fold could make numbers that float16 does not hold, or with few digits; no other dtype is so narrow."""
    layers = [modules[part.layer] for part in fold.parts]
    parameters = [own for layer in layers for own in layer.parameters() if own.dtype is torch.float16 and own.dim()]
    kind = kinds.batchnorm(modules[fold.batchnorm])
    if not parameters or kind is None:
        return False
    numbers = kind.numbers(modules[fold.batchnorm], fold.eps).each(Tensor.detach)
    scales, shifts = (each.abs() for each in scale_and_shift(*numbers))
    scale, shift = float(scales.max()), float(shifts.max())
    largest = max(float(own.detach().abs().max()) for own in parameters)
    # A channel that hardly counts behind the BatchNorm may vanish.
    counts = numbers.mean.new_ones(()) if numbers.weight is None else numbers.weight.abs() > _HARDLY
    if largest > 0.0 and bool((largest * scales < _FEW_DIGITS)[counts.expand(len(scales)).bool()].any()):
        return True
    largest += max(abs(part.residual) for part in fold.parts)
    if fold.direction == "forward":  # The shift is summed up over the inputs of each output.
        shift *= largest * max(own[0].numel() for own in parameters)
    return scale * largest + shift > torch.finfo(torch.float16).max


def _run(twin: nn.Module, recorder: Recorder, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    try:
        args, kwargs = _copy_example((args, kwargs))
    except Exception as error:
        raise FoldingError(f"The example cannot be copied, as each run needs its own: {named(error)}.") from error
    with _random_numbers_kept(twin), torch.no_grad(), _nothing_compiled(), recorder:
        try:
            # Watched as well, for some models merge their weights here, which are those of the original.
            twin.eval()
            # What the run gives lives until the recorder is closed: whatever it holds back counts as held by somebody.
            output = twin(*args, **kwargs)
        except Exception as error:
            raise FoldingError(
                f"The model does not run on the example it was given: {named(error)}. Pass what its `forward` takes "
                "as example_args and example_kwargs."
            ) from error
    return output


def _copy_example(example: Any) -> Any:
    """A copy for one run, which may write into its inputs or empty its dicts and lists."""
    together: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in {id(tensor): tensor for tensor in tensors_in(example)}.values():
        together[address_of(tensor) or 0].append(tensor)
    memo: dict[int, Any] = {}
    for address, tensors in together.items():
        if len(tensors) == 1 or not address:
            memo.update((id(tensor), tensor.detach().clone()) for tensor in tensors)
            continue
        # Inputs that share memory do so in the copy.
        storage = tensors[0].untyped_storage().clone()
        for tensor in tensors:
            other = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            memo[id(tensor)] = other.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    return copy.deepcopy(example, memo)


def _agree(expected: Any, found: Any) -> bool:
    """Whether two runs gave the same numbers, up to what rounding can grow to."""
    return all(
        first is not None and second is not None and _is_near(first, second)
        for first, second in zip_longest(tensors_in(expected), tensors_in(found))
    )


def _is_near(expected: Tensor, found: Tensor) -> bool:
    if expected.is_nested or found.is_nested:
        return expected.is_nested and found.is_nested and _agree(expected.unbind(), found.unbind())
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if expected.is_meta or expected.is_quantized or not (is_plain(expected) and is_plain(found)):
        return True  # Nothing that could be compared.
    if expected.layout is not torch.strided:
        expected, found = expected.to_dense(), found.to_dense()
    if expected.is_complex():
        expected, found = torch.view_as_real(expected), torch.view_as_real(found)
    if not expected.is_floating_point() or not expected.numel() or torch.equal(expected, found):
        return True
    # On average, since rounding may flip a decision here or there; a fold that is wrong moves more than that.
    finite = expected.isfinite()
    exact, error = expected[finite].double(), (found - expected)[finite].double()
    largest = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny) if exact.numel() else 1.0
    error, scale = ((each / largest).square().mean().sqrt() for each in (error, exact))
    return not exact.numel() or bool(error <= torch.finfo(expected.dtype).eps ** 0.5 * scale)


def in_float64(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[nn.Module, Any, Any] | None:
    """A copy of a model and its example in float64, in which rounding explains nothing; None if that is too large.

    Args:
        model: The model.
        args: Positional arguments of a call.
        kwargs: Keyword arguments of that call.
    """
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    is_exact = all(tensor.dtype is torch.float64 for tensor in tensors)
    if is_exact or sum(tensor.numel() for tensor in tensors) > _MOST_NUMBERS:
        return None
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().double()
        for tensor in tensors_in((args, kwargs))
        if tensor.is_floating_point() and tensor.dtype is not torch.float64
    }
    return (copy_model(model).double(), *copy.deepcopy((args, kwargs), memo))


@contextmanager
def _random_numbers_kept(model: nn.Module) -> Iterator[None]:
    with_cuda = list(model.parameters()) if torch.cuda.is_initialized() else []
    devices = sorted({parameter.get_device() for parameter in with_cuda if parameter.is_cuda})
    # Torch imports numpy, and numpy this part of it when somebody asks for it: then nobody has drawn from it yet.
    numpy: Any = sys.modules.get("numpy.random")
    state, state_of_numpy = random.getstate(), numpy and numpy.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.set_state(state_of_numpy)


def _nothing_compiled() -> AbstractContextManager[Any]:
    # Setting the stance loads the compiler, which takes seconds; where it is not loaded, nothing has been compiled.
    return torch.compiler.set_stance("force_eager") if _is_compiler_loaded() else nullcontext()


def _is_compiler_loaded() -> bool:
    return "torch._dynamo" in sys.modules
