"""The whole server below HTTP, on the fake backend: restarts, ends of sessions, slots, garbage."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
import sqlalchemy as sa
from pydantic import BaseModel

from training.backends.base import SampleRequest, SampleResult
from training.config import (
    EngineConfig,
    ModelConfig,
    SessionConfig,
    StorageConfig,
    TrainingConfig,
)
from training.core.errors import Gone, InvalidRequest, NotFound, StorageError
from training.core.ids import TinkerPath
from training.core.records import FutureResult, FutureStatus, ModelStatus, SessionStatus
from training.services.server import Server
from training.storage import tables
from training.storage.repositories import models, sessions
from training.wire import tinkercloud_pb2 as pb
from training.wire.json_base import ModelInputJson
from training.wire.requests import (
    CreateModelRequest,
    CreateSamplingSessionRequest,
    CreateSessionRequest,
    LoadWeightsRequest,
    LoraConfigJson,
    OptimStepRequest,
    SampleJsonRequest,
    SamplingParamsJson,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
)

pytestmark = pytest.mark.usefixtures("each_database")

ME = "me"
MODEL = "test/fake"


def config(tmp_path: Path, max_slots: int = 4, expiry_s: float = 1800.0) -> TrainingConfig:
    return TrainingConfig(
        storage=StorageConfig(
            metadata_dir=tmp_path / "m",
            checkpoint_dir=tmp_path / "c",
            database_url=os.environ.get("DATABASE_URL"),
        ),
        supported_models=(ModelConfig(name=MODEL, backend="fake"),),
        engine=EngineConfig(max_slots=max_slots),
        session=SessionConfig(expiry_s=expiry_s),
    )


@asynccontextmanager
async def running(settings: TrainingConfig) -> AsyncIterator[Server]:
    server = Server(settings)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


class Client:
    """One session's calls, numbered as the SDK numbers them."""

    def __init__(self, server: Server, session_id: str) -> None:
        self.server = server
        self.session_id = session_id
        self.seq = 0

    @classmethod
    async def connect(cls, server: Server) -> Client:
        session = await server.sessions.create(ME, CreateSessionRequest())
        return cls(server, session.session_id)

    async def result(self, request_id: str) -> FutureResult:
        result = await self.server.promises.wait(request_id, ME, 60)
        assert result is not None
        return result

    async def create(self, number: int = 0, rank: int = 4) -> FutureResult:
        request = CreateModelRequest(
            session_id=self.session_id,
            model_seq_id=number,
            base_model=MODEL,
            lora_config=LoraConfigJson(rank=rank, seed=1, train_attn=False, train_mlp=False),
        )
        return await self.result(await self.server.models.create(ME, request, dumped(request)))

    @property
    def model_id(self) -> str:
        return f"{self.session_id}:train:0"

    async def train(self, loss: str = "cross_entropy") -> FutureResult:
        self.seq += 1
        body = train_body(self.model_id, self.seq, loss)
        request_id, _ = await self.server.training.forward_backward(ME, body)
        return await self.result(request_id)

    async def step(self) -> FutureResult:
        self.seq += 1
        raw = {"model_id": self.model_id, "seq_id": self.seq, "adam_params": {}}
        request = OptimStepRequest.model_validate(raw)
        return await self.result(
            await self.server.training.optim_step(ME, request, orjson.dumps(raw))
        )

    async def save(self, name: str, overwrite: bool = False) -> FutureResult:
        self.seq += 1
        request = SaveWeightsRequest(
            model_id=self.model_id, path=name, seq_id=self.seq, overwrite=overwrite
        )
        return await self.result(
            await self.server.checkpoints.save_weights(ME, request, dumped(request))
        )

    async def load(self, path: str, optimizer: bool = True) -> FutureResult:
        self.seq += 1
        request = LoadWeightsRequest(
            model_id=self.model_id, path=path, seq_id=self.seq, optimizer=optimizer
        )
        return await self.result(await self.server.models.load_into(ME, request, dumped(request)))

    async def save_for_sampler(self, number: int, kind: str = "snapshot") -> str:
        self.seq += 1
        request = SaveWeightsForSamplerRequest.model_validate(
            {
                "model_id": self.model_id,
                "sampling_session_seq_id": number,
                "kind": kind,
                "seq_id": self.seq,
            }
        )
        result = await self.result(
            await self.server.checkpoints.save_for_sampler(ME, request, dumped(request))
        )
        return str(orjson.loads(result.body)["sampling_session_id"])

    async def sample(self, sampler: str, seq: int = 0, max_tokens: int = 4) -> FutureResult:
        request = sample_request(sampler, seq, max_tokens)
        payload = dumped(request)
        request_id, _ = await self.server.sampling.sample(ME, request, payload)
        return await self.result(request_id)


