"""Group commit, isolation of failures, migrations against the tables, durability of rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from training.backends.base import LoraSpec
from training.core.errors import InvalidRequest, StorageError
from training.core.ids import CheckpointKind, TinkerPath
from training.core.records import (
    Checkpoint,
    FutureKind,
    FutureResult,
    FutureStatus,
    Model,
    ModelStatus,
    NewFuture,
    SamplerKind,
    SamplingSession,
    Session,
    SessionStatus,
    utcnow,
)
from training.storage import tables
from training.storage.connections import Sqlite
from training.storage.database import Database
from training.storage.postgres import Postgres
from training.storage.repositories import (
    checkpoints,
    futures,
    models,
    sampling_sessions,
    sessions,
)
from training.storage.tables import metadata
from training.wire.requests import CreateSessionRequest


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    await database.start()
    yield database
    await database.close()


def new_future(number: int, scope: str = "model:m", seq: int | None = None) -> NewFuture:
    return NewFuture(
        request_id=f"req-{number}",
        kind=FutureKind.FORWARD_BACKWARD,
        scope=scope,
        seq=number if seq is None else seq,
        owner="me",
        session_id="s",
        model_id="m",
        payload=b"payload %d" % number,
        content_type="application/x-protobuf",
    )


def is_ours(name: str | None, kind: str, parents: object) -> bool:
    """All but the table that the PostgreSQL driver keeps for itself."""
    return (kind, name) != ("table", "last_commit")


async def test_migrations_produce_exactly_the_tables(database: Database) -> None:
    def differences(connection: sa.Connection) -> object:
        context = MigrationContext.configure(connection, opts={"include_name": is_ours})
        return compare_metadata(context, metadata)

    assert await database.read(differences) == []


async def test_a_burst_of_writes_shares_commits_and_keeps_every_row(database: Database) -> None:
    commits = 0

    def count_commit(connection: sa.Connection) -> None:
        nonlocal commits
        commits += 1

    connections = database._connections
    assert isinstance(connections, (Sqlite, Postgres))
    writer = connections._writer
    engine = writer if isinstance(writer, sa.Engine) else writer.sync_engine
    sa.event.listen(engine, "commit", count_commit)
    now = utcnow()
    stored = await asyncio.gather(
        *(database.write(futures.insert, new_future(number), now) for number in range(300))
    )
    assert all(item.is_new for item in stored)
    assert len(await database.read(futures.pending, FutureKind.FORWARD_BACKWARD)) == 300
    assert commits <= 4


async def test_a_failing_statement_undoes_itself_alone(database: Database) -> None:
    now = utcnow()

    def fails(connection: sa.Connection) -> None:
        futures.insert(connection, new_future(99), now)
        raise InvalidRequest("no")

    outcomes = await asyncio.gather(
        database.write(futures.insert, new_future(1), now),
        database.write(fails),
        database.write(futures.insert, new_future(2), now),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], InvalidRequest)
    ids = {
        item.future.request_id
        for item in await database.read(futures.pending, FutureKind.FORWARD_BACKWARD)
    }
    assert ids == {"req-1", "req-2"}
    with pytest.raises(InvalidRequest):
        await database.write(fails)
    assert len(await database.read(futures.pending, FutureKind.FORWARD_BACKWARD)) == 2


async def test_a_repeated_sequence_number_gets_the_first_promise(database: Database) -> None:
    now = utcnow()
    first = await database.write(futures.insert, new_future(1, seq=7), now)
    again = await database.write(futures.insert, new_future(2, seq=7), now)
    other = await database.write(futures.insert, new_future(3, scope="model:n", seq=7), now)
    assert (first.request_id, first.is_new) == ("req-1", True)
    assert (again.request_id, again.is_new) == ("req-1", False)
    assert (other.request_id, other.is_new) == ("req-3", True)


async def test_a_future_settles_once_and_survives_reopening(database_url: str) -> None:
    database = Database(database_url)
    await database.start()
    now = utcnow()
    for number in range(3):
        await database.write(futures.insert, new_future(number), now)
    done = FutureResult(FutureStatus.DONE, b"bytes", "application/x-protobuf")
    failed = FutureResult(FutureStatus.FAILED, error="why")
    assert await database.write(futures.finish, "req-1", done, now) == 1
    assert await database.write(futures.finish, "req-1", failed, now) is None
    assert await database.write(futures.finish, "req-0", failed, now) == 2
    await database.close()

    reopened = Database(database_url)
    await reopened.start()
    result = await reopened.read(futures.result, "req-1")
    assert result == done
    result = await reopened.read(futures.result, "req-0")
    assert result is not None
    assert (result.status, result.error) == (FutureStatus.FAILED, "why")
    assert await reopened.read(futures.result, "nobody") is None
    (left,) = await reopened.read(futures.pending, FutureKind.FORWARD_BACKWARD)
    assert (left.future.request_id, left.body) == ("req-2", b"payload 2")
    found = await reopened.read(futures.completions, "model:m", 0, 0, 10, 100)
    assert [item.request_id for item in found] == ["req-1", "req-0"]
    found = await reopened.read(futures.completions, "model:m", 1, 0, 10, 100)
    assert [item.request_id for item in found] == ["req-0"]
    await reopened.close()


async def test_records_come_back_as_they_went_in(database: Database) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    session = Session("s", "me", SessionStatus.ACTIVE, now, now, ("a",), {"k": 1}, "0.38.0")
    model = Model(
        "s:train:0", "s", 0, "me", "org/m", LoraSpec(8, 1), "adamw", ModelStatus.CREATING, now, now
    )
    sampler = SamplingSession(
        "s:sample:0", "s", "me", "org/m", SamplerKind.INFLIGHT, now, model_id="s:train:0"
    )
    path = TinkerPath("s:train:0", CheckpointKind.TRAINING, "a")
    checkpoint = Checkpoint(path, "me", "org/m", LoraSpec(8, 1), "adamw", "dir", 5, now, {"x": "y"})

    def store(connection: sa.Connection) -> list[bool]:
        return [
            sessions.insert(connection, session),
            models.insert(connection, model),
            sampling_sessions.insert(connection, sampler),
            checkpoints.insert(connection, checkpoint),
        ]

    assert await database.write(store) == [True] * 4
    assert await database.write(store) == [False] * 4
    assert await database.read(sessions.get, "s") == session
    assert await database.read(models.get, "s:train:0") == model
    assert await database.read(sampling_sessions.get, "s:sample:0") == sampler
    assert await database.read(checkpoints.get, path) == checkpoint
    assert await database.read(models.page, "me", 10, 0) == [model]
    assert await database.read(models.num_owned, "you") == 0


async def test_states_change_only_along_allowed_transitions(database: Database) -> None:
    now = utcnow()
    model = Model("m", "s", 0, "me", "b", LoraSpec(8, 1), "adamw", ModelStatus.CREATING, now, now)
    await database.write(models.insert, model)

    async def move(to: ModelStatus) -> bool:
        return await database.write(models.move, "m", to)

    assert await move(ModelStatus.READY)
    assert not await move(ModelStatus.CREATING)
    assert not await move(ModelStatus.FAILED)
    assert await move(ModelStatus.UNLOADED)
    assert not await move(ModelStatus.READY)

    session = Session("s", "me", SessionStatus.ACTIVE, now, now)
    await database.write(sessions.insert, session)
    later = now + timedelta(seconds=9)
    await database.write(sessions.touch, {"s": later})
    assert await database.read(sessions.stale, later) == []
    assert len(await database.read(sessions.stale, later + timedelta(seconds=1))) == 1
    end = SessionStatus.FINISHED
    assert await database.write(sessions.end, "s", end, now, "success", None)
    assert not await database.write(sessions.end, "s", end, now, "errored", None)


async def test_clone_numbers_and_inflight_weights(database: Database) -> None:
    now = utcnow()

    async def save(number: int, kind: SamplerKind, seq: int) -> SamplingSession:
        sampler = SamplingSession(f"x{number}", "s", "me", "b", kind, now, model_id="m")
        sampler = replace(sampler, snapshot_id=f"after {seq}", saved_seq=seq, size_bytes=seq)
        if kind is SamplerKind.INFLIGHT:
            sampler = await database.write(sampling_sessions.join_inflight, sampler)
        await database.write(sampling_sessions.insert, sampler)
        return sampler

    async def snapshots() -> list[str | None]:
        found = [await database.read(sampling_sessions.get, f"x{number}") for number in range(4)]
        return [each.snapshot_id for each in found if each is not None]

    await save(0, SamplerKind.SNAPSHOT, 1)
    assert await database.write(sampling_sessions.add_clone, "x0") == 1
    assert await database.write(sampling_sessions.add_clone, "x0") == 2
    await save(1, SamplerKind.INFLIGHT, 2)
    await save(2, SamplerKind.INFLIGHT, 4)
    assert await snapshots() == ["after 1", "after 4", "after 4"]
    late = await save(3, SamplerKind.INFLIGHT, 3)
    assert (late.snapshot_id, late.saved_seq, late.size_bytes) == ("after 4", 4, 4)
    assert await snapshots() == ["after 1", "after 4", "after 4", "after 4"]


async def test_a_database_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    database = Database(f"sqlite:///{tmp_path / 'file' / 'futures.db'}")
    with pytest.raises(StorageError, match="cannot open database"):
        await database.start()


async def test_a_database_that_cannot_be_reached_is_worth_a_repetition(database: Database) -> None:
    """``StorageError`` is what outcomes are kept for and what clients are told to repeat."""
    reachable = database._connections
    nobody_listens = sa.make_url("postgresql+asyncpg://u:p@127.0.0.1:1/db")
    database._connections = Postgres(nobody_listens)
    with pytest.raises(StorageError):
        await database.read(futures.get, "req-1")
    writes = [database.write(futures.insert, new_future(n), utcnow()) for n in range(3)]
    for outcome in await asyncio.gather(*writes, return_exceptions=True):
        assert isinstance(outcome, StorageError)
    await database._connections.close()
    database._connections = reachable
    assert (await database.write(futures.insert, new_future(1), utcnow())).is_new


@pytest.mark.parametrize("name", ["sdk_version", "project_id", "display_name"])
def test_columns_hold_the_longest_text_that_a_request_may_bring(name: str) -> None:
    """PostgreSQL refuses what is longer, and the client would be told to repeat it."""
    options = CreateSessionRequest.model_json_schema()["properties"][name]["anyOf"]
    column = tables.sessions.c[name].type
    assert isinstance(column, sa.String)
    longest = max(option.get("maxLength", 0) for option in options)
    assert column.length is None or column.length >= longest
