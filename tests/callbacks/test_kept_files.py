"""Files that are written over while they are kept have their content back, however they were written."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy
import pytest
import torch
from torch.serialization import save as save_as_imported

from lit_bnfold.callbacks.kept_files import files_put_back

OLD = b"what was there before"


def write_whole(path: Path) -> None:
    path.write_bytes(b"new")


def write_open_file(path: Path) -> None:
    with path.open("wb") as file:
        torch.save({"new": torch.ones(3)}, file)


def replace_by_another(path: Path) -> None:
    other = path.with_suffix(".tmp")
    other.write_bytes(b"new")
    other.replace(path)


def move_away(path: Path) -> None:
    path.rename(path.with_name("moved"))


def remove_and_write(path: Path) -> None:
    path.unlink()
    path.write_bytes(b"new")


def write_and_remove_with_its_directory(path: Path) -> None:
    path.write_bytes(b"new")
    path.unlink()
    path.parent.rmdir()


def write_and_move_with_its_directory(path: Path) -> None:
    path.write_bytes(b"new")
    path.parent.rename(path.parent.with_name("outer"))
    assert [each.name for each in path.parent.with_name("outer").iterdir()] == [path.name]


def write_and_remove_whatever_is_beside_it(path: Path) -> None:
    path.write_bytes(b"new")
    shutil.rmtree(path.parent)


def write_with_a_file_of_an_earlier_process_beside_it(path: Path) -> None:
    path.with_name(f".{path.name}.kept").write_bytes(b"older")
    path.write_bytes(b"new")
    path.write_bytes(b"")


def write_twice_and_replace(path: Path) -> None:
    write_whole(path)
    write_whole(path)
    replace_by_another(path)


def remove_with_its_directory(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()


def write_compressed(path: Path) -> None:
    with gzip.open(path, "wb") as file:
        file.write(b"new")


def write_array(path: Path) -> None:
    with path.open("wb") as file:
        numpy.save(file, numpy.ones(3))


def write_pickle(path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(3, file)


def write_from_another_directory(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        Path(path.name).write_bytes(b"new")
    finally:
        os.chdir(before)


WAYS: list[Callable[[Path], object]] = [
    write_whole,
    write_open_file,
    replace_by_another,
    move_away,
    remove_and_write,
    remove_with_its_directory,
    write_compressed,
    write_array,
    write_from_another_directory,
    lambda path: torch.save({"new": torch.ones(3)}, path),
    lambda path: torch.save({"new": torch.ones(3)}, str(path), _use_new_zipfile_serialization=False),
    lambda path: save_as_imported({"new": torch.ones(3)}, str(path)),
    lambda path: open(os.fsencode(path), "wb").close(),  # noqa: PTH123 (a path of bytes)
    lambda path: os.close(os.open(path, os.O_WRONLY | os.O_TRUNC)),
    lambda path: shutil.copy(__file__, path),
    lambda path: shutil.rmtree(path.parent),
    write_pickle,
    write_and_remove_with_its_directory,
    write_and_move_with_its_directory,
    write_and_remove_whatever_is_beside_it,
    write_with_a_file_of_an_earlier_process_beside_it,
    write_twice_and_replace,
]


@pytest.mark.parametrize("write", WAYS)
def test_what_was_there_before_is_there_again(write: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "inner" / "weights"
    path.parent.mkdir()
    path.write_bytes(OLD)
    path.chmod(0o640)
    before = path.stat()
    with files_put_back():
        write(path)
        assert not path.exists() or path.read_bytes() != OLD
    assert path.read_bytes() == OLD
    after = path.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


def test_a_process_that_is_killed_leaves_what_was_in_a_file_beside_it(tmp_path: Path) -> None:
    path, name = tmp_path / "weights", tmp_path / "name"
    path.write_bytes(OLD)
    name.hardlink_to(path)
    child = os.fork()
    if not child:
        with files_put_back():
            write_whole(path)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_bytes() == b"new"
    assert (tmp_path / ".weights.kept").read_bytes() == name.read_bytes() == OLD


def test_a_file_that_cannot_be_set_aside_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ("w" * 252)  # Another name with it may not be longer than 255.
    path.write_bytes(OLD)
    with files_put_back():
        write_whole(path)
    assert path.read_bytes() == OLD

    path = tmp_path / "weights"
    path.write_bytes(OLD)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Path, "touch", fail)
    with files_put_back():
        write_whole(path)
    assert path.read_bytes() == OLD
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


@pytest.mark.parametrize("step", ["rename", "touch"])
def test_an_interrupt_on_the_way_loses_nothing(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(OLD)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, step, interrupt)
    with pytest.raises(KeyboardInterrupt), files_put_back():
        write_whole(path)
    assert path.read_bytes() == OLD
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_file_that_may_not_be_written_still_may_not_be(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(OLD)
    path.chmod(0o440)
    with files_put_back():
        with suppress(PermissionError):  # Who is root may write it.
            write_whole(path)
        assert path.stat().st_mode & 0o777 == 0o440
    assert path.read_bytes() == OLD


def test_what_fails_in_between_puts_back_too(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(OLD)

    def fail() -> None:
        with files_put_back():
            write_whole(path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == OLD


def test_new_files_and_appended_lines_stay_and_what_is_only_changed_is_not_copied(tmp_path: Path) -> None:
    log, memory, new = tmp_path / "log", tmp_path / "memory", tmp_path / "new"
    log.write_bytes(b"one\n")
    memory.write_bytes(bytes(8))
    with files_put_back():
        with log.open("ab") as file:
            file.write(b"two\n")
        numpy.memmap(memory, dtype=numpy.uint8)[0] = 1
        new.write_bytes(b"first")
        new.write_bytes(b"second")
        new.replace(tmp_path / "renamed")
    assert log.read_bytes() == b"one\ntwo\n"
    assert memory.read_bytes()[0] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"log", "memory", "renamed"}


def test_a_link_leads_where_it_led(tmp_path: Path) -> None:
    first, second, latest = tmp_path / "first", tmp_path / "second", tmp_path / "latest"
    first.write_bytes(OLD)
    latest.symlink_to(first)
    with files_put_back():
        write_whole(latest)  # through the link
        second.write_bytes(b"second")
        (tmp_path / "tmp").symlink_to(second)
        (tmp_path / "tmp").replace(latest)
    assert latest.readlink() == first
    assert first.read_bytes() == OLD
    assert second.read_bytes() == b"second"


def test_another_name_of_a_file_has_what_was_there_first(tmp_path: Path) -> None:
    path, name = tmp_path / "weights", tmp_path / "latest"
    path.write_bytes(OLD)
    name.hardlink_to(path)
    with files_put_back():
        write_whole(path)
        name.unlink()
        name.hardlink_to(path)
    assert path.read_bytes() == name.read_bytes() == OLD


def test_another_name_of_a_file_that_could_not_be_set_aside_has_what_was_there_first(tmp_path: Path) -> None:
    path, name = tmp_path / "weights", tmp_path / "latest"
    path.write_bytes(OLD)
    name.hardlink_to(path)
    (tmp_path / ".weights.kept").write_bytes(b"older")
    with files_put_back():
        write_whole(path)
        write_whole(name)
    assert path.read_bytes() == name.read_bytes() == OLD


def test_a_lock_is_the_same_for_others_all_the_time(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.touch()
    inode = lock.stat().st_ino
    with files_put_back():
        os.close(os.open(lock, os.O_RDWR | os.O_TRUNC))
        assert lock.stat().st_ino == inode
    assert lock.stat().st_ino == inode


def test_a_file_without_content_has_none_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "done"
    path.touch()
    with files_put_back():
        write_whole(path)
    assert path.read_bytes() == b""


def test_what_is_made_and_moved_in_between_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(OLD)
    with files_put_back():
        for _ in range(2):
            with tempfile.NamedTemporaryFile(dir=tmp_path, delete=False) as file:
                file.write(b"new")
            Path(file.name).replace(path)
        with (tmp_path / "lines").open("a") as lines:
            lines.write("new")
        (tmp_path / "lines").rename(tmp_path / "others")
        tempfile.NamedTemporaryFile(dir=tmp_path).close()
    assert path.read_bytes() == OLD
    assert {each.name for each in tmp_path.iterdir()} == {"weights", "others"}


def test_where_there_is_no_room_for_a_copy_the_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "weights", tmp_path / "other"
    path.write_bytes(OLD)
    other.write_bytes(OLD)
    copy = shutil.copy2

    def fail(source: Path, target: Path) -> None:
        if source == path:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(shutil, "copy2", fail)
    with files_put_back():
        write_whole(other)
        with pytest.raises(OSError, match="No space left"):
            path.unlink()
    assert path.read_bytes() == other.read_bytes() == OLD


def test_a_file_that_could_not_be_kept_is_kept_when_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(OLD)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with files_put_back():
        with monkeypatch.context() as patch:
            patch.setattr(Path, "touch", fail)
            patch.setattr(shutil, "copy2", fail)
            with pytest.raises(OSError, match="No space left"):
                write_whole(path)
        assert path.read_bytes() == OLD
        write_whole(path)
    assert path.read_bytes() == OLD


def test_what_cannot_be_put_back_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, temporary = tmp_path / "weights", tmp_path / "temporary"
    path.write_bytes(OLD)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill_the_disk() -> None:
        with files_put_back():
            path.unlink()
            monkeypatch.setattr(shutil, "copy2", fail)

    with pytest.raises(OSError, match="No space left"), pytest.warns(UserWarning, match=str(temporary)):
        fill_the_disk()
    assert [copy.read_bytes() for copy in temporary.rglob("*") if copy.is_file()] == [OLD]


def test_one_that_cannot_be_put_back_keeps_no_other_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other, temporary = tmp_path / "weights", tmp_path / "other", tmp_path / "temporary"
    path.write_bytes(OLD)
    other.write_bytes(OLD)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def make_a_directory() -> None:
        with files_put_back():
            write_whole(other)
            path.unlink()
            path.mkdir()

    with pytest.raises(OSError, match="directory"), pytest.warns(UserWarning, match=f"lies in {temporary}"):
        make_a_directory()
    assert other.read_bytes() == OLD
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_nothing_is_watched_afterwards(tmp_path: Path) -> None:
    functions = [open, io.open, os.open, os.replace, os.remove, vars(torch.serialization)["_open_zipfile_writer"]]
    inside, outside = threading.Event(), threading.Event()

    def listen() -> None:
        with files_put_back():
            inside.set()
            outside.wait()

    thread = threading.Thread(target=listen)
    with files_put_back():
        thread.start()
        inside.wait()
    path = tmp_path / "weights"
    path.write_bytes(OLD)
    with files_put_back():
        torch.save(3, path)
    assert path.read_bytes() == OLD
    outside.set()
    thread.join()
    assert [open, io.open, os.open, os.replace, os.remove] == functions[:5]
    assert vars(torch.serialization)["_open_zipfile_writer"] is functions[5]


def test_other_threads_and_processes_write_as_they_like(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("thread", "process", "own")]
    for path in paths:
        path.write_bytes(OLD)
    with files_put_back():
        writer = threading.Thread(target=write_whole, args=(paths[0],))
        writer.start()
        writer.join()
        child = os.fork()
        if not child:
            write_whole(paths[1])
            os._exit(0)
        os.waitpid(child, 0)
        write_whole(paths[2])
    assert [path.read_bytes() for path in paths] == [b"new", b"new", OLD]


def test_one_inside_of_another_puts_back_its_own(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(OLD)
    with files_put_back():
        path.write_bytes(b"outer")
        with files_put_back():
            path.write_bytes(b"inner")
        assert path.read_bytes() == b"outer"
    assert path.read_bytes() == OLD


@pytest.mark.parametrize("write", WAYS)
def test_one_around_another_does_not_take_that_for_its_own(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, temporary = tmp_path / "inner" / "weights", tmp_path / "temporary"
    path.parent.mkdir()
    path.write_bytes(OLD)
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with files_put_back(), files_put_back():
        write(path)
    assert path.read_bytes() == OLD
    assert not list(temporary.iterdir())
