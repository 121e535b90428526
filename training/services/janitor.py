"""Reclaims what nobody needs any more: results that were fetched a while ago, and all bytes of
sessions that have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import structlog

from training.core.errors import StorageError
from training.core.records import utcnow
from training.services.promises import Promises
from training.storage.database import Database
from training.storage.repositories import futures

log = structlog.get_logger(__name__)

_ROUND_S = 10.0
_BATCH = 200
"""Promises in one transaction: an accepted request must not wait for more."""


@dataclass(eq=False)
class _Ended:
    """A session that has ended and may have bytes left: those of promises from ``after`` on (None:
    all were gone through), and of those that were ``unsettled`` when it was looked at last."""

    after: str | None = ""
    unsettled: set[str] = field(default_factory=set)


class Janitor:
    def __init__(self, database: Database, promises: Promises, results_kept_s: float) -> None:
        self._database = database
        self._promises = promises
        self._kept = timedelta(seconds=results_kept_s)
        self._ended: dict[str, _Ended] = {}
        self._delivered: list[str] = []
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="janitor")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            await self._note_delivered()
        except StorageError as error:
            # Such results stay until they are fetched again, or their session ends.
            log.warning("janitor.deliveries_not_stored", error=str(error))

    async def tidy(self) -> None:
        """One round."""
        await self._note_delivered()
        for session_id in tuple(self._ended):
            await self.session_ended(session_id)
        before = utcnow() - self._kept
        while await self._database.write(futures.drop_delivered, before, _BATCH) == _BATCH:
            pass

    async def session_ended(self, session_id: str) -> None:
        """Deletes its bytes now, and those of what still runs once it is settled."""
        ended = self._ended.setdefault(session_id, _Ended())
        pending = await self._database.read(futures.pending_of_session, session_id)
        settled = ended.unsettled - pending
        ended.unsettled |= pending
        while ended.after is not None:
            ended.after = await self._database.write(
                futures.drop_bytes_of_session, session_id, ended.after, _BATCH
            )
        await self._drop_bytes(sorted(settled))
        ended.unsettled = pending
        if not pending:
            self._ended.pop(session_id, None)

    async def finish_ended(self) -> None:
        """Of sessions that ended in the moment in which an earlier server did."""
        for session_id in await self._database.read(futures.ended_sessions_with_pending):
            error = f"session {session_id} has ended"
            await self._database.write(futures.fail_pending_of_session, session_id, error, utcnow())
        await self._drop_bytes(await self._database.read(futures.bytes_of_ended_sessions))

    async def _drop_bytes(self, request_ids: Sequence[str]) -> None:
        for start in range(0, len(request_ids), _BATCH):
            await self._database.write(futures.drop_bytes, request_ids[start : start + _BATCH])

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_ROUND_S)
            try:
                await self.tidy()
            except Exception:
                # The border of the job: a full disk now must not stop it for good.
                log.exception("janitor.failed")

    async def _note_delivered(self) -> None:
        self._delivered += self._promises.take_delivered()
        if self._delivered:
            # What is not stored now is noted in a later round.
            await self._database.write(futures.mark_delivered, self._delivered, utcnow())
            self._delivered = []
