"""Training models: created, loaded from checkpoints, found, ended."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import structlog

from training.backends.base import LoraSpec
from training.core import ids
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
from training.core.records import (
    FutureKind,
    Model,
    ModelStatus,
    utcnow,
)
from training.services.hosts import Hosts
from training.services.keeper import ModelKeeper
from training.services.loaded import LoadedModel, LoadedModels
from training.services.model_loading import ModelLoader
from training.services.model_snapshots import ModelSnapshots
from training.services.operations import Incoming, OperationDesk
from training.services.sessions import SessionService
from training.storage.database import Connection, Database
from training.storage.repositories import futures, models, operations, snapshots
from training.wire.requests import CreateModelRequest, LoadWeightsRequest

log = structlog.get_logger(__name__)


class ModelService:
    def __init__(
        self,
        database: Database,
        hosts: Hosts,
        sessions: SessionService,
        desk: OperationDesk,
        loaded: LoadedModels,
        loader: ModelLoader,
        snapshots: ModelSnapshots,
        keeper: ModelKeeper,
    ) -> None:
        self._database = database
        self._hosts = hosts
        self._sessions = sessions
        self._desk = desk
        self._loaded = loaded
        self._loader = loader
        self._snapshots = snapshots
        self._keeper = keeper

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
        return await self._accept(incoming, LoadedModel(model, host))

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
            checkpoint = await self._loader.checkpoint(owner, request.path)
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
        return await self._accept(incoming, LoadedModel(model, host), request)

    async def _accept(
        self, incoming: Incoming, loaded: LoadedModel, request: LoadWeightsRequest | None = None
    ) -> str:
        model = loaded.model

        def also(connection: Connection) -> None:
            models.insert(connection, model)

        def opened() -> None:
            self._loaded.add(loaded)
            loaded.host.tasks.open_model(model.model_id, loaded.held_slot)

        work = self._loader.creation(loaded, request)
        return await self._desk.accept(incoming, loaded.host, work, also, opened)

    # ----------------------------------------------------------------- loading

    async def load_into(self, owner: str, request: LoadWeightsRequest, payload: bytes) -> str:
        """Replaces the weights of a model; its gradients and a spoiled window go with the old."""
        assert request.model_id is not None
        loaded = await self.get_loaded(owner, request.model_id)
        incoming = self._desk.incoming(
            FutureKind.LOAD_WEIGHTS, loaded.model, request.seq_id, payload, "application/json"
        )
        work = self._loader.loading(loaded, incoming.seq, request)
        return await self._desk.accept(incoming, loaded.host, work)

    async def restore(self) -> None:
        """Opens the models of an earlier process. Each is brought back when it has work to do."""
        await self._finish_ends()
        pending = await self._database.read(operations.pending_by_model)
        covered = await self._database.read(snapshots.newest_seqs)
        live = [ModelStatus.CREATING, ModelStatus.READY]
        for model in await self._database.read(models.with_status, live):
            try:
                host = self._hosts.get(model.base_model)
            except InvalidRequest as error:
                # Nothing is lost: it waits for a server that serves its base model again.
                log.error("model.not_served", model_id=model.model_id, error=str(error))
                continue
            loaded = LoadedModel(model, host)
            if model.status is ModelStatus.READY:
                try:
                    loaded.slot = host.slots.allocate(model.model_id)
                except BackendError as error:
                    # The same where a smaller ``engine.max_slots`` leaves it no place.
                    log.error("model.not_served", model_id=model.model_id, error=str(error))
                    continue
            self._loaded.add(loaded)
            next_seq = covered.get(model.model_id, -1) + 1
            host.tasks.open_stored(
                model.model_id, loaded.held_slot, next_seq, model.model_id in pending
            )

    async def _finish_ends(self) -> None:
        """Of sessions that ended when the server did, or before."""
        for model in await self._database.read(models.left_over):
            await self._forget(model.model_id)
            error = f"model {model.model_id} was unloaded when its session ended"
            await self._database.write(
                futures.fail_pending_of_session, model.session_id, error, utcnow()
            )
            log.info("model.unloaded", model_id=model.model_id, reason="session had ended")

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
            raise Gone(_why_not(model))
        await self._sessions.get_active(owner, loaded.model.session_id)
        return loaded

    async def of_session(self, session_id: str) -> list[Model]:
        return await self._database.read(models.of_session, session_id)

    async def page(self, owner: str, limit: int, offset: int) -> tuple[list[Model], int]:
        found = await self._database.read(models.page, owner, limit, offset)
        return found, await self._database.read(models.num_owned, owner)

    # ----------------------------------------------------------------- the end

    async def unload_session(self, session_id: str, reason: str) -> None:
        for loaded in self._loaded.of_session(session_id):
            await self._unload(loaded, Gone(f"the session has ended ({reason})"))
        for model in await self.of_session(session_id):
            await self._forget(model.model_id)

    async def _unload(self, loaded: LoadedModel, error: TinkercloudError) -> None:
        self._loader.close(loaded, error)
        await self._keeper.end_operations(loaded, error)
        log.info("model.unloaded", model_id=loaded.model.model_id, reason=str(error))

    async def _forget(self, model_id: str) -> None:
        """A full disk does not keep a model from ending; the next start corrects the record."""
        try:
            await self._snapshots.end(model_id)
        except StorageError as error:
            log.error("model.status_not_stored", model_id=model_id, error=str(error))


def _why_not(model: Model) -> str:
    match model.status:
        case ModelStatus.LOST:
            return model.fault or f"model {model.model_id} was lost"
        case ModelStatus.UNLOADED:
            return f"model {model.model_id} was unloaded when its session ended"
        case ModelStatus.FAILED:
            return f"model {model.model_id} was never created: {model.fault or 'it failed'}"
        case ModelStatus.CREATING | ModelStatus.READY:
            return f"model {model.model_id} is not loaded: {model.base_model} is not served now"


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
