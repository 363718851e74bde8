"""One run of a module's own validation, or of its training steps, in the middle of a fit, that leaves no trace.

Lightning has no public way to validate from inside a hook of ``Trainer.fit``, so this file drives the fit's own
validation loop. It is the only file of this package that touches private names of Lightning's Trainer. Most of them are
never spelled out: whole objects are put back as they were, with whatever attributes their version of Lightning gives
them.
"""

from __future__ import annotations

import copy
import operator
import random
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial, singledispatch
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy
import torch
from lightning.fabric.loggers.logger import _DummyExperiment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin, is_lazy  # type: ignore[attr-defined]
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torchmetrics import Metric

from lit_bnfold.callbacks.kept_files import files_put_back
from lit_bnfold.folding import FoldingError
from lit_bnfold.folding.tensors import WITHOUT_TENSORS
from lit_bnfold.writing import written_at_once

_GENERATORS = (torch.Generator, random.Random, numpy.random.Generator, numpy.random.RandomState)
_CONTAINERS = (dict, list, deque, set)
_OPENED = (nn.Module, *_CONTAINERS, tuple, *_GENERATORS)
_MOST_PARTS = 10_000
_missing = object()
_HOOKS = tuple(name for name in dir(Callback) if name.startswith("on_"))
# Where loaders, their datasets and those in turn keep what may draw random numbers.
_INSIDE_LOADERS = ("sampler", "batch_sampler", "dataset", "collate_fn", "transform", "target_transform", "transforms")
_LISTS_INSIDE_LOADERS = ("datasets", "transforms")
_LIVE_METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


def validation_follows(trainer: Trainer) -> bool:
    """Whether a fit validates right after the training batch that ends at this moment.

    Args:
        trainer: A Trainer in the hook ``on_train_batch_end``.
    """
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


@dataclass(frozen=True)
class ValidationRun:
    """What one run of the module's own validation gave.

    Attributes:
        metrics: Every scalar that validation logs, under its key in ``trainer.callback_metrics``, with the suffix
            ``/dataloader_idx_<i>`` where there are several loaders. A module that logs none has the one key ``loss``:
            the mean of the losses that ``validation_step`` returns, weighted by batch size. Empty if it returns none.
        batches: The number of batches run, per validation loader. A ``CombinedLoader`` that is not sequential counts
            as one loader.
    """

    metrics: dict[str, float]
    batches: tuple[int, ...]


def run_validation(
    trainer: Trainer, pl_module: LightningModule, callbacks: Sequence[Callback] = (), epoch: int | None = None
) -> ValidationRun | None:
    """Run the validation of ``pl_module`` once and put everything back as it was, also when validation raises.

    Every run draws the same random numbers, so two runs differ only by what was changed between them. Loggers write
    nothing, of all callbacks only ``callbacks`` get their validation hooks called, and files that the module writes
    over have their content back. What stays: new files that it writes, what it changes in place in plain tensor
    attributes and in objects other than Python's containers and torchmetrics, and, if the fit has not validated before,
    the validation loaders, so that the next run reads the same ones.

    Args:
        trainer: A Trainer in ``fit``, at a point where no validation runs, such as ``on_train_end``; all ranks of it.
        pl_module: The module that ``trainer`` fits.
        callbacks: The callbacks that measure. What they keep on themselves stays.
        epoch: Which epoch it shall be for the module; by default the Trainer's current one.

    Returns:
        What validation logged, or None if there is nothing to validate on: no ``validation_step``, no validation
        loader, none with a batch, or ``limit_val_batches=0``.
    """
    if not trainer.enable_validation:
        return None
    loop = trainer.fit_loop.epoch_loop.val_loop
    _set_up_loaders(trainer)
    if loop.skip:
        return None
    returned_loss = _ReturnedLoss()
    stale = dict(trainer._logger_connector._callback_metrics)
    with _sandbox(trainer, pl_module, [*callbacks, returned_loss], epoch):
        try:
            loop.run()
        except BaseException as error:
            # As Lightning does; they have to be done before all is put back.
            for callback in callbacks:
                callback.on_exception(trainer, pl_module, error)
            raise
        # Lightning puts a new tensor under each key that it updates, so whatever is not an old object was logged now.
        logged = {key: value for key, value in trainer.callback_metrics.items() if value is not stale.get(key)}
        return _measured(trainer, loop, logged, returned_loss)


