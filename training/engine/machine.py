"""What the machine has."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

import torch

CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
"""Of version 2 and 1; as a container sees its own."""


def memory_bytes(device: torch.device) -> int:
    """All that this process may use of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(installed, *(_limit(path) or installed for path in CGROUP_LIMITS))


def return_free_memory() -> None:
    """To the system: the allocator has been told to keep it (``backends/child.py`` says why)."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _limit(path: Path) -> int | None:
    """None where there is none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
