"""The weights in the directory of a sharded strategy, as one state dict, without running any code that lies in it.

torch reads such a directory by unpickling its index and whatever is no tensor, which can do anything. Here the index is
read first by an unpickler that knows nothing but its parts, and of the weights the tensors alone are asked for.
"""

from __future__ import annotations

import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

INDEX = ".metadata"
"""The file in the directory that says which tensor is in which of the others."""

_DTYPES = {str(each).removeprefix("torch.") for each in vars(torch).values() if type(each) is torch.dtype}

# What torch puts into an index, by the name of its module.
_PARTS = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # as Python 3.13 calls them
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}

# FSDP calls the weights by the first name, ModelParallel by the other.
_NAMES = ("model", "state_dict")


class _IndexUnpickler(pickle.Unpickler):
    """Refuses to look up anything that is no part of an index, before it could be called."""

    def find_class(self, module: str, name: str) -> Any:
        """Find a part of an index.

        Raises:
            UnpicklingError: If it is none.
        """
        if name not in _PARTS.get(module, ()):
            raise pickle.UnpicklingError(f"weights_only: {module}.{name} is no part of an index")
        return super().find_class(module, name)


def read_shards(directory: Path, weights_only: bool = True) -> dict[str, Any]:
    """Read the weights from a directory that FSDP or ModelParallel wrote.

    Args:
        directory: The directory.
        weights_only: Whether to read nothing but tensors; what is none, such as the extra state of a module, can run
            code when it is read.

    Returns:
        The state dict of the module.

    Raises:
        UnpicklingError: If the index, or a part of the weights, is more than ``weights_only`` allows.
    """
    weights = _tensors(directory) if weights_only else _everything(directory)
    return next(weights[name] for name in _NAMES if name in weights)


def _everything(directory: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "consolidated.ckpt"
        dcp_to_torch_save(directory, file)
        everything: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    return everything


def _tensors(directory: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of the weights; what the optimizers hold is not read."""
    with (directory / INDEX).open("rb") as file:
        index = _IndexUnpickler(file).load()
    weights: dict[str, dict[str, Tensor]] = {}
    for key, entry in index.state_dict_metadata.items():
        kind, *names = index.planner_data[key]
        if kind not in _NAMES:
            continue
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"weights_only: {key} is no tensor")
        (name,) = names
        weights.setdefault(kind, {})[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        # That this is a single process.
        warnings.filterwarnings("ignore", message="torch.distributed is")
        load(weights, checkpoint_id=directory)
    return weights