def run_trainers_validation(
    trainer: Trainer, pl_module: LightningModule, callbacks: Sequence[Callback], **kwargs: Any
) -> ValidationRun:
    """Run ``trainer.validate`` once, outside of a fit.

    As in ``run_validation``, every run draws the same random numbers, and loggers write nothing. The Trainer's own
    callbacks take part, and what it and the module come to stays.

    Args:
        trainer: A Trainer that is doing nothing else.
        pl_module: The module.
        callbacks: The callbacks that measure.
        **kwargs: What ``trainer.validate`` takes besides.

    Returns:
        What validation logged.
    """
    others, returned_loss = vars(trainer)["callbacks"], _ReturnedLoss()
    with ExitStack() as stack:
        stack.enter_context(same_random_numbers(trainer.global_rank))
        stack.enter_context(written_at_once(trainer))
        stack.enter_context(files_put_back())
        for logger in trainer.loggers:
            stack.enter_context(_muted_logger(logger))
        vars(trainer)["callbacks"] = [*others, *callbacks, returned_loss]
        try:
            trainer.validate(pl_module, verbose=False, **kwargs)
        finally:
            vars(trainer)["callbacks"] = others
    return _measured(trainer, trainer.validate_loop, trainer.callback_metrics, returned_loss)


def _measured(trainer: Trainer, loop: Any, logged: Mapping[str, Tensor], returned_loss: _ReturnedLoss) -> ValidationRun:
    """What a run of a validation loop has logged, and over how many batches."""
    if loop._combined_loader is None:  # There was nothing to validate on.
        return ValidationRun({}, ())
    metrics = {key: float(value) for key, value in logged.items() if value.numel() == 1}
    loaders = range(loop.num_dataloaders if loop._is_sequential else 1)
    batches = tuple(loop._seen_batches_per_dataloader[idx] for idx in loaders)
    # All ranks have to meet here, also if only some of them logged.
    loss = returned_loss.compute(trainer)
    return ValidationRun(metrics or loss, batches)


def run_training_steps(
    trainer: Trainer,
    pl_module: LightningModule,
    batches: int,
    flags: Mapping[nn.Module, bool],
    watching: AbstractContextManager[object],
) -> int:
    """Run the ``training_step`` of ``pl_module`` on the first batches of its training data, and train nothing.

    Each step begins with the module as it is now, whatever the steps before it did. An optimizer that is told to step
    runs its closure and finds no gradients, ``self.log`` does nothing, and everything is put back as by
    ``run_validation``, parameters and gradients as well. Without a fit the training loaders are set up for this run.

    Args:
        trainer: A Trainer in ``fit`` or in ``validate``, at a point where no step runs; all ranks of it.
        pl_module: The module of ``trainer``.
        batches: How many batches to run, or all if there are fewer.
        flags: The training flags of the modules for these steps.
        watching: What is entered around each step.

    Returns:
        The number of batches run by this rank.

    Raises:
        FoldingError: If ``training_step`` takes the iterator of the loader instead of a batch.
    """
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise FoldingError("`training_step` takes a `dataloader_iter`; nobody else can hand it batches.")
    done = 0
    # To leave inference mode also means to turn gradients on.
    with torch.inference_mode(False), _put_back([vars(trainer), vars(trainer.fit_loop)]):
        _set_up_training_loaders(trainer)
        with _training_sandbox(trainer, pl_module):
            for module, flag in flags.items():
                module.training = flag
            for batch in _training_batches(trainer, pl_module, batches):
                with weights_put_back(pl_module), module_put_back(trainer, pl_module):
                    for parameter in pl_module.parameters():
                        parameter.grad = None
                    with trainer.precision_plugin.train_step_context(), watching:
                        _training_step(pl_module, batch, done)
                done += 1
    return done


def first_training_batch(trainer: Trainer, pl_module: LightningModule) -> Any:
    """Return the first batch of the training data, as ``training_step`` would get it.

    Args:
        trainer: A Trainer in ``fit``.
        pl_module: The module of ``trainer``.

    Raises:
        FoldingError: If the training data is used up.
    """
    loop = trainer.fit_loop
    with same_random_numbers(trainer.global_rank), _put_back(_trainer_parts(trainer, loop)):
        _drop_iterators(loop)
        for batch in _training_batches(trainer, pl_module, 1):
            return batch
    raise FoldingError("There is no training batch: the training data is used up.")


