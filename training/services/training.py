"""forward, forward_backward, optim_step."""

from __future__ import annotations

from training.core.converters import to_adam_params
from training.core.errors import RequestError
from training.core.operations import OptimWork, RefusedWork, TrainWork, Work
from training.core.records import FutureKind
from training.core.threads import in_thread
from training.core.training_data import to_train_op_data
from training.services.loaded import LoadedModel
from training.services.models import ModelService
from training.services.operations import OperationDesk
from training.services.results import PROTOBUF
from training.wire.json_base import parse_json
from training.wire.protobuf import TrainEnvelope, decode_data, open_forward_backward
from training.wire.requests import OptimStepRequest

_INLINE_BYTES = 64 * 2**10
"""A thread hop costs more than decoding a body this small."""


class TrainingService:
    def __init__(self, models: ModelService, desk: OperationDesk) -> None:
        self._models = models
        self._desk = desk

    async def forward_backward(self, owner: str, body: bytes) -> tuple[str, str]:
        """Takes the protobuf request; returns request id and model id.

        Bad content is accepted and fails in its place in the order: the SDK does not send a
        sequence number again that was rejected, and the model would wait for it.
        """
        envelope = open_forward_backward(body)
        loaded = await self._models.get_loaded(owner, envelope.model_id)
        kind = FutureKind.FORWARD if envelope.forward_only else FutureKind.FORWARD_BACKWARD
        incoming = self._desk.incoming(kind, loaded.model, envelope.seq_id, body, PROTOBUF)
        work = await _decoded(envelope, loaded, len(body))
        return await self._desk.accept(incoming, loaded.host, work), envelope.model_id

    async def optim_step(self, owner: str, request: OptimStepRequest, payload: bytes) -> str:
        loaded = await self._models.get_loaded(owner, request.model_id)
        incoming = self._desk.incoming(
            FutureKind.OPTIM_STEP, loaded.model, request.seq_id, payload, "application/json"
        )
        return await self._desk.accept(incoming, loaded.host, _optim_work(request, loaded))


async def decode_forward_backward(loaded: LoadedModel, seq: int, body: bytes) -> Work:
    return await _decoded(open_forward_backward(body), loaded, len(body))


async def decode_optim_step(loaded: LoadedModel, seq: int, body: bytes) -> Work:
    return _optim_work(parse_json(OptimStepRequest, body), loaded)


def _optim_work(request: OptimStepRequest, loaded: LoadedModel) -> Work:
    try:
        return OptimWork(loaded.held_slot, to_adam_params(request.params, loaded.model.optimizer))
    except RequestError as error:
        return _refused(error)


def _refused(error: RequestError) -> RefusedWork:
    """Without its traceback and what it came of: their frames would keep all that was decoded for
    as long as the refusal waits for its turn."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return RefusedWork(error)


async def _decoded(envelope: TrainEnvelope, loaded: LoadedModel, num_bytes: int) -> Work:
    if num_bytes <= _INLINE_BYTES:
        return _train_work(envelope, loaded)
    return await in_thread(_train_work, envelope, loaded)


def _train_work(envelope: TrainEnvelope, loaded: LoadedModel) -> Work:
    try:
        data = to_train_op_data(decode_data(envelope), loaded.host.capabilities())
    except RequestError as error:
        return _refused(error)
    num_tokens = sum(datum.num_tokens for datum in data.data)
    return TrainWork(loaded.held_slot, data.loss, data.loss_config, data.data, num_tokens)
