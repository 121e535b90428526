"""forward, forward_backward, optim_step."""

from __future__ import annotations

from training.core.converters import to_adam_params
from training.core.errors import RequestError
from training.core.operations import OptimWork, RefusedWork, TrainWork, Work
from training.core.records import FutureKind
from training.core.threads import in_thread
from training.core.training_data import to_train_op_data
from training.services.models import LoadedModel, ModelService
from training.services.operations import OperationDesk
from training.services.results import PROTOBUF
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
        if len(body) <= _INLINE_BYTES:
            work = _train_work(envelope, loaded)
        else:
            work = await in_thread(_train_work, envelope, loaded)
        return await self._desk.accept(incoming, loaded.host, work), envelope.model_id

    async def optim_step(self, owner: str, request: OptimStepRequest, payload: bytes) -> str:
        loaded = await self._models.get_loaded(owner, request.model_id)
        incoming = self._desk.incoming(
            FutureKind.OPTIM_STEP, loaded.model, request.seq_id, payload, "application/json"
        )
        work: Work
        try:
            params = to_adam_params(request.params, loaded.model.optimizer)
            work = OptimWork(loaded.held_slot, params)
        except RequestError as error:
            work = RefusedWork(error)
        return await self._desk.accept(incoming, loaded.host, work)


def _train_work(envelope: TrainEnvelope, loaded: LoadedModel) -> Work:
    try:
        data = to_train_op_data(decode_data(envelope), loaded.host.capabilities())
    except RequestError as error:
        return RefusedWork(error)
    num_tokens = sum(datum.num_tokens for datum in data.data)
    return TrainWork(loaded.held_slot, data.loss, data.loss_config, data.data, num_tokens)
