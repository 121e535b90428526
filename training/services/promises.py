"""Accepting, settling and awaiting futures: durable first, then fast.

A promise is answered only after its row and payload are committed; a result is handed out only
after it is committed. Waiting costs an entry in a dict, no database connection.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from training.core.errors import (
    InvalidRequest,
    NotFound,
    RequestError,
    StorageError,
    TinkercloudError,
)
from training.core.operations import Outcome
from training.core.records import (
    Future,
    FutureKind,
    FutureResult,
    FutureStatus,
    NewFuture,
    utcnow,
)
from training.core.unit_runner import failed
from training.services.quotas import Quotas
from training.storage.database import Connection, Database
from training.storage.repositories import futures

log = structlog.get_logger(__name__)

_CACHE_BYTES = 32 * 2**20
_MAX_RETRY_DELAY_S = 15.0
CLONE_SEQS = 1_000_000_000
"""A cloned sampling client numbers its requests from clone_id times this."""


@dataclass(eq=False)
class _Entry:
    """A promise this process knows of; ``result`` once it is settled."""

    owner: str
    scope: str
    kind: FutureKind
    num_bytes: int
    """Of the request, which waits in memory."""
    result: FutureResult | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)


class Promises:
    def __init__(self, database: Database, quotas: Quotas) -> None:
        self._database = database
        self._quotas = quotas
        self._pending: dict[str, _Entry] = {}
        self._recent: OrderedDict[str, _Entry] = OrderedDict()
        self._recent_bytes = 0
        self._scope_watchers: dict[str, set[asyncio.Event]] = {}
        self._closing = asyncio.Event()
        self._is_stopping = False
        self._delivered: list[str] = []

    def stop_waiting(self) -> None:
        """Nobody waits any longer: the server is about to stop, and clients ask its successor."""
        self._is_stopping = True
        for entry in self._pending.values():
            entry.settled.set()
        for watchers in self._scope_watchers.values():
            for watcher in watchers:
                watcher.set()

    def close(self) -> None:
        """From now on an outcome that cannot be stored stays pending; it is not tried again."""
        self._closing.set()

    def take_delivered(self) -> list[str]:
        """Requests whose results were handed out since the last call."""
        delivered, self._delivered = self._delivered, []
        return delivered

    async def accept(
        self, new: NewFuture, also: Callable[[Connection], None] | None = None
    ) -> futures.Stored:
        """Commits the promise, and what ``also`` writes, in one transaction.

        A repeated (scope, seq) changes nothing and gets the promise of the first.
        """

        def store(connection: Connection) -> futures.Stored:
            stored = futures.insert(connection, new, utcnow())
            if stored.is_new and also is not None:
                also(connection)
            return stored

        self._hold(
            new.request_id, _Entry(new.owner, new.scope, new.kind, num_bytes=len(new.payload))
        )
        try:
            stored = await self._database.write(store)
        except BaseException:
            self._release(new.request_id)
            raise
        if not stored.is_new:
            self._release(new.request_id)
        return stored

    async def refuse(self, new: NewFuture, error: TinkercloudError) -> futures.Stored:
        """Accepts a promise that is already known to fail: both in one transaction."""
        result = failed(error)

        def also(connection: Connection) -> None:
            futures.finish(connection, new.request_id, result, utcnow())

        stored = await self.accept(new, also)
        if stored.is_new:
            self._wake(new.request_id, result)
        return stored

    def adopt(self, future: Future, num_bytes: int = 0) -> None:
        """Takes over a promise that an earlier process accepted."""
        self._hold(future.request_id, _Entry(future.owner, future.scope, future.kind, num_bytes))

    async def settle(self, request_id: str, result: FutureResult) -> None:
        """Commits the outcome and wakes whoever waits; a promise settles once.

        A full disk delays the outcome and does not lose it: the commit is tried until it holds.
        """
        await self.settle_outcome(request_id, Outcome(result))

    async def settle_outcome(self, request_id: str, outcome: Outcome) -> None:
        """The same with what must become durable in the same transaction."""
        result = outcome.result
        try:
            completion = await self._commit_outcome(request_id, outcome)
        except RequestError as error:
            result = failed(error)
            completion = await self._commit_outcome(request_id, Outcome(result))
            after = outcome.undo
        else:
            # A promise that was settled before leaves what this outcome brought without a use.
            after = outcome.undo if completion is None else outcome.then
        try:
            if after is not None:
                await after()
        except Exception:
            # The border of the job: the outcome is stored and must be told; a file too many is
            # removed by the next start.
            log.exception("future.not_tidied", request_id=request_id)
        finally:
            self._wake(request_id, result if completion is not None else None)

    def _wake(self, request_id: str, result: FutureResult | None) -> None:
        """None: somebody else settled it, and the next poll reads what they stored."""
        entry = self._release(request_id)
        if entry is None:
            return
        entry.settled.set()
        if result is None:
            return
        entry.result = result
        self._remember(request_id, entry)
        for watcher in self._scope_watchers.get(entry.scope, ()):
            watcher.set()

    async def wait(self, request_id: str, owner: str, timeout_s: float) -> FutureResult | None:
        """The outcome, or None if it is not there within ``timeout_s``.

        Raises ``NotFound`` for ids never given out and for those of other owners.
        """
        entry = self._pending.get(request_id) or self._recent.get(request_id)
        if entry is None:
            result = await self._stored_result(request_id, owner)
        else:
            if entry.owner != owner:
                raise NotFound(f"no such request: {request_id}")
            if entry.result is None and not self._is_stopping:
                with suppress(TimeoutError):
                    await asyncio.wait_for(entry.settled.wait(), timeout_s)
            result = entry.result
        if result is not None:
            self._delivered.append(request_id)
        return result

    async def completions(
        self, scope: str, clone: int, after: int, timeout_s: float, limit: int = 1000
    ) -> list[Future]:
        """Settled promises of one sampling client since cursor ``after``; waits for the first.

        Raises ``InvalidRequest`` for a ``clone`` whose sequence numbers no integer could hold.
        """
        if clone >= 2**63 // CLONE_SEQS:
            raise InvalidRequest(f"there is no cloned sampler {clone}")
        deadline = asyncio.get_running_loop().time() + timeout_s
        watcher = asyncio.Event()
        self._scope_watchers.setdefault(scope, set()).add(watcher)
        low = clone * CLONE_SEQS
        try:
            while True:
                watcher.clear()
                found = await self._database.read(
                    futures.completions, scope, after, low, low + CLONE_SEQS, limit
                )
                remaining = deadline - asyncio.get_running_loop().time()
                if found or remaining <= 0 or self._is_stopping:
                    return found
                try:
                    await asyncio.wait_for(watcher.wait(), remaining)
                except TimeoutError:
                    return []
        finally:
            watchers = self._scope_watchers[scope]
            watchers.discard(watcher)
            if not watchers:
                del self._scope_watchers[scope]

    def num_pending(self) -> int:
        return len(self._pending)

    def _hold(self, request_id: str, entry: _Entry) -> None:
        self._pending[request_id] = entry
        self._quotas.take(entry.owner, entry.kind, entry.num_bytes)

    def _release(self, request_id: str) -> _Entry | None:
        entry = self._pending.pop(request_id, None)
        if entry is not None:
            self._quotas.give_back(entry.owner, entry.kind, entry.num_bytes)
        return entry

    async def _commit_outcome(self, request_id: str, outcome: Outcome) -> int | None:
        """The completion number, or None if it was settled before. Raises what ``also`` raises."""

        def store(connection: Connection) -> int | None:
            completion = futures.finish(connection, request_id, outcome.result, utcnow())
            if completion is not None and outcome.also is not None:
                outcome.also(connection)
            return completion

        delay_s = 0.5
        while True:
            try:
                return await self._database.write(store)
            except StorageError as error:
                log.error("future.not_stored", request_id=request_id, error=str(error))
                if self._closing.is_set():
                    raise
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), delay_s)
            delay_s = min(delay_s * 2, _MAX_RETRY_DELAY_S)

    async def _stored_result(self, request_id: str, owner: str) -> FutureResult | None:
        future = await self._database.read(futures.get, request_id)
        if future is None or future.owner != owner:
            raise NotFound(f"no such request: {request_id}")
        result = await self._database.read(futures.result, request_id)
        return None if result is None or result.status is FutureStatus.PENDING else result

    def _remember(self, request_id: str, entry: _Entry) -> None:
        self._recent[request_id] = entry
        self._recent_bytes += _cost_bytes(entry)
        while self._recent_bytes > _CACHE_BYTES and len(self._recent) > 1:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= _cost_bytes(oldest)


def _cost_bytes(entry: _Entry) -> int:
    """What a settled entry holds in memory, its bookkeeping included."""
    return 2048 + (len(entry.result.body) if entry.result is not None else 0)
