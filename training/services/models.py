"""Training models: created, loaded from checkpoints, found, ended."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import structlog

from training.backends.base import LoraSpec
from training.core import ids, metrics
from training.core.converters import to_lora_spec, to_optimizer_family
from training.core.errors import (
    BackendError,
    Gone,
    InvalidRequest,
    NotFound,
    RequestError,
    StorageError,
    TinkercloudError,
)
from training.core.ids import CheckpointKind, TinkerPath
from training.core.operations import CallWork
from training.core.records import (
    Checkpoint,
    FutureKind,
    FutureResult,
    Model,
    ModelStatus,
    utcnow,
)
from training.core.threads import in_thread
from training.services.hosts import Host, Hosts
from training.services.operations import Incoming, OperationDesk
from training.services.results import done_json
from training.services.sessions import SessionService
from training.storage.database import Connection, Database
from training.storage.files import CheckpointFiles
from training.storage.repositories import checkpoints, models
from training.wire.requests import CreateModelRequest, LoadWeightsRequest
from training.wire.responses import CreatedModel, LoadedWeights

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class LoadedModel:
    """A model that may be trained now; ``slot`` is None until its creation has run.

    ``generation`` is the engine's that holds the slot.
    """

    model: Model
    host: Host
    slot: int | None = None
    generation: int = 0

    def is_lost(self) -> bool:
        """Whether the engine that held its slot is gone."""
        health = self.host.backend.health()
        is_current = health.alive and health.generation == self.generation
        return self.slot is not None and not is_current

    def held_slot(self) -> int:
        """Raises ``BackendError`` when the creation failed."""
        if self.slot is None:
            raise BackendError(f"model {self.model.model_id} was not created")
        return self.slot


class ModelService:
    def __init__(
        self,
        database: Database,
        files: CheckpointFiles,
        hosts: Hosts,
        sessions: SessionService,
        desk: OperationDesk,
    ) -> None:
        self._database = database
        self._files = files
        self._hosts = hosts
        self._sessions = sessions
        self._desk = desk
        self._loaded: dict[str, LoadedModel] = {}

    # ----------------------------------------------------------------- creation

    async def create(self, owner: str, request: CreateModelRequest, payload: bytes) -> str:
        """Accepts a new model; returns the request id of its promise."""
        session = await self._sessions.get_active(owner, request.session_id)
        incoming = _creation(
            FutureKind.CREATE_MODEL, owner, session.session_id, request.model_seq_id, payload
        )
        try:
            host = self._hosts.get(request.base_model)
            capabilities = host.capabilities()
            lora = to_lora_spec(request.lora_config, capabilities, secrets.randbits(63))
            optimizer = to_optimizer_family(request.optimizer_config, capabilities)
        except RequestError as error:
            return await self._desk.refuse(incoming, error)
        model = _new_model(
            incoming,
            request.model_seq_id,
            request.base_model,
            lora,
            optimizer,
            request.user_metadata,
        )
        return await self._accept(incoming, model, host, None, with_optimizer=False)

    async def create_from_checkpoint(
        self, owner: str, request: LoadWeightsRequest, payload: bytes
    ) -> str:
        """The same from a checkpoint, whose rank, layer groups and optimizer the model takes."""
        assert request.session_id is not None
        assert request.model_seq_id is not None
        session = await self._sessions.get_active(owner, request.session_id)
        incoming = _creation(
            FutureKind.LOAD_WEIGHTS, owner, session.session_id, request.model_seq_id, payload
        )
        try:
            checkpoint = await self.training_checkpoint(owner, request.path)
            if request.base_model not in (None, checkpoint.base_model):
                raise InvalidRequest(
                    f"{request.path} was trained on {checkpoint.base_model}, "
                    f"not on {request.base_model}"
                )
            host = self._hosts.get(checkpoint.base_model)
            family = checkpoint.optimizer
            if not request.optimizer:
                family = to_optimizer_family(request.optimizer_config, host.capabilities())
        except RequestError as error:
            return await self._desk.refuse(incoming, error)
        model = _new_model(
            incoming,
            request.model_seq_id,
            checkpoint.base_model,
            checkpoint.lora,
            family,
            request.user_metadata,
        )
        model = replace(model, loaded_from=str(checkpoint.path))
        return await self._accept(incoming, model, host, checkpoint, request.optimizer)

    async def load_into(self, owner: str, request: LoadWeightsRequest, payload: bytes) -> str:
        """Replaces the weights of a model; its gradients and a spoiled window go with the old."""
        assert request.model_id is not None
        loaded = await self.get_loaded(owner, request.model_id)
        incoming = self._desk.incoming(
            FutureKind.LOAD_WEIGHTS, loaded.model, request.seq_id, payload, "application/json"
        )

        async def run() -> FutureResult:
            checkpoint = await self.training_checkpoint(owner, request.path)
            model = loaded.model
            if (checkpoint.base_model, _shape(checkpoint)) != (model.base_model, _shape(model)):
                raise InvalidRequest(
                    f"{request.path} does not fit this model: it has {_shape(checkpoint)} on "
                    f"{checkpoint.base_model}, the model {_shape(model)} on {model.base_model}"
                )
            directory = await in_thread(self._files.verify, checkpoint.directory)
            await loaded.host.backend.load_slot(
                loaded.held_slot(), model.lora, directory, request.optimizer
            )
            loaded.generation = loaded.host.backend.health().generation
            loaded.host.tasks.reset_window(model.model_id)
            return done_json(LoadedWeights(path=request.path, model_id=model.model_id))

        return await self._desk.accept(incoming, loaded.host, CallWork(run))

    async def _accept(
        self,
        incoming: Incoming,
        model: Model,
        host: Host,
        checkpoint: Checkpoint | None,
        with_optimizer: bool,
    ) -> str:
        loaded = LoadedModel(model, host)

        def also(connection: Connection) -> None:
            models.insert(connection, model)

        def opened() -> None:
            self._loaded[model.model_id] = loaded
            host.tasks.open_model(model.model_id)
            metrics.LOADED_MODELS.set(len(self._loaded))

        async def run() -> FutureResult:
            try:
                # It may have ended before this model was there to be unloaded with it.
                await self._sessions.get_active(model.owner, model.session_id)
                await self._fill_slot(loaded, checkpoint, with_optimizer)
                await self._database.write(models.move, model.model_id, ModelStatus.READY)
            except TinkercloudError as error:
                await self._give_up(loaded, error)
                raise
            log.info("model.ready", model_id=model.model_id, rank=model.lora.rank)
            if checkpoint is None:
                return done_json(CreatedModel(model_id=model.model_id))
            return done_json(LoadedWeights(path=str(checkpoint.path), model_id=model.model_id))

        return await self._desk.accept(incoming, host, CallWork(run), also, opened)

    async def _fill_slot(
        self, loaded: LoadedModel, checkpoint: Checkpoint | None, with_optimizer: bool
    ) -> None:
        directory = None
        if checkpoint is not None:
            directory = await in_thread(self._files.verify, checkpoint.directory)
        slot = loaded.host.slots.allocate(loaded.model.model_id)
        try:
            await loaded.host.backend.load_slot(slot, loaded.model.lora, directory, with_optimizer)
        except BaseException:
            loaded.host.slots.free(slot)
            raise
        loaded.slot, loaded.generation = slot, loaded.host.backend.health().generation

    async def _give_up(self, loaded: LoadedModel, error: TinkercloudError) -> None:
        self._close(loaded, BackendError(f"model was not created: {error}"))
        await self._free_slot(loaded)
        await self._record(loaded, ModelStatus.FAILED)

    # ----------------------------------------------------------------- look-up

    async def get(self, owner: str, model_id: str) -> Model:
        """Raises ``NotFound`` for other people's models too."""
        loaded = self._loaded.get(model_id)
        if loaded is not None and loaded.model.owner == owner:
            return loaded.model
        model = await self._database.read(models.get, model_id)
        if model is None or model.owner != owner:
            raise NotFound(f"no such model: {model_id[:250]}")
        return model

    async def get_loaded(self, owner: str, model_id: str) -> LoadedModel:
        """The model, if it can be trained now. Raises ``Gone`` with the way back otherwise."""
        loaded = self._loaded.get(model_id)
        if loaded is None or loaded.model.owner != owner:
            model = await self.get(owner, model_id)
            raise Gone(_WHY_NOT.get(model.status, "model {id} is not loaded").format(id=model_id))
        await self._sessions.get_active(owner, loaded.model.session_id)
        return loaded

    async def of_session(self, session_id: str) -> list[Model]:
        return await self._database.read(models.of_session, session_id)

    async def page(self, owner: str, limit: int, offset: int) -> tuple[list[Model], int]:
        found = await self._database.read(models.page, owner, limit, offset)
        return found, await self._database.read(models.num_owned, owner)

    async def training_checkpoint(self, owner: str, path: str) -> Checkpoint:
        """One that ``save_state`` wrote and the caller may read; raises a ``RequestError``."""
        parsed = TinkerPath.parse(path)
        if parsed.kind is not CheckpointKind.TRAINING:
            raise InvalidRequest(
                f"{path} is a {parsed.kind} checkpoint; only the weights of save_state can be "
                "loaded for training"
            )
        return await readable_checkpoint(self._database, owner, parsed)

    # ----------------------------------------------------------------- the end

    async def unload_session(self, session_id: str, reason: str) -> None:
        for loaded in [x for x in self._loaded.values() if x.model.session_id == session_id]:
            await self._unload(loaded, Gone(f"the session has ended ({reason})"))

    async def _unload(self, loaded: LoadedModel, error: TinkercloudError) -> None:
        self._close(loaded, error)
        await loaded.host.tasks.run_between(lambda: self._free_slot(loaded))
        await self._record(loaded, ModelStatus.UNLOADED)
        log.info("model.unloaded", model_id=loaded.model.model_id, reason=str(error))

    async def lose_all(self, base_model: str, reason: str) -> None:
        """The engine died, and with it the adapters that were only in its memory.

        Models that wait for their creation, or were loaded into its successor, live on.
        """
        host = self._hosts.get(base_model)
        lost = [x for x in self._loaded.values() if x.host is host and x.is_lost()]
        for loaded in lost:
            self._close(loaded, BackendError(_LOST.format(id=loaded.model.model_id)))
            if loaded.slot is not None:
                host.slots.free(loaded.slot)
                loaded.slot = None
        for loaded in lost:
            await self._record(loaded, ModelStatus.LOST)
            log.error("model.lost", model_id=loaded.model.model_id, reason=reason)

    def _close(self, loaded: LoadedModel, error: TinkercloudError) -> None:
        """From here on every operation, queued or to come, fails with ``error``."""
        self._loaded.pop(loaded.model.model_id, None)
        metrics.LOADED_MODELS.set(len(self._loaded))
        loaded.host.tasks.close_model(loaded.model.model_id, error)

    async def _free_slot(self, loaded: LoadedModel) -> None:
        """Only where no plan can be using the slot."""
        if loaded.slot is None:
            return
        slot, loaded.slot = loaded.slot, None
        try:
            await loaded.host.backend.unload_slot(slot)
        except BackendError as error:
            # It went with its engine, or the next model that gets the slot replaces it.
            log.warning("model.not_unloaded", model_id=loaded.model.model_id, error=str(error))
        finally:
            loaded.host.slots.free(slot)
            loaded.host.slots.check_integrity()

    async def _record(self, loaded: LoadedModel, status: ModelStatus) -> None:
        """A full disk does not keep a model from ending; the next start corrects the record."""
        try:
            await self._database.write(models.move, loaded.model.model_id, status)
        except StorageError as error:
            log.error("model.status_not_stored", model_id=loaded.model.model_id, error=str(error))


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


