"""Outcomes on their way to the database, beside the operations that follow.

Those of one model's operations that change it become durable in their order, so that what is
stored is always a beginning of what happened. An operation that is run again after a crash settles
nothing: its result is compared with the one that the client got.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import structlog

from training.core import metrics
from training.core.keeper import Keeper
from training.core.operations import Operation, Outcome
from training.core.records import STATEFUL_KINDS, FutureResult

log = structlog.get_logger(__name__)


class Settling:
    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._last: dict[str, asyncio.Task[None]] = {}
        """Per model, the newest outcome of an operation that changes it."""
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}

    def put(self, operation: Operation, outcome: Outcome) -> None:
        """In the background: the trainer goes on while the outcome is committed."""
        metrics.OPERATIONS.labels(operation.kind.value, outcome.result.status.value).inc()
        in_order = operation.kind in STATEFUL_KINDS
        before = self._last.get(operation.model_id) if in_order else None
        task = self._start(operation.model_id, self._settle(operation, outcome, before))
        if in_order:
            self._last[operation.model_id] = task

    def compare(self, operation: Operation, result: FutureResult) -> None:
        """``operation`` was done before; its new result must be the old one."""
        metrics.REPLAYED_OPERATIONS.labels(operation.kind.value).inc()
        assert operation.stored is not None
        before = operation.stored.digest
        if before is not None and before != result.digest():
            log.error(
                "replay.differs",
                model_id=operation.model_id,
                seq=operation.seq,
                kind=operation.kind.value,
            )
            self._start(operation.model_id, self._keeper.mark_corrupted(operation))

    async def drained(self, model_id: str | None = None) -> None:
        """Returns when the outcomes known now are stored: of one model, or of all."""
        sets = self._tasks.values() if model_id is None else [self._tasks.get(model_id, set())]
        await asyncio.gather(*(task for tasks in sets for task in tasks), return_exceptions=True)

    async def _settle(
        self, operation: Operation, outcome: Outcome, before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        await self._keeper.settle(operation, outcome)

    def _start(self, model_id: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.setdefault(model_id, set()).add(task)
        task.add_done_callback(lambda done: self._ended(model_id, done))
        return task

    def _ended(self, model_id: str, task: asyncio.Task[None]) -> None:
        tasks = self._tasks[model_id]
        tasks.discard(task)
        if not tasks:
            del self._tasks[model_id]
        if self._last.get(model_id) is task:
            del self._last[model_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("future.not_stored", model_id=model_id, error=str(error))