def dumped(request: BaseModel) -> bytes:
    return orjson.dumps(request.model_dump(mode="json", exclude_none=True))


def train_body(model_id: str, seq: int, loss: str = "cross_entropy") -> bytes:
    request = pb.ForwardBackwardRequest(model_id=model_id, seq_id=seq, loss_fn=loss)
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = b"\1\0\0\0\2\0\0\0"
    targets = datum.loss_fn_inputs["target_tokens"]
    targets.dense, targets.dtype = b"\2" + b"\0" * 7 + b"\3" + b"\0" * 7, pb.DTYPE_INT64
    weights = datum.loss_fn_inputs["weights"]
    weights.dense, weights.dtype = b"\0\0\x80\x3f" * 2, pb.DTYPE_FLOAT32
    return request.SerializeToString()


def sample_request(sampler: str, seq: int, max_tokens: int) -> SampleJsonRequest:
    prompt = ModelInputJson.model_validate({"chunks": [{"tokens": [1, 2, 3]}]})
    return SampleJsonRequest(
        prompt=prompt,
        sampling_params=SamplingParamsJson(max_tokens=max_tokens),
        sampling_session_id=sampler,
        seq_id=seq,
    )


async def test_sampling_requests_run_again_and_draw_the_same_tokens(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        sampler = await server.sampling.create_session(
            ME,
            CreateSamplingSessionRequest(
                session_id=client.session_id, sampling_session_seq_id=0, base_model=MODEL
            ),
        )
        request = sample_request(sampler.sampling_session_id, 0, 50)
        payload = orjson.dumps(request.model_dump(exclude_none=True))
        request_id, _ = await server.sampling.sample(ME, request, payload)
        undisturbed = await client.result(request_id)
        # As if the server had been killed before the result was stored.
        await server.database.write(forget_result, request_id, payload)
    async with running(settings) as server:
        again = await server.promises.wait(request_id, ME, 60)
    assert again == undisturbed
    assert len(pb.SampleResponse.FromString(undisturbed.body).sequences) == 1


def forget_result(connection: sa.Connection, request_id: str, payload: bytes) -> None:
    body = {"request_id": request_id, "content_type": "application/json", "body": payload}
    connection.execute(sa.insert(tables.payloads).values(**body))
    connection.execute(sa.delete(tables.results).where(tables.results.c.request_id == request_id))
    connection.execute(
        sa.update(tables.futures)
        .where(tables.futures.c.request_id == request_id)
        .values(status=FutureStatus.PENDING, completion=None, finished_at=None)
    )


async def test_a_finished_session_frees_its_slots_and_its_ephemeral_weights(
    tmp_path: Path,
) -> None:
    async with running(config(tmp_path, max_slots=1)) as server:
        client = await Client.connect(server)
        assert (await client.create()).status is FutureStatus.DONE
        sampler = await client.save_for_sampler(0)
        assert (await client.sample(sampler)).status is FutureStatus.DONE
        assert len(server.files.names()) == 1

        other = await Client.connect(server)
        full = await other.create()
        assert full.status is FutureStatus.FAILED
        assert "full" in full.error

        await server.sessions.finish(ME, client.session_id, "success", None)
        assert server.files.names() == set()
        assert server.hosts.get(MODEL).slots.available == 1
        with pytest.raises(Gone, match="session ended"):
            await server.training.forward_backward(ME, train_body(client.model_id, 5))
        assert (await other.create(number=1)).status is FutureStatus.DONE


async def test_far_more_models_than_memory_holds_can_be_loaded(tmp_path: Path) -> None:
    default = EngineConfig().max_slots
    async with running(config(tmp_path, max_slots=default)) as server:
        client = await Client.connect(server)
        for number in range(100):
            assert (await client.create(number)).status is FutureStatus.DONE
        assert server.hosts.get(MODEL).slots.available == default - 100


async def test_a_silent_session_expires(tmp_path: Path) -> None:
    async with running(config(tmp_path, expiry_s=0.2)) as server:
        client = await Client.connect(server)
        await client.create()
        while True:
            session = await server.database.read(sessions.get, client.session_id)
            assert session is not None
            if session.status is SessionStatus.EXPIRED:
                break
            await asyncio.sleep(0.02)
        with pytest.raises(Gone):
            await server.sessions.heartbeat(ME, client.session_id)
        while (await server.database.read(models.get, client.model_id)) is not None:
            model = await server.database.read(models.get, client.model_id)
            assert model is not None
            if model.status is ModelStatus.UNLOADED:
                break
            await asyncio.sleep(0.02)


async def test_inflight_sessions_follow_the_newest_weights(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        first = await client.save_for_sampler(0, "inflight")
        fixed = await client.save_for_sampler(1, "snapshot")
        await client.train()
        await client.step()
        second = await client.save_for_sampler(2, "inflight")
        snapshots = {
            name: (await server.sampling.get_session(ME, name)).snapshot_id
            for name in (first, fixed, second)
        }
        assert snapshots[first] == snapshots[second] != snapshots[fixed]
        assert len(server.files.names()) == 2
        for name in (first, fixed, second):
            assert (await client.sample(name)).status is FutureStatus.DONE


async def test_a_name_is_taken_once_unless_overwritten(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        assert (await client.save("a")).status is FutureStatus.DONE
        again = await client.save("a")
        assert (again.status, again.category.value) == (FutureStatus.FAILED, "user")
        assert (await client.save("a", overwrite=True)).status is FutureStatus.DONE
        assert len(server.files.names()) == 1
        refused = await client.save("../../etc/passwd")
        assert "not allowed" in refused.error


async def test_what_belongs_to_others_is_not_there(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        path = orjson.loads((await client.save("a")).body)["path"]
        sampler = await client.save_for_sampler(0)
        you = "you"
        with pytest.raises(NotFound):
            await server.models.get(you, client.model_id)
        with pytest.raises(NotFound):
            await server.training.forward_backward(you, train_body(client.model_id, 9))
        with pytest.raises(NotFound):
            await server.checkpoints.readable(you, TinkerPath.parse(path))
        with pytest.raises(NotFound):
            await server.sampling.get_session(you, sampler)
        with pytest.raises(NotFound):
            await server.sessions.get(you, client.session_id)


async def test_an_unknown_base_model_fails_as_a_promise_and_names_those_served(
    tmp_path: Path,
) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        request = CreateModelRequest(
            session_id=client.session_id,
            model_seq_id=0,
            base_model="no/model",
            lora_config=LoraConfigJson(),
        )
        result = await client.result(await server.models.create(ME, request, b"{}"))
        assert (result.status, result.category.value) == (FutureStatus.FAILED, "user")
        assert MODEL in result.error
        with pytest.raises(InvalidRequest):
            server.hosts.get("no/model")


async def test_directories_that_nothing_refers_to_are_removed_at_start(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await client.save("keep")
        sampler = await client.save_for_sampler(0)
        staged = server.files.stage()
        (staged / "x").write_bytes(b"x")
        orphan = "0123456789abcdef" * 2
        server.files.commit(staged, orphan)
        other = tmp_path / "c" / "my own notes"
        other.mkdir()
        assert len(server.files.names()) == 4
    async with running(settings) as server:
        assert orphan not in server.files.names()
        assert len(server.files.names()) == 3
        assert other.is_dir(), "what was not made by the server is not its to remove"
        revived = Client(server, client.session_id)
        assert (await revived.sample(sampler, seq=5)).status is FutureStatus.DONE


async def test_a_wrong_database_does_not_start_and_removes_nothing(tmp_path: Path) -> None:
    """As when somebody forgets the URL of the right one."""
    settings = config(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        await client.save("keep")
        (kept,) = server.files.names()
    fresh = f"sqlite:///{tmp_path / 'fresh.db'}"
    storage = settings.storage.model_copy(update={"database_url": fresh})
    elsewhere = storage.model_copy(update={"checkpoint_dir": str(tmp_path / "elsewhere")})
    places = {tmp_path / "c": storage, settings.storage.resolved_snapshot_dir(): elsewhere}
    for directory, wrong in places.items():
        with pytest.raises(StorageError, match=f"{directory} holds .* another database"):
            async with running(settings.model_copy(update={"storage": wrong})):
                pass
    async with running(settings) as server:
        assert server.files.names() == {kept}
        revived = Client(server, client.session_id)
        revived.seq = client.seq
        assert (await revived.train()).status is FutureStatus.DONE


async def test_the_bytes_of_a_session_go_with_it(tmp_path: Path) -> None:
    settings = config(tmp_path)
    async with running(settings) as server:
        client = await Client.connect(server)
        await client.create()
        body = train_body(client.model_id, 1)
        request_id, _ = await server.training.forward_backward(ME, body)
        await client.result(request_id)
        await server.sessions.finish(ME, client.session_id, "success", None)
    async with running(settings) as server:
        gone = await server.promises.wait(request_id, ME, 0)
        assert gone is not None
        assert (gone.status, gone.category.value) == (FutureStatus.FAILED, "user")
        assert "its session has ended" in gone.error
        for table in (tables.payloads, tables.results):
            assert await server.database.read(num_rows, table) == 0


async def test_the_bytes_of_samples_that_outlast_their_session_go_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        raw = CreateSamplingSessionRequest(
            session_id=client.session_id, sampling_session_seq_id=0, base_model=MODEL
        )
        sampler = await server.sampling.create_session(ME, raw)
        may_end = asyncio.Event()
        sample = server.hosts.get(MODEL).backend.sample

        async def slow(request: SampleRequest) -> SampleResult:
            await may_end.wait()
            return await sample(request)

        monkeypatch.setattr(server.hosts.get(MODEL).backend, "sample", slow)
        request = sample_request(sampler.sampling_session_id, 0, 4)
        request_id, _ = await server.sampling.sample(ME, request, dumped(request))
        await server.sessions.finish(ME, client.session_id, "success", None)
        await server.janitor.tidy()
        assert await server.database.read(num_rows, tables.payloads) == 1
        may_end.set()
        assert (await client.result(request_id)).status is FutureStatus.DONE
        assert await server.database.read(num_rows, tables.results) == 1
        await server.janitor.tidy()
        for table in (tables.payloads, tables.results):
            assert await server.database.read(num_rows, table) == 0


def num_rows(connection: sa.Connection, table: sa.Table) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


async def test_models_that_find_no_place_leave_no_files(tmp_path: Path) -> None:
    async with running(config(tmp_path, max_slots=1)) as server:
        client = await Client.connect(server)
        await client.create()
        path = orjson.loads((await client.save("a")).body)["path"]
        kept = set(server.config.storage.resolved_snapshot_dir().glob("[!.]*"))
        for number in range(1, 4):
            request = LoadWeightsRequest(
                session_id=client.session_id, model_seq_id=number, path=path
            )
            refused = await client.result(
                await server.models.create_from_checkpoint(ME, request, dumped(request))
            )
            assert "full" in refused.error
        assert set(server.config.storage.resolved_snapshot_dir().glob("[!.]*")) == kept
