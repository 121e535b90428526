"""Which calls an engine is at work on, told so that it can be read after its death: a few numbers
in memory that the server and the engine share. Nothing is ever sent, so noting costs a microsecond.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import tempfile
from array import array
from collections.abc import Sequence

# Places of the numbers, each 8 bytes.
_NUM_WRITES = 0
"""Begun and ended writes of the calls: odd in the middle of one."""
_RECEIVING = 1
_NUM_CALLS = 2
_CALLS = 3


def _words(fd: int) -> tuple[mmap.mmap, memoryview]:
    shared = mmap.mmap(fd, 0)
    return shared, memoryview(shared).cast("Q")


class FlightRecorder:
    """The engine's end. ``at_work`` is for the thread that computes, ``receiving`` for the one that
    reads commands."""

    def __init__(self, fd: int) -> None:
        self._shared, self._words = _words(fd)

    def at_work(self, calls: Sequence[int]) -> None:
        """From now on the work is for ``calls``; for none, it is over."""
        words, num = self._words, len(calls)
        numbers = memoryview(array("Q", calls))
        words[_NUM_WRITES] += 1
        words[_NUM_CALLS] = num
        words[_CALLS : _CALLS + num] = numbers
        words[_NUM_WRITES] += 1

    def receiving(self, call: int) -> None:
        """Its command is being taken off the socket; 0: none is."""
        self._words[_RECEIVING] = call


class FlightRecord:
    """The server's end: made before the engine, which inherits ``fd``, and read after it."""

    def __init__(self, max_calls: int) -> None:
        """``max_calls``: at once."""
        with contextlib.ExitStack() as opened:
            if sys.platform == "linux":
                self.fd = os.memfd_create("flight-recorder", os.MFD_CLOEXEC)
                opened.callback(os.close, self.fd)
            else:
                self.fd = opened.enter_context(tempfile.TemporaryFile()).fileno()
            os.truncate(self.fd, 8 * (_CALLS + max_calls))
            self._shared, self._words = _words(self.fd)
            self._opened = opened.pop_all()

    def read(self) -> frozenset[int]:
        """Of an engine that has ended: the calls it was at work on, and the one that it was
        receiving. Where it ended in the middle of noting, the work had not begun."""
        words = self._words
        calls = {words[_RECEIVING]} - {0}
        if words[_NUM_WRITES] % 2 == 0:
            calls.update(words[_CALLS : _CALLS + words[_NUM_CALLS]])
        return frozenset(calls)

    def close(self) -> None:
        self._words.release()
        self._shared.close()
        self._opened.close()
