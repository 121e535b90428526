"""The desk where operations of models are taken in: stored first, then queued."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from training.core import ids
from training.core.errors import Busy, InvalidRequest, TinkercloudError
from training.core.operations import Operation, TrainWork, Work
from training.core.records import FutureKind, Model, NewFuture, utcnow
from training.services.hosts import Host
from training.services.promises import Promises
from training.services.quotas import Quotas
from training.storage.database import Connection, Database
from training.storage.repositories import models, operations, waiting


@dataclass(frozen=True, eq=False)
class Incoming:
    """An operation as it came; ``payload`` is what a replay would need."""

    kind: FutureKind
    owner: str
    session_id: str
    model_id: str
    seq: int
    payload: bytes
    content_type: str

    def future(self, num_tokens: int = 0) -> NewFuture:
        return NewFuture(
            request_id=ids.new_request_id(),
            kind=self.kind,
            scope=operations.model_scope(self.model_id),
            seq=self.seq,
            owner=self.owner,
            session_id=self.session_id,
            model_id=self.model_id,
            payload=self.payload,
            content_type=self.content_type,
            num_tokens=num_tokens,
        )


class OperationDesk:
    def __init__(self, database: Database, promises: Promises, quotas: Quotas) -> None:
        self._database = database
        self._promises = promises
        self._quotas = quotas

    def incoming(
        self, kind: FutureKind, model: Model, seq: int | None, payload: bytes, content_type: str
    ) -> Incoming:
        """``seq`` counts from 1; 0 was the model's creation."""
        if seq is None or seq < 1:
            raise InvalidRequest(f"seq_id must be 1 or more, not {seq}")
        return Incoming(
            kind, model.owner, model.session_id, model.model_id, seq, payload, content_type
        )

    async def accept(
        self,
        incoming: Incoming,
        host: Host,
        work: Work,
        also: Callable[[Connection], None] | None = None,
        opened: Callable[[], None] | None = None,
    ) -> str:
        """Commits the promise, then queues the work; a repetition does neither.

        ``opened`` runs between the two, for an operation that makes its own queue.
        """
        is_next = host.tasks.check_room(incoming.model_id, incoming.seq)
        await self._check_quotas(incoming, is_next)
        arrived_s = time.monotonic()

        def store(connection: Connection) -> None:
            if also is not None:
                also(connection)
            models.touch(connection, incoming.model_id, utcnow())

        num_tokens = work.num_tokens if isinstance(work, TrainWork) else 0
        stored = await self._promises.accept(incoming.future(num_tokens), store)
        if stored.is_new:
            if opened is not None:
                opened()
            host.tasks.submit(
                Operation(
                    stored.request_id,
                    incoming.model_id,
                    incoming.seq,
                    incoming.kind,
                    work,
                    arrived_s,
                    incoming.owner,
                )
            )
        return stored.request_id

    async def _check_quotas(self, incoming: Incoming, is_next: bool) -> None:
        """Raises ``Busy``, but not for the operation that later ones of its model wait for: without
        it none of them would end."""
        owner, num_bytes = incoming.owner, len(incoming.payload)
        try:
            self._quotas.check(owner, incoming.kind, num_bytes)
        except Busy:
            model_id, seq = incoming.model_id, incoming.seq
            if not is_next or not await self._database.read(waiting.waits_for, model_id, seq):
                raise
            self._quotas.check_awaited(num_bytes)

    async def refuse(self, incoming: Incoming, error: TinkercloudError) -> str:
        """Accepts what belongs to no queue and fails at once. Raises ``Busy``."""
        self._quotas.check(incoming.owner, incoming.kind, len(incoming.payload))
        return (await self._promises.refuse(incoming.future(), error)).request_id
