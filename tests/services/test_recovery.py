"""Models after a crash, on the whole server over the fake backend and a real database."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest
import sqlalchemy as sa

from tests.services.test_races import fake_backend
from tests.services.test_server import ME, MODEL, Client, config, num_rows, running, train_body
from training.config import DurabilityConfig, TrainingConfig
from training.core.errors import Gone
from training.core.records import FutureResult, FutureStatus, ModelStatus
from training.services.server import Server
from training.storage import tables
from training.storage.repositories import models, snapshots


def eager(tmp_path: Path, steps: int = 2, **durability: float) -> TrainingConfig:
    """Saves a model every few steps, at once, and never because it rests."""
    policy = DurabilityConfig.model_validate(
        {
            "snapshot_steps": steps,
            "snapshot_pause_s": 0,
            "snapshot_idle_s": 1e6,
            "snapshot_share": 1.0,
            "drain_s": 0.0,
            **durability,
        }
    )
    return config(tmp_path).model_copy(update={"durability": policy})


async def steps(client: Client, num: int) -> list[FutureResult]:
    results = []
    for _ in range(num):
        results += [await client.train(), await client.step()]
    return results


async def saved_until(server: Server, client: Client, seq: int) -> None:
    """Returns when a snapshot covers operation ``seq``."""
    while True:
        found = await server.database.read(snapshots.of_model, client.model_id)
        if found and found[0].seq >= seq:
            return
        await asyncio.sleep(0.01)


async def undisturbed(tmp_path: Path, num: int) -> list[FutureResult]:
    async with running(config(tmp_path / "undisturbed")) as server:
        client = await Client.connect(server)
        await client.create()
        return await steps(client, num)


def bodies(results: list[FutureResult]) -> list[bytes]:
    assert {result.status for result in results} == {FutureStatus.DONE}
    return [result.body for result in results]


async def again(client: Client, server: Server) -> Client:
    """The same client after a restart."""
    client.server = server
    return client


@pytest.mark.parametrize("num_before", [0, 1, 2, 5])
@pytest.mark.parametrize("kind", ["engine", "server"])
async def test_training_goes_on_to_the_last_bit(tmp_path: Path, num_before: int, kind: str) -> None:
    expected = bodies(await undisturbed(tmp_path, num_before + 3))
    settings = eager(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        results = await steps(client, num_before)
        if kind == "engine":
            fake_backend(server).crash()
            results += await steps(client, 3)
    if kind == "server":
        async with running(settings) as server:
            results += await steps(await again(client, server), 3)
            assert not (await server.models.get(ME, client.model_id)).corrupted
    assert bodies(results) == expected


async def test_what_was_accepted_and_not_run_runs_after_a_restart(tmp_path: Path) -> None:
    expected = bodies(await undisturbed(tmp_path, 2))
    settings = eager(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        results = await steps(client, 1)
        await server.hosts.get(MODEL).tasks.close()  # nothing runs any more
        body = train_body(client.model_id, client.seq + 1)
        request_id, _ = await server.training.forward_backward(ME, body)
        client.seq += 1
    async with running(settings) as server:
        await again(client, server)
        results += [await client.result(request_id), await client.step()]
    assert bodies(results) == expected


async def test_an_operation_of_a_creation_that_never_ran_waits_for_it(tmp_path: Path) -> None:
    settings = eager(tmp_path)
    async with running(settings) as server:
        await server.hosts.get(MODEL).tasks.close()
        client = await Client.connect(server)
        creating = asyncio.create_task(client.create())
        await accepted(server)
        body = train_body(client.model_id, 1)
        request_id, _ = await server.training.forward_backward(ME, body)
        creating.cancel()
        await asyncio.gather(creating, return_exceptions=True)
    async with running(settings) as server:
        await again(client, server)
        result = await client.result(request_id)
    assert bodies([result]) == bodies((await undisturbed(tmp_path, 1))[:1])


async def rows(server: Server, table: sa.Table) -> int:
    return await server.database.read(num_rows, table)


async def accepted(server: Server) -> None:
    """Returns when a model's creation is stored."""
    while True:
        if await rows(server, tables.models):
            return
        await asyncio.sleep(0.01)


