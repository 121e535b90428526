"""What a server and its engines did to their files and said over HTTP, in one order.

Recorded by ``chaos_recorder.cpp``, which is compiled here and preloaded into them.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

_SOURCE = Path(__file__).with_name("chaos_recorder.cpp")
_EVENT = struct.Struct("<BiiQQII")


class Did(IntEnum):
    OPEN = 1
    WRITE = 2
    TRUNCATE = 3
    SYNC = 4
    RENAME = 5
    UNLINK = 6
    MKDIR = 7
    MMAP = 8
    LINK = 9
    ACCEPTED = 10
    HEARD = 11
    SAID = 12


class Event(NamedTuple):
    """``value``: offset of a write, size of a truncation, flags of an opening."""

    did: Did
    pid: int
    fd: int
    inode: int
    value: int
    name: str
    data: bytes


class Recorder:
    """Records what happens below ``root``."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._library = folder / "recorder.so"
        self._trace = folder / "trace"
        self._root = root
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-o", str(self._library)]
        subprocess.run([*command, str(_SOURCE), "-ldl"], check=True)

    def environment(self) -> Mapping[str, str]:
        """For the server's process; its engines inherit it."""
        return {
            "LD_PRELOAD": str(self._library),
            "RECORDER_TRACE": str(self._trace),
            "RECORDER_ROOT": str(self._root),
        }

    def events(self) -> list[Event]:
        return list(_events(self._trace.read_bytes()))


def _events(trace: bytes) -> Iterator[Event]:
    at = 0
    while at < len(trace):
        did, pid, fd, inode, value, num_name, num_data = _EVENT.unpack_from(trace, at)
        at += _EVENT.size
        name = trace[at : at + num_name].decode()
        at += num_name
        yield Event(Did(did), pid, fd, inode, value, name, trace[at : at + num_data])
        at += num_data
