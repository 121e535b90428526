"""What the server keeps of what it was sent: no more than it needs."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.services.test_server import (
    ME,
    MODEL,
    Client,
    config,
    dumped,
    forget_result,
    running,
    sample_request,
)
from training.config import ModelConfig
from training.core.operations import RefusedWork
from training.services import sampling
from training.services.loaded import LoadedModel
from training.services.training import decode_forward_backward, decode_optim_step
from training.wire import tinkercloud_pb2 as pb
from training.wire.json_base import ModelInputJson
from training.wire.records import TextChunk
from training.wire.requests import CreateSamplingSessionRequest, CreateSessionRequest

pytestmark = pytest.mark.usefixtures("each_database")


def num_chunks() -> int:
    gc.collect()
    return sum(type(each) is TextChunk for each in gc.get_objects())


def refusals(model_id: str) -> list[bytes]:
    """Found out after everything was decoded, and by an error that came of another one."""
    text = pb.Chunk(encoded_text={}).SerializeToString()
    full = pb.DatumEnvelope(model_input=[text] * 1000).SerializeToString()
    envelopes = [
        pb.ForwardBackwardEnvelope(model_id=model_id, seq_id=1, loss_fn=loss, data=data)
        for loss, data in (("cross_entropy", [full]), ("x", [full]), ("x", [full, b"\xff"]))
    ]
    return [envelope.SerializeToString() for envelope in envelopes]


async def test_a_refusal_that_waits_keeps_nothing_of_its_request(tmp_path: Path) -> None:
    async with running(config(tmp_path)) as server:
        client = await Client.connect(server)
        await client.create()
        loaded: LoadedModel = await server.models.get_loaded(ME, client.model_id)
        before = num_chunks()
        waiting = [
            await decode_forward_backward(loaded, 1, body) for body in refusals(client.model_id)
        ]
        adam = f'{{"model_id": "{client.model_id}", "optimizer_params": {{"type": "x"}}}}'
        waiting.append(await decode_optim_step(loaded, 1, adam.encode()))
        assert num_chunks() == before
        for work in waiting:
            assert isinstance(work, RefusedWork)
            assert work.error.__traceback__ is None
            assert work.error.__context__ is None
            assert work.error.__cause__ is None


@pytest.mark.parametrize("num_prompt", [3, 10_000])
async def test_large_sampling_requests_are_turned_into_arrays_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_prompt: int
) -> None:
    threads: list[bool] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            threads.append(threading.current_thread() is threading.main_thread())
            return function(*args)

        return noting

    for name in ("to_sample_request", "encode_sample_response", "parse_json"):
        monkeypatch.setattr(sampling, name, noted(getattr(sampling, name)))
    prompt = ModelInputJson.model_validate({"chunks": [{"tokens": [1] * num_prompt}]})
    served = ModelConfig(name=MODEL, backend="fake", context_length=20_000)
    settings = config(tmp_path).model_copy(update={"supported_models": (served,)})
    async with running(settings) as server:
        client = await Client.connect(server)
        wanted = CreateSamplingSessionRequest(
            session_id=client.session_id, sampling_session_seq_id=0, base_model=MODEL
        )
        sampler = (await server.sampling.create_session(ME, wanted)).sampling_session_id
        request = sample_request(sampler, 0, 4).model_copy(update={"prompt": prompt})
        payload = dumped(request) + b" " * 10 * num_prompt
        request_id, _ = await server.sampling.sample(ME, request, payload)
        result = await client.result(request_id)
        assert threads
        assert set(threads) == {num_prompt == 3}
        await server.database.write(forget_result, request_id, payload)
    async with running(settings) as server:
        assert await server.promises.wait(request_id, ME, 60) == result
    assert set(threads) == {num_prompt == 3}


async def test_of_a_session_only_its_owner_is_kept(tmp_path: Path) -> None:
    request = CreateSessionRequest(
        tags=["tag" + "x" * 1000], user_metadata={"a": "metadata" + "x" * 1000}, display_name="name"
    )
    async with running(config(tmp_path)) as server:
        session_id = (await server.sessions.create(ME, request)).session_id
        for _ in range(2):  # after the second it was read from the database
            active = await server.sessions.get_active(ME, session_id)
            assert active == (session_id, ME)
            assert server.sessions._active == {session_id: active}
            server.sessions._active.clear()
        session = await server.sessions.get(ME, session_id)
        assert (list(session.tags), session.user_metadata) == (request.tags, request.user_metadata)
