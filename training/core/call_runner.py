"""Runs calls beside the loop: other models do not wait while one is created, loaded or saved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from training.core.background import Background
from training.core.errors import BackendDead, BackendError, StorageError, TinkercloudError
from training.core.model_queue import ModelQueue
from training.core.operations import CallWork, Finish, Operation, Outcome, RefusedWork
from training.core.records import STATEFUL_KINDS, FutureStatus
from training.core.recovery import Recovery
from training.core.settling import Settling
from training.core.unit_runner import failed

log = structlog.get_logger(__name__)


class CallRunner:
    """``wake`` makes the task manager's loop look at its queues again."""

    def __init__(
        self,
        settling: Settling,
        background: Background,
        recovery: Recovery,
        wake: Callable[[], None],
    ) -> None:
        self._settling = settling
        self._background = background
        self._recovery = recovery
        self._wake = wake

    def start(self, queue: ModelQueue, operation: Operation) -> None:
        queue.busy = True
        earlier = self._background.of(operation.model_id)
        self._background.start(operation.model_id, self._run(queue, operation, earlier))

    async def _run(
        self, queue: ModelQueue, operation: Operation, earlier: set[asyncio.Task[None]]
    ) -> None:
        try:
            try:
                finish = await self._begin(queue, operation, earlier)
            finally:
                queue.busy = False
                self._wake()
            if finish is None:
                return
            outcome = await finish()
        except BackendDead as error:
            await self._recovery.died([operation], error)
            return
        except TinkercloudError as error:
            if operation.is_settled and isinstance(error, StorageError):
                self._recovery.not_read(operation, error)
                return
            outcome = Outcome(failed(error))
        except Exception as error:
            # The border of the job: one broken call must not leave its client waiting.
            log.exception("call.failed", kind=operation.kind.value)
            internal = BackendError(f"internal error ({type(error).__name__}); see the server log")
            outcome = Outcome(failed(internal))
        await self._absorb(operation, outcome)

    async def _begin(
        self, queue: ModelQueue, operation: Operation, earlier: set[asyncio.Task[None]]
    ) -> Finish | None:
        """None: the model has to be brought back first, and the operation comes back with it."""
        if operation.kind in STATEFUL_KINDS and earlier:
            # It may load what is just being saved. And its snapshot covers those saves, so they
            # must be answered first: after a crash they would not be run again.
            await asyncio.wait(earlier)
            await self._settling.drained(operation.model_id)
            if queue.must_revive:
                return None
        async with self._recovery.suspects.alone([operation.request_id]):
            for decoded in await self._recovery.decode([operation]):
                if isinstance(decoded.work, RefusedWork):
                    raise decoded.work.error
                assert isinstance(decoded.work, CallWork)
                return await decoded.work.run()
        return None

    async def _absorb(self, operation: Operation, outcome: Outcome) -> None:
        if not operation.is_settled:
            self._settling.put(operation, outcome)
        elif outcome.result.status is FutureStatus.DONE:
            self._settling.compare(operation, outcome.result)
        else:
            self._recovery.replay_failed(operation, BackendError(outcome.result.error))
        if operation.is_settled and outcome.undo is not None:
            await outcome.undo()  # its files have done their part, and are those of no record
