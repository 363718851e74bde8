"""``python -m lit_bnfold`` is ``lit-bnfold``: the command line, and a sentence for whoever stops it."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

# Of TensorBoard: what is logged is handed over to a thread that writes it.
_HANDED_OVER_IN = "tensorboard.summary.writer.event_file_writer"
_PUT_OFF_SECONDS = 0.01


class _Terminated(BaseException):
    """SIGTERM has come."""


def run() -> None:
    """Run the command line in a process of its own.

    Whatever stops it, it ends with a sentence and the code that a shell gives for the signal: 130 for Ctrl-C, 143 for
    SIGTERM. Lightning ends a training that is stopped with Ctrl-C with 1.
    """
    threading.excepthook = _leave_to_the_main_thread
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        # It takes seconds, in which one may think better of it.
        from lit_bnfold.cli import main

        main()
    except KeyboardInterrupt:
        _stop("Ctrl-C", signal.SIGINT)
    except _Terminated:
        _stop("SIGTERM", signal.SIGTERM)
    finally:
        # All is done or said; on its way out Python would answer with a traceback.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(signum: int, frame: FrameType | None) -> None:
    # While Lightning trains it listens itself, calls this too, and stops when the step is done.
    if signal.getsignal(signum) is _terminate and not _is_put_off(signum, frame):
        raise _Terminated


def _interrupt(signum: int, frame: FrameType | None) -> None:
    if not _is_put_off(signum, frame):
        raise KeyboardInterrupt


def _is_put_off(signum: int, frame: FrameType | None) -> bool:
    """Whether this is no moment for an exception; the signal comes again in another one then.

    While something is being handed over to TensorBoard's thread, an exception can leave a lock held that nobody
    releases, or a thread that does not know of what it has to write. Lightning closes the files of a training that is
    stopped, and would wait for that thread: for two minutes, or without an end. Out of a `__del__` Python lets no
    exception, and fsspec takes each for the answer that a file is not there: the process would go on as if nobody had
    stopped it.
    """
    while frame is not None and not _must_end(frame):
        frame = frame.f_back
    # Windows has no such timers.
    if frame is None or not hasattr(signal, "setitimer"):
        return False
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signum))
    signal.setitimer(signal.ITIMER_REAL, _PUT_OFF_SECONDS)
    return True


def _must_end(frame: FrameType) -> bool:
    module, function = frame.f_globals.get("__name__"), frame.f_code.co_name
    return module == _HANDED_OVER_IN or function == "__del__" or (module, function) == ("fsspec.spec", "exists")


def _stop(by: str, signum: signal.Signals) -> NoReturn:
    sys.stderr.write(f"lit-bnfold: stopped by {by}.\n")
    sys.exit(128 + signum)


def _leave_to_the_main_thread(failure: threading.ExceptHookArgs) -> None:
    # TensorBoard writes its files in a thread, and raises in the main thread as well what happens there.
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


if __name__ == "__main__":
    run()
