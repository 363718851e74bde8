"""What a folding is doing, for whoever waits for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info


class Stages:
    """Says which stage has begun of something that takes long and shows nothing else.

    Where Lightning draws a bar on a terminal, that is one line there, which each stage replaces and the end erases.
    Elsewhere it is a line of Lightning's log for each stage, as also beside a ``RichProgressBar``, which has the
    terminal for itself. Only rank 0 speaks. No thread is at work, since a data loader may fork at any time.
    """

    def __init__(self) -> None:
        self._is_shown = False
        # Where the line is drawn, None for the log.
        self._terminal: TextIO | None = None
        self._line = ""

    @contextmanager
    def shown(self, trainer: Trainer) -> Iterator[None]:
        """Let the stages be seen for a while.

        Args:
            trainer: The Trainer that is at work.
        """
        self._is_shown = trainer.is_global_zero
        self._terminal = sys.stderr if _draws_lines(trainer) else None
        try:
            yield
        finally:
            self.clear()
            self._is_shown, self._terminal = False, None

    def begin(self, stage: str) -> None:
        """Say what begins.

        Args:
            stage: A few words, as in "validating the original".
        """
        if not self._is_shown:
            return
        said = f"BatchNorm folding: {stage}"
        if self._terminal is None:
            rank_zero_info(said)
        else:
            self.clear()
            self._line = f"{said} ..."
            # Whatever else is printed then begins at the beginning of the line.
            self._terminal.write(f"{self._line}\r")
            self._terminal.flush()

    def clear(self) -> None:
        """Erase the line, because somebody else is about to print."""
        if self._line and self._terminal is not None:
            self._terminal.write(" " * len(self._line) + "\r")
            self._terminal.flush()
        self._line = ""


def _draws_lines(trainer: Trainer) -> bool:
    bar = trainer.progress_bar_callback
    # By its name, because Lightning has two.
    is_rich = any(each.__name__ == "RichProgressBar" for each in type(bar).__mro__)
    return bar is not None and not is_rich and sys.stderr.isatty()
