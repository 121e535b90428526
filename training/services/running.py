"""What runs at this moment, written where a process that is killed leaves it behind.

For the case in which the kernel, for want of memory, kills engine and server at once: the next
server then knows which requests to suspect. The file is written without a sync, a few microseconds
a unit: it survives the process, and after a power cut nobody is to blame.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import structlog

from training.backends.death import count_oom_kills

log = structlog.get_logger(__name__)

_COUNTER = (Path("/proc/vmstat"),)
"""Of the whole machine: a container that starts again counts its own from zero."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class RunningRequests:
    """One file per server. What cannot be written or read costs a verdict, nothing else."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._running: dict[str, Sequence[str]] = {}
        self._boot_id = _boot_id()

    def start(self) -> list[str]:
        """Requests that an earlier process was running when the kernel killed it for its memory."""
        try:
            left = json.loads(self._path.read_bytes())
            suspects = [str(name) for names in left["running"].values() for name in names]
            kills = count_oom_kills(_COUNTER)
            same_boot = left["boot_id"] == self._boot_id
            killed = kills is not None and left["oom_kills"] is not None
            guilty = suspects if same_boot and killed and kills > left["oom_kills"] else []
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            guilty = []  # the first start, or cut off in the middle of a write
        try:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError as error:
            log.warning("running.not_written", error=str(error))
        self._write()
        return guilty

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def note(self, engine: str, request_ids: Sequence[str]) -> None:
        """``engine`` begins to run these. That it has ended them need not be told: what has an
        outcome is beyond suspicion."""
        self._running[engine] = request_ids
        self._write()

    def _write(self) -> None:
        if self._descriptor is None:
            return
        content = json.dumps(
            {
                "boot_id": self._boot_id,
                "oom_kills": count_oom_kills(_COUNTER),
                "running": self._running,
            }
        ).encode()
        try:
            # Shorter content ends in spaces, which JSON ignores: no truncation in between.
            size = os.fstat(self._descriptor).st_size
            os.pwrite(self._descriptor, content.ljust(size), 0)
        except OSError as error:
            log.warning("running.not_written", error=str(error))
            self.close()


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
