"""How much smaller and faster a folded module is: its numbers, its operations and its eager latency.

Latency is measured in pairs, each of one run of the original and one of the folded module, so that whatever else the
machine does meets both. It is measured for a short while only, on copies, and not at all where a single run takes long.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_bnfold.callbacks.export import NO_CALL, ExampleCall, quietly, reason_of
from lit_bnfold.callbacks.validation import experiments_of, same_random_numbers
from lit_bnfold.copying import eval_copy
from lit_bnfold.folding import FoldingError
from lit_bnfold.folding.tensors import tensors_in

Inference = dict[str, Any]

BATCH_SIZES = (1, 1024)
"""How many examples a run gets, whose latency is measured."""

# Of the time that one validation takes; the whole of `on_train_end` takes a little more than two.
_SHARE = 0.05
# The same for a short validation, and up to how many seconds: some runs of a small network should fit in.
_SHARE_OF_SHORT, _SHORT = 0.2, 0.04
# Seconds: enough for a network whose run takes a fraction of a millisecond, and as much as anybody should wait.
_LEAST, _MOST = 0.015, 2.0

_FEWEST_PAIRS, _MOST_PAIRS = 3, 30

# A larger batch is run only when smaller ones have shown that there is time for it; it is so many times larger, unless
# there is plenty.
_GROWTH = 8

# Bytes: everything that the operations of one run make, taken together.
_MOST_MEMORY = 2**30


class _Versions(NamedTuple):
    original: nn.Module
    folded: nn.Module


def runnable_copy(pl_module: LightningModule, trainer: Trainer | None = None) -> LightningModule | None:
    """A copy in eval mode, without a Trainer, around the memory of the module's parameters.

    Args:
        pl_module: The module.
        trainer: The Trainer that it is attached to, if it is.

    Returns:
        The copy: running it leaves the module's buffers and attributes as they are. None if it cannot be copied.
    """
    try:
        belongings = [] if trainer is None else experiments_of(trainer.loggers)
        return eval_copy(pl_module, pl_module.parameters(), trainer, belongings)
    except FoldingError:
        return None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """In here copies of a module run without a word, a gradient, compiled code, or a trace in the random numbers."""
    with same_random_numbers(0), quietly(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def _obstacle_to_running(trainer: Trainer, calls: Sequence[ExampleCall]) -> str | None:
    """Why copies of a module are not run, in words; None if they can be."""
    if trainer.world_size > 1:
        return "one of several processes does not run the module alone"
    if not calls:
        return NO_CALL
    if not calls[0].has_one_batch_axis:
        return "its arguments do not share one batch axis"
    return None


def measure_inference(
    trainer: Trainer,
    original: LightningModule | None,
    folded: LightningModule | None,
    calls: Sequence[ExampleCall],
    *,
    validation_seconds: float,
) -> Inference:
    """Compare what two versions of a module take to run, without a trace in either or in the random numbers.

    Args:
        trainer: The Trainer. With several processes nothing is run: a module may wait for the other ones.
        original: A ``runnable_copy`` of the module before folding; None if there is none.
        folded: The folded module, without a Trainer; None if there is none.
        calls: A call of it to run; the first one is taken, with its batch made larger or smaller.
        validation_seconds: How long one validation took. Latency is measured for at most a twentieth of that, or for a
            fifth where that is less than 0.04 seconds; at least for 0.015 seconds, and never for more than 2.

    Returns:
        ``size``, ``operations`` and ``latency`` (a list, by batch size) of both versions, each as far as it could be
        measured; ``not_measured``, a sentence for each that could not; ``setup``, where it was measured. Latencies are
        medians in seconds.
    """
    inference: Inference = {"size": {}, "operations": {}, "latency": [], "not_measured": [], "setup": {}}
    if original is None or folded is None:
        inference["not_measured"].append("size, operations and latency: the module cannot be copied")
        return inference
    inference["size"] = {"original": _size(original), "folded": _size(folded)}
    inference["setup"] = _setup(original.device)
    folded_copy, obstacle = runnable_copy(folded), _obstacle_to_running(trainer, calls)
    if folded_copy is None:
        obstacle = "the folded module cannot be copied"
    elif obstacle is None:
        with _undisturbed():
            try:
                versions = _Versions(original, folded_copy)
                call = calls[0].map(lambda tensor: tensor.to(original.device))
                _run_both(inference, versions, call, _time_for(validation_seconds))
            except Exception as error:
                obstacle = reason_of(error)
    if obstacle is not None:
        inference["not_measured"].append(f"operations and latency: {obstacle}")
    return inference


def _time_for(validation_seconds: float) -> float:
    """How long to measure, in seconds."""
    of_short = min(_SHARE_OF_SHORT * validation_seconds, _SHORT)
    return min(max(_SHARE * validation_seconds, of_short, _LEAST), _MOST)


def _run_both(inference: Inference, versions: _Versions, call: ExampleCall, seconds: float) -> None:
    inference["operations"], memory = _operations(versions, call.of_size(1))
    start = time.perf_counter()
    # A single example takes the least time, and what it leaves is for the large batch.
    for rows, share in zip(BATCH_SIZES, (0.25, 1.0), strict=True):
        left = share * seconds - (time.perf_counter() - start)
        _add_latency(inference, versions, call, rows, left, memory * rows)


def _size(module: nn.Module) -> dict[str, int]:
    parameters, buffers = list(module.parameters()), list(module.buffers())
    return {
        "parameters": sum(tensor.numel() for tensor in parameters),
        "buffers": sum(tensor.numel() for tensor in buffers),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *buffers)),
    }


def _setup(device: torch.device) -> dict[str, Any]:
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": str(device), "hardware": hardware, "threads": torch.get_num_threads()}


def _processor() -> str:
    """The processor's name, which Python itself knows on some systems only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


