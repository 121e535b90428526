"""Memory of a process from /proc: what it holds, and the most it has held since ``reset_peak``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Memory(NamedTuple):
    steady_mib: float
    peak_mib: float


def memory_of(pid: int) -> Memory:
    """Resident sizes. Raises ``FileNotFoundError`` for a process that has ended."""
    return parse_status(Path(f"/proc/{pid}/status").read_text())


def parse_status(text: str) -> Memory:
    lines = (line.split() for line in text.splitlines())
    kib = {line[0]: int(line[1]) for line in lines if line and line[0] in ("VmRSS:", "VmHWM:")}
    return Memory(kib["VmRSS:"] / 1024, kib["VmHWM:"] / 1024)


def reset_peak(pid: int) -> None:
    """From here on the peak is that of what comes (see proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def children_of(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
