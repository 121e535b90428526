"""Writes captured states in a thread of its own, one after the other, while the engine goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from training.backends.state_files import storage_errors

MAX_CAPTURES = 2
"""Not yet written: one being written and one that waits. Each is a copy of a whole state."""


class Captured(Protocol):
    """What ``engine.capture.Capture`` is to the loop."""

    def write(self, directory: Path) -> None:
        """Returns with every file on disk; called in the writer's thread."""


Done = Callable[[Exception | None], None]
"""Told, in the writer's thread, that all files are on disk or why they are not."""


class StateWriter:
    """``put``, ``is_full`` and ``close`` are for one thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "state-writer")
        # Each is counted by one thread alone, so neither needs a lock.
        self._num_put = 0
        self._num_written = 0

    @property
    def is_full(self) -> bool:
        return self._num_put - self._num_written >= MAX_CAPTURES

    def put(self, captured: Captured, directory: Path, done: Done) -> None:
        if self.is_full:
            raise RuntimeError("too many captured states at once")
        self._num_put += 1
        self._thread.submit(self._write, captured, directory, done)

    def close(self) -> None:
        """Returns when what was captured is written."""
        self._thread.shutdown()

    def _write(self, captured: Captured, directory: Path, done: Done) -> None:
        error: Exception | None = None
        try:
            with storage_errors():
                captured.write(directory)
        except Exception as raised:  # border: one state that cannot be written ends nothing else
            error = raised
        self._num_written += 1
        done(error)
