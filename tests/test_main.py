"""A process that is stopped in the middle of handing something over to TensorBoard can still close its files."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec.implementations.local
import fsspec.spec
import pytest
from fsspec.implementations.local import LocalFileSystem
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lit_bnfold import __main__ as command
from lit_bnfold.cli import _leave

# `python -m` warns of a module that has been imported, and other tests run it so.
del sys.modules[command.__name__]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals end processes there")

STOPS = {
    signal.SIGTERM: (command._terminate, command._Terminated),
    signal.SIGINT: (command._interrupt, KeyboardInterrupt),
}
ACTIONS: dict[str, Callable[[EventFileWriter], object]] = {
    "an event": lambda writer: writer.add_event(Event(step=1)),
    "a flush": EventFileWriter.flush,
    "the end": EventFileWriter.close,
}


# What the signals come in the middle of.
FILES = (event_file_writer.__file__, queue.__file__, threading.__file__)


def trace(lines: Any, act: Callable[[], object]) -> None:
    own = sys.gettrace()
    sys.settrace(lines)
    try:
        act()
    finally:
        sys.settrace(own)


@pytest.fixture(params=STOPS)
def signum(request: pytest.FixtureRequest) -> Iterator[int]:
    handlers = {each: signal.getsignal(each) for each in (request.param, signal.SIGALRM)}
    signal.signal(request.param, STOPS[request.param][0])
    yield request.param
    for each, handler in handlers.items():
        signal.signal(each, handler)


def close(writer: EventFileWriter) -> None:
    """As Lightning does."""
    # It may be closed.
    with contextlib.suppress(OSError):
        writer.flush()
    writer.close()


@pytest.mark.parametrize("action", ACTIONS)
def test_a_signal_at_any_line_of_tensorboard_leaves_a_file_that_can_be_closed(
    action: str, signum: int, tmp_path: Path, lines: Any
) -> None:
    act, stop = ACTIONS[action], STOPS[signum][1]
    undisturbed = lines(FILES, math.inf, signum)
    writer = EventFileWriter(str(tmp_path))
    trace(undisturbed, lambda: act(writer))
    writer.close()
    assert undisturbed.seen > 10

    def log_on() -> None:
        act(writer)
        time.sleep(60)

    for line in range(1, undisturbed.seen + 1):
        writer = EventFileWriter(str(tmp_path))
        with pytest.raises(stop):
            trace(lines(FILES, line, signum), log_on)
        # Who waits for the thread that writes may wait without an end.
        closing = threading.Thread(target=close, args=(writer,), daemon=True)
        closing.start()
        closing.join(30)
        assert not closing.is_alive(), f"stopped at line {line} of {undisturbed.seen}"


def test_a_signal_in_a_finalizer_is_not_lost(signum: int) -> None:
    class Finalized:
        def __del__(self) -> None:
            os.kill(os.getpid(), signum)
            ended.append(True)

    ended: list[bool] = []

    def finalize() -> None:
        Finalized()
        time.sleep(60)

    with pytest.raises(STOPS[signum][1]):
        finalize()
    assert ended == [True]


def test_a_signal_while_a_file_is_looked_for_is_not_lost(signum: int, tmp_path: Path, lines: Any) -> None:
    filesystem = LocalFileSystem()

    def look() -> None:
        assert filesystem.exists(tmp_path)

    files = (fsspec.spec.__file__, fsspec.implementations.local.__file__)
    undisturbed = lines(files, math.inf, signum)
    trace(undisturbed, look)
    assert undisturbed.seen > 10

    def look_on() -> None:
        look()
        time.sleep(60)

    for line in range(1, undisturbed.seen + 1):
        with pytest.raises(STOPS[signum][1]):
            trace(lines(files, line, signum), look_on)


def test_a_file_whose_name_is_bytes_is_named_as_any_other() -> None:
    with pytest.raises(SystemExit, match=r"^lit-bnfold: \[Errno 13\] no: '/x/events'\. Allow it, or choose another"):
        _leave(PermissionError(13, "no", b"/x/events"))


def test_elsewhere_a_signal_stops_at_once(signum: int) -> None:
    with pytest.raises(STOPS[signum][1]):
        os.kill(os.getpid(), signum)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