def _set_up_loaders(trainer: Trainer) -> None:
    """Ask for the validation loaders, as the start of a fit does, if this fit has not done so."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None:
        with _put_back([vars(trainer.state)]), same_random_numbers(trainer.global_rank):
            trainer.validating = True
            loop.setup_data()


def _set_up_training_loaders(trainer: Trainer) -> None:
    """Ask for the training loaders, as the start of a fit does, where no fit has done so."""
    if trainer.fit_loop._combined_loader is None:
        with _put_back([vars(trainer.state)]), same_random_numbers(trainer.global_rank):
            trainer.training = True
            datamodule = getattr(trainer, "datamodule", None)
            if datamodule is not None:
                datamodule.setup("fit")
            trainer.fit_loop.setup_data()


def _training_batches(trainer: Trainer, pl_module: LightningModule, count: int) -> Iterator[Any]:
    """Yield the first batches of the training data as the training loop hands them to the module."""
    loop = trainer.fit_loop
    assert loop._combined_loader is not None
    for batch, _, _ in islice(loop._combined_loader, int(min(count, loop.max_batches))):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _training_step(pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
    takes_number = is_param_in_hook_signature(pl_module.training_step, "batch_idx", min_args=2)
    pl_module.training_step(*((batch, batch_idx) if takes_number else (batch,)))


@contextmanager
def _sandbox(
    trainer: Trainer, pl_module: LightningModule, callbacks: Sequence[Callback], epoch: int | None
) -> Iterator[None]:
    """Ready ``trainer`` for a validation run in which only ``callbacks`` take part, and take all of it back."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    epochs: Any = trainer.fit_loop.epoch_progress.current
    # A hook of the module may put other weights into it for the time of a validation, and fail to take them out again.
    with weights_put_back(pl_module), _put_back([vars(epochs)]), _no_trace(trainer, pl_module, loop, callbacks):
        trainer.validating = True
        # At the end of a training the next epoch is the current one.
        epochs.completed = trainer.current_epoch if epoch is None else epoch
        loop.batch_progress = type(loop.batch_progress)()
        loop._results = type(loop._results)(training=False)
        loop._module_mode = type(loop._module_mode)()
        loop._seen_batches_per_dataloader = defaultdict(int)
        # With reload_dataloaders_every_n_epochs the run would ask for new loaders; those of the last validation serve.
        loop._last_val_dl_reload_epoch = trainer.current_epoch
        yield


