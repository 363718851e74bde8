"""Runs a model once and writes the value graph down.

Three witnesses watch the run. Module hooks tell which module is running. A torch function mode sees calls at the level
of ``torch.nn.functional``, where a Linear or a BatchNorm is one call whatever it becomes below, and where tensors turn
into lists and arrays without any operation. A torch dispatch mode sees every operation below that. Nothing is traced
symbolically: the model runs as it is, and what the witnesses saw is what happened.
"""

from __future__ import annotations

import copy
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from lit_bnfold.folding.census import Census, names_around
from lit_bnfold.folding.graph import GIVEN, RETURNED, BatchNorm, Call, Frame, Layer, Ref, Value, ValueGraph, argument
from lit_bnfold.folding.kinds import (
    KIND_OF_FUNCTION,
    KINDS,
    NORMALISING,
    BatchNormKind,
    Kinds,
    LayerKind,
    Normalisation,
    own_tensors,
    size_of_bias_left_out,
)
from lit_bnfold.folding.ledger import Ledger
from lit_bnfold.folding.operations import (
    RECURRENT,
    asked_of_reshape,
    has_mask,
    is_arithmetic,
    is_compound,
    is_foreign,
    known_of,
    lets_numbers_out,
    name_of,
    numbers_read,
    repeats_asked,
)
from lit_bnfold.folding.tensors import WITHOUT_TENSORS, address_of, holds_no_tensor, tensors_in

# Those of torch, of TensorFlow and of published detection models.
_USUAL_EPS = (1e-5, 1e-3, 1e-6, 1e-4, 1e-8, 1e-12, 0.0)

_LARGE = -1e6

_RECURRENT_MODULES = {nn.GRU, nn.LSTM, nn.RNN}

_UNREAD = Ref(-1)

_Facts = TypeVar("_Facts", Layer, BatchNorm)


