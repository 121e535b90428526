"""Weights that samplers read are there for as long as one does, and gone afterwards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest

from tests.services.test_exactly_once import until
from tests.services.test_races import fake_backend
from tests.services.test_server import (
    ME,
    MODEL,
    Client,
    config,
    dumped,
    running,
    sample_request,
)
from training.backends.base import SampleRequest, SampleResult
from training.config import ModelConfig, TrainingConfig
from training.core.errors import BackendDead, DeathCause, NotFound, StorageError
from training.core.ids import TinkerPath
from training.core.records import FutureResult, FutureStatus, SamplingSession, utcnow
from training.services.server import Server
from training.storage.files import CheckpointFiles
from training.storage.remote_files import RemoteFiles
from training.storage.repositories import checkpoints
from training.wire.requests import CreateSamplingSessionRequest, SaveWeightsForSamplerRequest

pytestmark = pytest.mark.usefixtures("each_database")


async def saved(client: Client, name: str = "a", overwrite: bool = False) -> TinkerPath:
    result = await client.save(name, overwrite)
    return TinkerPath.parse(orjson.loads(result.body)["path"])


async def sampler_of(client: Client, path: TinkerPath, number: int = 50) -> SamplingSession:
    wanted = CreateSamplingSessionRequest(
        session_id=client.session_id, sampling_session_seq_id=number, model_path=str(path)
    )
    return await client.server.sampling.create_session(ME, wanted)


async def greedy(client: Client, sampler: SamplingSession, seq: int) -> FutureResult:
    """Says the same whoever asks, as long as the weights are the same."""
    request = sample_request(sampler.sampling_session_id, seq, 4)
    params = request.sampling_params.model_copy(update={"temperature": 0.0})
    request = request.model_copy(update={"sampling_params": params})
    request_id, _ = await client.server.sampling.sample(ME, request, dumped(request))
    return await client.result(request_id)


def remote(settings: TrainingConfig, tmp_path: Path) -> TrainingConfig:
    """Checkpoints in an object store, and next to no room for them on this machine."""
    place = {"checkpoint_dir": f"memory://{tmp_path.name}/c", "checkpoint_cache_bytes": 1}
    return settings.model_copy(update={"storage": settings.storage.model_copy(update=place)})


@asynccontextmanager
async def slow_samples(server: Server) -> AsyncIterator[asyncio.Event]:
    """Samples wait for the event, which is set at the end."""
    may_end = asyncio.Event()
    backend = fake_backend(server)
    sample = backend.sample

    async def slow(request: SampleRequest) -> SampleResult:
        await may_end.wait()
        return await sample(request)

    backend.sample = slow  # type: ignore[method-assign]
    try:
        yield may_end
    finally:
        may_end.set()
        backend.sample = sample  # type: ignore[method-assign]


async def overwrite(client: Client, path: TinkerPath) -> None:
    await client.train()
    await client.step()
    await saved(client, path.name, overwrite=True)


async def delete(client: Client, path: TinkerPath) -> None:
    await client.server.checkpoints.delete(ME, path)


async def expire(client: Client, path: TinkerPath) -> None:
    await client.server.database.write(checkpoints.set_expiry, path, utcnow())
    await client.server.checkpoints.close()
    await client.server.checkpoints.start()
    while True:
        if not await client.server.checkpoints.of_run(ME, client.model_id):
            return
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("ending", [overwrite, delete, expire])
async def test_a_sampler_outlives_its_checkpoint(
    tmp_path: Path, ending: Callable[[Client, TinkerPath], Awaitable[None]]
) -> None:
    settings = config(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await client.train()
        await client.step()
        path = await saved(client)
        sampler = await sampler_of(client, path)
        before = await greedy(client, sampler, 0)
        await ending(client, path)
        kept = 1 if ending is overwrite else 0
        listed, _ = await server.checkpoints.page(ME, 10, 0)
        assert sampler.snapshot_id not in [each.directory for each in listed]
        used_bytes = sum(each.size_bytes for each in listed)
        assert await server.database.read(checkpoints.owned_bytes, ME) == used_bytes
        assert len(listed) == kept
    for seq in (1, 2):  # a second start knows it as well as the first
        async with running(settings) as server:
            client.server = server
            again = await greedy(client, sampler, seq)
            assert again.status is FutureStatus.DONE, again.error
            assert again.body == before.body
    async with running(settings) as server:
        assert sampler.snapshot_id in server.files.names()
        await server.sessions.finish(ME, client.session_id, "success", None)
        assert sampler.snapshot_id not in server.files.names()
        assert len(server.files.names()) == kept
        server.weights.check_integrity()


async def test_a_sample_outlives_its_session_and_then_its_weights_go(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        sampler = await client.save_for_sampler(0)
        async with slow_samples(server) as may_end:
            request = sample_request(sampler, 0, 4)
            request_id, _ = await server.sampling.sample(ME, request, dumped(request))
            snapshots = server.hosts.get(MODEL).snapshots
            await until(lambda: bool(snapshots._published))
            await server.sessions.finish(ME, client.session_id, "success", None)
            fake_backend(server).crash()
            assert len(server.files.names()) == 1
            may_end.set()
            assert (await client.result(request_id)).status is FutureStatus.DONE
        await until(lambda: server.files.names() == set())
        assert not snapshots._published
        assert not fake_backend(server)._snapshots


async def test_weights_are_published_from_the_first_sampler_to_the_last(tmp_path: Path) -> None:
    async with running(remote(config(tmp_path), tmp_path)) as server:
        assert isinstance(server.files, RemoteFiles)
        owner = await Client.connect(server)
        await owner.create()
        path = await saved(owner)
        users = [await Client.connect(server) for _ in range(2)]
        samplers = [await sampler_of(user, path) for user in users]
        for user, sampler in zip(users, samplers, strict=True):
            done = await user.sample(sampler.sampling_session_id)
            assert done.status is FutureStatus.DONE
        directory = samplers[0].snapshot_id
        for user, held in zip(users, ([directory], []), strict=True):
            await server.sessions.finish(ME, user.session_id, "success", None)
            assert list(server.hosts.get(MODEL).snapshots._published) == held
            assert list(fake_backend(server)._snapshots) == held
            assert list(server.files._held) == held
        assert server.files.names() == {directory}, "it still has a name"


async def test_a_checkpoint_deleted_while_a_sampler_is_made_of_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        path = await saved(client)
        verify, looking, may_go_on = server.files.verify, threading.Event(), threading.Event()

        def slowly(name: str) -> Path:
            looking.set()
            may_go_on.wait(60)
            return verify(name)

        monkeypatch.setattr(server.files, "verify", slowly)
        making = asyncio.create_task(sampler_of(client, path))
        await until(looking.is_set)
        await server.checkpoints.delete(ME, path)
        assert len(server.files.names()) == 1, "somebody reads it"
        may_go_on.set()
        with pytest.raises(NotFound, match="no such checkpoint"):
            await making
        assert server.files.names() == set()


async def test_weights_in_use_are_read_in_full_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        path = await saved(client)
        verify, read = server.files.verify, list[str]()

        def counted(name: str) -> Path:
            read.append(name)
            return verify(name)

        monkeypatch.setattr(server.files, "verify", counted)
        made = await asyncio.gather(*(sampler_of(client, path, number) for number in range(20)))
        again = await sampler_of(client, path, 3)
        assert again == made[3]
        assert read == [made[0].snapshot_id]
        await server.sessions.finish(ME, client.session_id, "success", None)
        await sampler_of(await Client.connect(server), path)
        assert len(read) == 2


@pytest.mark.parametrize("is_remote", [False, True])
async def test_what_cannot_be_deleted_fails_nothing_and_goes_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_remote: bool
) -> None:
    settings = config(tmp_path)
    if is_remote:
        settings = remote(settings, tmp_path)
    deleted = []

    def refuse(self: CheckpointFiles, name: str) -> None:
        deleted.append(name)
        raise StorageError("cannot delete checkpoint: 503 SlowDown")

    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        path = await saved(client)
        await client.save_for_sampler(0, "inflight")
        with monkeypatch.context() as patch:
            patch.setattr(type(server.files), "delete", refuse)
            assert (await client.save("a", overwrite=True)).status is FutureStatus.DONE
            await client.save_for_sampler(1, "inflight")
            await server.checkpoints.delete(ME, path)
            await server.sessions.finish(ME, client.session_id, "success", None)
        assert len(deleted) == 4
        assert server.files.names() == set(deleted)
    with monkeypatch.context() as patch:
        patch.setattr(type(server.files), "delete", refuse)
        async with running(settings) as server:  # nor does it keep a server from starting
            assert server.files.names() == set(deleted)
    async with running(settings) as server:
        assert server.files.names() == set()


async def test_an_engine_that_ends_while_weights_are_taken_from_it_fails_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        for number, kind in enumerate(("inflight", "inflight", "snapshot", "snapshot")):
            await client.save_for_sampler(number, kind)

        async def die(snapshot_id: str) -> None:
            raise BackendDead("the engine process has ended", DeathCause.KILLED)

        monkeypatch.setattr(fake_backend(server), "retire", die)
        await client.save_for_sampler(4, "inflight")
        await server.sessions.finish(ME, client.session_id, "success", None)
        assert server.files.names() == set()
        assert not server.hosts.get(MODEL).snapshots._published


async def test_a_save_that_cannot_be_published_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        backend = fake_backend(server)
        publish, num_tries = backend.publish, 0

        async def die_once(snapshot_id: str, directory: Path) -> None:
            nonlocal num_tries
            num_tries += 1
            if num_tries == 1:
                backend.crash(DeathCause.KILLED)
                raise BackendDead("the engine process has ended", DeathCause.KILLED)
            await publish(snapshot_id, directory)

        monkeypatch.setattr(backend, "publish", die_once)
        sampler = await client.save_for_sampler(0)
        assert num_tries == 2
        assert (await client.sample(sampler)).status is FutureStatus.DONE
        assert len(server.files.names()) == 1


async def test_saves_that_end_in_another_order_leave_the_newest_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        await client.save_for_sampler(0, "inflight")
        commit, may_go_on, committed = server.files.commit, threading.Event(), list[str]()

        def first_last(staged: Path, name: str) -> int:
            committed.append(name)
            if len(committed) == 1:
                may_go_on.wait(60)
            return commit(staged, name)

        monkeypatch.setattr(server.files, "commit", first_last)
        client.seq += 1
        request = SaveWeightsForSamplerRequest(
            model_id=client.model_id, sampling_session_seq_id=1, kind="inflight", seq_id=client.seq
        )
        late = await server.checkpoints.save_for_sampler(ME, request, dumped(request))
        await until(lambda: len(committed) == 1)
        await client.train()
        await client.step()
        await client.save_for_sampler(2, "inflight")
        newer = committed[-1]
        may_go_on.set()
        assert (await client.result(late)).status is FutureStatus.DONE
        samplers = await server.sampling.of_session(client.session_id)
        assert [each.snapshot_id for each in samplers] == [newer] * 3
        await until(lambda: server.files.names() == {newer})
        answers = [await greedy(client, each, 0) for each in samplers]
        assert len({answer.body for answer in answers}) == 1
        server.weights.check_integrity()


async def test_a_client_is_not_told_where_the_files_were(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        path = await saved(client)
        sampler = await sampler_of(client, path)
        assert sampler.snapshot_id is not None
        server.files.delete(sampler.snapshot_id)  # by whoever has access to the disk
        failed = await client.sample(sampler.sampling_session_id)
        assert failed.status is FutureStatus.FAILED
        assert "is not there" in failed.error
        assert str(tmp_path) not in failed.error


async def test_a_sample_waits_for_a_server_that_serves_its_base_model(tmp_path: Path) -> None:
    settings = config(tmp_path)
    other = ModelConfig(name="test/other", backend="fake")
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        sampler = await client.save_for_sampler(0)
        async with slow_samples(server):
            request = sample_request(sampler, 0, 4)
            request_id, _ = await server.sampling.sample(ME, request, dumped(request))
            await server.close()
    async with running(settings.model_copy(update={"supported_models": (other,)})) as server:
        assert await server.promises.wait(request_id, ME, 0) is None
    async with running(settings) as server:
        client.server = server
        assert (await client.result(request_id)).status is FutureStatus.DONE
