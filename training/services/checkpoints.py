"""Saving weights, and what can be asked about what was saved."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from training.backends.base import Saving
from training.core import ids
from training.core.errors import InvalidRequest, NotFound, RequestError
from training.core.ids import CheckpointKind, TinkerPath, checked_name
from training.core.operations import CallWork, Finish, Outcome, RefusedWork, Work
from training.core.records import (
    Checkpoint,
    FutureKind,
    Model,
    SamplerKind,
    SamplingSession,
    utcnow,
)
from training.core.threads import in_thread
from training.services.loaded import LoadedModel
from training.services.model_loading import readable_checkpoint
from training.services.models import ModelService
from training.services.operations import OperationDesk
from training.services.quotas import Quotas
from training.services.results import done_json
from training.services.sampler_weights import SamplerWeights
from training.storage.database import Connection, Database
from training.storage.files import CheckpointFiles
from training.storage.repositories import checkpoints, sampling_sessions
from training.wire.json_base import parse_json
from training.wire.requests import SaveWeightsForSamplerRequest, SaveWeightsRequest
from training.wire.responses import SavedWeights, SavedWeightsForSampler

log = structlog.get_logger(__name__)

MIN_TTL_S = 3600
MAX_TTL_S = 10 * 365 * 24 * 3600
_JSON = "application/json"
_REAP_S = 60.0


class _Stored(NamedTuple):
    directory: str
    size_bytes: int


class CheckpointService:
    def __init__(
        self,
        database: Database,
        files: CheckpointFiles,
        models: ModelService,
        desk: OperationDesk,
        quotas: Quotas,
        weights: SamplerWeights,
    ) -> None:
        self._database = database
        self._files = files
        self._models = models
        self._desk = desk
        self._quotas = quotas
        self._weights = weights
        self._reaper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._reaper = asyncio.create_task(self._reap(), name="checkpoint-reaper")

    async def close(self) -> None:
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.gather(self._reaper, return_exceptions=True)

    async def _reap(self) -> None:
        while True:
            try:
                for expired in await self._database.read(checkpoints.expired, utcnow()):
                    await self._remove(expired)
            except Exception:
                # The border of the job: what cannot be deleted now is tried again.
                log.exception("checkpoint.reaper_failed")
            await asyncio.sleep(_REAP_S)

    # ----------------------------------------------------------------- saving

    async def save_weights(self, owner: str, request: SaveWeightsRequest, payload: bytes) -> str:
        """Weights and optimizer state under a name, for ``load_weights``."""
        loaded = await self._models.get_loaded(owner, request.model_id)
        incoming = self._desk.incoming(
            FutureKind.SAVE_WEIGHTS, loaded.model, request.seq_id, payload, _JSON
        )
        work = self._saving(loaded, incoming.seq, request)
        return await self._desk.accept(incoming, loaded.host, work)

    async def save_for_sampler(
        self, owner: str, request: SaveWeightsForSamplerRequest, payload: bytes
    ) -> str:
        """Named: a checkpoint with a path. Unnamed: an ephemeral one behind a sampling session."""
        loaded = await self._models.get_loaded(owner, request.model_id)
        incoming = self._desk.incoming(
            FutureKind.SAVE_WEIGHTS_FOR_SAMPLER, loaded.model, request.seq_id, payload, _JSON
        )
        work = self._exporting(loaded, incoming.seq, request)
        return await self._desk.accept(incoming, loaded.host, work)

    async def decode_save(self, loaded: LoadedModel, seq: int, body: bytes) -> Work:
        return self._saving(loaded, seq, parse_json(SaveWeightsRequest, body))

    async def decode_save_for_sampler(self, loaded: LoadedModel, seq: int, body: bytes) -> Work:
        return self._exporting(loaded, seq, parse_json(SaveWeightsForSamplerRequest, body))

    def _saving(self, loaded: LoadedModel, seq: int, request: SaveWeightsRequest) -> Work:
        return self._named(
            loaded,
            CheckpointKind.TRAINING,
            request.path if request.path is not None else f"step-{seq}",
            request.ttl_seconds,
            dict(request.user_metadata or {}),
            request.overwrite,
        )

    def _exporting(
        self, loaded: LoadedModel, seq: int, request: SaveWeightsForSamplerRequest
    ) -> Work:
        if request.path is not None:
            return self._named(
                loaded,
                CheckpointKind.SAMPLER,
                request.path,
                request.ttl_seconds,
                dict(request.user_metadata or {}),
                overwrite=False,
            )
        if request.sampling_session_seq_id is None:
            return RefusedWork(InvalidRequest("give either path or sampling_session_seq_id"))
        kind = SamplerKind(request.kind)
        return self._ephemeral(loaded, seq, kind, request.sampling_session_seq_id)

    def _named(
        self,
        loaded: LoadedModel,
        kind: CheckpointKind,
        name: str,
        ttl_seconds: int | None,
        user_metadata: dict[str, Any],
        overwrite: bool,
    ) -> Work:
        model, backend = loaded.model, loaded.host.backend
        try:
            path = TinkerPath(model.model_id, kind, checked_name(name))
            lifetime = checked_ttl(ttl_seconds)
        except RequestError as error:
            return RefusedWork(error)
        write = backend.save_state if kind is CheckpointKind.TRAINING else backend.export_adapter

        async def run() -> Finish:
            if not overwrite and await self._database.read(checkpoints.get, path) is not None:
                raise InvalidRequest(_taken(path))
            await self._check_bytes(model.owner)
            finish = await self._capture(loaded, write)

            async def outcome() -> Outcome:
                stored = await finish()
                now = utcnow()
                checkpoint = Checkpoint(
                    path=path,
                    owner=model.owner,
                    base_model=model.base_model,
                    lora=model.lora,
                    optimizer=model.optimizer,
                    directory=stored.directory,
                    size_bytes=stored.size_bytes,
                    created_at=now,
                    user_metadata=user_metadata,
                    expires_at=None if lifetime is None else now + lifetime,
                )
                return self._registered(checkpoint, overwrite)

            return outcome

        return CallWork(run)

    def _registered(self, checkpoint: Checkpoint, overwrite: bool) -> Outcome:
        replaced: list[str] = []

        def also(connection: Connection) -> None:
            if overwrite:
                old = checkpoints.replace(connection, checkpoint)
                replaced[:] = [] if old is None else [old]
            elif not checkpoints.insert(connection, checkpoint):
                raise InvalidRequest(_taken(checkpoint.path))

        async def undo() -> None:
            await self._weights.discard(checkpoint.directory)

        async def then() -> None:
            path, size_bytes = str(checkpoint.path), checkpoint.size_bytes
            log.info("checkpoint.saved", path=path, size_bytes=size_bytes)
            for old in replaced:
                await self._weights.discard(old)

        result = done_json(_SAVED[checkpoint.kind](path=str(checkpoint.path)))
        return Outcome(result, also, undo, then)

    def _ephemeral(
        self, loaded: LoadedModel, seq: int, kind: SamplerKind, sampler_seq: int
    ) -> Work:
        model, host = loaded.model, loaded.host

        async def run() -> Finish:
            self._quotas.check_samplers(self._weights.num_samplers(model.owner))
            await self._check_bytes(model.owner)
            finish = await self._capture(loaded, host.backend.export_adapter)

            async def outcome() -> Outcome:
                stored = await finish()
                self._weights.hold_unnamed(stored.directory, model.owner, stored.size_bytes)
                try:
                    await host.snapshots.ensure(stored.directory)
                except BaseException:
                    # If it runs again, it writes another one.
                    await self._weights.let_go(stored.directory)
                    raise
                session = SamplingSession(
                    sampling_session_id=ids.sampling_session_id(model.session_id, sampler_seq),
                    session_id=model.session_id,
                    owner=model.owner,
                    base_model=model.base_model,
                    kind=kind,
                    created_at=utcnow(),
                    model_id=model.model_id,
                    snapshot_id=stored.directory,
                    saved_seq=seq,
                    size_bytes=stored.size_bytes,
                )
                return self._sampler_opened(session, stored.directory)

            return outcome

        return CallWork(run)

    def _sampler_opened(self, session: SamplingSession, directory: str) -> Outcome:
        """``directory`` is held until it is stored who uses it."""
        stored = session

        def also(connection: Connection) -> None:
            nonlocal stored
            stored = _insert_sampler(connection, session)

        async def undo() -> None:
            await self._weights.let_go(directory)

        async def then() -> None:
            await self._weights.opened(stored)
            await self._weights.let_go(directory)

        result = done_json(SavedWeightsForSampler(sampling_session_id=session.sampling_session_id))
        return Outcome(result, also, undo, then)

    async def _capture(
        self, loaded: LoadedModel, write: Callable[[int, Path], Awaitable[Saving]]
    ) -> Callable[[], Awaitable[_Stored]]:
        """Returns when the weights are captured; what that returns waits for their files."""
        staged = await in_thread(self._files.stage)
        try:
            saving = await write(loaded.held_slot(), staged)
        except BaseException:
            await in_thread(self._files.discard, staged)
            raise

        async def finish() -> _Stored:
            try:
                await saving.written()
            except BaseException:
                await in_thread(self._files.discard, staged)
                raise
            directory = ids.new_directory()
            size_bytes = await in_thread(self._files.commit, staged, directory)
            return _Stored(directory, size_bytes)

        return finish

    async def _check_bytes(self, owner: str) -> None:
        """Raises ``OverQuota``."""
        named = await self._database.read(checkpoints.owned_bytes, owner)
        self._quotas.check_checkpoint_bytes(named + self._weights.unnamed_bytes(owner))

    # ----------------------------------------------------------------- asking, deleting

    async def readable(self, owner: str, path: TinkerPath) -> Checkpoint:
        """One's own or a published checkpoint; raises ``NotFound``."""
        return await readable_checkpoint(self._database, owner, path)

    async def owned(self, owner: str, path: TinkerPath) -> Checkpoint:
        checkpoint = await readable_checkpoint(self._database, owner, path)
        if checkpoint.owner != owner:
            raise NotFound(f"no such checkpoint: {path}")
        return checkpoint

    async def of_run(self, owner: str, model_id: str) -> list[Checkpoint]:
        model: Model = await self._models.get(owner, model_id)
        return await self._database.read(checkpoints.of_run, model.model_id)

    async def latest_of_run(self, model_id: str) -> Mapping[CheckpointKind, Checkpoint]:
        return await self._database.read(checkpoints.latest_of_run, model_id)

    async def page(self, owner: str, limit: int, offset: int) -> tuple[list[Checkpoint], int]:
        found = await self._database.read(checkpoints.page, owner, limit, offset)
        return found, await self._database.read(checkpoints.num_owned, owner)

    async def delete(self, owner: str, path: TinkerPath) -> None:
        await self._remove(await self.owned(owner, path))

    async def _remove(self, checkpoint: Checkpoint) -> None:
        if await self._database.write(checkpoints.delete, checkpoint):
            log.info("checkpoint.deleted", path=str(checkpoint.path))
            await self._weights.discard(checkpoint.directory)

    async def set_ttl(self, owner: str, path: TinkerPath, ttl_seconds: int | None) -> None:
        await self.owned(owner, path)
        lifetime = checked_ttl(ttl_seconds)
        expires_at = None if lifetime is None else utcnow() + lifetime
        await self._database.write(checkpoints.set_expiry, path, expires_at)


def checked_ttl(ttl_seconds: int | None) -> timedelta | None:
    """None means for ever; raises ``InvalidRequest``."""
    if ttl_seconds is None:
        return None
    if not MIN_TTL_S <= ttl_seconds <= MAX_TTL_S:
        raise InvalidRequest(
            f"ttl_seconds must be {MIN_TTL_S} to {MAX_TTL_S} (or absent), not {ttl_seconds}"
        )
    return timedelta(seconds=ttl_seconds)


def _insert_sampler(connection: Connection, session: SamplingSession) -> SamplingSession:
    """Returns it as it was stored: saves of inflight weights may end in another order."""
    if session.kind is SamplerKind.INFLIGHT:
        session = sampling_sessions.join_inflight(connection, session)
    if not sampling_sessions.insert(connection, session):
        raise InvalidRequest(f"sampling session {session.sampling_session_id} exists already")
    return session


def _taken(path: TinkerPath) -> str:
    return f"{path} exists already; save under another name or with overwrite=True"


_SAVED: Mapping[CheckpointKind, type[SavedWeights | SavedWeightsForSampler]] = {
    CheckpointKind.TRAINING: SavedWeights,
    CheckpointKind.SAMPLER: SavedWeightsForSampler,
}
