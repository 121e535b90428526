"""The queues of all models of one trainer; those that are idle are not looked at."""

from __future__ import annotations

from collections.abc import Iterable

from training.core.model_queue import ModelQueue
from training.core.operations import SlotOf


class ModelQueues:
    def __init__(self) -> None:
        self._queues: dict[str, ModelQueue] = {}
        self._active: dict[str, ModelQueue] = {}

    def open(self, model_id: str, slot: SlotOf, next_seq: int) -> ModelQueue:
        queue = self._queues[model_id] = ModelQueue(model_id, slot, next_seq)
        return queue

    def close(self, model_id: str) -> ModelQueue | None:
        self._active.pop(model_id, None)
        return self._queues.pop(model_id, None)

    def get(self, model_id: str) -> ModelQueue | None:
        return self._queues.get(model_id)

    def activate(self, queue: ModelQueue) -> None:
        """There is something to run, bring back or save."""
        if self._queues.get(queue.model_id) is queue:
            self._active[queue.model_id] = queue

    def active(self) -> Iterable[ModelQueue]:
        """Thousands of idle models cost a busy one nothing."""
        return self._active.values()

    def prune(self) -> None:
        for queue in [each for each in self._active.values() if each.is_idle()]:
            del self._active[queue.model_id]
