"""Sampling sessions and sampling requests."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import replace

import structlog

from training.backends.base import SampleRequest, SampleResult
from training.core import ids, metrics
from training.core.errors import (
    BackendDead,
    BackendError,
    DeathCause,
    Gone,
    InvalidRequest,
    NotFound,
    StorageError,
    TinkercloudError,
)
from training.core.ids import CheckpointKind, TinkerPath
from training.core.records import (
    FutureKind,
    FutureResult,
    FutureStatus,
    NewFuture,
    SamplerKind,
    SamplingSession,
    SessionStatus,
    utcnow,
)
from training.core.sampling_data import target_layout, to_sample_request
from training.core.threads import in_thread_if
from training.core.unit_runner import failed
from training.services.checkpoints import CheckpointService
from training.services.hosts import Host, Hosts
from training.services.promises import Promises
from training.services.quotas import Quotas
from training.services.results import done_protobuf
from training.services.sampler_weights import SamplerWeights
from training.services.sessions import SessionService
from training.storage.database import Connection, Database
from training.storage.repositories import (
    checkpoints,
    futures,
    operations,
    sampling_sessions,
    sessions,
)
from training.wire.json_base import parse_json
from training.wire.protobuf import encode_sample_response
from training.wire.requests import CreateSamplingSessionRequest, SampleJsonRequest

log = structlog.get_logger(__name__)

_INLINE_NUMBERS = 2**13
"""Of a request and its answer: 64 KiB of JSON, about, which take the event loop a millisecond."""


class SamplingService:
    def __init__(
        self,
        database: Database,
        weights: SamplerWeights,
        hosts: Hosts,
        sessions: SessionService,
        checkpoints: CheckpointService,
        promises: Promises,
        quotas: Quotas,
    ) -> None:
        self._database = database
        self._weights = weights
        self._hosts = hosts
        self._sessions = sessions
        self._checkpoints = checkpoints
        self._promises = promises
        self._quotas = quotas
        self._running: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Requests still running stay pending in the database and run again after a restart."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # ----------------------------------------------------------------- sampling sessions

    async def create_session(
        self, owner: str, request: CreateSamplingSessionRequest
    ) -> SamplingSession:
        """On a base model, or on weights of either kind. Repeating it gives the same session."""
        session = await self._sessions.get_active(owner, request.session_id)
        sampling_session_id = ids.sampling_session_id(
            session.session_id, request.sampling_session_seq_id
        )
        existing = await self._database.read(sampling_sessions.get, sampling_session_id)
        if existing is not None:
            return existing
        base_model, path, snapshot_id = request.base_model, None, None
        if request.model_path is not None:
            path = TinkerPath.parse(request.model_path)
            if path.kind is CheckpointKind.EXTERNAL:
                raise InvalidRequest(f"{path} is an export; sample from weights or sampler_weights")
            checkpoint = await self._checkpoints.readable(owner, path)
            if base_model not in (None, checkpoint.base_model):
                raise InvalidRequest(f"{path} belongs to {checkpoint.base_model}, not {base_model}")
            base_model = checkpoint.base_model
            snapshot_id = checkpoint.directory
        if base_model is None:
            raise InvalidRequest("give base_model or model_path")
        self._hosts.get(base_model)
        sampler = SamplingSession(
            sampling_session_id=sampling_session_id,
            session_id=session.session_id,
            owner=owner,
            base_model=base_model,
            kind=SamplerKind.SNAPSHOT,
            created_at=utcnow(),
            model_path=None if path is None else str(path),
            snapshot_id=snapshot_id,
        )
        with self._weights.opening(owner):
            await self._open(sampler, path)
        return sampler

    async def _open(self, sampler: SamplingSession, path: TinkerPath | None) -> None:
        snapshot_id = sampler.snapshot_id
        async with self._weights.using(snapshot_id):
            if snapshot_id is not None:
                # Read once in full: damaged weights are refused here, not sampled from.
                await self._weights.check(snapshot_id)
            if await self._database.write(_store, sampler, path):
                await self._weights.opened(sampler)

    async def get_session(self, owner: str, sampling_session_id: str) -> SamplingSession:
        """Raises ``NotFound`` for other people's, too."""
        session = await self._database.read(sampling_sessions.get, sampling_session_id)
        if session is None or session.owner != owner:
            raise NotFound(f"no such sampling session: {sampling_session_id[:250]}")
        return session

    async def join(self, owner: str, sampling_session_id: str) -> int:
        """A number of its own for one more client process of a sampling session."""
        await self.get_session(owner, sampling_session_id)
        return await self._database.write(sampling_sessions.add_clone, sampling_session_id)

    async def of_session(self, session_id: str) -> list[SamplingSession]:
        return await self._database.read(sampling_sessions.of_session, session_id)

    # ----------------------------------------------------------------- requests

    async def sample(
        self, owner: str, request: SampleJsonRequest, payload: bytes
    ) -> tuple[str, tuple[str, ...]]:
        """Accepts a request; returns its id and the ids of its sequences to come."""
        if request.sampling_session_id is None:
            raise InvalidRequest("sampling_session_id is missing")
        session = await self.get_session(owner, request.sampling_session_id)
        await self._sessions.get_active(owner, session.session_id)
        new = NewFuture(
            request_id=ids.new_request_id(),
            kind=FutureKind.SAMPLE,
            scope=sample_scope(session.sampling_session_id),
            seq=request.seq_id,
            owner=owner,
            session_id=session.session_id,
            model_id=session.model_id,
            payload=payload,
            content_type="application/json",
        )
        self._quotas.check(owner, FutureKind.SAMPLE, len(payload))
        stored = await self._promises.accept(new)
        if stored.is_new:
            self._start(stored.request_id, session, request)
        # One id per sequence asked for; a request with a bad number fails before it has any.
        return stored.request_id, ids.sequence_ids(
            stored.request_id, min(max(request.num_samples, 0), 1024)
        )

    async def resume(self, stored: futures.Payload) -> None:
        """Runs a request again that an earlier process had accepted."""
        sampling_session_id = stored.future.scope.removeprefix(sample_scope(""))
        session = await self.get_session(stored.future.owner, sampling_session_id)
        if session.base_model not in self._hosts.names():
            # As models do, it waits for a server that serves its base model again.
            log.error(
                "sample.not_served",
                request_id=stored.future.request_id,
                base_model=session.base_model,
            )
            return
        is_long = len(stored.body) > 8 * _INLINE_NUMBERS
        request = await in_thread_if(is_long, parse_json, SampleJsonRequest, stored.body)
        tasks = self._hosts.get(session.base_model).tasks
        tasks.suspects.remember(stored.future.request_id, stored.future.deaths)
        self._start(stored.future.request_id, session, request)

    async def cancel(self, owner: str, request_id: str) -> None:
        """Ends a pending request of the caller's; anything else is none of its business."""
        future = await self._database.read(futures.get, request_id)
        task = self._running.get(request_id)
        if future is None or future.owner != owner or task is None:
            return
        session = await self.get_session(owner, future.scope.removeprefix(sample_scope("")))
        cancelled = FutureResult(FutureStatus.CANCELLED, error="cancelled by the client")
        await self._promises.settle(request_id, cancelled)
        await self._hosts.get(session.base_model).backend.cancel(request_id)

    def _start(self, request_id: str, session: SamplingSession, request: SampleJsonRequest) -> None:
        task = asyncio.create_task(self._run(request_id, session, request))
        self._running[request_id] = task
        metrics.PENDING_SAMPLES.set(len(self._running))
        task.add_done_callback(lambda _: self._finished(request_id))

    def _finished(self, request_id: str) -> None:
        self._running.pop(request_id, None)
        metrics.PENDING_SAMPLES.set(len(self._running))

    async def _run(
        self, request_id: str, session: SamplingSession, request: SampleJsonRequest
    ) -> None:
        try:
            result = await self._on_newest(request_id, session, request)
        except TinkercloudError as error:
            result = failed(error)
        except Exception as error:
            # The border of the job: the client gets an answer whatever went wrong.
            log.exception("sample.failed", request_id=request_id)
            result = failed(BackendError(f"internal error ({type(error).__name__})"))
        metrics.OPERATIONS.labels(FutureKind.SAMPLE.value, result.status.value).inc()
        await self._promises.settle(request_id, result)

    async def _on_newest(
        self, request_id: str, session: SamplingSession, request: SampleJsonRequest
    ) -> FutureResult:
        """A save of inflight weights takes the older ones away from requests on their way."""
        while True:
            try:
                async with self._weights.using(session.snapshot_id):
                    return await self._outcome(request_id, session, request)
            except TinkercloudError:
                newest = await self.get_session(session.owner, session.sampling_session_id)
                if newest.snapshot_id == session.snapshot_id:
                    raise
                session = newest

    async def _outcome(
        self, request_id: str, session: SamplingSession, request: SampleJsonRequest
    ) -> FutureResult:
        host = self._hosts.get(session.base_model)
        capabilities = host.capabilities()
        seed = seed_of(request_id)
        num_numbers = request.num_numbers()
        sample = await in_thread_if(
            num_numbers > _INLINE_NUMBERS,
            to_sample_request,
            request,
            request_id,
            session.snapshot_id,
            capabilities,
            seed,
        )
        sample = replace(sample, tenant=session.owner)
        result = await self._sample(host, sample)
        num_sampled = sum(len(sequence.tokens) for sequence in result.sequences)
        metrics.PROMPT_TOKENS.inc(len(sample.prompt))
        metrics.SAMPLED_TOKENS.inc(num_sampled)
        is_long = num_numbers + num_sampled > _INLINE_NUMBERS
        return done_protobuf(await in_thread_if(is_long, _encoded, result, request))

    async def _sample(self, host: Host, request: SampleRequest) -> SampleResult:
        """Again when the engine ends, unless the request is what ends it."""
        name, suspects = request.request_id, host.tasks.suspects
        while True:
            try:
                async with suspects.alone([name]):
                    if request.snapshot_id is not None:
                        await host.snapshots.ensure(request.snapshot_id)
                    result = await host.backend.sample(request)
                suspects.forget([name])
                return result
            except BackendDead as error:
                # Thousands may wait in an engine; the log names those that are suspects.
                is_suspect = error.cause is not DeathCause.BYSTANDER
                level = logging.WARNING if is_suspect else logging.DEBUG
                log.log(level, "sample.engine_died", request_id=name, cause=error.cause.value)
                verdict = suspects.died([name], error)
                if verdict.counted:
                    await self._note_death(name)
                if poison := verdict.poison.get(name):
                    raise poison from error
                if error.cause is DeathCause.CLOSED:
                    raise

    async def _note_death(self, request_id: str) -> None:
        try:
            await self._database.write(operations.note_deaths, [request_id])
        except StorageError as error:
            # This process remembers it too; only the next one would have to learn it again.
            log.error("sample.death_not_stored", request_id=request_id, error=str(error))


def _store(connection: Connection, sampler: SamplingSession, path: TinkerPath | None) -> bool:
    """Stores it, if its session and its weights are still there; False for a repetition."""
    session = sessions.get(connection, sampler.session_id)
    if session is None or session.status is not SessionStatus.ACTIVE:
        raise Gone(f"session {sampler.session_id} has ended")
    if path is not None:
        checkpoint = checkpoints.get(connection, path)
        if checkpoint is None or checkpoint.directory != sampler.snapshot_id:
            raise NotFound(f"no such checkpoint: {path}")
    return sampling_sessions.insert(connection, sampler)


def _encoded(result: SampleResult, request: SampleJsonRequest) -> bytes:
    return encode_sample_response(result, target_layout(request))


def sample_scope(sampling_session_id: str) -> str:
    return f"sample:{sampling_session_id}"


def seed_of(request_id: str) -> int:
    """The seed of a request that brought none: the same when it is run again."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:7], "big")