class _Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches, and the bytes of all they make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.count += 1
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, kwargs))}
        # A view, such as a transposed weight, takes no memory, and does not grow with the batch.
        made = (tensor for tensor in tensors_in(output) if tensor.untyped_storage().data_ptr() not in given)
        self.bytes += sum(tensor.nbytes for tensor in made)
        return output


def _operations(versions: _Versions, call: ExampleCall) -> tuple[dict[str, int], int]:
    """The number of operations of both versions, and the bytes that those of the larger one make."""
    counts, most = {}, 0
    for name, module in versions._asdict().items():
        with _Operations() as operations:
            module(*call.args, **call.kwargs)
        counts[name], most = operations.count, max(most, operations.bytes)
    return counts, most


def _add_latency(
    inference: Inference, versions: _Versions, call: ExampleCall, rows: int, seconds: float, memory: int
) -> None:
    """Add the latency of a batch, or the reason why there is none."""
    try:
        if memory > _MOST_MEMORY:
            raise FoldingError(f"one run may take {memory / 2**30:.1f} GiB")
        pairs = _pairs(versions, call, rows, seconds)
    except Exception as error:
        inference["not_measured"].append(f"batch of {rows:,}: {reason_of(error)}")
        return
    medians = {name: median(times) for name, times in zip(_Versions._fields, zip(*pairs, strict=True), strict=True)}
    inference["latency"].append({"batch_size": rows, "runs": len(pairs), "seconds": medians})


def _pairs(versions: _Versions, call: ExampleCall, rows: int, seconds: float) -> list[tuple[float, float]]:
    """Run both versions in turn for a while; the times of each pair."""
    deadline, size, smaller, less = time.perf_counter() + seconds, 1, 0, 0.0
    while True:
        batch = call.of_size(size)
        spent = sum(_pair(versions, batch, turned=False))
        # A small batch takes nearly as long as a single example, and what each further one adds tells of a large one.
        each = max(0.0, spent - less) / (size - smaller)
        left, whole = deadline - time.perf_counter(), spent + each * (rows - size)
        larger = rows if (1 + _FEWEST_PAIRS) * whole <= left else min(size * _GROWTH, rows)
        ahead = spent + each * (larger - size) if size < rows else spent * _FEWEST_PAIRS
        if ahead > left:
            raise FoldingError(
                f"one run of a batch of {size:,} takes {spent / 2:.2g} s, too long for the {seconds:.2g} s there are"
            )
        if size == rows:
            break
        size, smaller, less = larger, size, spent
    pairs: list[tuple[float, float]] = []
    while len(pairs) < _FEWEST_PAIRS or (len(pairs) < _MOST_PAIRS and time.perf_counter() < deadline):
        pairs.append(_pair(versions, batch, turned=len(pairs) % 2 == 1))
    return pairs


def _pair(versions: _Versions, call: ExampleCall, *, turned: bool) -> tuple[float, float]:
    """Seconds of one run of the original and one of the folded module, the latter first if ``turned``."""
    if turned:
        folded = _seconds(versions.folded, call)
        return _seconds(versions.original, call), folded
    return _seconds(versions.original, call), _seconds(versions.folded, call)


def _seconds(module: nn.Module, call: ExampleCall) -> float:
    # Some modules write into what they are given.
    own = call.map(Tensor.clone)
    _finish(own)
    start = time.perf_counter()
    module(*own.args, **own.kwargs)
    _finish(own)
    return time.perf_counter() - start


def _finish(call: ExampleCall) -> None:
    """Wait for the device to do what it was told."""
    if any(tensor.is_cuda for tensor in tensors_in((call.args, call.kwargs))):
        torch.cuda.synchronize()