@contextmanager
def _training_sandbox(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Ready ``trainer`` for training steps that train nothing, and take all of it back."""
    precision = trainer.precision_plugin.state_dict()
    with _no_trace(trainer, pl_module, trainer.fit_loop), _put_back([vars(trainer.strategy)]), _no_optimizer_steps():
        trainer.training = True
        if not pl_module.automatic_optimization and not trainer.optimizers:
            trainer.strategy.setup_optimizers(trainer)
        vars(pl_module)["log"] = _nothing
        try:
            yield
        finally:
            trainer.precision_plugin.load_state_dict(precision)


@contextmanager
def _no_trace(
    trainer: Trainer, pl_module: LightningModule, loop: Any, callbacks: Sequence[Callback] = ()
) -> Iterator[None]:
    """Let nobody but ``callbacks`` hear of what ``loop`` does in here, and put back whatever that may change."""
    measuring = {id(callback) for callback in callbacks}
    others = [callback for callback in vars(trainer)["callbacks"] if id(callback) not in measuring]
    connector = trainer._logger_connector
    with ExitStack() as stack:
        stack.enter_context(same_random_numbers(trainer.global_rank))
        stack.enter_context(_put_back([vars(trainer.strategy)]))
        stack.enter_context(written_at_once(trainer))
        stack.enter_context(files_put_back())
        # Compiled code would be compiled again for layers that are swapped for one run only.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_put_back(_trainer_parts(trainer, loop)))
        stack.enter_context(module_put_back(trainer, pl_module))
        for logger in trainer.loggers:
            _mute_what_is_kept_of(logger, pl_module)
            stack.enter_context(_muted_logger(logger))
        for callback in others:
            stack.enter_context(_muted_callback(callback))
        vars(trainer).update(callbacks=[*others, *callbacks], profiler=PassThroughProfiler())
        # Copies, not empty dicts: a hook of the module may read what training logged.
        for name in _LIVE_METRICS:
            setattr(connector, name, dict(getattr(connector, name)))
        _drop_iterators(loop)
        yield


def _drop_iterators(loop: Any) -> None:
    """Let the loaders of a loop begin anew: persistent workers would go on with the random numbers they have."""
    for part in _loader_parts(loop):
        if "_iterator" in vars(part):
            vars(part)["_iterator"] = None


# What is put back ----------------------------------------------------------------------------------------------------


def _trainer_parts(trainer: Trainer, loop: Any) -> Iterator[object]:
    """Yield the state outside the module that a run of ``loop``, or user code in it, may change."""
    datamodule = getattr(trainer, "datamodule", None)
    owners = [trainer, trainer.state, trainer._logger_connector, loop, *_loader_parts(loop)]
    # A hook of the module may draw from the training data.
    loops = [] if trainer.fit_loop._combined_loader is None else [trainer.fit_loop]
    owners += [part for each in loops for part in _loader_parts(each)]
    owners += _schedulers_in([config.scheduler for config in trainer.lr_scheduler_configs])
    owners += [] if datamodule is None else [datamodule]
    for owner in owners:
        yield vars(owner)
        yield from (value for value in vars(owner).values() if isinstance(value, _GENERATORS))
    for part in () if datamodule is None else vars(datamodule).values():
        if isinstance(part, _CONTAINERS) and len(part) <= _MOST_PARTS:
            yield part
    for optimizer in trainer.optimizers:
        yield from optimizer.param_groups
        yield optimizer.state
        yield from (state for state in optimizer.state.values() if isinstance(state, dict))


def _schedulers_in(schedulers: Sequence[Any]) -> list[Any]:
    """List schedulers of the learning rate and those that they are made of, such as one after the other."""
    return [*schedulers, *(inner for each in schedulers for inner in _schedulers_in(getattr(each, "_schedulers", ())))]


def _loader_parts(loop: Any) -> list[object]:
    """List the loaders of a loop with what they draw from and transform with, as far as these have attributes."""
    combined_loader = loop._combined_loader
    assert combined_loader is not None
    parts: dict[int, object] = {}
    pending: list[object] = [combined_loader, *combined_loader.flattened]
    while pending:
        part = pending.pop()
        if hasattr(part, "__dict__") and not isinstance(part, type) and id(part) not in parts:
            parts[id(part)] = part
            pending += [vars(part).get(name) for name in _INSIDE_LOADERS]
            several = [vars(part).get(name) for name in _LISTS_INSIDE_LOADERS]
            pending += [each for item in several if isinstance(item, (list, tuple)) for each in item]
    return list(parts.values())


def _module_parts(trainer: Trainer, pl_module: LightningModule) -> Iterator[object]:
    """Yield the state of ``pl_module``: attributes, plain containers in them, buffers, metric states, generators.

    Modules that stand in a plain list or dict, such as unregistered metrics, are opened like registered ones.
    """
    # A wrapper that the strategy adds is put into eval mode too, and stops to synchronise its ranks.
    yield vars(trainer.model)
    pending: list[Any] = list(pl_module.modules())
    seen: set[int] = set()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            yield from part.parameters(recurse=False)
            yield from part.buffers(recurse=False)
            if isinstance(part, Metric):
                yield from (state for state in part.metric_state.values() if isinstance(state, Tensor))
            pending.append(vars(part))
        elif isinstance(part, _GENERATORS):
            yield part
        else:
            if isinstance(part, _CONTAINERS):
                yield part
            if len(part) > _MOST_PARTS:  # That is data.
                continue
            inner = part.values() if isinstance(part, dict) else part
            # The first question is the quick one: torch asks its Generator's class in Python.
            pending += (thing for thing in inner if type(thing) not in WITHOUT_TENSORS and isinstance(thing, _OPENED))


def module_put_back(
    trainer: Trainer, pl_module: LightningModule, unless: Callable[[], bool] = lambda: False
) -> AbstractContextManager[None]:
    """Put a module back as it is on entry, but for the numbers of its parameters.

    Args:
        trainer: The Trainer of the module.
        pl_module: The module.
        unless: Whether it shall stay as it is in the end, which is asked then.
    """
    return _put_back(_module_parts(trainer, pl_module), unless)


@dataclass(frozen=True)
class _Weight:
    """A parameter of which the numbers and the gradient are put back as well."""

    parameter: nn.Parameter


def weights_put_back(pl_module: LightningModule) -> AbstractContextManager[None]:
    """Put the numbers and the gradients of all parameters back as they are on entry.

    Args:
        pl_module: Their module.
    """
    return _put_back(_Weight(parameter) for parameter in pl_module.parameters() if not is_lazy(parameter))


# How it is put back: the very same object gets its old content, so that whoever else holds it sees no difference -----


@contextmanager
def _put_back(parts: Iterable[object], unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Put every one of ``parts`` back, in place, to the state that it has on entry."""
    with ExitStack() as stack:
        for part in parts:
            stack.callback(_undo(part))
        try:
            yield
        finally:
            if unless():
                stack.pop_all()


@singledispatch
def _undo(part: Any) -> Callable[[], object]:
    """Return the call that puts ``part`` back to the state that it has now."""
    raise TypeError(f"Expected a part with a known way back, got {type(part).__name__}.")


@_undo.register(dict)
def _(part: dict[Any, Any]) -> Callable[[], object]:
    # The methods of the kind itself, here and below: those of a Counter count on.
    kind: Any = OrderedDict if isinstance(part, OrderedDict) else dict
    before = list(kind.items(part))

    def put_back() -> None:
        # An emptied dict is filled again in its old order, but only when it has to be.
        now = list(kind.items(part))
        if [id(key) for key, _ in now] != [id(key) for key, _ in before]:
            kind.clear(part)
            now = [(None, _missing)] * len(before)
        for (key, value), (_, found) in zip(before, now, strict=True):
            if found is not value:
                kind.__setitem__(part, key, value)

    return put_back


@_undo.register(list)
@_undo.register(deque)
@_undo.register(set)
def _(part: list[Any] | deque[Any] | set[Any]) -> Callable[[], object]:
    kind: Any = next(kind for kind in _CONTAINERS if isinstance(part, kind))
    before = list(kind.__iter__(part))

    def put_back() -> None:
        now = list(kind.__iter__(part))
        if len(now) != len(before) or any(map(operator.is_not, now, before)):
            kind.clear(part)
            fill: Any = kind.update if kind is set else kind.extend
            fill(part, before)

    return put_back


@_undo.register
def _(part: UninitializedTensorMixin) -> Callable[[], object]:
    return _nothing  # It has neither numbers nor a flag yet.


@_undo.register
def _(part: nn.Parameter) -> Callable[[], object]:
    return partial(part.requires_grad_, part.requires_grad)


@_undo.register
def _(part: Tensor) -> Callable[[], object]:
    # On the CPU, where a second copy of a large buffer does no harm.
    before = part.detach().to("cpu", copy=True)

    def put_back() -> None:
        # Torch cannot compare sparse tensors.
        if part.layout is not torch.strided or not torch.equal(part.detach().cpu(), before):
            with torch.no_grad():
                part.copy_(before)

    return put_back


@_undo.register
def _(part: _Weight) -> Callable[[], object]:
    parameter, data, gradient = part.parameter, part.parameter.data, part.parameter.grad
    undo_numbers = _undo(data)

    def put_back() -> None:
        undo_numbers()
        if parameter.data_ptr() != data.data_ptr():
            parameter.data = data
        parameter.grad = gradient

    return put_back


@_undo.register(torch.Generator)
@_undo.register(numpy.random.RandomState)
def _(part: Any) -> Callable[[], object]:
    return partial(part.set_state, part.get_state())


@_undo.register
def _(part: numpy.random.Generator) -> Callable[[], object]:
    return partial(setattr, part.bit_generator, "state", part.bit_generator.state)


@_undo.register
def _(part: random.Random) -> Callable[[], object]:
    return partial(part.setstate, part.getstate())


@contextmanager
def same_random_numbers(seed: int) -> Iterator[None]:
    """Seed the global random generators, and give them back as they were.

    Lightning's ``isolate_rng`` does not give them back when its body raises.

    Args:
        seed: The seed.
    """
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda"):
        try:
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


# What is kept silent -------------------------------------------------------------------------------------------------


def _nothing(*args: object, **kwargs: object) -> None:
    """Stand in for a method that must not run."""


class _MutedExperiment(_DummyExperiment):
    """Answers what a logger's experiment is asked, such as where it writes, and does nothing that it is told."""

    def __init__(self, logger: Logger, loud: type[Logger]) -> None:
        self._logger, self._loud = logger, loud

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._loud, "experiment", None)
        experiment = own.__get__(self._logger) if isinstance(own, property) else vars(self._logger).get("experiment")
        told = getattr(experiment, name)
        if isinstance(told, (Mapping, list)):  # What is written into it vanishes with the copy.
            return copy.copy(told)
        is_answer = type(told) in WITHOUT_TENSORS or isinstance(told, Path) or name.startswith("get_")
        return told if is_answer else MagicMock()

    def __getitem__(self, key: Any) -> Any:
        return MagicMock()

    def __enter__(self) -> _MutedExperiment:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """That of the experiment, for whoever asks with ``isinstance``."""
        return next(map(type, experiments_of([self._logger])), type(self))


