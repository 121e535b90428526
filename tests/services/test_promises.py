"""Promises over a real database: durable, settled once, woken, private, cursors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from training.config import QuotaConfig, SchedulerConfig
from training.core.errors import InvalidRequest, NotFound
from training.core.records import FutureKind, FutureResult, FutureStatus, NewFuture
from training.services.promises import CLONE_SEQS, Promises
from training.services.quotas import Quotas
from training.storage.database import Database
from training.storage.repositories import futures

DONE = FutureResult(FutureStatus.DONE, b"result", "application/x-protobuf")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    database = Database(database_url)
    await database.start()
    yield database
    await database.close()


def promises_of(database: Database) -> Promises:
    return Promises(database, Quotas(QuotaConfig(), SchedulerConfig(), is_shared=False))


def new(number: int, scope: str = "sample:s", owner: str = "me") -> NewFuture:
    return NewFuture(
        f"req-{scope}-{number}", FutureKind.SAMPLE, scope, number, owner, "s", None, b"{}", "json"
    )


async def test_a_waiter_is_woken_and_the_result_outlives_the_process(database: Database) -> None:
    promises = promises_of(database)
    stored = await promises.accept(new(1))
    assert await promises.wait(stored.request_id, "me", 0.01) is None
    waiting = asyncio.create_task(promises.wait(stored.request_id, "me", 60))
    await asyncio.sleep(0)
    await promises.settle(stored.request_id, DONE)
    assert await waiting == DONE
    assert await promises.wait(stored.request_id, "me", 0) == DONE
    later = promises_of(database)
    assert await later.wait(stored.request_id, "me", 0) == DONE


async def test_a_promise_settles_once(database: Database) -> None:
    promises = promises_of(database)
    stored = await promises.accept(new(1))
    await promises.settle(stored.request_id, DONE)
    await promises.settle(stored.request_id, FutureResult(FutureStatus.FAILED, error="late"))
    assert await promises.wait(stored.request_id, "me", 0) == DONE


async def test_ids_of_others_are_not_there(database: Database) -> None:
    promises = promises_of(database)
    stored = await promises.accept(new(1))
    for instance in (promises, promises_of(database)):
        with pytest.raises(NotFound):
            await instance.wait(stored.request_id, "you", 0)
        with pytest.raises(NotFound):
            await instance.wait("req-never", "me", 0)


async def test_concurrent_repetitions_get_one_promise(database: Database) -> None:
    promises = promises_of(database)
    repeated = [
        NewFuture(f"req-{n}", FutureKind.SAMPLE, "sample:s", 7, "me", "s", None, b"{}", "json")
        for n in range(20)
    ]
    stored = await asyncio.gather(*(promises.accept(item) for item in repeated))
    assert len({item.request_id for item in stored}) == 1
    assert sum(item.is_new for item in stored) == 1
    assert promises.num_pending() == 1


async def test_a_refused_promise_fails_with_its_category(database: Database) -> None:
    promises = promises_of(database)
    stored = await promises.refuse(new(1), InvalidRequest("wrong"))
    result = await promises.wait(stored.request_id, "me", 0)
    assert result is not None
    assert (result.status, result.error, result.category.value) == ("failed", "wrong", "user")


async def test_an_adopted_promise_wakes_its_waiter(database: Database) -> None:
    await promises_of(database).accept(new(1))
    (pending,) = await database.read(futures.pending, FutureKind.SAMPLE)
    promises = promises_of(database)
    promises.adopt(pending.future)
    waiting = asyncio.create_task(promises.wait(pending.future.request_id, "me", 60))
    await asyncio.sleep(0)
    await promises.settle(pending.future.request_id, DONE)
    assert await waiting == DONE


async def test_completions_follow_a_cursor_and_keep_clones_apart(database: Database) -> None:
    promises = promises_of(database)
    for number in (0, 1, CLONE_SEQS + 5):
        await promises.accept(new(number))
    assert await promises.completions("sample:s", 0, 0, 0.01) == []
    waiting = asyncio.create_task(promises.completions("sample:s", 0, 0, 60))
    await asyncio.sleep(0.01)
    await promises.settle(f"req-sample:s-{CLONE_SEQS + 5}", DONE)
    await promises.settle("req-sample:s-1", DONE)
    (first,) = await waiting
    assert first.request_id == "req-sample:s-1"
    assert first.completion is not None
    await promises.settle("req-sample:s-0", FutureResult(FutureStatus.FAILED, error="x"))
    (second,) = await promises.completions("sample:s", 0, first.completion, 60)
    assert (second.request_id, second.status) == ("req-sample:s-0", FutureStatus.FAILED)
    (cloned,) = await promises.completions("sample:s", 1, 0, 60)
    assert cloned.seq == CLONE_SEQS + 5


async def test_a_clone_that_cannot_be_is_refused(database: Database) -> None:
    largest = 2**63 // CLONE_SEQS - 1
    assert await promises_of(database).completions("sample:s", largest, 0, 0) == []
    with pytest.raises(InvalidRequest):
        await promises_of(database).completions("sample:s", largest + 1, 0, 0)
