"""Work of single models that runs beside the task manager's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

import structlog

log = structlog.get_logger(__name__)


class Background:
    def __init__(self) -> None:
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}

    def start(self, model_id: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.setdefault(model_id, set()).add(task)
        task.add_done_callback(lambda done: self._ended(model_id, done))
        return task

    def of(self, model_id: str) -> set[asyncio.Task[None]]:
        """Without the one that asks."""
        return self._tasks.get(model_id, set()) - {asyncio.current_task()}

    def all(self) -> list[asyncio.Task[None]]:
        return [task for tasks in self._tasks.values() for task in tasks]

    async def idle(self, model_id: str) -> None:
        """Returns when nothing of the model runs any more, but who asks."""
        if tasks := self.of(model_id):
            await asyncio.wait(tasks)

    def _ended(self, model_id: str, task: asyncio.Task[None]) -> None:
        tasks = self._tasks[model_id]
        tasks.discard(task)
        if not tasks:
            del self._tasks[model_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("task.failed", model_id=model_id, exc_info=error)
