"""Which operation is to blame when an engine crashes again and again.

Whatever ran in a crashed engine is suspect and runs alone among suspects from then on; what is
running when an engine crashes for the second time did it. An engine that somebody killed says
nothing about its work, but even so an operation is not tried for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from training.core.errors import BackendDead, BackendError, DeathCause
from training.core.operations import Operation

MAX_CRASHES = 2
MAX_KILLS = 20


class Suspects:
    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._crashes: dict[str, int] = {}
        self._kills: dict[str, int] = {}

    def is_suspect(self, operation: Operation) -> bool:
        return max(operation.deaths, self._crashes.get(operation.request_id, 0)) > 0

    def cut(self, operations: Sequence[Operation]) -> Sequence[Operation]:
        """The beginning of a unit that may run together: a suspect runs in a unit of its own."""
        for index, operation in enumerate(operations):
            if self.is_suspect(operation):
                return operations[: max(index, 1)]
        return operations

    @asynccontextmanager
    async def alone(self, operations: Sequence[Operation]) -> AsyncIterator[None]:
        """Suspects take turns, training and sampling alike; others pass."""
        if not any(self.is_suspect(operation) for operation in operations):
            yield
            return
        async with self._turn:
            yield

    def died(
        self, operations: Sequence[Operation], error: BackendDead
    ) -> list[tuple[Operation, BackendError | None]]:
        """Those to whom a crash is counted, each with the error that it now fails with, if any."""
        counted: list[tuple[Operation, BackendError | None]] = []
        for operation in operations:
            name = operation.request_id
            if error.cause.blames_work:
                crashes = max(operation.deaths, self._crashes.get(name, 0)) + 1
                self._crashes[name] = crashes
                poison = None
                if crashes >= MAX_CRASHES:
                    poison = _poison(f"each of the {crashes} engines that ran it ended", error)
                counted.append((operation, poison))
            elif error.cause is DeathCause.KILLED:
                self._kills[name] = self._kills.get(name, 0) + 1
                if self._kills[name] >= MAX_KILLS:
                    counted.append((operation, _poison(f"{MAX_KILLS} engines were killed", error)))
        return counted

    def forget(self, operation: Operation) -> None:
        self._crashes.pop(operation.request_id, None)
        self._kills.pop(operation.request_id, None)


def _poison(what: str, error: BackendDead) -> BackendError:
    return BackendError(f"the operation is not tried again: {what} while it ran; {error}")
