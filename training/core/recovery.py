"""Brings models back after the death of an engine or a server, and finds out who is to blame."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from training.backends.base import TrainerBackend
from training.core import metrics
from training.core.background import Background
from training.core.errors import (
    BackendDead,
    BackendError,
    ModelLost,
    StorageError,
    TinkercloudError,
)
from training.core.keeper import Keeper
from training.core.model_queue import ModelQueue
from training.core.model_queues import ModelQueues
from training.core.operations import Operation, Outcome, StoredWork
from training.core.settling import Settling
from training.core.suspects import MAX_CRASHES, Suspects, poison_of_earlier
from training.core.unit_runner import came_too_late, effect_of_failure, failed

log = structlog.get_logger(__name__)

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
"""Between attempts: the engine went again, the database or the disk is in trouble."""
_MAX_REPLAY_FAILURES = 3
_MAX_LOAD_CRASHES = 3
"""Engines that one after another crash while they load a model."""


class Recovery:
    """``wake`` makes the task manager's loop look at its queues again."""

    def __init__(
        self,
        backend: TrainerBackend,
        keeper: Keeper,
        settling: Settling,
        background: Background,
        queues: ModelQueues,
        wake: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._keeper = keeper
        self._settling = settling
        self._background = background
        self._queues = queues
        self._wake = wake
        self.suspects = Suspects()

    async def died(self, operations: Sequence[Operation], error: BackendDead) -> None:
        """What had no outcome runs again when its model is back, unless it is to blame."""
        for operation in operations:
            if (queue := self._queues.get(operation.model_id)) is not None:
                self._must_revive(queue)
        self._wake()
        verdict = self.suspects.died((item.request_id for item in operations), error)
        if verdict.counted:
            await self._keeper.note_deaths(verdict.counted)
        for operation in list(operations):
            if (poison := verdict.poison.get(operation.request_id)) is None:
                continue
            if operation.is_settled or operation.seq == 0:
                self._lose(operation.model_id, poison)
            else:
                self._condemn(operation, poison)

    def _condemn(self, operation: Operation, poison: BackendError) -> None:
        """The model comes back from the database, which then knows what this did to its window."""
        log.error("operation.poison", request_id=operation.request_id, error=str(poison))
        outcome = Outcome(failed(poison, effect_of_failure(operation)))
        self._settling.put(operation, outcome)

    def revive_stale(self) -> None:
        """Begins to bring back whatever has work and is in no engine that lives."""
        health = self._backend.health()
        for queue in self._queues.active():
            stale = queue.generation is not None and (
                not health.alive or queue.generation != health.generation
            )
            if stale:
                queue.must_revive = True
            if queue.must_revive and queue.has_work() and queue.reviving is None and not queue.busy:
                queue.reviving = self._background.start(queue.model_id, self._revive(queue))

    def replay_failed(self, operation: Operation, error: TinkercloudError) -> None:
        """An operation that was done before could not be done again: not as it was, yet."""
        queue = self._queues.get(operation.model_id)
        if queue is None:
            return
        queue.replay_failures += 1
        self._must_revive(queue)
        log.error("replay.failed", model_id=operation.model_id, seq=operation.seq, error=str(error))
        if queue.replay_failures >= _MAX_REPLAY_FAILURES:
            reason = f"operation {operation.seq} cannot be run again: {error}"
            self._lose(operation.model_id, BackendError(reason))

    async def decode(self, operations: Sequence[Operation]) -> list[Operation]:
        """What cannot be read from the database now is left out, with what follows it of its model:
        nothing of it was done, and the model comes back for it."""
        decoded: list[Operation] = []
        unread: set[str] = set()
        for operation in operations:
            if operation.model_id in unread:
                continue
            work = operation.work
            if isinstance(work, StoredWork) and not operation.is_passed_over:
                try:
                    work = await work.load()
                except StorageError as error:
                    unread.add(operation.model_id)
                    self.not_read(operation, error)
                    continue
            decoded.append(replace(operation, work=work))
        return decoded

    def not_read(self, operation: Operation, error: StorageError) -> None:
        """It could not be read from the database, or not done for what is stored: nothing is known
        to be wrong with it, and its model is brought back to before it."""
        queue = self._queues.get(operation.model_id)
        if queue is None:
            return
        log.warning(
            "operation.not_read",
            model_id=operation.model_id,
            seq=operation.seq,
            error=str(error),
        )
        self._must_revive(queue)
        # A revival waits for this: the trouble is not over at once.
        self._background.start(queue.model_id, asyncio.sleep(_FIRST_PAUSE_S))

    async def _revive(self, queue: ModelQueue) -> None:
        try:
            await self._background.idle(queue.model_id)
            pause_s, crashes = _FIRST_PAUSE_S, 0
            while self._queues.get(queue.model_id) is queue:
                try:
                    await self._try_to_revive(queue)
                    return
                except ModelLost as error:
                    self._lose(queue.model_id, error)
                    return
                except BackendDead as error:
                    log.warning("model.not_revived_yet", model_id=queue.model_id, error=str(error))
                    crashes += error.cause.blames_work
                    if crashes >= _MAX_LOAD_CRASHES:
                        reason = f"{crashes} engines ended while they loaded it; {error}"
                        self._lose(queue.model_id, BackendError(reason))
                        return
                except Exception as error:
                    # The border of the job: whatever went wrong, the model has not changed.
                    log.warning(
                        "model.not_revived_yet",
                        model_id=queue.model_id,
                        error=str(error),
                        exc_info=not isinstance(error, TinkercloudError),
                    )
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        finally:
            queue.reviving = None
            self._wake()

    async def _try_to_revive(self, queue: ModelQueue) -> None:
        """Everything that is known of the model's operations is stored first, so that the database
        tells what is to be run again."""
        await self._settling.drained(queue.model_id)
        with metrics.REVIVAL_SECONDS.time():
            until = None if queue.is_stored else queue.high_seq
            revival = await self._keeper.revive(queue.model_id, until)
        if poison := [item for item in revival.operations if _is_poison(item)]:
            # Of an earlier process, which its engine took along.
            for operation in poison:
                self._condemn(operation, poison_of_earlier(MAX_CRASHES))
            await self._try_to_revive(queue)
            return
        for operation in revival.operations:
            assert operation.stored is not None
            self.suspects.remember(operation.request_id, operation.stored.deaths)
        late = queue.revive(revival.next_seq, revival.operations, revival.generation)
        for operation in late:
            self._settling.put(operation, Outcome(came_too_late(operation)))
        log.info(
            "model.revived",
            model_id=queue.model_id,
            next_seq=revival.next_seq,
            num_replayed=sum(item.is_settled for item in revival.operations),
        )

    def _must_revive(self, queue: ModelQueue) -> None:
        """There are operations to run again, which only the database has."""
        queue.must_revive = queue.has_stored = True
        self._queues.activate(queue)

    def _lose(self, model_id: str, error: TinkercloudError) -> None:
        self._background.start(f"lose {model_id}", self._keeper.give_up(model_id, error))


def _is_poison(operation: Operation) -> bool:
    """A creation runs again: without it there is no model that could go on."""
    assert operation.stored is not None
    is_pending = not operation.is_settled and operation.seq > 0
    return is_pending and operation.stored.deaths >= MAX_CRASHES