def experiments_of(loggers: Iterable[Logger]) -> list[Any]:
    """What loggers write to, as far as they have begun to.

    Args:
        loggers: The loggers.
    """
    return [vars(logger)["_experiment"] for logger in loggers if vars(logger).get("_experiment") is not None]


def _mute_what_is_kept_of(logger: Logger, pl_module: LightningModule) -> None:
    """Mute the experiment of a logger where a module keeps it as an attribute, which is put back with all others."""
    experiment = next(iter(experiments_of([logger])), None)
    for name, value in list(vars(pl_module).items()):
        if value is experiment is not None:
            vars(pl_module)[name] = _MutedExperiment(logger, type(logger))


@contextmanager
def _muted_logger(logger: Logger) -> Iterator[None]:
    """Make writes through ``logger`` vanish, while it stays an instance of its class and tells where it would write."""
    loud = type(logger)
    writers = [name for name in dir(loud) if name.startswith("log") or name in ("save", "finalize")]
    silent: dict[str, Any] = {name: _nothing for name in writers if callable(getattr(loud, name))}
    silent["experiment"] = property(lambda muted: _MutedExperiment(muted, loud))
    logger.__class__ = type(loud.__name__, (loud,), silent)
    try:
        yield
    finally:
        logger.__class__ = loud


