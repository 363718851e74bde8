"""Whose turn it is to fold, where several threads want to."""

from __future__ import annotations

import threading

TURN = threading.RLock()
"""Held while a model is planned or folded.

What a run is watched with and what is put back after it belong to the process and not to a thread: the states of the
random generators, torch's flag that a dispatch mode is on, the stance of its compiler. Two runs in two threads would
put back what they have found of each other, for good. And two threads that fold one model in place would fold it twice.
"""
