"""Saves models in the background while they train: one at a time, the one that is furthest past
its last snapshot, and no more often than the trainer can afford."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog

from training.core import metrics
from training.core.errors import BackendDead, TinkercloudError
from training.core.keeper import FinishSnapshot, Keeper
from training.core.model_queue import ModelQueue
from training.core.progress import SnapshotPolicy
from training.core.settling import Settling

log = structlog.get_logger(__name__)

_RETRY_S = 5.0
"""After a snapshot that could not be written: a full disk does not empty faster when asked."""


class Saving:
    """``on_finished`` wakes the loop: the next one may be due."""

    def __init__(
        self,
        keeper: Keeper,
        settling: Settling,
        policy: SnapshotPolicy,
        on_finished: Callable[[], None],
    ) -> None:
        self._keeper = keeper
        self._settling = settling
        self._policy = policy
        self._running: asyncio.Task[None] | None = None
        self._not_before_s = 0.0
        self._on_finished = on_finished

    def next(self, queues: Iterable[ModelQueue], now_s: float) -> ModelQueue | float | None:
        """The model to save now, or the seconds until one is due; None: nothing to do yet."""
        if self._running is not None:
            return None
        due = [
            (in_s, -queue.progress.tokens, queue)
            for queue in queues
            if (in_s := queue.progress.due_in_s(self._policy, now_s)) is not None
        ]
        if not due:
            return None
        in_s, _, queue = min(due, key=lambda each: each[:2])
        in_s = max(in_s, self._not_before_s - now_s)
        return queue if in_s <= 0 else in_s

    async def save(self, queue: ModelQueue) -> None:
        """Returns when the model is captured; the rest goes on beside its next operations.

        Raises ``BackendDead``; any other failure is told in the log and tried again later.
        """
        progress = queue.progress
        seq, steps, tokens = progress.boundary_seq, progress.steps, progress.tokens
        assert seq is not None
        progress.is_saving = True
        started_s = time.monotonic()
        try:
            finish = await self._keeper.snapshot(queue.model_id, seq)
        except BaseException as error:
            progress.is_saving = False
            if isinstance(error, BackendDead) or not isinstance(error, TinkercloudError):
                raise
            self._failed(queue.model_id, error)
            return

        async def rest() -> None:
            try:
                if await self._finish(queue.model_id, finish):
                    progress.saved(steps, tokens, time.monotonic())
                    metrics.SNAPSHOT_SECONDS.observe(time.monotonic() - started_s)
            finally:
                progress.is_saving = False
                took_s = time.monotonic() - started_s
                pause_s = took_s * (1 / self._policy.share - 1)
                self._not_before_s = max(self._not_before_s, time.monotonic() + pause_s)
                self._running = None
                self._on_finished()

        self._running = asyncio.create_task(rest())

    async def drained(self) -> None:
        if self._running is not None:
            await asyncio.wait([self._running])

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _finish(self, model_id: str, finish: FinishSnapshot) -> bool:
        # A snapshot must not cover what is not yet answered: after a crash nobody could tell what
        # the answer would have been.
        await self._settling.drained(model_id)
        try:
            if not await finish():
                return False
        except BackendDead:
            return False  # the model is brought back from an older one
        except TinkercloudError as error:
            self._failed(model_id, error)
            return False
        except Exception:
            # The border of the job: a snapshot that fails costs a longer replay, nothing else.
            log.exception("snapshot.failed", model_id=model_id)
            self._not_before_s = time.monotonic() + _RETRY_S
            return False
        metrics.SNAPSHOTS.labels("done").inc()
        return True

    def _failed(self, model_id: str, error: TinkercloudError) -> None:
        metrics.SNAPSHOTS.labels("failed").inc()
        log.warning("snapshot.failed", model_id=model_id, error=str(error))
        self._not_before_s = time.monotonic() + _RETRY_S
