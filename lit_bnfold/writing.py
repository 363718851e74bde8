"""Files are written whole: each gets its name when it is complete."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO


@contextmanager
def whole_file(path: Path, trainer: Trainer, outdated: Sequence[Path] = ()) -> Iterator[Path]:
    """Write beside, then rename, so that the file under its own name is always a whole one.

    Args:
        path: Where the file goes; its directory is made.
        trainer: The Trainer, whose first rank does the renaming.
        outdated: Files that this one makes outdated; they are taken away right before it gets its name.

    Yields:
        The path to write to.

    Raises:
        OSError: If it cannot be written; names the file.
    """
    part = _beside(path)
    own_io = trainer.strategy.checkpoint_io
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # What is written later cannot be renamed now; and what is renamed here need not be moved or renamed before.
        if _is_asynchronous(own_io) or type(own_io).__name__ in ("TorchCheckpointIO", "WholeCheckpointIO"):
            trainer.strategy.checkpoint_io = _PlainCheckpointIO()
        yield part
        if trainer.is_global_zero:
            if not part.exists():
                written_by = type(trainer.strategy.checkpoint_io).__name__
                raise FileNotFoundError(f"{written_by} wrote no file of the name that it was given, for {path}")
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            for other in outdated:
                other.unlink(missing_ok=True)
            part.replace(path)
    except OSError as error:
        _raise_naming(error, path)
    finally:
        trainer.strategy.checkpoint_io = own_io
        if trainer.is_global_zero:
            part.unlink(missing_ok=True)


def _is_asynchronous(checkpoint_io: Any) -> bool:
    # By name, for the other import name of Lightning has classes of its own.
    return "AsyncCheckpointIO" in [base.__name__ for base in type(checkpoint_io).__mro__]


@contextmanager
def written_at_once(trainer: Trainer) -> Iterator[None]:
    """Have checkpoints written by whoever saves them, and not later by another thread.

    Args:
        trainer: The Trainer.
    """
    own_io = trainer.strategy.checkpoint_io
    try:
        if _is_asynchronous(own_io):
            trainer.strategy.checkpoint_io = _PlainCheckpointIO()
        yield
    finally:
        trainer.strategy.checkpoint_io = own_io


class _PlainCheckpointIO(TorchCheckpointIO):
    """Writes to the name that it is given, and to no other disk before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        # As Lightning does: torch's own writing to files reports a full disk as a RuntimeError without a number.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("wb") as file:
            file.write(buffer.getbuffer())
            os.fsync(file.fileno())


class WholeCheckpointIO(_PlainCheckpointIO):
    """Writes checkpoints beside their names and then renames them, so that under its name each is always whole.

    Lightning writes to the directory of temporary files and moves from there. Where that is on another disk, moving is
    copying, and who is killed in its middle has half a checkpoint under the name of the one before.

    Example:
        >>> trainer = Trainer(logger=False, accelerator="cpu", plugins=[WholeCheckpointIO()])
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Args:
            checkpoint: What it holds.
            path: Its name; what is no path of this machine is left to Lightning.
            storage_options: As for Lightning.

        Raises:
            OSError: If it cannot be written; names the file, which is as it was before.
        """
        if "://" in str(path) or storage_options is not None:
            TorchCheckpointIO.save_checkpoint(self, checkpoint, path, storage_options)
            return
        path = Path(path)
        part = _beside(path)
        try:
            super().save_checkpoint(checkpoint, part)
            part.replace(path)
        except OSError as error:
            _raise_naming(error, path)
        finally:
            part.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _raise_naming(error: OSError, path: Path) -> NoReturn:
    # A full disk is reported without the file that no longer fitted on it, and the part's name is of no interest.
    if error.errno is None or error.filename not in (None, str(_beside(path))):
        raise error
    raise OSError(error.errno, error.strerror, str(path)) from error