class Recorder:
    """Context manager that records what a model does while it is open; opened again, it records on.

    While the recorder is open the model carries additional forward hooks; afterwards it is as it was, and what the run
    wrote into its parameters and buffers is put back. Only the thread that opened the recorder is recorded.

    Args:
        model: The model of interest. The caller runs it, in whatever way is the real one.
        kinds: What counts as a layer and as a BatchNorm.
        plans: Whether a plan is to be made of what is recorded. For that, what outlives the run is found out.
        lends: Whether, for a plan, a layer without a bias, but with a forward of its own, gets one of zeros meanwhile.
            Only so can it be seen whether it would use that of a fold; but it may refuse it, and raise an error.
        evens: Whether a BatchNorm that normalises by operations of its own is made to give, to the bit, what torch's
            own makes of it.
        instead: What is to run instead of the function of a layer, made of its name and of that function.

    Raises:
        FoldingError: If a lazy module of the model has not met its first batch.

    Attributes:
        graph: What was recorded; complete when the recorder is closed. What the run gave must be dropped before that:
            whatever is still alive then counts as kept by somebody.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
        >>> x = torch.randn(4, 3)
        >>> with torch.no_grad(), Recorder(model) as recorder:
        ...     _ = model(x)
        >>> [(call.kind, call.owner) for call in recorder.graph.calls]
        [('layer', '0'), ('batchnorm', '1')]
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: Kinds = KINDS,
        *,
        plans: bool = True,
        lends: bool = True,
        evens: bool = False,
        instead: Callable[[str, Callable[..., Tensor]], Callable[..., Tensor]] | None = None,
    ) -> None:
        self.graph = ValueGraph()
        self._plans = plans
        self._lends = plans and lends
        self._evens = evens
        self._instead = instead
        self._census = Census(model, kinds)
        self._ledger = Ledger(self.graph, follows_memory=plans)
        self._batchnorms = self._census.batchnorm_kinds
        # Those that do not call `batch_norm` are one call each, whatever they do inside.
        self._whole = {module: kind for module, kind in self._batchnorms.items() if not kind.calls_batch_norm}
        self._seen_whole: nn.Module | None = None
        self._eps_before = {module: getattr(module, kind.eps, None) for module, kind in self._batchnorms.items()}
        self._eps_of_calls: dict[nn.Module, float] = {}
        self._computers = {
            source: (module, key)
            for module, computed in self._census.computed.items()
            for key, source in computed.items()
            if isinstance(source, nn.Module)
        }
        self._computed: dict[tuple[nn.Module, str], int] = {}  # the latest value of each tensor that is computed
        self._statistics = {id(tensor) for module in self._batchnorms for tensor in own_tensors(module).values()}
        self._by_address: dict[int | None, list[Tensor]] = defaultdict(list)
        for tensor in self._census.tensors:
            self._by_address[address_of(tensor)].append(tensor)
        self._thread: int | None = None
        self.running = [_Running(0, None)]
        self.looking_away = _LookingAway()
        # By tensor, the memory that it had and what was in it; the run may give it other memory.
        self._before_write: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._varying: set[int] = set()  # storages that hold something else than constants
        self._lent: dict[nn.Module, Tensor] = {}
        self._picked: dict[int, _Picked] = {}  # by value, what masks have picked and nobody has counted yet
        self._modules = {name: module for module, name in self._census.names.items()}
        self._hashes = {id(module): hash(module) for module in self._census.names}
        # As they were when Python first got to know a number. By identity, for the hash of a metric of torchmetrics
        # changes with its state.
        self._attributes: dict[int, dict[str, Any]] = {}
        self._exit = ExitStack()
        if plans:
            for tensor, name in self._census.tensors.items():
                self._ledger.register(tensor, name)
        if plans or self._whole:
            for module in self._batchnorms:
                self.graph.batchnorms[self._census.names[module]] = self._census.batchnorms[module]

    def __enter__(self) -> Recorder:
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            stack.callback(self._put_back)
            hooks: list[RemovableHandle] = []
            stack.callback(_remove_all, hooks)
            for module in self._census.names:
                if not isinstance(module, torch.jit.ScriptModule):
                    self._watch(module, hooks)
                    if self._lends:
                        self._lend_bias(module, stack)
            stack.enter_context(_FunctionWitness(self))
            stack.enter_context(_OperationWitness(self))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()
        for value in [value for value, picked in self._picked.items() if not picked.is_written_back]:
            self._note_look(value)
        self._picked.clear()
        if self._plans:
            self._ledger.settle()

    @property
    def has_lent(self) -> bool:
        """Whether a layer had a bias that is not its own."""
        return bool(self._lent)

    # The model's own tensors come out as they went in.

    def save_written(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Note what an operation is about to write, and what the model's own tensors held before."""
        known = known_of(operation)
        if not known.writes and not known.is_batch_norm:
            return ()
        written = tuple(tensors_in([argument(args, kwargs, *place) for place in known.writes]))
        trains = known.training is None or argument(args, kwargs, *known.training) is not False
        for tensor in tensors_in((args, kwargs)) if known.is_batch_norm and trains else written:
            self._save_before_write(tensor)
        return written

    def _save_before_write(self, tensor: Tensor) -> None:
        with self.looking_away:
            for own in self._by_address.get(address_of(tensor) or -1, ()):
                if own not in self._before_write:
                    self._before_write[own] = own.detach(), own.detach().clone()

    def _put_back(self) -> None:
        with torch.no_grad():
            for memory, before in self._before_write.values():
                memory.copy_(before)
        self._before_write.clear()

    # What the module hooks see.

    def _watch(self, module: nn.Module, hooks: list[RemovableHandle]) -> None:
        hooks.append(module.register_forward_pre_hook(self._enter_module, prepend=True, with_kwargs=True))
        hooks.append(module.register_forward_hook(self._leave_module, with_kwargs=True, always_call=True))
        if module in self._census.hooked:
            hooks.append(module.register_forward_hook(self._show_to_hooks, prepend=True))

    def _lend_bias(self, module: nn.Module, stack: ExitStack) -> None:
        """Give a layer without a bias one of zeros, to see whether a forward of its own would use that of a fold."""
        size = self._size_of_missing_bias(module)
        like = None if size is None else next(module.parameters(), None)
        if size is None or like is None:
            return
        own = module._parameters
        if "bias" in own:
            stack.callback(own.update, {"bias": None})
        else:
            stack.callback(own.pop, "bias")
        bias = nn.Parameter(like.new_zeros(size), requires_grad=False)
        own["bias"] = self._lent[module] = bias

    def _size_of_missing_bias(self, module: nn.Module) -> int | None:
        """The length of the bias that a layer with a forward of its own lacks; None where nothing is to be asked."""
        kind = self._census.layer_kinds.get(module)
        if kind is None:
            return size_of_bias_left_out(module)
        if "weight" not in self._census.owned[module].keys() | self._census.computed.get(module, {}).keys():
            return None  # The census says what is wrong with it.
        is_asked = kind is not NORMALISING and kind.has_bias and not kind.runs_torchs_forward(module)
        return kind.channels(module)[1] if is_asked and module._parameters.get("bias") is None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        # A model that copies one of its modules during the run copies the hooks on it too.
        return self

    def _enter_module(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._is_known(module):
            return
        if threading.get_ident() != self._thread:
            self._note_blind_spot(module)
            return
        self.graph.frames.append(Frame(self._census.names[module], self.running[-1].frame))
        self.running.append(_Running(len(self.graph.frames) - 1, module, self.looking_away.is_on))
        if self._plans and (self.graph.forked or self._picked):
            self._note_what_is_told(module, args, kwargs)
        if module in self._census.hooked:
            self._show_to_hooks(module, args, kwargs)
        if module in self._whole and not self.looking_away.is_on:
            self.looking_away.is_on, self._seen_whole = True, module

    def _is_known(self, module: nn.Module) -> bool:
        """Whether a module is one of the model's, and can be found by its hash, which that of a metric changes."""
        return self._hashes.get(id(module)) == hash(module)

    def _note_what_is_told(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note if numbers that Python got to know may reach a module otherwise than in the one tensor it is given.

        It may be by its other arguments, by how many there are, or by its attributes. A module around it that is not
        running may have been asked for its ``forward``, past its hooks, and decide there by its own attributes.
        """
        name, caller = self._census.names[module], self.running[-2].module
        is_given_one_tensor = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
        if not is_given_one_tensor or any(map(self._is_changed, module.modules())):
            self._note_told(name)
        around = map(self._modules.get, names_around(name))
        running = {id(each.module) for each in self.running}
        if any(each is not None and id(each) not in running and self._is_changed(each) for each in around):
            self._note_told(None if caller is None else self._census.names[caller])

    def _note_told(self, module: str | None) -> None:
        for picked in self._picked.values():
            picked.told.append(module)
        cause = next(iter(self.graph.forked.values()), None)
        if cause is not None:
            self.graph.forked.setdefault(module, cause)

    def _remember_attributes(self) -> None:
        if self._plans and not self._attributes:
            self._attributes = {id(module): _attributes_of(module) for module in self._census.names}

    def _is_changed(self, module: nn.Module) -> bool:
        return _attributes_of(module) != self._attributes.get(id(module))

    def _leave_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        if not self._is_known(module):
            if self.running[-1].module is module:  # It was known when it was entered.
                self.running.pop()
            return None
        if module is self._seen_whole:
            self.looking_away.is_on, self._seen_whole = False, None
            output = self._add_whole_batchnorm(module, self._whole[module], args, kwargs, output)
        if module in self._computers and isinstance(output, Tensor):
            with self.looking_away:
                self._computed[self._computers[module]] = self._ledger.value(output).index
        # Only what a module holds itself could be used unseen.
        if self._plans and self._census.owned[module] and not self._is_seen(self.running[-1]):
            self._note_blind_spot(module)
        self.running.pop()
        if len(self.running) == 1:
            # Whoever calls a layer by itself may do so elsewhere, and read there what it makes.
            fate = GIVEN if self._census.names[module] else RETURNED
            with self.looking_away:
                for tensor in tensors_in(output):
                    self._ledger.value(tensor).fate = fate
        return output if self._evens else None

    def _is_seen(self, running: _Running) -> bool:
        """Whether the witnesses see what this call of a module does; inside a custom operation they do not."""
        if not (running.away or (running.heard_function and running.heard_operation)):
            with self.looking_away:
                torch.empty(0)
        return running.away or (running.heard_function and running.heard_operation)

    def _note_blind_spot(self, module: nn.Module) -> None:
        for tensor in self._census.owned[module].values() if self._plans else ():
            storage = self.graph.named_values[self._census.tensors[tensor]].storage
            self.graph.aliased.setdefault(storage, "is used where the run could not be watched")

    def _show_to_hooks(self, module: nn.Module, args: Any, other: Any) -> None:
        if threading.get_ident() == self._thread:
            self._add_call("opaque", "hook", (args, other))

    # What the function mode sees.

    def on_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one call of torch's Python interface; record it if it is a layer's, a BatchNorm's or an escape."""
        running = self.running[-1]
        running.heard_function, module = True, running.module
        if self.looking_away.is_on:
            return function(*args, **kwargs)
        if self._picked:
            self._note_looks(function, args, kwargs)
        if module is not None:
            if function is F.batch_norm and module in self._batchnorms:
                return self._run_batchnorm(module, args, kwargs)
            kind = self._census.layer_kinds.get(module) or self._kind_by_call(module, function, args, kwargs)
            if kind is not None and function is kind.function and module not in self._batchnorms:
                return self._run_layer(module, kind, args, kwargs)
            if function is F.batch_norm:
                self._note_batch_norm_inside()
        asked = asked_of_reshape(function, args, kwargs)
        if asked is not None:
            return self._run_reshape(function, asked, args, kwargs)
        repeats = repeats_asked(function, args, kwargs)
        if repeats is not None:
            return self._run_whole("operation", "repeat_interleave", torch.repeat_interleave, repeats, {})
        if function is torch._pad_packed_sequence:
            # It makes a tensor of the lengths without any operation that reads the batch sizes.
            return self._run_whole("operation", "pad_packed_sequence", function, args, kwargs)
        if function in RECURRENT:
            return self._run_whole("operation", function.__name__, function, args, kwargs)
        if function is F.pad and "circular" in (*args, *kwargs.values()):
            # Below, this is a dozen of writes into slices of one tensor.
            return self._run_whole("operation", "circular_pad", F.pad, args, kwargs)
        for tensor in numbers_read(function, args, kwargs):
            self._note_reading(function, tensor)
        # Torch's own functions read one tensor in Python at most, their first; what others do is not seen from here.
        for tensor in tensors_in((args, kwargs)) if is_foreign(function) else args[:1]:
            if isinstance(tensor, Tensor):
                self._note_python(function, tensor)
        return function(*args, **kwargs)

    def _kind_by_call(
        self, module: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> LayerKind | None:
        """A module of any class is a layer if it calls a layer's function with a weight and a bias of its own."""
        kind = KIND_OF_FUNCTION.get(function)
        if kind is None or module in self._batchnorms:
            return None
        weight = self._census.owned.get(module, {}).get("weight")
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 - kind.channel_axis:
            return None
        given = kind.given(args, kwargs)
        return kind if given.get("weight") is weight else None

    def _note_batch_norm_inside(self) -> None:
        """What is left of a BatchNorm that does more leaves out every `batch_norm`, also that of its parts."""
        for running in self.running:
            if running.module in self._batchnorms and self._plans:
                name = self._census.names[running.module]
                facts = self.graph.batchnorms[name]
                self.graph.batchnorms[name] = _add_obstacle(facts, "own-forward", "a part of it calls `batch_norm` too")

    def _run_reshape(
        self, function: Callable[..., Any], asked: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Below, this is a view like any other, or a copy and a view; what was asked for is known only here."""
        tensor = args[0]
        with self.looking_away:
            output = function(*args, **kwargs)
        if output is not tensor:
            self._add_call("operation", "reshape", (tensor,), asked, output)
        return output

    def _run_batchnorm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        name, given = self._census.names[module], NORMALISING.given(args, kwargs)
        if given.get("training"):
            for key in ("running_mean", "running_var"):
                if given[key] is not None:
                    self._save_before_write(given[key])
        if self._plans:
            self._look_at_batchnorm(module, name, given)
        return self._run_whole("batchnorm", "batch_norm", F.batch_norm, args, kwargs, owner=name)

    def _look_at_batchnorm(self, module: nn.Module, name: str, given: dict[str, Any]) -> None:
        """Note what its call tells of a BatchNorm, as one and as a layer."""
        facts = self.graph.batchnorms[name]
        if given.get("training"):
            facts = _add_obstacle(facts, "batch-statistics", "it normalised by the batch, as in training")
        elif not self._are_own(module, given, ("running_mean", "running_var", "weight", "bias")):
            facts = _add_obstacle(facts, "computed-weight", "it was called with other tensors than its own")
        with self.looking_away:
            as_layer = self.graph.layers.get(name) or self._census.layer(module)
        eps = given.get("eps", 1e-5)
        facts = self._with_eps(module, facts, eps)
        if facts.eps is not None:
            as_layer = _add_obstacle(as_layer, "own-forward", f"`{name}` normalises with another eps than its own")
        if facts.obstacle is not None:
            as_layer = replace(as_layer, obstacle=facts.obstacle)
        self.graph.batchnorms[name], self.graph.layers[name] = facts, as_layer

    def _with_eps(self, module: nn.Module, facts: BatchNorm, eps: float) -> BatchNorm:
        """The facts about a BatchNorm, with the eps of its call if that is not the one it had before the run."""
        if self._eps_of_calls.setdefault(module, eps) != eps:
            return _add_obstacle(facts, "own-forward", "it normalises with another eps from call to call")
        return facts if eps == self._eps_before[module] else replace(facts, eps=eps)

    def _add_whole_batchnorm(
        self, module: nn.Module, kind: BatchNormKind, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Enter what a BatchNorm did by itself as one call, if it is what torch's own does; its output."""
        name, inputs = self._census.names[module], (*args, *kwargs.values())
        facts = self.graph.batchnorms[name]
        if facts.obstacle is None:
            with self.looking_away:
                # An `nn.Identity`, which will be left of it, takes no other keyword.
                eps = _eps_of(kind, module, inputs) if kwargs.keys() <= {"input"} else None
            if eps is None or not isinstance(output, Tensor):
                facts = _add_obstacle(facts, "own-forward", "in float64 it gives something else than a BatchNorm does")
            else:
                facts = self._with_eps(module, facts, eps)
            self.graph.batchnorms[name] = facts
        if self._evens and self.graph.batchnorms[name].obstacle is None:
            with self.looking_away:
                usual = _normalised(kind, inputs[0], kind.numbers(module, self.graph.batchnorms[name].eps))
                output = torch.empty_like(output).copy_(usual)
        given = (*inputs, *own_tensors(module).values())
        self._add_call("batchnorm", "batch_norm", given, output=output, owner=name)
        return output

    def _run_layer(self, module: nn.Module, kind: LayerKind, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        name, input_name = self._census.names[module], kind.arguments[0]
        if not args and input_name in kwargs:  # Its input comes first in what is recorded.
            args, kwargs = (kwargs[input_name],), {key: each for key, each in kwargs.items() if key != input_name}
        if not self._plans:
            return self._run_whole("layer", kind.function.__name__, kind.function, args, kwargs, owner=name)
        with self.looking_away:
            facts = self.graph.layers.get(name) or self._census.layer(module, kind.function.__name__)
        given = kind.given(args, kwargs)
        is_without = kind.has_bias and given.get("bias") is None
        if is_without and not kind.runs_torchs_forward(module):
            is_asked = module in self._lent or module._parameters.get("bias") is not None
            what = "has no use for the bias" if is_asked else "was not seen to use a bias such as the one"
            sentence = f"the forward of `{name}` {what} that a fold would give it"
            facts = _add_obstacle(facts, "own-forward", sentence)
        elif not self._are_own(module, given, kind.arguments[1:]):
            facts = _add_obstacle(facts, "computed-weight", f"`{name}` was called with other tensors than its own")
        if kind.function is F.embedding and argument(args, kwargs, 3, "max_norm") is not None:
            facts = _add_obstacle(facts, "computed-weight", f"`{name}` limits the norm of its rows at every call")
        groups = argument(args, kwargs, 6, "groups", 1)
        if facts.kernel and groups != kind.groups(module):
            facts = _add_obstacle(facts, "unusual-weight", f"`{name}` was called with other groups than its own")
        computed = tuple(self._ledger.value(given[key]).index for key in facts.computed if given.get(key) is not None)
        output = self._run_whole("layer", kind.function.__name__, kind.function, args, kwargs, owner=name)
        self.graph.calls[-1].computed = computed
        taken = None if kind.function is F.embedding else given.get(input_name)  # of an Embedding, indices
        for side, tensor, expected in (("inputs", taken, facts.in_channels), ("outputs", output, facts.out_channels)):
            if tensor is not None and tensor.is_nested:
                facts = _add_obstacle(facts, "unusual-weight", f"`{name}` is called with nested tensors")
            elif tensor is not None and tensor.shape[kind.channel_axis] != expected:
                sentence = f"`{name}` has another number of {side} than its attributes say"
                facts = _add_obstacle(facts, "unusual-weight", sentence)
        self.graph.layers[name] = facts
        return output

    def _are_own(self, module: nn.Module, given: dict[str, Any], keys: tuple[str, ...]) -> bool:
        # Those it had before the run: `functional_call` lends a module other tensors for the time of one call.
        own = self._census.owned[module]
        if module in self._lent:
            own = own | {"bias": self._lent[module]}
        computed = self._census.computed.get(module, {})
        return all(
            self._is_computed(module, key, given.get(key)) if key in computed else given.get(key) is own.get(key)
            for key in keys
        )

    def _is_computed(self, module: nn.Module, key: str, given: Any) -> bool:
        """Whether a tensor is what a parametrization or a hook of a module has just computed."""
        if not isinstance(self._census.computed[module][key], nn.Module):
            return given is vars(module).get(key)
        return isinstance(given, Tensor) and self._ledger.value(given).index == self._computed.get((module, key))

    def _run_whole(
        self,
        kind: Literal["layer", "batchnorm", "operation"],
        name: str,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        owner: str | None = None,
    ) -> Tensor:
        """Run a function whose inside is of no interest, as one call."""
        with self.looking_away:
            if owner is not None and self._instead is not None:
                function = self._instead(owner, function)
            try:
                output = function(*args, **kwargs)
            except BaseException:
                self._note_failure(name, args, kwargs)
                raise
        self._add_call(kind, name, args, kwargs, output, owner=owner)
        return output

    def _note_python(self, function: Callable[..., Any], tensor: Tensor) -> None:
        if lets_numbers_out(function):
            self._save_before_write(tensor)  # Whoever has the memory could write it unseen.
            self._note_reading(function, tensor)
        elif id(tensor) in self._statistics:
            # A glance at the dtype is a reading too: the tensor will be gone from the folded model.
            self._add_call("opaque", name_of(function), (tensor,))

    def _note_reading(self, function: Callable[..., Any], tensor: Tensor) -> None:
        self._add_call("opaque", name_of(function), (tensor,))
        self._note_fork((tensor,))

    def _note_fork(self, args: Any, what: str = "makes a Python value of a tensor") -> None:
        """By what the latest call has done, the modules that are running may take another path the next time."""
        if self._varies(args):
            self._enter_fork(self.graph.calls[-1], what)

    def _varies(self, args: Any) -> bool:
        """Whether anything that could be another one next time is among some tensors of which Python is told."""
        module = self.running[-1].module
        if type(module) in _RECURRENT_MODULES and module not in self._census.hooked and "forward" not in vars(module):
            # Torch's own code asks how many sequences a packed batch has, and tells nobody.
            return False
        with self.looking_away:
            values = [self._ledger.value(tensor) for tensor in tensors_in(args)]
            return not all(self._is_constant(value) for value in values)

    def _enter_fork(self, call: Call, what: str, told: Sequence[str | None] = ()) -> None:
        self._remember_attributes()
        frames = (call.frame, self.running[-1].frame)
        around = [module for frame in frames for module in self.graph.modules_around(frame)]
        for module in (*around, *told):
            self.graph.forked.setdefault(module, f"{self.graph.where(call)} {what}")

    def _note_look(self, value: int) -> None:
        """Somebody may count what a mask has picked, and has a Python value then."""
        picked = self._picked.pop(value, None)
        if picked is not None:
            self._enter_fork(picked.call, "picks by a mask", picked.told)

    def _note_looks(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self.looking_away:
            for tensor in tensors_in((args, kwargs)) if function is not Tensor.__setitem__ else args[:1]:
                self._note_look(self._ledger.value(tensor).index)

    def _note_failure(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Whoever catches an error has learned something of the numbers that led to it."""
        self._add_call("opaque", name, (args, kwargs))
        self._note_fork((args, kwargs), "fails")

    # What the dispatch mode sees.

    def on_operation(self, operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation and record it."""
        known = known_of(operation)
        written = self.save_written(operation, args, kwargs)
        try:
            output = operation(*args, **kwargs)
        except BaseException:
            self._note_failure(known.name, args, kwargs)
            raise
        read = args[1:] if known.reads_shapes and not self._may_change_form(args) else args
        self._add_call("operation", known.name, read, kwargs, output, written, draws=known.draws)
        if known.reveals_numbers:
            self._note_fork((args, kwargs))
        if known.masks is not None and has_mask(args[1]) and self._varies(args[1]):
            self._note_mask(known.masks, args, output)
        return output

    def _may_change_form(self, args: tuple[Any, ...]) -> bool:
        """Whether a fold may lay the first of some arguments out anew, as what a BatchNorm gave, or take it away."""
        with self.looking_away:
            maker = self.graph.maker(self._ledger.value(args[0])) if args and isinstance(args[0], Tensor) else None
        return maker is None or maker.kind == "batchnorm"

    def _note_mask(self, does: Literal["picks", "writes"], args: tuple[Any, ...], output: Any) -> None:
        """How many a mask says is a Python value as soon as somebody counts them, or has to have as many.

        That is nobody where what it picks is written back where it says, and where one number is written everywhere.
        """
        call = self.graph.calls[-1]
        if does == "picks":
            self._remember_attributes()
            with self.looking_away:
                self._picked[self._ledger.value(output).index] = _Picked(call)
        elif args[2].numel() != 1 and call.args[2].value not in self._picked:
            self._note_fork(args[1], "writes by a mask")

    def _add_call(
        self,
        kind: Literal["layer", "batchnorm", "operation", "opaque"],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        output: Any = None,
        written: tuple[Tensor, ...] = (),
        owner: str | None = None,
        draws: bool = False,
    ) -> None:
        with self.looking_away:
            given = _tensors_given(args, kwargs or {})
            if owner is not None and not self._plans:
                given = given[:1]  # Its own tensors matter to a plan alone.
            read = {id(tensor): self._ledger.value(tensor) for tensor in given}
            call = Call(
                index=len(self.graph.calls),
                kind=kind,
                name=name,
                frame=self.running[-1].frame,
                owner=owner,
                args=() if kind == "opaque" else _with_refs(args, read),
                kwargs=_with_refs(kwargs, read) if kwargs else {},
                inputs=tuple([value.index for value in read.values()]),
                draws=draws,
            )
            self.graph.calls.append(call)
            for value in read.values():
                value.users.append(call.index)
                if self._picked and not self._is_written_back(call, value):
                    self._note_look(value.index)
            made = [tensor for tensor in _tensors_given((output,)) if id(tensor) not in read]
            constant = not draws and kind == "operation" and all(map(self._is_constant, read.values()))
            outputs = [self._ledger.add(tensor, call.index, constant) for tensor in (*written, *made)]
            call.outputs = tuple([value.index for value in outputs])
            for value in outputs[: len(written)]:
                self.graph.writers.setdefault(value.storage, []).append(call)
                if not constant:
                    self._varying.add(value.storage)

    def _is_written_back(self, call: Call, value: Value) -> bool:
        """Whether a call does nothing with a value but write it to where the mask says that has picked it."""
        picked = self._picked.get(value.index)
        if picked is None or call.name != "aten.index_put_.default":
            return False
        target, indices, written = call.args[:3]
        ref = Ref(value.index)
        is_back = written == ref and indices == picked.call.args[1] and ref not in (target, *indices)
        picked.is_written_back |= is_back
        return is_back

    def _is_constant(self, value: Value) -> bool:
        # A tensor that began as a constant may have been written since then through a view of it.
        return value.constant and value.storage not in self._varying


_MOST_VALUES = 1000

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _attributes_of(module: nn.Module) -> dict[str, Any]:
    """What may tell a module which path to take: plain values, also in containers and objects, and who is in it."""
    public = {
        key: _plain_values(value)
        for key, value in vars(module).items()
        if key not in _OF_EVERY_MODULE and not key.startswith("_")
    }
    return public | {"training": module.training, "_modules": {key: id(each) for key, each in module._modules.items()}}


def _plain_values(value: Any, depth: int = 2) -> Any:
    """A plain value itself, and those in a container or an object, some levels deep."""
    if type(value) in WITHOUT_TENSORS:
        return value
    if depth == 0 or isinstance(value, (Tensor, nn.Module, type)):
        return None
    if isinstance(value, (dict, list, tuple, set, deque)) and len(value) > _MOST_VALUES:
        return len(value)  # That is data, such as a vocabulary.
    if isinstance(value, dict):
        return {key: _plain_values(each, depth - 1) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, deque)):
        return [_plain_values(each, depth - 1) for each in value]
    attributes = getattr(value, "__dict__", {}).items()
    return {key: _plain_values(each, depth - 1) for key, each in attributes if not str(key).startswith("_")}


def _add_obstacle(facts: _Facts, code: str, sentence: str) -> _Facts:
    """The same facts with an obstacle; the first one found stays."""
    return replace(facts, obstacle=facts.obstacle or (code, sentence))


@dataclass(slots=True)
class _Running:
    """A call of a module that has not come to its end: whether the witnesses have heard of anything inside it."""

    frame: int
    module: nn.Module | None
    away: bool = True  # whether it is the inside of something that is recorded as a whole
    heard_function: bool = False
    heard_operation: bool = False


@dataclass
class _Picked:
    """What a mask has picked: the call that did it, who may have been told how many, and whether it went back."""

    call: Call
    told: list[str | None] = field(default_factory=list)
    is_written_back: bool = False


class _LookingAway:
    """In here happens a recorder's own doing, or the inside of a call that is recorded as a whole."""

    def __init__(self) -> None:
        self.is_on = False
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(self.is_on)
        self.is_on = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_on = self._before.pop()


class _Arithmetic(TorchDispatchMode):
    """Finds out whether all that is done in here is arithmetic, of which a few numbers show what it is for all others.

    Of what compares numbers, picks by a mask or limits them, they do not.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_arithmetic = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # As of the witness below.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload) and is_compound(func.name()):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        self.is_arithmetic &= is_arithmetic(func)
        return func(*args, **(kwargs or {}))


class _FunctionWitness(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.on_function(func, args, kwargs or {})


class _OperationWitness(TorchDispatchMode):
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else torch loads its compiler with the first operation, which takes seconds, to keep it from compiling this.
        return False

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._recorder.running[-1].heard_operation = True
        if self._recorder.looking_away.is_on:
            # What a call that is recorded as a whole writes has to be put back as well.
            self._recorder.save_written(func, args, kwargs)
            return func(*args, **kwargs)
        # In inference mode compound operations arrive whole; they are taken apart, so that one table serves both modes.
        if isinstance(func, torch._ops.OpOverload) and is_compound(func.name()):
            with self:
                return func.decompose(*args, **kwargs)
        return self._recorder.on_operation(func, args, kwargs)


def _tensors_given(args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> list[Tensor]:
    """The same as ``tensors_in`` both, and faster: nearly all of a call's tensors lie in no container."""
    found: list[Tensor] = []
    for each in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(each, Tensor):
            found.append(each)
        elif not holds_no_tensor(each):
            found += tensors_in(each)
    return found


def _with_refs(tree: Any, read: dict[int, Value]) -> Any:
    """The same nesting of arguments with a ``Ref`` for each tensor: ``_UNREAD`` for one that the call does not read."""
    if isinstance(tree, Tensor):
        value = read.get(id(tree))
        return _UNREAD if value is None else Ref(value.index)
    if isinstance(tree, (list, tuple)):
        return tuple([each if holds_no_tensor(each) else _with_refs(each, read) for each in tree])
    if isinstance(tree, dict):
        return {key: _with_refs(each, read) for key, each in tree.items()}
    return tree


def _eps_of(kind: BatchNormKind, module: nn.Module, args: tuple[Any, ...]) -> float | None:
    """With which eps a module does what torch's own BatchNorm does; None if it does something else.

    A copy is asked, in float64 and with small variances, since others would hide it.
    """
    if len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].is_floating_point() or not args[0].numel():
        return None
    input, exact = args[0].detach().double(), copy.deepcopy(module).double()
    axis = kind.channel_axis % max(1, input.dim())
    if axis == 0 or input.shape[axis] != len(kind.numbers(exact).mean):
        return None
    # What the example is too small or of the wrong sign to show, such as a limit, large numbers do.
    inputs = (input, _LARGE * input)
    with torch.no_grad():
        kind.numbers(exact).var.fill_(1e-6)
        outputs = _arithmetic_of(exact, inputs)
    for eps in (kind.numbers(exact).eps,) if hasattr(module, kind.eps) else _USUAL_EPS:
        numbers = kind.numbers(exact, eps)
        if outputs and all(map(_is_same, outputs, (_normalised(kind, each, numbers) for each in inputs))):
            return eps
    return None


def _arithmetic_of(module: nn.Module, inputs: Sequence[Tensor]) -> list[Any]:
    """What a module makes of some inputs, if it takes them and does arithmetic alone; else nothing."""
    try:
        with _Arithmetic() as seen:
            outputs = [module(input) for input in inputs]
    except Exception:
        return []  # It takes some numbers or dtypes alone.
    return outputs if seen.is_arithmetic else []


def _is_same(output: Any, expected: Tensor) -> bool:
    if not isinstance(output, Tensor) or output.shape != expected.shape or output.dtype != expected.dtype:
        return False
    near = 1e-9 * expected.abs().amax().nan_to_num(0.0)
    return torch.allclose(output, expected, rtol=0.0, atol=float(near))


def _normalised(kind: BatchNormKind, input: Tensor, numbers: Normalisation) -> Tensor:
    # (N, ..., C, ...) -> (N, C, ...) and back
    return numbers.of(input.movedim(kind.channel_axis, 1)).movedim(1, kind.channel_axis)


def _remove_all(hooks: Sequence[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
