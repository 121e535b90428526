"""What is reclaimed, at what cost, and that a failing database loses nothing of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from training.config import QuotaConfig, SchedulerConfig
from training.core.errors import StorageError
from training.core.records import (
    FutureKind,
    FutureResult,
    FutureStatus,
    NewFuture,
    Session,
    SessionStatus,
    utcnow,
)
from training.services import janitor as janitor_module
from training.services.janitor import Janitor
from training.services.promises import Promises
from training.services.quotas import Quotas
from training.storage import tables
from training.storage.database import Connection, Database
from training.storage.postgres import Postgres
from training.storage.repositories import futures, sessions

NUM_SETTLED = 25
DONE = FutureResult(FutureStatus.DONE, b"result", "x")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    await database.start()
    yield database
    await database.close()


@pytest.fixture
def promises(database: Database) -> Promises:
    return Promises(database, Quotas(QuotaConfig(), SchedulerConfig(), is_shared=False))


@pytest.fixture
def janitor(database: Database, promises: Promises, monkeypatch: pytest.MonkeyPatch) -> Janitor:
    monkeypatch.setattr(janitor_module, "_BATCH", 10)
    return Janitor(database, promises, results_kept_s=0.0)


def promise(number: int) -> NewFuture:
    return NewFuture(
        f"req-{number:03}", FutureKind.SAMPLE, "sampler", number, "me", "s", None, b"p", "x"
    )


async def num_bytes(database: Database) -> int:
    def count(connection: Connection) -> int:
        return sum(
            int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())
            for table in (tables.payloads, tables.results)
        )

    return await database.read(count)


async def test_a_session_s_bytes_go_in_pieces_and_later_rounds_look_at_what_is_left(
    database: Database, promises: Promises, janitor: Janitor
) -> None:
    for number in range(NUM_SETTLED):
        await promises.accept(promise(number))
        await promises.settle(f"req-{number:03}", DONE)
    late = [await promises.accept(promise(number)) for number in (900, 901)]
    await janitor.session_ended("s")
    assert await num_bytes(database) == len(late), "the requests that still run"

    changes: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        if statement.startswith("DELETE"):
            changes.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        for _ in range(3):
            await janitor.tidy()
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert changes == [], "nothing has ended, so nothing is deleted"

    for stored in late:
        await promises.settle(stored.request_id, DONE)
        await janitor.tidy()
    assert await num_bytes(database) == 0
    assert not janitor._ended


async def test_what_an_earlier_server_left_is_found_from_the_bytes(
    database: Database, promises: Promises, janitor: Janitor
) -> None:
    session = Session("s", "me", SessionStatus.FINISHED, utcnow(), utcnow())
    await database.write(sessions.insert, session)
    for number in range(NUM_SETTLED):
        await promises.accept(promise(number))
        await promises.settle(f"req-{number:03}", DONE)
    await promises.accept(promise(900))
    await janitor.finish_ended()
    assert await num_bytes(database) == 0
    result = await database.read(futures.result, "req-900")
    assert result is not None
    assert (result.status, result.error) == (FutureStatus.FAILED, "session s has ended")


async def test_deliveries_are_noted_once_the_database_is_back(
    database: Database, promises: Promises, janitor: Janitor
) -> None:
    await promises.accept(promise(0))
    await promises.settle("req-000", DONE)
    assert await promises.wait("req-000", "me", 0) == DONE
    reachable = database._connections
    database._connections = Postgres(sa.make_url("postgresql+asyncpg://u:p@127.0.0.1:1/db"))
    with pytest.raises(StorageError):
        await janitor.tidy()
    await database._connections.close()
    database._connections = reachable
    await asyncio.sleep(0.01)
    await janitor.tidy()
    before = utcnow() + timedelta(seconds=1)
    assert await database.write(futures.drop_delivered, before, 10) == 0
    assert await num_bytes(database) == 0
