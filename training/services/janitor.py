"""Reclaims what nobody needs any more: results that were fetched a while ago, and all bytes of
sessions that have ended."""

from __future__ import annotations

import asyncio
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
"""Results deleted in one transaction: an accepted request must not wait for more."""


class Janitor:
    def __init__(self, database: Database, promises: Promises, results_kept_s: float) -> None:
        self._database = database
        self._promises = promises
        self._kept = timedelta(seconds=results_kept_s)
        self._ended: set[str] = set()
        """Sessions some of whose samples still run."""
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
        self._ended.add(session_id)
        if not await self._database.write(futures.drop_bytes, session_id):
            self._ended.discard(session_id)

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
