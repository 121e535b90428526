"""Things that happen at the same moment, on the whole server over the fake backend."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.services.test_server import ME, MODEL, Client, config, running
from training.backends.fake import FakeBackend
from training.core.errors import Gone
from training.services.server import Server


def fake_backend(server: Server) -> FakeBackend:
    backend = server.hosts.get(MODEL).backend
    assert isinstance(backend, FakeBackend)
    return backend


async def refuse_writes(server: Server) -> None:
    """What a full disk does: every write fails, reads go on."""

    def read_only(connection: sa.Connection) -> None:
        connection.exec_driver_sql("PRAGMA query_only=ON")

    await server.database.write(read_only)


async def test_a_session_that_ends_while_it_is_read_stays_ended(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        clients = [await Client.connect(server) for _ in range(20)]
        server.sessions._active.clear()  # as after a restart: sessions are read again
        beats = [server.sessions.heartbeat(ME, client.session_id) for client in clients * 2]
        ends = [server.sessions.finish(ME, x.session_id, "success", None) for x in clients]
        await asyncio.gather(*ends, *beats, return_exceptions=True)
        for client in clients:
            with pytest.raises(Gone):
                await server.sessions.heartbeat(ME, client.session_id)


async def test_a_heartbeat_does_not_revive_a_session_that_is_ending(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        clients = [await Client.connect(server) for _ in range(20)]
        for client in clients:
            await asyncio.gather(
                server.sessions.finish(ME, client.session_id, "success", None),
                server.sessions.heartbeat(ME, client.session_id),
                return_exceptions=True,
            )
            with pytest.raises(Gone):
                await server.sessions.heartbeat(ME, client.session_id)