async def test_a_damaged_snapshot_is_never_loaded_and_costs_a_longer_replay(tmp_path: Path) -> None:
    expected = bodies(await undisturbed(tmp_path, 7))
    settings = eager(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        results = []
        for _ in range(3):
            results += await steps(client, 2)
            await saved_until(server, client, client.seq)
        newest = (await server.database.read(snapshots.of_model, client.model_id))[0]
    weights = settings.storage.resolved_snapshot_dir() / newest.directory / "optimizer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    async with running(settings) as server:
        results += await steps(await again(client, server), 1)
        assert not (await server.models.get(ME, client.model_id)).corrupted
    assert bodies(results) == expected


async def test_a_model_without_any_good_snapshot_is_lost_and_says_so(tmp_path: Path) -> None:
    settings = eager(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        for _ in range(3):
            await steps(client, 2)
            await saved_until(server, client, client.seq)
    for directory in settings.storage.resolved_snapshot_dir().iterdir():
        for path in directory.glob("*.safetensors"):
            path.unlink()
    async with running(settings) as server:
        result = await (await again(client, server)).train()
        assert result.status is FutureStatus.FAILED
        assert "no snapshot" in result.error
        assert (await server.models.get(ME, client.model_id)).status is ModelStatus.LOST
        with pytest.raises(Gone, match="last checkpoint"):
            await client.train()


async def test_payloads_go_once_they_are_covered_and_results_once_delivered(tmp_path: Path) -> None:
    settings = eager(tmp_path, results_kept_s=0.0)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        for _ in range(4):
            await steps(client, 2)
            await saved_until(server, client, client.seq)
        # The two newest snapshots stay, and what came after the older of them.
        assert await rows(server, tables.payloads) == 4
        await server.janitor.tidy()
        assert await rows(server, tables.results) == 0
        assert await rows(server, tables.snapshots) == 2
        names = {path.name for path in settings.storage.resolved_snapshot_dir().iterdir()}
        held = await server.database.read(snapshots.directories)
        assert {name for name in names if not name.startswith(".")} == held
        await server.sessions.finish(ME, client.session_id, "success", None)
        assert await rows(server, tables.snapshots) == 0
        assert await rows(server, tables.payloads) == 0


async def test_a_loaded_checkpoint_may_be_deleted_the_model_still_comes_back(
    tmp_path: Path,
) -> None:
    settings = eager(tmp_path, steps=1000)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 2)
        path = orjson.loads((await client.save("start")).body)["path"]
        expected = bodies(await steps(client, 2))
        assert (await client.load(path)).status is FutureStatus.DONE
        assert bodies(await steps(client, 1)) == expected[:2]
        checkpoint = next(iter(server.files.names()))
        server.files.delete(checkpoint)
    async with running(settings) as server:
        assert bodies(await steps(await again(client, server), 1)) == expected[2:]
        fake_backend(server).crash()
        await client.train()
        assert not (await server.models.get(ME, client.model_id)).corrupted


async def test_a_run_that_does_not_repeat_itself_is_marked(tmp_path: Path) -> None:
    settings = eager(tmp_path, steps=1000)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 2)

        def tamper(connection: sa.Connection) -> None:
            where = tables.futures.c.scope == f"model:{client.model_id}"
            first = where & (tables.futures.c.seq == 1)
            connection.execute(sa.update(tables.futures).where(first).values(digest=b"x" * 32))

        await server.database.write(tamper)
        fake_backend(server).crash()
        await steps(client, 1)
        model = await server.database.read(models.get, client.model_id)
        while model is not None and not model.corrupted:
            model = await server.database.read(models.get, client.model_id)
        assert model is not None
        assert "operation 1 (ForwardBackward)" in (model.fault or "")


async def test_a_stopped_server_saves_its_models_first(tmp_path: Path) -> None:
    settings = eager(tmp_path, steps=1000, drain_s=60.0)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 3)
    async with running(settings) as server:
        found = await server.database.read(snapshots.of_model, client.model_id)
        assert [snapshot.seq for snapshot in found] == [6]
        assert bodies(await steps(await again(client, server), 1))


async def test_a_session_that_ends_while_the_server_is_down_is_ended(tmp_path: Path) -> None:
    settings = eager(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 2)
        await server.hosts.get(MODEL).tasks.close()
        body = train_body(client.model_id, client.seq + 1)
        request_id, _ = await server.training.forward_backward(ME, body)

        def end(connection: sa.Connection) -> None:
            connection.execute(sa.update(tables.sessions).values(status="finished"))

        await server.database.write(end)
    async with running(settings) as server:
        result = await server.promises.wait(request_id, ME, 0)
        assert result is not None
        assert "ended" in result.error
        assert (await server.models.get(ME, client.model_id)).status is ModelStatus.UNLOADED
        assert await rows(server, tables.snapshots) == 0


async def test_the_bytes_of_a_session_go_though_the_server_died_at_its_end(tmp_path: Path) -> None:
    """Nothing of it was pending any more."""
    settings = eager(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 2)

        def end(connection: sa.Connection) -> None:
            connection.execute(sa.update(tables.sessions).values(status="finished"))

        await server.database.write(end)
        assert await rows(server, tables.results) > 0
    async with running(settings) as server:
        assert await rows(server, tables.payloads) == 0
        assert await rows(server, tables.results) == 0
