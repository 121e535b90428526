"""What puts weights into a model's slot: its creation, and loads of checkpoints.

Each is work that can be made again from the stored request, for a replay after a crash.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog

from training.core.errors import (
    BackendDead,
    BackendError,
    InvalidRequest,
    NotFound,
    TinkercloudError,
)
from training.core.ids import CheckpointKind, TinkerPath
from training.core.operations import CallWork, Finish, Outcome, Work
from training.core.records import Checkpoint, Model, ModelStatus, utcnow
from training.core.threads import in_thread
from training.core.unit_runner import failed
from training.services.loaded import LoadedModel, LoadedModels
from training.services.model_snapshots import Adopted, ModelSnapshots
from training.services.quotas import Quotas
from training.services.results import done_json
from training.services.sessions import SessionService
from training.storage.database import Connection, Database
from training.storage.files import CheckpointFiles
from training.storage.repositories import checkpoints, models
from training.wire.json_base import parse_json
from training.wire.requests import LoadWeightsRequest
from training.wire.responses import CreatedModel, LoadedWeights

log = structlog.get_logger(__name__)


class ModelLoader:
    def __init__(
        self,
        database: Database,
        files: CheckpointFiles,
        sessions: SessionService,
        loaded: LoadedModels,
        snapshots: ModelSnapshots,
        quotas: Quotas,
    ) -> None:
        self._database = database
        self._files = files
        self._sessions = sessions
        self._loaded = loaded
        self._snapshots = snapshots
        self._quotas = quotas

    def creation(self, loaded: LoadedModel, request: LoadWeightsRequest | None) -> CallWork:
        """Puts the model into a slot: fresh, or from the checkpoint that ``request`` names."""
        model = loaded.model

        async def run() -> Finish:
            try:
                # It may have ended before this model was there to be unloaded with it.
                await self._sessions.get_active(model.owner, model.session_id)
                adopted = None if request is None else await self._adopt(model.owner, request)
                await self._fill_slot(loaded, 0, adopted)
            except BackendDead:
                raise
            except TinkercloudError as error:
                if loaded.model.status is not ModelStatus.CREATING:
                    raise  # it was created before: the task manager decides
                return await self._not_created(loaded, error)
            path = "" if request is None else request.path
            return _finished(self._created(loaded, path, adopted))

        return CallWork(run)

    def _created(self, loaded: LoadedModel, path: str, adopted: Adopted | None) -> Outcome:
        model = loaded.model
        unused: list[str] = []

        def also(connection: Connection) -> None:
            models.move(connection, model.model_id, ModelStatus.READY)
            if adopted is not None:
                unused[:] = self._snapshots.store(connection, loaded, 0, adopted)

        async def then() -> None:
            loaded.model = replace(model, status=ModelStatus.READY)
            log.info("model.ready", model_id=model.model_id, rank=model.lora.rank)
            await self._snapshots.delete(unused)

        result = done_json(
            LoadedWeights(path=path, model_id=model.model_id)
            if path
            else CreatedModel(model_id=model.model_id)
        )
        return Outcome(result, also, self._undo(adopted), then)

    async def _not_created(self, loaded: LoadedModel, error: TinkercloudError) -> Finish:
        self.close(loaded, BackendError(f"model was not created: {error}"))
        slot, loaded.slot = loaded.slot, None
        await loaded.host.release(slot)

        def also(connection: Connection) -> None:
            models.move(connection, loaded.model.model_id, ModelStatus.FAILED, str(error))

        return _finished(Outcome(failed(error), also))

    def loading(self, loaded: LoadedModel, seq: int, request: LoadWeightsRequest) -> CallWork:
        async def run() -> Finish:
            model = loaded.model
            checkpoint = await self.checkpoint(model.owner, request.path)
            if (checkpoint.base_model, _shape(checkpoint)) != (model.base_model, _shape(model)):
                raise InvalidRequest(
                    f"{request.path} does not fit this model: it has {_shape(checkpoint)} on "
                    f"{checkpoint.base_model}, the model {_shape(model)} on {model.base_model}"
                )
            adopted = await self._adopt(model.owner, request)
            await self._fill_slot(loaded, seq, adopted)
            return _finished(self._replaced(loaded, seq, request.path, adopted))

        return CallWork(run)

    def _replaced(self, loaded: LoadedModel, seq: int, path: str, adopted: Adopted) -> Outcome:
        unused: list[str] = []

        def also(connection: Connection) -> None:
            unused[:] = self._snapshots.store(connection, loaded, seq, adopted)

        async def then() -> None:
            await self._snapshots.delete(unused)

        result = done_json(LoadedWeights(path=path, model_id=loaded.model.model_id))
        return Outcome(result, also, self._undo(adopted), then)

    async def _adopt(self, owner: str, request: LoadWeightsRequest) -> Adopted:
        checkpoint = await self.checkpoint(owner, request.path)
        directory = await in_thread(self._files.verify, checkpoint.directory)
        return await self._snapshots.adopt(directory, request.optimizer)

    async def _fill_slot(self, loaded: LoadedModel, seq: int, adopted: Adopted | None) -> None:
        host, model = loaded.host, loaded.model
        directory = None if adopted is None else self._snapshots.path(adopted)
        with_optimizer = adopted is not None and adopted.with_optimizer
        try:
            if loaded.slot is None:
                held = self._loaded.num_by_owner()
                self._quotas.check_models(model.owner, held, host.capabilities().max_slots)
                loaded.slot = host.slots.allocate(model.model_id)
            await host.backend.load_slot(loaded.slot, model.lora, directory, with_optimizer)
        except BaseException:
            if adopted is not None:
                await self._snapshots.delete([adopted.directory])
            raise
        host.tasks.loaded(model.model_id, seq, host.backend.health().generation)

    def _undo(self, adopted: Adopted | None) -> Callable[[], Awaitable[None]]:
        async def undo() -> None:
            if adopted is not None:
                await self._snapshots.delete([adopted.directory])

        return undo

    async def decode_creation(self, loaded: LoadedModel, seq: int, body: bytes) -> Work:
        """What it asked for is part of the model, so the request is not needed."""
        return self.creation(loaded, None)

    async def decode_load(self, loaded: LoadedModel, seq: int, body: bytes) -> Work:
        request = parse_json(LoadWeightsRequest, body)
        return self.creation(loaded, request) if seq == 0 else self.loading(loaded, seq, request)

    async def checkpoint(self, owner: str, path: str) -> Checkpoint:
        """One that ``save_state`` wrote and the caller may read; raises a ``RequestError``."""
        parsed = TinkerPath.parse(path)
        if parsed.kind is not CheckpointKind.TRAINING:
            raise InvalidRequest(
                f"{path} is a {parsed.kind} checkpoint; only the weights of save_state can be "
                "loaded for training"
            )
        return await readable_checkpoint(self._database, owner, parsed)

    def close(self, loaded: LoadedModel, error: TinkercloudError) -> None:
        """From here on every operation, queued or to come, fails with ``error``."""
        self._loaded.remove(loaded.model.model_id)
        loaded.host.tasks.close_model(loaded.model.model_id, error)


def _finished(outcome: Outcome) -> Finish:
    async def finish() -> Outcome:
        return outcome

    return finish


async def readable_checkpoint(database: Database, owner: str, path: TinkerPath) -> Checkpoint:
    """One's own or a published checkpoint that has not expired; raises ``NotFound``."""
    checkpoint = await database.read(checkpoints.get, path)
    now = utcnow()
    if (
        checkpoint is None
        or (checkpoint.expires_at or now) < now
        or (checkpoint.owner != owner and not checkpoint.public)
    ):
        raise NotFound(f"no such checkpoint: {path}")
    return checkpoint


def _shape(of: Model | Checkpoint) -> str:
    groups = {
        "attn": of.lora.train_attn,
        "mlp": of.lora.train_mlp,
        "unembed": of.lora.train_unembed,
    }
    trained = "+".join(name for name, is_trained in groups.items() if is_trained)
    return f"rank {of.lora.rank} on {trained}"
