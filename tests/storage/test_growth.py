"""What a long history must not cost: statements look at what is pending, left or newest alone."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from tests.storage.test_database import new_future
from training.backends.base import LoraSpec
from training.core import ids
from training.core.ids import CheckpointKind, TinkerPath
from training.core.records import Checkpoint, FutureResult, FutureStatus, utcnow
from training.storage import tables
from training.storage.database import Connection, Database
from training.storage.repositories import checkpoints, futures, operations

NUM_SETTLED = 2000
DONE = FutureResult(FutureStatus.DONE, b"result", "x")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A model with a long history, two promises of which are pending."""
    database = Database(database_url)
    await database.start()
    await database.write(fill)
    yield database
    await database.close()


def fill(connection: Connection) -> None:
    now = utcnow()
    for number in range(NUM_SETTLED):
        futures.insert(connection, new_future(number), now)
        futures.finish(connection, f"req-{number}", DONE, now)
    for number in (NUM_SETTLED, NUM_SETTLED + 1):
        futures.insert(connection, new_future(number), now)


async def plans(database: Database, run: Callable[[Connection], object]) -> list[str]:
    """How the database finds the rows of every statement of ``run``, whose writes are undone."""
    sent: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *more: Any) -> None:
        sent.append((statement, parameters))

    def explain(connection: Connection) -> list[str]:
        is_sqlite = connection.dialect.name == "sqlite"
        connection.exec_driver_sql("ANALYZE futures" if not is_sqlite else "SELECT 1")
        sa.event.listen(connection, "before_cursor_execute", note)
        with connection.begin_nested() as undo:
            run(connection)
            undo.rollback()
        sa.event.remove(connection, "before_cursor_execute", note)
        found = []
        for statement, parameters in sent:
            if statement.startswith("SELECT"):
                how = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"
                rows = connection.exec_driver_sql(f"{how} {statement}", parameters)
                found.append("\n".join(str(row[-1]) for row in rows))
        return found

    return await database.write(explain)


async def test_what_is_pending_is_found_without_the_history(database: Database) -> None:
    """SQLite's plan is a rule and PostgreSQL's follows its statistics: both name the index."""
    finds: tuple[Callable[[Connection], object], ...] = (
        lambda c: operations.has_pending_until(c, "m", NUM_SETTLED),
        lambda c: operations.pending_of_model(c, "m", None),
        lambda c: futures.pending_of_session(c, "s"),
    )
    for find in finds:
        (plan,) = await plans(database, find)
        assert "ix_futures_pending" in plan
    assert await database.read(operations.has_pending_until, "m", NUM_SETTLED)
    assert not await database.read(operations.has_pending_until, "m", NUM_SETTLED - 1)
    assert not await database.read(operations.has_pending_until, "other", NUM_SETTLED)
    assert await database.read(futures.pending_of_session, "s") == {
        f"req-{NUM_SETTLED}",
        f"req-{NUM_SETTLED + 1}",
    }


async def test_all_that_is_pending_is_found_without_the_history(database: Database) -> None:
    for find in (futures.unsettled, operations.pending_by_model):
        (plan,) = await plans(database, find)
        assert "ix_futures_pending" in plan
    (failing, *_) = await plans(
        database, lambda c: futures.fail_pending_of_session(c, "s", "ended", utcnow())
    )
    assert "ix_futures_pending" in failing


async def test_the_bytes_of_a_session_go_a_piece_at_a_time(database: Database) -> None:
    (plan,) = await plans(database, lambda c: futures.drop_bytes_of_session(c, "s", "", 100))
    assert "ix_futures_session_id" in plan
    after, rounds = "", 0
    left = await num_rows(database, tables.results)
    assert left == NUM_SETTLED
    while (found := await drop(database, after)) is not None:
        before, left = left, await num_rows(database, tables.results)
        assert 98 <= before - left <= 100
        after, rounds = found, rounds + 1
    assert rounds == NUM_SETTLED // 100
    assert await num_rows(database, tables.results) == 0
    assert await num_rows(database, tables.payloads) == 2, "of what is pending"


async def drop(database: Database, after: str) -> str | None:
    return await database.write(futures.drop_bytes_of_session, "s", after, 100)


async def num_rows(database: Database, table: sa.Table) -> int:
    query = sa.select(sa.func.count()).select_from(table)
    return await database.read(lambda c: int(c.execute(query).scalar_one()))


async def test_promises_that_are_failed_together_are_listed_as_completed(
    database: Database,
) -> None:
    """In the order in which they were accepted, after what had completed before."""
    await database.write(futures.insert, new_future(9000, "sampler", 0), utcnow())
    failed = await database.write(futures.fail_pending_of_session, "s", "ended", utcnow())
    assert failed == 3
    found = await database.read(futures.completions, "model:m", NUM_SETTLED, 0, 10**6, 10)
    assert [(each.request_id, each.completion, each.status) for each in found] == [
        (f"req-{NUM_SETTLED + number}", NUM_SETTLED + 1 + number, FutureStatus.FAILED)
        for number in (0, 1)
    ]
    (other,) = await database.read(futures.completions, "sampler", 0, 0, 10, 10)
    assert (other.request_id, other.completion) == ("req-9000", 1)
    result = await database.read(futures.result, "req-9000")
    assert result is not None
    assert (result.status, result.error) == (FutureStatus.FAILED, "ended")
    ended = await database.read(futures.pending_of_session, "s")
    assert ended == set()


async def test_the_newest_checkpoints_of_a_run_are_read_alone(database: Database) -> None:
    then, kept = utcnow(), 50

    def save(connection: Connection) -> None:
        for number in range(kept):
            for kind in (CheckpointKind.TRAINING, CheckpointKind.SAMPLER):
                at = then + timedelta(seconds=number)
                checkpoints.insert(connection, checkpoint(kind, f"step-{number}", at))
        checkpoints.insert(connection, checkpoint(CheckpointKind.TRAINING, "a-twin", at))

    await database.write(save)
    num_read = 0

    def latest(connection: Connection) -> object:
        nonlocal num_read

        @sa.event.listens_for(connection, "after_cursor_execute")
        def note(connection: Any, cursor: Any, statement: str, *more: Any) -> None:
            nonlocal num_read
            num_read += statement.startswith("SELECT")

        return checkpoints.latest_of_run(connection, "m")

    found = await database.read(latest)
    assert num_read == 1
    assert isinstance(found, dict)
    assert {kind: each.path.name for kind, each in found.items()} == {
        CheckpointKind.TRAINING: "a-twin",
        CheckpointKind.SAMPLER: f"step-{kept - 1}",
    }
    assert found[CheckpointKind.SAMPLER].created_at == then + timedelta(seconds=kept - 1)
    (plan,) = await plans(database, lambda c: checkpoints.latest_of_run(c, "m"))
    if "SCAN" in plan or "SEARCH" in plan:  # few rows: PostgreSQL rightly reads them all
        assert plan.count("ix_checkpoints_training_run_id_kind_created_at") == len(CheckpointKind)


def checkpoint(kind: CheckpointKind, name: str, at: Any) -> Checkpoint:
    path = TinkerPath("m", kind, name)
    return Checkpoint(path, "me", "b", LoraSpec(8, 1), "adamw", ids.new_directory(), 1, at)
