"""A server that is killed and started again: its processes, its folders, its end."""

from __future__ import annotations

import asyncio
import os
import signal
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


async def until(condition: Callable[[], bool], look_s: float = _POLL_S) -> None:
    """Nobody tells us of other processes and of files: we look again and again."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(look_s)


class Target(StrEnum):
    API = "api"
    ENGINE = "engine"
    BOTH = "both"


@dataclass(frozen=True)
class Process:
    """``started`` tells it from a later one of the same id."""

    pid: int
    started: str

    def is_alive(self) -> bool:
        return _started(self.pid) == self.started

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            if self.is_alive():
                os.kill(self.pid, signal.SIGKILL)


class KilledServer:
    """Starts ``server`` again whenever it is gone, as a service manager would."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.num_starts = 0
        self.engines: set[Process] = set()
        """Every engine that was ever seen."""
        self.problems: list[str] = []
        self._api_was_killed = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ready at the start; asked to stop at the end, and what it left running is a problem."""
        self._spawn()
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

    def kill(self, target: Target, gap_s: float = 0.0) -> bool:
        """SIGKILL; BOTH kills the engine first and the API ``gap_s`` later.

        False where there was nobody to kill.
        """
        found = self.processes()
        wanted = [Target.ENGINE, Target.API] if target is Target.BOTH else [target]
        victims = [each for each in wanted if each in found]
        for number, each in enumerate(victims):
            if number:
                time.sleep(gap_s)
            self._api_was_killed |= each is Target.API
            found[each].kill()
        return bool(victims)

    def _spawn(self) -> None:
        self.num_starts += 1
        self._api_was_killed = False
        self.server.spawn()

    async def _watch(self) -> None:
        while True:
            if (code := self.server.process.poll()) is not None:
                if not self._api_was_killed:
                    tail = self.server.log_tail(15)
                    self.problems.append(f"the server ended by itself with code {code}:\n{tail}")
                self._spawn()
            self.processes()
            await asyncio.sleep(_POLL_S)

    async def _stop(self) -> None:
        """As a service manager does it: SIGTERM to the server's process, then patience."""
        api = self.processes().get(Target.API)
        if api is not None:
            os.kill(api.pid, signal.SIGTERM)
        try:
            code = await asyncio.to_thread(self.server.process.wait, _STOP_S)
        except Exception:
            self.problems.append(f"the server did not stop within {_STOP_S:g} s")
            for process in self.processes().values():
                process.kill()
            self.server.kill()
            return
        if code != 0 and not self._api_was_killed:
            self.problems.append(f"the stopped server exited with {code}")
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
