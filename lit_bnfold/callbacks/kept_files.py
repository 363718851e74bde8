"""Files that are written over for a while, such as a module's own checkpoints in a validation that is not its own."""

from __future__ import annotations

import builtins
import io
import os
import pathlib
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

import torch.serialization

_Function = Callable[..., Any]

# Through these Python opens, moves and removes files; `torch.save` opens its own elsewhere.
_OPENING = [(builtins, "open"), (io, "open")]
_MOVING = [(os, "rename"), (os, "replace")]
_REMOVING = [(os, "remove"), (os, "unlink"), (os, "rmdir")]
if _accessor := getattr(pathlib, "_NormalAccessor", None):  # Python 3.10 has them once more.
    _OPENING += [(_accessor, "open")]
    _MOVING += [(_accessor, "rename"), (_accessor, "replace")]
    _REMOVING += [(_accessor, "unlink"), (_accessor, "rmdir")]


@contextmanager
def files_put_back() -> Iterator[None]:
    """Put back what was in every file that this thread writes anew, moves or removes in here.

    What is appended to a file or written into the middle of it stays, and so do new files and directories that are
    moved. What code outside of Python writes is not seen, but for ``torch.save``. What is written anew is never written
    into the file that was there: that lies beside it meanwhile, as ``.best.pt.kept``, and still does if the process is
    killed.

    Example:
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     best = Path(directory) / "best.txt"
        ...     _ = best.write_text("mine")
        ...     with files_put_back():
        ...         _ = best.write_text("another")
        ...     best.read_text()
        'mine'
    """
    thread = threading.get_ident()
    with _listening():
        around, copies = _copies.get(thread), _Copies()
        _copies[thread] = copies
        try:
            yield
        finally:
            try:
                copies.put_back()
            finally:
                if around is None:
                    del _copies[thread]
                else:
                    _copies[thread] = around


