"""Files that are written over for a while, such as a module's own checkpoints in a validation that is not its own."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch.serialization

# What Python tells audit hooks of, and where in its arguments the paths are.
_PATHS_AT = {"open": (0,), "os.rename": (0, 1), "os.remove": (0,)}


@contextmanager
def files_put_back() -> Iterator[None]:
    """Put back what was in every file that this thread writes anew, moves or removes in here.

    What is appended to a file or written into the middle of it stays, and so do new files. What code outside of Python
    writes is not seen, but for ``torch.save``.

    Example:
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     best = Path(directory) / "best.txt"
        ...     _ = best.write_text("mine")
        ...     with files_put_back():
        ...         _ = best.write_text("another")
        ...     best.read_text()
        'mine'
    """
    _listen()
    thread = threading.get_ident()
    around = _copies.get(thread)
    with tempfile.TemporaryDirectory() as directory, _torch_save_heard():
        copies = _copies[thread] = _Copies(Path(directory))
        try:
            yield
        finally:
            if around is None:
                del _copies[thread]
            else:
                _copies[thread] = around
            copies.put_back()


class _Copies:
    """Copies of files as they were before they were written.

    Args:
        directory: Where the copies go.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process = os.getpid()
        self._copies: dict[Path, Path] = {}
        self._links: dict[Path, Path] = {}
        self._new: set[Path] = set()
        self._is_busy = False

    def keep(self, given: Any, *, follows_links: bool) -> None:
        """Copy a file, or note where a link leads, if it was there before and is not kept yet."""
        # What is open was heard of when it was opened. A process that was forked has files of its own.
        if self._is_busy or isinstance(given, int) or os.getpid() != self._process:
            return
        absolute = os.path.realpath if follows_links else os.path.abspath
        path = Path(absolute(os.fsdecode(given)))
        self._is_busy = True
        try:
            if path in self._copies.keys() | self._links.keys() | self._new:
                return
            if path.is_symlink():
                self._links[path] = path.readlink()
            elif path.is_file():
                copy = self._directory / str(len(self._copies))
                shutil.copy2(path, copy)
                self._copies[path] = copy
            elif not path.exists():
                self._new.add(path)
        finally:
            self._is_busy = False

    def put_back(self) -> None:
        """Give every file its content back, in place: somebody may have it open, to append to it."""
        with ExitStack() as stack:  # One that cannot be written keeps no other from it.
            for path, copy in self._copies.items():
                stack.callback(_write_back, path, copy)
            for path, target in self._links.items():
                stack.callback(_link_back, path, target)


def _write_back(path: Path, copy: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        path.unlink()
    shutil.copyfile(copy, path)
    shutil.copystat(copy, path)


def _link_back(path: Path, target: Path) -> None:
    if not path.is_symlink() or path.readlink() != target:
        path.unlink(missing_ok=True)
        path.symlink_to(target)


_copies: dict[int, _Copies] = {}  # by thread


@cache
def _listen() -> None:
    sys.addaudithook(_hear)  # For good: Python has no way to take it away.


def _hear(event: str, args: tuple[Any, ...]) -> None:
    if not _copies or event not in _PATHS_AT:
        return
    copies = _copies.get(threading.get_ident())
    # A file that is only opened to be read or changed, such as a data set in a memory map, may be of any size.
    if copies is not None and (event != "open" or (isinstance(args[2], int) and args[2] & os.O_TRUNC)):
        for place in _PATHS_AT[event]:
            copies.keep(args[place], follows_links=event == "open")


@contextmanager
def _torch_save_heard() -> Iterator[None]:
    """Make ``torch.save`` tell of the file that it opens, which it does outside of Python."""
    serialization: Any = torch.serialization
    opens = serialization._open_zipfile_writer

    def open_and_tell(file: Any) -> Any:
        copies = _copies.get(threading.get_ident())
        if copies is not None and isinstance(file, (str, os.PathLike)):
            copies.keep(file, follows_links=True)
        return opens(file)

    serialization._open_zipfile_writer = open_and_tell
    try:
        yield
    finally:
        serialization._open_zipfile_writer = opens
