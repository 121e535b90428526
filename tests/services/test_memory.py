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
            error = work.error
            assert error.__traceback__ is error.__context__ is error.__cause__ is None
