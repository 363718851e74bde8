"""What the tests of the callback share: a look at everything that a Trainer, its module and the process hold."""

from __future__ import annotations

import enum
import hashlib
import random
import types
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.progress import ProgressColumn
from torch import Tensor

# Objects of the tests are looked into as well.
OPENED = (
    *("lightning.", "pytorch_lightning.", "torch.nn", "torch.optim", "torch.utils.data", "torchmetrics."),
    __name__.removesuffix("conftest"),
)
PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


@pytest.fixture
def everything() -> Callable[..., dict[str, object]]:
    return snapshot


def snapshot(trainer: Any, alive: list[object], closed: type) -> dict[str, object]:
    """Names every field that can be reached from `trainer` and gives each a value that can be compared.

    Objects are compared by identity and then by their own fields, so neither a changed object nor an equal copy of
    it goes unseen. Whatever was seen goes to `alive`, since an object that dies can lend its identity to a new one.
    What is in an instance of `closed` is not looked at.
    """
    fields: dict[str, object] = {
        "global/torch": torch.get_rng_state().numpy().tobytes(),
        "global/python": random.getstate(),
        "global/numpy": repr(numpy.random.get_state()),
        "global/grad": torch.is_grad_enabled(),
        "global/dtype": torch.get_default_dtype(),
        "global/stance": torch._dynamo.eval_frame._stance.stance,
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.flush()
    root = Path(trainer.default_root_dir)
    for path in root.rglob("*"):
        fields[f"files/{path.relative_to(root)}"] = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()

    seen: set[int] = set()
    pending: deque[tuple[str, object]] = deque([("trainer", trainer)])
    while pending:
        name, thing = pending.popleft()
        fields[name], inner = value_of(thing, closed)
        alive.append(thing)
        if id(thing) not in seen:
            seen.add(id(thing))
            pending += [(f"{name}.{key}", part) for key, part in inner.items()]
    return fields


def value_of(thing: Any, closed: type) -> tuple[object, dict[object, object]]:
    """Returns what to compare of `thing`, and what is inside of it by name."""
    if isinstance(thing, PLAIN):
        return repr(thing), {}
    if isinstance(thing, tuple):
        # Tuples are often made anew, so only what is in them counts.
        return len(thing), dict(enumerate(thing))
    identity = (type(thing).__qualname__, id(thing))
    # The columns of the Rich bar are redrawn by a thread of their own.
    opened = type(thing).__module__.startswith(OPENED) and not isinstance(thing, (closed, ProgressColumn))
    inner: dict[object, object] = {"__dict__": vars(thing)} if opened and hasattr(thing, "__dict__") else {}
    if isinstance(thing, Tensor):
        content = thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (*identity, thing.dtype, thing.shape, thing.requires_grad, content), {
            "grad": thing.is_leaf and thing.grad
        }
    if isinstance(thing, torch.Generator):
        return (*identity, thing.get_state().numpy().tobytes()), {}
    if isinstance(thing, numpy.random.RandomState):
        return (*identity, repr(thing.get_state())), {}
    if isinstance(thing, random.Random):
        return (*identity, thing.getstate()), {}
    if isinstance(thing, numpy.random.Generator):
        return (*identity, repr(thing.bit_generator.state)), {}
    if isinstance(thing, dict):
        return (*identity, [repr(key) for key in thing]), {**inner, **thing}
    if isinstance(thing, (list, deque)):
        return (*identity, len(thing)), {**inner, **dict(enumerate(thing))}
    if isinstance(thing, set):
        return (*identity, sorted(map(repr, thing))), {}
    return identity, {} if isinstance(thing, (type, types.FunctionType)) else inner
