"""Nothing is skipped, done twice or left waiting where two things go wrong at once."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.services.test_races import fake_backend
from tests.services.test_recovery import again, bodies, eager, saved_until, steps, undisturbed
from tests.services.test_server import ME, MODEL, Client, dumped, running, train_body
from training.config import TrainingConfig
from training.core.errors import BackendDead, DeathCause, StorageError
from training.core.operations import Outcome
from training.core.records import FutureStatus, ModelStatus
from training.services.server import Server
from training.storage.repositories import futures, models, operations, snapshots
from training.wire.requests import LoadWeightsRequest, OptimStepRequest, SaveWeightsRequest


def impatient(settings: TrainingConfig) -> TrainingConfig:
    """Gives up on gaps after a moment."""
    scheduler = settings.scheduler.model_copy(update={"gap_timeout_s": 0.1})
    return settings.model_copy(update={"scheduler": scheduler})


def killed(tmp_path: Path, name: str) -> Path:
    """What the server in ``tmp_path / "before"`` leaves behind if it is killed now."""
    return Path(shutil.copytree(tmp_path / "before", tmp_path / name))


async def until(happened: Callable[[], bool]) -> None:
    while True:
        if happened():
            return
        await asyncio.sleep(0.01)


async def submit_train(client: Client, seq: int) -> str:
    body = train_body(client.model_id, seq)
    return (await client.server.training.forward_backward(ME, body))[0]


async def submit_step(client: Client, seq: int) -> str:
    raw = {"model_id": client.model_id, "seq_id": seq, "adam_params": {}}
    request = OptimStepRequest.model_validate(raw)
    return await client.server.training.optim_step(ME, request, orjson.dumps(raw))


def fail_read(
    server: Server, monkeypatch: pytest.MonkeyPatch, which: Callable[[int, Any], bool]
) -> list[str]:
    """The database does not answer when a request's bytes are read for which ``which`` (number of
    the read, request id) is true; returns those ids as they come."""
    read, number = server.database.read, 0
    failed: list[str] = []

    async def flaky(statement: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal number
        if statement is operations.payload:
            number += 1
            if not failed and which(number, args[0]):
                failed.append(args[0])
                raise StorageError("database read failed: connection was closed")
        return await read(statement, *args, **kwargs)

    monkeypatch.setattr(server.database, "read", flaky)
    return failed


async def test_a_read_that_fails_in_a_replay_skips_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bodies(await undisturbed(tmp_path, 4))
    async with running(eager(tmp_path, steps=1000)) as server:
        client = await Client.connect(server)
        await client.create()
        results = await steps(client, 3)
        failed = fail_read(server, monkeypatch, lambda number, _: number == 4)
        fake_backend(server).crash(DeathCause.KILLED)
        results += await steps(client, 1)
        assert failed
        assert not (await server.models.get(ME, client.model_id)).corrupted
    assert bodies(results) == expected


async def test_a_read_that_fails_loses_nothing_that_was_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = bodies(await undisturbed(tmp_path, 2))
    async with running(eager(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        results = await steps(client, 1)
        await server.hosts.get(MODEL).tasks.close()
        pending = [await submit_train(client, 3), await submit_step(client, 4)]
    server = Server(eager(tmp_path))
    failed = fail_read(server, monkeypatch, lambda _, name: name == pending[0])
    await server.start()
    try:
        await again(client, server)
        results += [await client.result(name) for name in pending]
    finally:
        await server.close()
    assert failed == pending[:1]
    assert bodies(results) == expected


async def test_what_comes_too_late_before_a_kill_is_answered_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = impatient(eager(tmp_path / "before", steps=1))
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 1)
        client.seq = 3  # which is on its way
        await steps(client, 2)
        await saved_until(server, client, 7)

        async def never(request_id: str, outcome: Outcome) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(server.promises, "settle_outcome", never)
        late = await submit_train(client, 3)
        left = killed(tmp_path, "after")
        monkeypatch.undo()
    async with running(impatient(eager(left, steps=1))) as server:
        await again(client, server)
        answer = await client.result(late)
        assert (answer.status, answer.category.value) == (FutureStatus.FAILED, "user")
        assert "stopped waiting" in answer.error
        await steps(client, 2)
        await saved_until(server, client, client.seq)


@pytest.mark.parametrize("with_crash", [False, True])
async def test_a_gap_that_was_given_up_is_one_in_a_replay_too(
    tmp_path: Path, with_crash: bool
) -> None:
    async with running(impatient(eager(tmp_path, steps=1000))) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 1)
        await client.train()
        client.seq += 1  # a step that comes too late
        await client.train()
        late = await client.result(await submit_step(client, 4))
        if with_crash:
            fake_backend(server).crash(DeathCause.KILLED)
        step = await client.step()
        after = await client.train()
        assert "stopped waiting" in late.error
        assert step.status is FutureStatus.FAILED
        assert "operation 4 never arrived" in step.error
        first = (await undisturbed(tmp_path, 2))[2]
        assert after.body == first.body, "no step was taken since the first"
        assert not (await server.models.get(ME, client.model_id)).corrupted


async def test_a_load_sees_the_save_before_it(tmp_path: Path) -> None:
    async with running(eager(tmp_path, steps=1000)) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 1)
        save = SaveWeightsRequest(model_id=client.model_id, path="a", seq_id=3)
        path = f"tinker://{client.model_id}/weights/a"
        load = LoadWeightsRequest(model_id=client.model_id, path=path, seq_id=4, optimizer=True)
        saved = await server.checkpoints.save_weights(ME, save, dumped(save))
        loaded = await server.models.load_into(ME, load, dumped(load))
        for name in (saved, loaded):
            assert (await client.result(name)).status is FutureStatus.DONE


@pytest.mark.parametrize("num_revivals", [1, 2])
async def test_a_session_that_ends_while_its_engine_is_dead_leaves_no_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_revivals: int
) -> None:
    """What ran when the engine died is in the database alone until the model is back."""
    async with running(eager(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 1)
        reviving, ended, number = asyncio.Event(), asyncio.Event(), 0
        read = server.database.read

        async def read_slowly(statement: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal number
            if statement is operations.of_model:
                number += 1
                if number == num_revivals:
                    reviving.set()
                    await ended.wait()
            return await read(statement, *args, **kwargs)

        async def dead(*_: object) -> None:
            raise BackendDead("the engine is gone", DeathCause.KILLED)

        monkeypatch.setattr(server.database, "read", read_slowly)
        monkeypatch.setattr(fake_backend(server), "load_slot", dead)
        monkeypatch.setattr(fake_backend(server), "forward_backward", dead)
        waiting = await submit_train(client, 3)
        await reviving.wait()
        assert server.hosts.get(MODEL).tasks.num_reviving() == 1
        finish = server.sessions.finish(ME, client.session_id, "success", None)
        finishing = asyncio.create_task(finish)
        await until(lambda: server.sessions._num_active[ME] == 0)
        ended.set()
        await finishing
        left = await read(operations.pending_of_model, client.model_id, None)
        assert not left
        assert (await client.result(waiting)).status is FutureStatus.FAILED


async def test_a_snapshot_that_is_written_when_its_session_ends_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(eager(tmp_path, steps=1)) as server:
        client = await Client.connect(server)
        await client.create()
        add, adding, ended = snapshots.add, asyncio.Event(), asyncio.Event()
        write = server.database.write

        async def late(statement: Any, *args: Any, **kwargs: Any) -> Any:
            if statement is add:
                adding.set()
                await ended.wait()
            return await write(statement, *args, **kwargs)

        monkeypatch.setattr(server.database, "write", late)
        await steps(client, 1)
        await adding.wait()
        await server.sessions.finish(ME, client.session_id, "success", None)
        ended.set()
        files = server.snapshots._files
        await until(lambda: not files.names())
        assert not await server.database.read(snapshots.of_model, client.model_id)


async def test_a_snapshot_of_a_model_that_was_unloaded_is_forgotten_at_the_start(
    tmp_path: Path,
) -> None:
    settings = eager(tmp_path, steps=1)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 1)
        await saved_until(server, client, 2)
        await server.database.write(models.move, client.model_id, ModelStatus.UNLOADED)
    async with running(settings) as server:
        assert not await server.database.read(snapshots.of_model, client.model_id)
        assert not server.snapshots._files.names()


async def test_what_ended_two_engines_with_their_servers_is_not_tried_again(
    tmp_path: Path,
) -> None:
    settings = eager(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await steps(client, 1)
        await server.hosts.get(MODEL).tasks.close()
        guilty = await submit_train(client, 3)
        for _ in range(2):
            await server.database.write(operations.note_deaths, [guilty])
    async with running(settings) as server:
        await again(client, server)
        answer = await client.result(guilty)
        assert "not tried again" in answer.error
        client.seq = 3
        assert (await client.step()).status is FutureStatus.FAILED, "its window is spoiled"
        assert {each.status for each in await steps(client, 1)} == {FutureStatus.DONE}


async def test_success_clears_an_operation_of_earlier_crashes(tmp_path: Path) -> None:
    async with running(eager(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        await server.hosts.get(MODEL).tasks.close()
        name = await submit_train(client, 1)
        await server.database.write(operations.note_deaths, [name])
    async with running(eager(tmp_path)) as server:
        await again(client, server)
        assert (await client.result(name)).status is FutureStatus.DONE
        future = await server.database.read(futures.get, name)
        assert future is not None
        assert future.deaths == 0
        await server.database.write(operations.note_deaths, [name], only_pending=True)
        future = await server.database.read(futures.get, name)
        assert future is not None
        assert future.deaths == 0


async def test_an_outcome_is_told_whatever_becomes_of_what_it_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(eager(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        assert (await client.save("latest")).status is FutureStatus.DONE

        def busy(name: str) -> None:
            raise StorageError("cannot delete checkpoint: slow down")

        monkeypatch.setattr(server.files, "delete", busy)
        assert (await client.save("latest", overwrite=True)).status is FutureStatus.DONE
