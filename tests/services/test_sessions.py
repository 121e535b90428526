"""When sessions end, and that all of what ends with them does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.services.test_server import ME, MODEL, Client, config, num_rows, running
from training.core.errors import Gone, StorageError
from training.core.records import FutureStatus, ModelStatus, Session, SessionStatus, utcnow
from training.services import sessions as service
from training.services.server import Server
from training.storage import tables
from training.storage.repositories import models, sessions

pytestmark = pytest.mark.usefixtures("each_database")

End = Callable[..., Awaitable[None]]


def count_rounds(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Awaitable[None]]:
    """Returns what waits until the reaper has ended so many more rounds."""
    expire, num_rounds = server.sessions._expire, 0

    async def counted(now: datetime) -> None:
        nonlocal num_rounds
        await expire(now)
        num_rounds += 1

    async def wait(num: int) -> None:
        target = num_rounds + num
        while True:
            if num_rounds >= target:
                return
            await asyncio.sleep(0.01)

    monkeypatch.setattr(server.sessions, "_expire", counted)
    return wait


@pytest.mark.parametrize("hours", [1, -1, 24 * 365])
async def test_sessions_outlive_a_jump_of_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    """A laptop that slept: its clients slept too, or could not reach it."""
    jump = timedelta(0)
    monkeypatch.setattr(service, "utcnow", lambda: utcnow() + jump)
    monkeypatch.setattr(service, "_FLUSH_S", 0.02)
    async with running(config(tmp_path)) as server:
        rounds = count_rounds(server, monkeypatch)
        client = await Client.connect(server)
        await client.create()
        for _ in range(2):
            await rounds(2)
            jump += timedelta(hours=hours)
        await rounds(2)
        assert (await client.train()).status is FutureStatus.DONE
        session = await server.database.read(sessions.get, client.session_id)
        assert session is not None
        assert abs(session.last_heartbeat_at - utcnow() - jump) < timedelta(minutes=10)


async def test_a_jump_is_not_forgotten_while_the_database_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jump, num_failed = timedelta(0), 0
    monkeypatch.setattr(service, "utcnow", lambda: utcnow() + jump)
    monkeypatch.setattr(service, "_FLUSH_S", 0.02)
    async with running(config(tmp_path)) as server:
        rounds = count_rounds(server, monkeypatch)
        client = await Client.connect(server)
        await rounds(1)
        start_afresh = server.sessions._start_afresh

        async def away() -> list[Session]:
            nonlocal num_failed
            num_failed += 1
            if num_failed < 4:
                raise StorageError("database read failed: the database was lost")
            return await start_afresh()

        monkeypatch.setattr(server.sessions, "_start_afresh", away)
        jump = timedelta(hours=5)
        await rounds(2)
        assert num_failed == 4
        session = await server.sessions.get(ME, client.session_id)
        assert session.status is SessionStatus.ACTIVE


async def test_a_start_counts_sessions_whatever_the_clock_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(service, "utcnow", lambda: utcnow() + timedelta(days=400))
        async with running(settings) as server:
            await Client.connect(server)
    async with running(settings) as server:
        assert server.sessions._num_active[ME] == 1


async def test_the_end_of_a_session_is_tried_until_all_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_FLUSH_S", 0.02)
    async with running(config(tmp_path)) as server:
        rounds = count_rounds(server, monkeypatch)
        client = await Client.connect(server)
        await client.create()
        await client.train()
        await client.save_for_sampler(0)
        num_ends = 0

        def failing(step: End) -> End:
            async def fail(*args: str) -> None:
                nonlocal num_ends
                num_ends += 1
                if num_ends <= 6:
                    raise StorageError("database read failed: the database was lost")
                await step(*args)

            return fail

        for owner, name in (
            (server.models, "unload_session"),
            (server.weights, "session_ended"),
            (server.janitor, "session_ended"),
        ):
            monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
        await server.sessions.finish(ME, client.session_id, "success", None)
        assert num_ends == 3, "one step that fails does not stop the others"
        with pytest.raises(Gone):
            await server.sessions.heartbeat(ME, client.session_id)
        await rounds(3)
        assert num_ends == 9
        assert server.files.names() == set()
        assert server.hosts.get(MODEL).slots.available == 4
        (model,) = await server.models.of_session(client.session_id)
        assert model.status is ModelStatus.UNLOADED
        for table in (tables.payloads, tables.results):
            assert await server.database.read(num_rows, table) == 0


async def test_a_read_that_fails_at_the_end_of_a_session_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_FLUSH_S", 0.02)
    async with running(config(tmp_path)) as server:
        rounds = count_rounds(server, monkeypatch)
        client = await Client.connect(server)
        await client.create()
        read = server.database.read

        async def failing(statement: Any, *args: Any) -> Any:
            if statement is models.of_session:
                raise StorageError("database read failed: the database was lost")
            return await read(statement, *args)

        with monkeypatch.context() as patch:
            patch.setattr(server.database, "read", failing)
            await server.sessions.finish(ME, client.session_id, "success", None)
        await rounds(3)
        (model,) = await server.models.of_session(client.session_id)
        assert model.status is ModelStatus.UNLOADED
        assert not server.sessions._unfinished
