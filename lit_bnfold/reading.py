"""Checkpoints are read with care: what is damaged, of another kind or could run code is refused in a sentence."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_bnfold.folding import FoldingError

# Sharded strategies write a directory: the tensors in the format of torch, all the rest in this file.
_SHARDED_REST = "meta.pt"

# Every checkpoint of Lightning says with which version it was written.
_VERSION = "pytorch-lightning_version"

# Characters of an error of Lightning or torch.
_MOST_SAID = 200

_ANOTHER_COPY = "Take another copy of the file, or write it anew."


def read_checkpoint(path: Path, weights_only: bool = True) -> dict[str, Any]:
    """Read what a checkpoint says, whether it is folded or not.

    Args:
        path: A checkpoint of Lightning, a file or the directory of a sharded strategy.
        weights_only: Whether to read nothing but tensors and plain values; anything else can run code when it is read.

    Returns:
        The checkpoint. A directory's comes without the weights; a file's weights stay on the disk until they are used.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        ValueError: If it is damaged, no checkpoint of Lightning, or holds more than ``weights_only`` allows.
    """
    _check_layout(path)
    file = path / _SHARDED_REST if path.is_dir() else path
    check_is_undamaged(file)
    with file.open("rb"):
        pass  # If the system does not let it be read, it says why.
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only, mmap=zipfile.is_zipfile(file))
    # A file of another kind can end the reading in any way.
    except Exception as error:
        if zipfile.is_zipfile(file) and "weights_only" in str(error):
            raise ValueError(_holds_more(path)) from error
        # Its checksums are right: it is as it was written.
        if zipfile.is_zipfile(file) and isinstance(error, (AttributeError, ImportError)):
            raise ValueError(_holds_unknown(path, error)) from error
        raise ValueError(f"Expected a checkpoint of Lightning at {path}, found {_kind_of(file)}.") from error
    _check_content(checkpoint, path)
    return checkpoint


def check_is_undamaged(file: Path) -> None:
    """Compare each part of a file with its checksum, which torch writes and does not read.

    At 2 GB a second that takes less time than loading; a bit that is another one in a weight shows in no other way.

    Args:
        file: A file that ``torch.save`` wrote. Of one of another format, or one that was written without checksums
            (``torch.serialization.set_crc32_options(False)``), nothing is known.

    Raises:
        ValueError: If a part is not what was written.
    """
    if not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as parts:
            # Without checksums, torch writes zeros.
            damaged = parts.testzip() if any(part.CRC for part in parts.infolist()) else None
    # Damage to what says where the parts are can end the reading in any way.
    except Exception as error:
        raise ValueError(f"{file} is damaged: {error}. {_ANOTHER_COPY}") from error
    if damaged is not None:
        raise ValueError(f"{file} is damaged: {damaged} in it is not what was written. {_ANOTHER_COPY}")


def _kind_of(file: Path) -> str:
    """What a file is that is no checkpoint, in words."""
    with file.open("rb") as opened:
        begins = opened.read(4)
    if not begins:
        return "an empty file"
    # Where the parts of such a file are, its end says.
    return f"one that is cut off or damaged. {_ANOTHER_COPY[:-1]}" if begins == b"PK\3\4" else "another kind of file"


def _holds_more(path: object) -> str:
    return (
        f"The checkpoint {path} holds more than tensors and plain values, which can run any code when it is read. If "
        "you trust it, allow that: `lit-bnfold fold` takes `--weights_only false`, `load_folded` and "
        "`fold_checkpoint` take weights_only=False."
    )


def _holds_unknown(path: object, error: Exception) -> str:
    return (
        f"The checkpoint {path} holds an object of a class that is not found here: {error}. Read it where that class "
        "can be imported by the name it had; what a script defines that is run, not imported, is not found again."
    )


def _check_content(checkpoint: Any, path: Path) -> None:
    """Make sure that what everything else relies on is of the types that Lightning writes.

    Raises:
        ValueError: If it is not.
    """
    version = checkpoint.get(_VERSION) if isinstance(checkpoint, dict) else None
    if not isinstance(version, str) or not re.match(r"\d+\.\d+", version):
        raise ValueError(f"Expected a checkpoint of Lightning at {path}, found another kind of file.")
    for key in ("state_dict", "hyper_parameters", "datamodule_hyper_parameters"):
        found = checkpoint.get(key, {})
        if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
            raise ValueError(_not_of_lightning(path, key, "a dict whose keys are names", found))
        for name in ("_class_path", "_instantiator"):
            if not isinstance(found.get(name, ""), str):
                raise ValueError(_not_of_lightning(path, f"{key}.{name}", "a name", found[name]))
    if "state_dict" not in checkpoint and path.is_file():
        raise ValueError(_not_of_lightning(path, "state_dict", "the weights", None))
    for key in ("hparams_name", "datamodule_hparams_name"):
        if not isinstance(checkpoint.get(key), (str, type(None))):
            raise ValueError(_not_of_lightning(path, key, "a name", checkpoint[key]))


def _not_of_lightning(path: Path, key: str, expected: str, found: Any) -> str:
    return f"{path}, `{key}`: expected {expected}, found {type(found).__name__}; save it with a Trainer."


@contextmanager
def naming_the_checkpoint(path: object) -> Iterator[None]:
    """Say of which file an error is that Lightning runs into when it loads what no Trainer has written.

    Args:
        path: The checkpoint.

    Raises:
        FoldingError: In place of one that names no file.
        ValueError: In place of an error that says nothing by itself, such as a KeyError, or names no file.
    """
    try:
        yield
    # A TypeError tells of arguments that the class wants.
    except TypeError:
        raise
    except Exception as error:
        # The class does not know where a hyperparameter that it refuses comes from, nor does a plan know its file.
        if type(error) in (ValueError, FoldingError) and str(path) not in str(error):
            raise type(error)(f"{path} cannot be loaded: {error}") from error
        if explains_itself(error):
            raise
        raise ValueError(cannot_be_loaded(path, error)) from error


def explains_itself(error: BaseException) -> bool:
    """Whether an error that ended the loading of a checkpoint says what is wrong with it.

    Args:
        error: The error.
    """
    if isinstance(error, OSError):
        # One of the system names the file, and torch's word for a damaged file does not.
        return error.filename is not None or isinstance(error, FileNotFoundError)
    # What is derived from a ValueError tells of a text or a version that is none, and not where it is.
    known = type(error) is ValueError or isinstance(error, (FoldingError, MisconfigurationException))
    return known or is_misfit(error)


def is_misfit(error: BaseException) -> bool:
    """Whether an error says that the weights of a checkpoint do not fit the module.

    Args:
        error: The error.
    """
    return isinstance(error, RuntimeError) and "Error(s) in loading state_dict" in str(error)


def cannot_be_loaded(path: object, error: BaseException) -> str:
    """A sentence about a checkpoint that Lightning cannot load.

    Args:
        path: The checkpoint.
        error: What loading it ended with.
    """
    if isinstance(error, UnpicklingError) and "weights_only" in str(error):
        return _holds_more(path)
    said = shorten(f"{type(error).__name__}: {error}", _MOST_SAID, placeholder=" ...").rstrip(".: ")
    return f"{path} cannot be loaded ({said}): it is not what a Trainer saves of this module. {_ANOTHER_COPY}"


def _check_layout(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"Expected a checkpoint at {path}, found nothing.")
    if path.is_dir() and (path / "zero_to_fp32.py").is_file():
        raise ValueError(
            f"{path} is a directory of DeepSpeed: make one file of it with "
            "`lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict` and fold that."
        )
    if path.is_dir() and not (path / _SHARDED_REST).is_file():
        raise ValueError(
            f"Expected a checkpoint at {path}, found a directory without the {_SHARDED_REST} of a sharded one."
        )
