"""A server that is killed and started again: its processes, its folders, its end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from benchmarks.memory import children_of
from tests.servers import Server

_POLL_S = 0.02
_STOP_S = 120.0
_ORPHAN_S = 30.0
_MAKE_FAILED = 2
"""What `make serve` ends with whenever its server does not end with 0; its last line says how."""
_MAKE_TERMINATED = re.compile(r"make(\[\d+\])?: \*\*\* .* Terminated")
"""A `make` that another one started (as `make test` does here) numbers itself."""


async def until(condition: Callable[[], bool], look_s: float = _POLL_S) -> None:
    """Nobody tells us of other processes and of files: we look again and again."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(look_s)


class Target(StrEnum):
    """Who is killed; STOP asks the server to end (SIGTERM), as a service manager does."""

    API = "api"
    ENGINE = "engine"
    BOTH = "both"
    STOP = "stop"


_VICTIMS = {
    Target.API: (Target.API,),
    Target.ENGINE: (Target.ENGINE,),
    Target.BOTH: (Target.ENGINE, Target.API),
    Target.STOP: (Target.API,),
}


@dataclass(frozen=True)
class Process:
    """``started`` tells it from a later one of the same id."""

    pid: int
    started: str

    def is_alive(self) -> bool:
        return _started(self.pid) == self.started

    def send(self, signal_number: signal.Signals) -> bool:
        """Whether there was still somebody to get it."""
        with suppress(ProcessLookupError):
            if self.is_alive():
                os.kill(self.pid, signal_number)
                return True
        return False


class KilledServer:
    """Starts ``server`` again whenever it is gone, as a service manager would.

    ``audit`` looks at what an end left behind before the next start, and returns what is wrong; its
    argument: whether the server had ended in order.
    """

    def __init__(self, server: Server, audit: Callable[[bool], list[str]]) -> None:
        self.server = server
        self._audit = audit
        self.num_starts = 0
        self.engines: set[Process] = set()
        """Every engine that was ever seen."""
        self.problems: list[str] = []
        self._ended_by: Target | None = None
        self._logged_before = 0
        """Bytes of the log that are not of the process that was started last."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ready at the start; asked to stop at the end, and what it left running is a problem."""
        self.spawn()
        await asyncio.to_thread(self.server.wait_until_ready)
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await self._stop()

    def processes(self) -> dict[Target, Process]:
        """Those that there are at the moment; the engine that was started last."""
        found = {}
        for pid in _descendants(self.server.process.pid):
            target = _target_of(pid)
            started = _started(pid)
            if target is not None and started is not None:
                found[target] = Process(pid, started)
                if target is Target.ENGINE:
                    self.engines.add(found[target])
        return found

    def kill(self, target: Target, gap_s: float = 0.0) -> dict[Target, Process]:
        """Returns whom it met; BOTH kills the engine first and the API ``gap_s`` later."""
        found = self.processes()
        met: dict[Target, Process] = {}
        for each in _VICTIMS[target]:
            if each not in found:
                continue
            if met:
                time.sleep(gap_s)
            if each is Target.API:
                self._ended_by = target
            is_asked = target is Target.STOP
            if found[each].send(signal.SIGTERM if is_asked else signal.SIGKILL):
                met[each] = found[each]
        return met

    def replays(self) -> list[int]:
        """Of each model that was brought back: how many operations were run again for that."""
        lines = self.server.log_file.read_text(errors="replace").splitlines()
        entries = [json.loads(line) for line in lines if '"model.revived"' in line]
        return [int(entry["num_replayed"]) for entry in entries]

    def spawn(self) -> None:
        self.num_starts += 1
        self._ended_by = None
        self._logged_before = _size_bytes(self.server.log_file)
        self.server.spawn()

    def check_end(self, code: int) -> None:
        """One that was asked to stop says so with 0, unless it had just begun to start."""
        if self._ended_by is None or (self._ended_by is Target.STOP and not self._stopped(code)):
            tail = self.server.log_tail(15)
            self.problems.append(f"the server ended by itself with code {code}:\n{tail}")

    def _stopped(self, code: int) -> bool:
        if code == 0:
            return True
        if code == _MAKE_FAILED:
            by_signal = _MAKE_TERMINATED.fullmatch(self.server.log_tail(1)) is not None
        else:
            by_signal = code == -signal.SIGTERM
        return by_signal and not self._was_ready()

    def _was_ready(self) -> bool:
        with self.server.log_file.open("rb") as log:
            log.seek(self._logged_before)
            return b'"server.ready"' in log.read()

    async def _watch(self) -> None:
        while True:
            if (code := self.server.process.poll()) is not None:
                self.check_end(code)
                is_orderly = code == 0 and self._ended_by is Target.STOP
                self.problems += await asyncio.to_thread(self._audit, is_orderly)
                self.spawn()
            self.processes()
            await asyncio.sleep(_POLL_S)

    async def _stop(self) -> None:
        """As a service manager does it: SIGTERM to the server's process, then patience."""
        self.kill(Target.STOP)
        try:
            self.check_end(await asyncio.to_thread(self.server.process.wait, _STOP_S))
        except subprocess.TimeoutExpired:
            self.problems.append(f"the server did not stop within {_STOP_S:g} s")
            for process in self.processes().values():
                process.send(signal.SIGKILL)
            self.server.kill()
            return
        deadline = time.monotonic() + _ORPHAN_S
        while left := [engine.pid for engine in self.engines if engine.is_alive()]:
            if time.monotonic() > deadline:
                self.problems.append(f"engines still run after the server's end: {left}")
                return
            await asyncio.sleep(_POLL_S)


def _descendants(pid: int) -> Iterator[int]:
    """The process itself first; children in the order they were started."""
    yield pid
    try:
        children = children_of(pid)
    except (FileNotFoundError, ProcessLookupError):
        return
    for child in children:
        yield from _descendants(child)


def _target_of(pid: int) -> Target | None:
    """By its command line: `make serve` and shells in between are neither."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if "python" not in os.path.basename(words[0]):
        return None
    if "training.engine" in words:
        return Target.ENGINE
    return Target.API if "serve" in words else None


def _started(pid: int) -> str | None:
    """Clock ticks since boot at its start; None for one that has ended, zombies too."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _size_bytes(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
