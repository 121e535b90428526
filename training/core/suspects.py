"""Which request is to blame when an engine crashes again and again.

What an engine was at work on when it crashed is suspect, and runs alone among suspects from then
on; what an engine is at work on when it crashes for the second time did it. What only waited in the
engine is not counted, however often. An engine that somebody killed says nothing about its work,
but even so a request is not tried for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from training.core.errors import BackendDead, BackendError, DeathCause
from training.core.operations import Operation

MAX_CRASHES = 2
MAX_KILLS = 20


@dataclass
class Verdict:
    """Requests to whom a crash is counted, and those that are not tried again, with the reason."""

    counted: list[str] = field(default_factory=list)
    poison: dict[str, BackendError] = field(default_factory=dict)


class Suspects:
    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._crashes: dict[str, int] = {}
        self._kills: dict[str, int] = {}

    def remember(self, request_id: str, crashes: int) -> None:
        """What an earlier process knew."""
        if crashes:
            self._crashes[request_id] = max(crashes, self._crashes.get(request_id, 0))

    def forget(self, request_ids: Iterable[str]) -> None:
        """They have an outcome."""
        for request_id in request_ids:
            self._crashes.pop(request_id, None)
            self._kills.pop(request_id, None)

    def cut(self, operations: Sequence[Operation]) -> Sequence[Operation]:
        """The beginning of a unit that may run together: a suspect runs in a unit of its own."""
        for index, operation in enumerate(operations):
            if operation.request_id in self._crashes:
                return operations[: max(index, 1)]
        return operations

    @asynccontextmanager
    async def alone(self, request_ids: Iterable[str]) -> AsyncIterator[None]:
        """Suspects take turns, training and sampling alike; others pass."""
        if self._crashes.keys().isdisjoint(request_ids):
            yield
            return
        async with self._turn:
            yield

    def died(self, request_ids: Iterable[str], error: BackendDead) -> Verdict:
        """An engine ended while these ran in it."""
        verdict = Verdict()
        for name in request_ids:
            if error.cause.blames_work:
                crashes = self._crashes[name] = self._crashes.get(name, 0) + 1
                verdict.counted.append(name)
                if crashes >= MAX_CRASHES:
                    what = f"each of the {crashes} engines that ran it ended"
                    verdict.poison[name] = _poison(what, error)
            elif error.cause is DeathCause.KILLED:
                kills = self._kills[name] = self._kills.get(name, 0) + 1
                if kills >= MAX_KILLS:
                    verdict.poison[name] = _poison(f"{kills} engines were killed", error)
        self.forget(verdict.poison)
        return verdict


def poison_of_earlier(crashes: int) -> BackendError:
    """The verdict on what an earlier process left, having ended with its engine."""
    return BackendError(
        f"the operation is not tried again: {crashes} engines ended while it ran, the last of them "
        "with the server"
    )


def _poison(what: str, error: BackendDead) -> BackendError:
    return BackendError(f"the operation is not tried again: {what} while it ran; {error}")
