"""One server per data directory: a second one would believe itself the owner of every model."""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from contextlib import suppress
from pathlib import Path

from training.core.errors import StorageError

WAIT_S = 10.0
"""A server that was just killed may take a moment to vanish; its locks go with its process."""
_POLL_S = 0.05


class FileLock:
    """An exclusive ``flock`` on a file that stays behind; the kernel frees it with the process.

    Blocking; call through ``in_thread``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._close: weakref.finalize[[int], FileLock] | None = None

    def acquire(self, wait_s: float | None = None) -> None:
        """Again after ``release``, but not twice.

        Raises ``StorageError`` with the holder's process id, or ``OSError`` of the disk.
        """
        deadline = time.monotonic() + (WAIT_S if wait_s is None else wait_s)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    raise StorageError(held_by(str(self._path.parent), _holder(descriptor)))
                time.sleep(_POLL_S)
            with suppress(OSError):  # of a full disk: the id is for people, the lock holds
                os.pwrite(descriptor, f"{os.getpid():<20}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._close = weakref.finalize(self, os.close, descriptor)

    def release(self) -> None:
        """Harmless when the lock is not held."""
        if self._close is not None:
            self._close()


def held_by(what: str, holder: str) -> str:
    return (
        f"another tinkercloud server uses {what} ({holder}): stop it first, or give this one "
        "a data directory and a database of its own"
    )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> str:
    return f"pid {os.pread(descriptor, 100, 0).decode(errors='replace').strip() or 'unknown'}"