@contextmanager
def _muted_callback(callback: Callback) -> Iterator[None]:
    """Keep ``callback`` from hearing of what is done, while user code still finds it in ``trainer.callbacks``."""
    attributes = vars(callback)
    before = {name: attributes[name] for name in _HOOKS if name in attributes}
    attributes.update(dict.fromkeys(_HOOKS, _nothing))
    try:
        yield
    finally:
        for name in _HOOKS:
            if name not in before:
                del attributes[name]
        attributes.update(before)


@contextmanager
def _no_optimizer_steps() -> Iterator[None]:
    """Take the gradients from every optimizer for the time of a step; one without gradients changes nothing.

    So a step's closure still runs, and optimizers that the Trainer does not know of stand still as well.
    """
    # By optimizer, as some of them step another one within a step of their own.
    taken: dict[Optimizer, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def take_gradients(optimizer: Optimizer) -> None:
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            if parameter.grad is not None:
                taken[optimizer].append((parameter, parameter.grad))
                parameter.grad = None

    def before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def without_gradients(closure: Any) -> Any:
            def run() -> Any:
                loss = closure()
                take_gradients(optimizer)
                return loss

            return run if callable(closure) else closure

        take_gradients(optimizer)
        return tuple(map(without_gradients, args)), {key: without_gradients(value) for key, value in kwargs.items()}

    def after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for parameter, gradient in taken.pop(optimizer, ()):
            parameter.grad = gradient

    with ExitStack() as hooks:
        hooks.callback(register_optimizer_step_pre_hook(before).remove)
        hooks.callback(register_optimizer_step_post_hook(after).remove)
        yield


# What is measured for a module that logs nothing ---------------------------------------------------------------------


class _ReturnedLoss(Callback):
    """Accumulate the losses that ``validation_step`` returns."""

    def __init__(self) -> None:
        self.total = 0.0
        self.examples = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the loss of one batch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            size = _batch_size(batch)
            self.total += float(loss) * size
            self.examples += size

    def compute(self, trainer: Trainer) -> dict[str, float]:
        """Return the mean loss of an example over all ranks, under the key ``loss``; nothing if none was returned."""
        sums = torch.tensor([self.total, self.examples], dtype=torch.float64)
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums.to(trainer.strategy.root_device), reduce_op="sum")
        total, examples = sums.tolist()
        return {"loss": total / examples} if examples else {}


def _batch_size(batch: Any) -> int:
    """Return the number of examples in ``batch`` by the rule of ``self.log``, 1 if the rule finds none."""
    with warnings.catch_warnings(), suppress(MisconfigurationException):
        warnings.simplefilter("ignore")
        return extract_batch_size(batch)
    return 1
