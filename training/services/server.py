"""The whole server below HTTP, assembled in one place: what starts first, what ends with what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import structlog

from training.config import TrainingConfig
from training.core.errors import TinkercloudError
from training.core.records import FutureKind, utcnow
from training.core.suspects import MAX_CRASHES, poison_of_earlier
from training.core.threads import in_thread
from training.core.unit_runner import failed
from training.services.auth import Authenticator
from training.services.checkpoints import CheckpointService
from training.services.hosts import Hosts, start_hosts
from training.services.janitor import Janitor
from training.services.keeper import ModelKeeper
from training.services.loaded import LoadedModels
from training.services.model_loading import ModelLoader
from training.services.model_snapshots import ModelSnapshots
from training.services.models import ModelService
from training.services.operations import OperationDesk
from training.services.promises import Promises
from training.services.quotas import Quotas, Room
from training.services.running import RunningRequests
from training.services.sampler_weights import SamplerWeights
from training.services.sampling import SamplingService
from training.services.sessions import SessionService
from training.services.training import (
    TrainingService,
    decode_forward_backward,
    decode_optim_step,
)
from training.storage.database import Database
from training.storage.files import CheckpointFiles
from training.storage.remote_files import open_files
from training.storage.repositories import futures, identity, operations

log = structlog.get_logger(__name__)


class Server:
    """Made by ``start``; every service is an attribute."""

    config: TrainingConfig
    auth: Authenticator
    database: Database
    files: CheckpointFiles
    quotas: Quotas
    arriving: Room
    """Bodies of requests, until they are answered."""
    promises: Promises
    hosts: Hosts
    sessions: SessionService
    models: ModelService
    training: TrainingService
    checkpoints: CheckpointService
    sampling: SamplingService
    weights: SamplerWeights

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.auth = Authenticator(config.auth)
        self.database = Database(config.storage.resolved_database_url())
        self.files = open_files(
            config.storage.checkpoint_dir,
            config.storage.metadata_dir / "checkpoint-cache",
            config.storage.checkpoint_cache_bytes,
        )
        is_shared = config.auth.enabled and len(config.auth.api_keys) > 1
        self.quotas = Quotas(config.quota, config.scheduler, is_shared)
        arriving_bytes = config.server.arriving_bytes()
        each = config.quota.max_arriving_bytes
        self.arriving = Room("bytes on their way in", each, arriving_bytes, is_shared)
        self.promises = Promises(self.database, self.quotas)
        durability = config.durability
        snapshot_files = CheckpointFiles(config.storage.resolved_snapshot_dir())
        self._loaded = LoadedModels()
        self.snapshots = ModelSnapshots(self.database, snapshot_files, durability.snapshots_kept)
        self._requests = RunningRequests(config.storage.metadata_dir / "running.json")
        self.keeper = ModelKeeper(
            self.database, self.promises, self._loaded, self.snapshots, self._requests
        )
        self.janitor = Janitor(self.database, self.promises, durability.results_kept_s)
        self.sessions = SessionService(
            self.database, config.session, self.quotas, self._session_ended
        )
        self._running = AsyncExitStack()

    async def start(self) -> None:
        """Raises ``ConfigError`` or ``StorageError``, with nothing left running."""
        try:
            await self._start()
        except BaseException:
            await self._running.aclose()
            raise
        log.info("server.ready", models=self.hosts.names())

    async def _start(self) -> None:
        """What is started first is closed last."""
        on_close = self._running.push_async_callback
        await self.database.start()
        on_close(self.database.close)
        await self._blame_earlier()
        self._running.callback(self._requests.close)
        self._running.callback(self.files.close)
        await in_thread(self.files.prepare)
        owner = await self.database.write(identity.get_or_create)
        await in_thread(self.files.claim, owner)
        self._running.callback(self.snapshots.close)
        await self.snapshots.prepare(owner)
        self.hosts = await start_hosts(self.config, self.files, self.keeper)
        on_close(self.hosts.close)
        self._running.callback(self.promises.close)
        self._assemble()
        await self.weights.start()
        on_close(self.sampling.close)
        on_close(self.sessions.close)
        await self.sessions.start()
        on_close(self.checkpoints.close)
        await self.checkpoints.start()
        await self._recover()
        on_close(self.janitor.close)
        await self.janitor.start()

    def _assemble(self) -> None:
        """The services above the hosts."""
        desk = OperationDesk(self.database, self.promises, self.quotas)
        loader = ModelLoader(
            self.database, self.files, self.sessions, self._loaded, self.snapshots, self.quotas
        )
        self.models = ModelService(
            self.database,
            self.hosts,
            self.sessions,
            desk,
            self._loaded,
            loader,
            self.snapshots,
            self.keeper,
        )
        self.training = TrainingService(self.models, desk)
        self.weights = SamplerWeights(self.database, self.files, self.hosts, self.quotas)
        self.checkpoints = CheckpointService(
            self.database, self.files, self.models, desk, self.quotas, self.weights
        )
        self.sampling = SamplingService(
            self.database,
            self.weights,
            self.hosts,
            self.sessions,
            self.checkpoints,
            self.promises,
            self.quotas,
        )
        self.keeper.decoders = {
            FutureKind.CREATE_MODEL: loader.decode_creation,
            FutureKind.LOAD_WEIGHTS: loader.decode_load,
            FutureKind.FORWARD: decode_forward_backward,
            FutureKind.FORWARD_BACKWARD: decode_forward_backward,
            FutureKind.OPTIM_STEP: decode_optim_step,
            FutureKind.SAVE_WEIGHTS: self.checkpoints.decode_save,
            FutureKind.SAVE_WEIGHTS_FOR_SAMPLER: self.checkpoints.decode_save_for_sampler,
        }

    def stop_waiting(self) -> None:
        """The server is about to stop: long polls are answered now."""
        self.promises.stop_waiting()

    async def close(self) -> None:
        """Lets what runs end and saves the models that train, within ``durability.drain_s``."""
        self.stop_waiting()
        await self.hosts.drain(self.config.durability.drain_s)
        self.database.stop_waiting()
        await self._running.aclose()
        log.info("server.closed")

    async def _recover(self) -> None:
        """Goes on where an earlier process stopped, however it stopped."""
        await self.janitor.finish_ended()
        await self.database.write(
            futures.fail_orphans, "its model had ended when the server started again", utcnow()
        )
        for future in await self.database.read(futures.unsettled):
            self.promises.adopt(future)
        await self.models.restore()
        for stored in await self.database.read(futures.pending, FutureKind.SAMPLE):
            await self._resume_sample(stored)

    async def _blame_earlier(self) -> None:
        """The kernel may have killed an earlier process and its engine for what they were doing."""
        guilty = self._requests.start()
        if guilty:
            log.warning("server.ran_out_of_memory", request_ids=guilty)
            await self.database.write(operations.note_deaths, guilty, only_pending=True)

    async def _resume_sample(self, stored: futures.Payload) -> None:
        try:
            if stored.future.deaths >= MAX_CRASHES:
                raise poison_of_earlier(stored.future.deaths)
            await self.sampling.resume(stored)
        except TinkercloudError as error:
            await self.promises.settle(stored.future.request_id, failed(error))

    async def _session_ended(self, session_id: str, reason: str) -> None:
        """Every step, whatever becomes of the others; raises what went wrong at the end."""
        steps: tuple[Callable[[], Awaitable[None]], ...] = (
            lambda: self.models.unload_session(session_id, reason),
            lambda: self.weights.session_ended(session_id),
            lambda: self.janitor.session_ended(session_id),
        )
        failures = []
        for step in steps:
            try:
                await step()
            except Exception as error:
                failures.append(error)
        if failures:
            raise ExceptionGroup(f"session {session_id} holds something still", failures)