_LOST = (
    "model {id} was lost when its engine stopped; go on from its last checkpoint with "
    "create_training_client_from_state_with_optimizer"
)
_WHY_NOT: Mapping[ModelStatus, str] = {
    ModelStatus.LOST: _LOST,
    ModelStatus.UNLOADED: "model {id} was unloaded when its session ended",
    ModelStatus.FAILED: "model {id} was never created: its creation failed",
}


def _creation(
    kind: FutureKind, owner: str, session_id: str, model_seq_id: int, payload: bytes
) -> Incoming:
    """Creation is operation 0 of the model."""
    model_id = ids.model_id(session_id, model_seq_id)
    return Incoming(kind, owner, session_id, model_id, 0, payload, "application/json")


def _new_model(
    incoming: Incoming,
    model_seq_id: int,
    base_model: str,
    lora: LoraSpec,
    optimizer: str,
    user_metadata: Mapping[str, Any] | None,
) -> Model:
    now = utcnow()
    return Model(
        model_id=incoming.model_id,
        session_id=incoming.session_id,
        model_seq_id=model_seq_id,
        owner=incoming.owner,
        base_model=base_model,
        lora=lora,
        optimizer=optimizer,
        status=ModelStatus.CREATING,
        created_at=now,
        last_request_at=now,
        user_metadata=user_metadata or {},
    )


def _shape(of: Model | Checkpoint) -> str:
    groups = {
        "attn": of.lora.train_attn,
        "mlp": of.lora.train_mlp,
        "unembed": of.lora.train_unembed,
    }
    trained = "+".join(name for name, is_trained in groups.items() if is_trained)
    return f"rank {of.lora.rank} on {trained}"
