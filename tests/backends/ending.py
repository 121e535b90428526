"""Ends of real engine processes, in the middle of a piece of work that a test has chosen."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

from training.backends.child import EngineChild
from training.backends.local import LocalBackend


def child_of(backend: LocalBackend) -> EngineChild:
    assert backend._child is not None
    return backend._child


def at_work(backend: LocalBackend) -> frozenset[int]:
    return child_of(backend)._record.read()


async def end(
    backend: LocalBackend,
    where: Callable[[frozenset[int]], object],
    by: signal.Signals = signal.SIGABRT,
) -> frozenset[int]:
    """Ends the engine at work on calls of which ``where`` is true; returns them.

    It is stopped to be looked at, so that it ends where it was seen; and as in a real crash the
    signal is for the thread that computes. Any other thread would take its time over telling of the
    signal while that one went on.
    """
    pid = child_of(backend).pid
    while True:
        os.kill(pid, signal.SIGSTOP)
        while state_of(pid) != "T":  # noqa: ASYNC110  it is only seen from outside
            await asyncio.sleep(0.001)
        if where(calls := at_work(backend)):
            _signal_main_thread(pid, by)
            os.kill(pid, signal.SIGCONT)
            return calls
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.005)


def _signal_main_thread(pid: int, by: signal.Signals) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.tgkill(pid, pid, by) != 0:
        raise OSError(ctypes.get_errno(), f"cannot signal the main thread of {pid}")


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
