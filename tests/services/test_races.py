"""Things that happen at the same moment, on the whole server over the fake backend."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest
import sqlalchemy as sa

from tests.services.test_server import ME, MODEL, Client, config, running, train_body
from training.backends.fake import FakeBackend
from training.config import DurabilityConfig
from training.core.errors import BackendError, Gone, NotFound, StorageError
from training.core.ids import TinkerPath
from training.core.records import FutureStatus, ModelStatus
from training.services.server import Server
from training.storage import tables
from training.wire.requests import LoadWeightsRequest

pytestmark = pytest.mark.usefixtures("each_database")


def fake_backend(server: Server) -> FakeBackend:
    backend = server.hosts.get(MODEL).backend
    assert isinstance(backend, FakeBackend)
    return backend


async def refuse_writes(server: Server) -> None:
    """What a full disk does: every write fails, reads go on."""

    def read_only(connection: sa.Connection) -> None:
        connection.exec_driver_sql(
            "PRAGMA query_only=ON"
            if connection.dialect.name == "sqlite"
            else "SET default_transaction_read_only = on"
        )

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


async def test_a_model_accepted_while_its_session_ended_holds_no_slot(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        owner = await Client.connect(server)
        await owner.create()
        path = orjson.loads((await owner.save("start")).body)["path"]
        late = await Client.connect(server)
        request = LoadWeightsRequest(session_id=late.session_id, model_seq_id=0, path=path)
        request_id, _ = await asyncio.gather(
            server.models.create_from_checkpoint(ME, request, b"{}"),
            server.sessions.finish(ME, late.session_id, "success", None),
        )
        assert (await late.result(request_id)).status is FutureStatus.FAILED
        assert server.hosts.get(MODEL).slots.available == 3
        assert (await server.models.get(ME, late.model_id)).status is not ModelStatus.READY


async def test_the_end_of_a_session_frees_its_slots_without_an_engine(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        for number in range(2):
            await client.create(number)
        await fake_backend(server).close()
        await server.sessions.finish(ME, client.session_id, "success", None)
        assert server.hosts.get(MODEL).slots.available == 4
        for model in await server.models.of_session(client.session_id):
            assert model.status is ModelStatus.UNLOADED


async def test_the_end_of_a_session_frees_its_slots_on_a_full_disk(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        for number in range(2):
            await client.create(number)
        await refuse_writes(server)
        await server.models.unload_session(client.session_id, "success")
        assert server.hosts.get(MODEL).slots.available == 4


async def test_every_model_of_a_dead_engine_comes_back(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        old, young = await Client.connect(server), await Client.connect(server)
        await old.create()
        before = await old.train()
        fake_backend(server).crash()
        await young.create()
        assert (await old.train()).body == before.body
        assert (await young.train()).body == before.body
        assert server.hosts.get(MODEL).slots.available == 2


async def test_a_server_on_a_full_disk_can_be_closed(tmp_path: Path) -> None:
    settings = config(tmp_path).model_copy(update={"durability": DurabilityConfig(drain_s=0.5)})
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        body = train_body(client.model_id, 2)  # waits for operation 1
        request_id, _ = await server.training.forward_backward(ME, body)
        await refuse_writes(server)
        server.hosts.get(MODEL).tasks.close_model(client.model_id, BackendError("ended"))
        await asyncio.sleep(0.1)  # the outcome cannot be stored and is tried again
        backend = fake_backend(server)
    assert not backend.health().alive
    async with running(settings) as server:
        # Its outcome was never stored: it waits for operation 1 again.
        client.server = server
        assert (await client.train()).status is FutureStatus.DONE
        assert (await client.result(request_id)).status is FutureStatus.DONE


async def test_a_start_that_fails_leaves_no_engine_behind(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with running(settings) as server:
        await server.database.write(lambda c: tables.checkpoints.drop(c))
    failing = Server(settings)
    with pytest.raises(StorageError):
        await failing.start()
    assert not fake_backend(failing).health().alive


async def test_requests_on_inflight_weights_survive_the_next_save(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        sampler = await client.save_for_sampler(0, "inflight")

        async def sample(seq: int) -> FutureStatus:
            await asyncio.sleep(0.001 * seq)
            return (await client.sample(sampler, seq)).status

        samples = [asyncio.create_task(sample(seq)) for seq in range(200)]
        number = 1
        while not all(task.done() for task in samples):
            await client.save_for_sampler(number, "inflight")
            number += 1
        assert {task.result() for task in samples} == {FutureStatus.DONE}


async def test_an_expired_checkpoint_does_not_take_its_successor_along(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        path = orjson.loads((await client.save("a")).body)["path"]
        expired = await server.checkpoints.readable(ME, TinkerPath.parse(path))
        await client.save("a", overwrite=True)
        await server.checkpoints._remove(expired)  # what the reaper had read before the save
        kept = await server.checkpoints.readable(ME, TinkerPath.parse(path))
        assert server.files.verify(kept.directory).is_dir()
        await server.checkpoints.delete(ME, TinkerPath.parse(path))
        with pytest.raises(NotFound):
            await server.checkpoints.readable(ME, TinkerPath.parse(path))
