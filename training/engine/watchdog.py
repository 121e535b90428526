"""Ends an engine that does not get on with one piece of work, so that another one can be started.

A piece that holds the interpreter's lock all the while is not seen: this is a thread of Python's.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

from training.backends.death import STALL_EXIT_CODE

_log = logging.getLogger(__name__)

LONGEST_TICK_S = 5.0
TICKS = 20
"""Of a timeout, at least: it is kept to one in so many."""


class Watchdog:
    """``look`` tells which piece of work is being done, by a number that no two in a row share;
    None: none.

    Time is counted in ticks, not read from a clock: while the process is stopped or its machine
    asleep there are none, and what stood still meanwhile is not to blame.
    """

    def __init__(self, look: Callable[[], int | None], timeout_s: float) -> None:
        self.tick_s = min(timeout_s / TICKS, LONGEST_TICK_S)
        self._look = look
        self._timeout_s = timeout_s
        self._piece: int | None = None
        self._num_ticks = 0  # that have seen it

    def tick(self) -> bool:
        """Whether the time of the piece is up."""
        piece = self._look()
        if piece is None or piece != self._piece:
            self._piece, self._num_ticks = piece, 0
            return False
        self._num_ticks += 1
        return self._num_ticks * self.tick_s >= self._timeout_s

    def start(self) -> None:
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def _run(self) -> None:
        while not self.tick():
            time.sleep(self.tick_s)
        _log.error("one piece of work has taken %g s: the engine ends", self._timeout_s)
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        os._exit(STALL_EXIT_CODE)