class _Copies:
    """Files as they were before they were written: set aside, or copied."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._copies: dict[Path, Path] = {}
        self._of_inode: dict[tuple[int, int], Path] = {}
        self._links: dict[Path, Path] = {}
        self._new: set[Path] = set()
        self._numbers = count()
        self._is_busy = False

    @cached_property
    def _directory(self) -> Path:
        return Path(tempfile.mkdtemp())

    def hear(
        self,
        path: Any,
        directory: int | None = None,
        *,
        opens: bool = False,
        creates_only: bool = False,
        leaves: bool = False,
    ) -> None:
        """Keep a file that is about to change, or where a link leads, if it was there before and is not kept yet.

        Args:
            path: The path.
            directory: A descriptor of the directory that it is relative to; None for the current one.
            opens: Whether it is opened, and a link followed.
            creates_only: Whether what is in the file stays.
            leaves: Whether it is removed or moved elsewhere; it may be a directory.
        """
        # A process that was forked has files of its own. What is open was heard of when it was opened.
        if self._is_busy or os.getpid() != self._process or hasattr(path, "__index__"):
            return
        self._is_busy = True
        try:
            place = _absolute(path, directory, follows_links=opens)
            if leaves:
                self._bring_to_safety(place)
            self._keep(place, creates_only, leaves)
        finally:
            self._is_busy = False

    def _keep(self, path: Path, creates_only: bool, leaves: bool) -> None:
        if path in self._copies or path in self._links or path in self._new:
            return
        if not os.path.lexists(path):
            self._new.add(path)
        elif creates_only:
            return
        elif path.is_symlink():
            self._links[path] = path.readlink()
        elif path.is_file():
            status = path.stat()
            inode = status.st_dev, status.st_ino
            # One without content may be a lock, which is known by its inode.
            if leaves or inode in self._of_inode or not status.st_size or not self._sets_aside(path):
                self._copies[path] = self._copy_of(path, inode)

    def _sets_aside(self, path: Path) -> bool:
        aside = _beside(path, "kept")
        if os.path.lexists(aside):
            return False
        self._copies[path] = aside  # Before it is there, for in between may come an interrupt.
        try:
            _set_aside(path, aside)
        except OSError:
            del self._copies[path]
            return False
        return True

    def _copy_of(self, path: Path, inode: tuple[int, int]) -> Path:
        if inode not in self._of_inode:  # Else it is another name of a file that is copied already.
            copy = self._new_place()
            shutil.copy2(path, copy)
            self._of_inode[inode] = copy
        return self._of_inode[inode]

    def _bring_to_safety(self, directory: Path) -> None:
        """Move away what was set aside in a directory that is about to go."""
        for path, aside in self._copies.items():
            if directory in path.parents and aside.parent == path.parent and aside.exists():
                copy = self._new_place()
                shutil.copy2(aside, copy)
                self._copies[path] = copy
                aside.unlink()

    def _new_place(self) -> Path:
        return self._directory / str(next(self._numbers))

    def put_back(self) -> None:
        """Give every file its content back; what could not be written stays among the temporary files."""
        self._is_busy = True  # Whoever listens around this one has nothing to keep of that.
        with ExitStack() as stack:  # One that cannot be written keeps no other from it.
            stack.push(self._remove_copies)
            for path, target in self._links.items():
                stack.callback(_link_back, path, target)
            for path, copy in self._copies.items():
                stack.callback(_write_back, path, copy)

    def _remove_copies(self, error: type[BaseException] | None, *_: object) -> None:
        if "_directory" not in vars(self):
            return
        if error is None:
            shutil.rmtree(self._directory)
        else:
            warnings.warn(
                "Not every file that was written over could be put back: what was in them lies in "
                f"{self._directory}. Copy it from there.",
                stacklevel=2,
            )


def _absolute(path: Any, directory: int | None, *, follows_links: bool) -> Path:
    name = os.fsdecode(path)
    if directory is not None:
        name = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)  # noqa: PTH115, PTH118
    return Path(os.path.realpath(name) if follows_links else os.path.abspath(name))  # noqa: PTH100 (it follows links)


def _beside(path: Path, ending: str) -> Path:
    name = os.fsdecode(os.fsencode(path.name)[:200])  # File systems take 255 bytes.
    return path.with_name(f".{name}.{ending}")


def _set_aside(path: Path, aside: Path) -> None:
    """Put an empty file in the place of a file."""
    mode = path.stat().st_mode & 0o777
    path.rename(aside)
    try:
        path.touch(exist_ok=False)
        path.chmod(mode)
    except OSError:
        aside.replace(path)
        raise


def _write_back(path: Path, copy: Path) -> None:
    if copy.parent == path.parent:
        with suppress(FileNotFoundError):  # Nothing has been written yet.
            copy.replace(path)
        return
    if path.is_file() and not path.stat().st_size and not copy.stat().st_size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # Under its own name there is always a whole file, also if this is interrupted.
    part = _beside(path, "put_back")
    try:
        shutil.copy2(copy, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _link_back(path: Path, target: Path) -> None:
    if not path.is_symlink() or path.readlink() != target:
        path.unlink(missing_ok=True)
        path.symlink_to(target)


# Who listens at this moment, by thread, and the functions that tell them.

_copies: dict[int, _Copies] = {}
_turn = threading.Lock()
_listeners = 0
_silent = ExitStack()


@contextmanager
def _listening() -> Iterator[None]:
    """Have the functions that touch files tell whoever listens; the first in starts that, and the last out ends it."""
    global _listeners
    with _turn:
        if not _listeners:
            _replace_functions()
        _listeners += 1
    try:
        yield
    finally:
        with _turn:
            _listeners -= 1
            if not _listeners:
                _silent.close()


def _replace_functions() -> None:
    tells: dict[tuple[Any, str], _Function] = {
        **dict.fromkeys(_OPENING, _opening),
        **dict.fromkeys(_MOVING, _moving),
        **dict.fromkeys(_REMOVING, _removing),
        (os, "open"): _opening_by_flags,
        (torch.serialization, "_open_zipfile_writer"): _torchs_opening,
    }
    for (module, name), tell in tells.items():
        function = getattr(module, name)
        setattr(module, name, partial(_called, function, tell))
        _silent.callback(setattr, module, name, function)


def _called(function: _Function, tell: _Function, *args: Any, **kwargs: Any) -> Any:
    copies = _copies.get(threading.get_ident())
    if copies is not None:
        tell(copies, *args, **kwargs)
    return function(*args, **kwargs)


def _opening(copies: _Copies, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> None:
    # A file that is only opened to be changed, such as a data set in a memory map, may be of any size.
    if any(letter in mode for letter in "wxa"):
        copies.hear(file, opens=True, creates_only="w" not in mode)


def _opening_by_flags(copies: _Copies, path: Any, flags: int, *args: Any, dir_fd: int | None = None, **_: Any) -> None:
    if flags & (os.O_CREAT | os.O_TRUNC):
        copies.hear(path, dir_fd, opens=True, creates_only=not flags & os.O_TRUNC)


def _torchs_opening(copies: _Copies, file: Any) -> None:
    if isinstance(file, (str, os.PathLike)):
        copies.hear(file, opens=True)


def _moving(
    copies: _Copies, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
) -> None:
    copies.hear(src, src_dir_fd, leaves=True)
    copies.hear(dst, dst_dir_fd)


def _removing(copies: _Copies, path: Any, *, dir_fd: int | None = None) -> None:
    copies.hear(path, dir_fd, leaves=True)
