"""Why an engine process ended: whether the work it was doing is to blame."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from training.core.errors import DeathCause

STALL_EXIT_CODE = 86
"""Of an engine that its own watchdog has ended."""

_CGROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


class Death(NamedTuple):
    cause: DeathCause
    detail: str


def counter_files(cgroups: Path = _CGROUPS, mount: Path = _MOUNT) -> list[Path]:
    """Where the kernel counts processes that it killed for want of memory, the most exact first.

    Ours of version 2 and 1, which our children share; as a container sees them, where the mount is
    our own group; then the whole machine's.
    """
    files = []
    for line in _text(cgroups).splitlines():
        number, controllers, group = line.split(":", 2)
        if number == "0":
            files += [mount / group.lstrip("/") / "memory.events", mount / "memory.events"]
        elif "memory" in controllers.split(","):
            memory = mount / "memory"
            files += [memory / group.lstrip("/") / "memory.oom_control"]
            files += [memory / "memory.oom_control"]
    return [*files, Path("/proc/vmstat")]


def count_oom_kills(files: Sequence[Path] | None = None) -> int | None:
    """As the first file says that has a count; None where none has."""
    for path in counter_files() if files is None else files:
        if found := re.search(r"^oom_kill (\d+)$", _text(path), re.MULTILINE):
            return int(found[1])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def death_of(
    returncode: int | None, oom_kills_before: int | None, oom_kills_after: int | None
) -> Death:
    """``returncode`` as ``subprocess`` has it: negative for a signal.

    A SIGKILL is the kernel's where its count of such kills has grown while the process lived, or
    where there is no count to say that it was not; else it was somebody's, and no work is to blame.
    """
    if returncode == STALL_EXIT_CODE:
        return Death(DeathCause.STALLED, "its watchdog found it stalled")
    if returncode is None or returncode >= 0:
        return Death(DeathCause.CRASHED, f"exit code {returncode}")
    how = f"signal {-returncode}"
    if returncode != -signal.SIGKILL:
        return Death(DeathCause.CRASHED, how)
    if oom_kills_before is None or oom_kills_after is None:
        return Death(DeathCause.CRASHED, f"{how}, perhaps for want of memory")
    if oom_kills_after > oom_kills_before:
        return Death(DeathCause.CRASHED, f"{how}, the machine was out of memory")
    return Death(DeathCause.KILLED, how)
