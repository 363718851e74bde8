"""How much faster a folded network runs than the original: eager, compiled, and in onnxruntime.

Run it with ``python tests/benchmarks/inference.py``. A ratio is how often the folded network runs in the time of one
run of the original: the median of pairs that run in turn, on one thread and the processor's clock, or by CUDA events.

Eager, every BatchNorm is an operation that is gone once it is folded; that is where the gain is. ``torch.compile``
keeps the BatchNorm, but fuses its arithmetic with the operations around it. The ONNX exporter and onnxruntime fold
BatchNorms behind layers by themselves. There nothing is expected of the folded network but that it is not slower.

What is left of the MLP at batch 1 is mostly calls of modules. A folded BatchNorm is an ``nn.Identity``, since a name or
a place in a ``Sequential`` that is gone would break whoever asks for it; three of them take 2.1 of 24.8 us. That the
embedding flattens its output itself, instead of an ``nn.Flatten``, saves 0.9 us of both versions: 1.81 instead of 1.79.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import networks
import torch
from measuring import Row, in_turn, median_ratio, medians, show
from torch import Tensor, nn

from lit_bnfold import BatchNormMLP, NamesDataModule, fold_batchnorm

# Of each pair: how long one measurement takes at least, and how many pairs there are, at most and at least.
SECONDS = 0.01
PAIRS = 101
FEWEST_PAIRS = 9
SECONDS_OF_A_LINE = 8

NEVER_SLOWER = ">= 0.97"
TARGETS = {("MLP", 1): ">= 1.8", ("MLP", 32): ">= 1.4", ("MobileNetV2", 32): ">= 1.2"}
IMAGE_BATCHES = (1, 32)
NETWORKS = {"ResNet-18": networks.resnet18, "MobileNetV2": networks.mobilenet_v2, "LeViT": networks.levit}

Run = Callable[[Tensor], object]


def measurement(device: str, calls: int) -> Callable[[Callable[[], object]], float]:
    """A way to measure the seconds that one of several calls takes."""

    def on_the_processor(function: Callable[[], object]) -> float:
        start = time.process_time()
        for _ in itertools.repeat(None, calls):
            function()
        return (time.process_time() - start) / calls

    def on_the_card(function: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in itertools.repeat(None, calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return on_the_card if device == "cuda" else on_the_processor


def line(name: str, way: str, target: str, original: Run, folded: Run, x: Tensor) -> Row:
    """Compare two networks on one batch."""
    device = x.device.type
    functions: list[Callable[[], object]] = [partial(original, x), partial(folded, x)]
    for function in functions:  # compiles
        function()
    spent = max(measurement(device, 1)(function) for function in functions for _ in range(3))
    calls = max(1, round(SECONDS / max(spent, 1e-5)))
    pairs = min(PAIRS, max(FEWEST_PAIRS, round(SECONDS_OF_A_LINE / (2 * calls * spent))))
    rounds = in_turn(functions, pairs, measurement(device, calls))
    before, after = (f"{1e3 * t:.3g} ms" for t in medians(rounds))
    measured = f"{after}; original {before}; {pairs} pairs"
    return Row(f"{name}, batch {len(x):,}, {way}", target, measured, median_ratio(rounds))


def in_onnxruntime(model: nn.Module, x: Tensor, directory: str) -> Run:
    """A network as onnxruntime runs it on one thread."""
    import onnxruntime

    path = Path(directory) / f"{id(model)}.onnx"
    # Of two examples, because a size of one would be taken for a constant.
    example = (torch.cat([x[:1], x[:1]]),)
    dynamic = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    arrays: dict[int, Any] = {}
    return lambda x: session.run(None, {given.name: arrays.setdefault(id(x), x.numpy())})


def lines(name: str, model: nn.Module, batches: list[Tensor], where: str) -> Iterator[Row]:
    """Compare a network with itself folded, in every way and on every batch."""
    folded = fold_batchnorm(model, (batches[-1][:2],))
    left = networks.batchnorms(folded)
    assert left == 0, f"{left} BatchNorms of {name} are left"
    exact = batches[0].dtype != torch.bfloat16
    expected = model(batches[-1][:8])
    error = (folded(batches[-1][:8]) - expected).abs().max() / expected.abs().max()
    assert error < (1e-3 if exact else 0.1), f"{name} is folded wrongly: {error}"
    for x in batches:
        target = TARGETS.get((name, len(x)), NEVER_SLOWER) if x.device.type == "cpu" else NEVER_SLOWER
        yield line(name, f"eager{where}", target, model, folded, x)
    for x in batches:
        torch.compiler.reset()
        compiled = (torch.compile(each, dynamic=False) for each in (model, folded))
        yield line(name, f"compiled{where}", NEVER_SLOWER, *compiled, x)
    if batches[0].device.type == "cpu":
        with tempfile.TemporaryDirectory() as directory:
            sessions = [in_onnxruntime(each, batches[-1], directory) for each in (model, folded)]
            for x in batches:
                yield line(name, "onnxruntime", NEVER_SLOWER, *sessions, x)


def rows() -> Iterator[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    places = [("cpu", torch.float32, "")]
    if torch.cuda.is_available():
        places += [("cuda", dtype, f", cuda, {dtype}") for dtype in (torch.float32, torch.bfloat16)]
    contexts, _ = NamesDataModule().splits["val"][:]  # (22655, 3)
    with torch.no_grad():
        for device, dtype, where in places:
            mlp = networks.randomised(BatchNormMLP().net.eval()).to(device, dtype)
            batches = [contexts[:size].to(device) for size in (1, 32, 1024, len(contexts))]
            yield from lines("MLP", mlp, batches, where)
            for name, make in NETWORKS.items():
                model = networks.randomised(make()).to(device, dtype)
                several = [networks.images(size).to(device, dtype) for size in IMAGE_BATCHES]
                yield from lines(name, model, several, where)


if __name__ == "__main__":
    show(rows())
