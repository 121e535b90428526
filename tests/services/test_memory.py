"""What the server keeps of what it was sent: no more than it needs."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.services.test_server import ME, Client, config, running
from training.core.operations import RefusedWork
from training.services.loaded import LoadedModel
from training.services.training import decode_forward_backward, decode_optim_step
from training.wire import tinkercloud_pb2 as pb
from training.wire.records import TextChunk
from training.wire.requests import CreateSessionRequest

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
