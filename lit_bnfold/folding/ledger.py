"""Which value each tensor of a run holds, and which of them share memory."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lit_bnfold.folding.graph import Value, ValueGraph
from lit_bnfold.folding.tensors import is_plain, memory_of, stride_of


class Ledger:
    """Knows which value each living tensor holds, and which values share memory, without keeping a tensor alive.

    Memory is followed by its storage, which outlives the tensor that it was made for when somebody keeps a view of it,
    its ``data``, or a Parameter around it.

    Args:
        graph: Where the values go.
        follows_memory: Whether it matters who shares memory and what outlives the run.
    """

    def __init__(self, graph: ValueGraph, *, follows_memory: bool) -> None:
        self._graph = graph
        self._follows_memory = follows_memory
        self._living: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._memory: dict[int, tuple[StorageWeakRef, int]] = {}  # address -> its storage, with the storage's number
        self._storages = 0

    def value(self, tensor: Tensor) -> Value:
        """The value a tensor holds now; a tensor of unknown origin gets a new one.

        Args:
            tensor: A tensor of any shape.
        """
        known = self._living.get(id(tensor))
        if known is not None:
            return self._graph.values[known[1]]
        known_storages = self._storages
        value = self.add(tensor, maker=None)
        if self._storages == known_storages and self._follows_memory:
            self._graph.aliased.setdefault(value.storage, "is also reached through a tensor of unknown origin")
        return value

    def register(self, tensor: Tensor, name: str) -> None:
        """Enter a parameter or buffer before the run.

        Args:
            tensor: The parameter or buffer.
            name: Its name.
        """
        value = self.value(tensor)
        value.name = name

    def add(self, tensor: Tensor, maker: int | None, constant: bool = False) -> Value:
        """Give a tensor a new value, made by a call or come from outside.

        Args:
            tensor: A tensor of any shape.
            maker: Index of the call that made it; None for what comes from outside.
            constant: Whether nothing went into it that could differ between two runs.
        """
        value = Value(
            index=len(self._graph.values),
            shape=() if tensor.is_nested else tuple(tensor.shape),
            stride=stride_of(tensor),
            dtype=tensor.dtype,
            storage=0,
            maker=maker,
            constant=constant,
        )
        if self._follows_memory:
            storage, address = memory_of(tensor)
            value.storage, value.fate = self._storage(storage, address), _unfollowable(tensor, address)
        self._graph.values.append(value)
        self._follow(tensor, value.index)
        return value

    def _storage(self, storage: torch.UntypedStorage | None, address: int | None) -> int:
        known = self._memory.get(address or 0)
        if known is not None and not known[0].expired():
            return known[1]
        self._storages += 1
        if storage is not None and address:
            self._memory[address] = (StorageWeakRef(storage), self._storages)
        return self._storages

    def _follow(self, tensor: Tensor, index: int) -> None:
        key = id(tensor)
        if key in self._living:  # a new version of a tensor that is being followed already
            self._living[key] = (self._living[key][0], index)
        else:
            # No function of Python's: an exception that a signal raises in it, such as that of Ctrl-C, would be lost.
            self._living[key] = (weakref.ref(tensor, partial(self._living.pop, key)), index)

    def settle(self) -> None:
        """Note which values outlived the run, and follow the parameters and buffers alone from here on."""
        if self._survivors():
            gc.collect()  # A survivor may only be waiting for the garbage collector.
            for value in self._survivors():
                value.fate = "is still held by somebody after the run"
        values = self._graph.values
        named = {value.storage for value in values if value.name is not None}
        self._memory = {address: known for address, known in self._memory.items() if known[1] in named}
        # In place: what forgets a tensor when it dies holds this very dict.
        for key, (_, index) in list(self._living.items()):
            if values[index].name is None:
                self._living.pop(key, None)

    def _survivors(self) -> list[Value]:
        """The values that the run has made and that are still alive, without those of which that is known.

        What was written over in place is gone, however long its memory lives.
        """
        latest = {(value.storage, value.shape, value.stride): value for value in self._graph.values}
        from_outside = {value.storage for value in self._graph.values if value.maker is None}
        alive = {number for ref, number in self._memory.values() if not ref.expired()} - from_outside
        return [value for value in latest.values() if value.fate is None and value.storage in alive]


def _unfollowable(tensor: Tensor, address: int | None) -> str | None:
    """Why the run cannot show what becomes of a tensor, as words for a reason; None if it can."""
    if not address:
        return "is a tensor without memory that could be followed"
    if not is_plain(tensor):
        return f"is a {type(tensor).__name__}, whose operations may be others than torch's"
    return None
