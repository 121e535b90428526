"""The whole server below HTTP, assembled in one place: what starts first, what ends with what."""

from __future__ import annotations

from contextlib import AsyncExitStack

import structlog

from training.config import TrainingConfig
from training.core.errors import TinkercloudError
from training.core.records import FutureKind, ModelStatus, utcnow
from training.core.task_manager import failed
from training.core.threads import in_thread
from training.services.auth import Authenticator
from training.services.checkpoints import CheckpointService
from training.services.hosts import Hosts, start_hosts
from training.services.models import ModelService
from training.services.operations import OperationDesk
from training.services.promises import Promises
from training.services.sampling import SamplingService
from training.services.sessions import SessionService
from training.services.training import TrainingService
from training.storage.database import Database
from training.storage.files import CheckpointFiles
from training.storage.repositories import checkpoints, futures, models, sampling_sessions

log = structlog.get_logger(__name__)


class Server:
    """Made by ``start``; every service is an attribute."""

    config: TrainingConfig
    auth: Authenticator
    database: Database
    files: CheckpointFiles
    promises: Promises
    hosts: Hosts
    sessions: SessionService
    models: ModelService
    training: TrainingService
    checkpoints: CheckpointService
    sampling: SamplingService

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.auth = Authenticator(config.auth)
        self.database = Database(config.storage.resolved_database_url())
        self.files = CheckpointFiles(config.storage.checkpoint_dir)
        self.promises = Promises(self.database)
        self.sessions = SessionService(self.database, config.session, self._session_ended)
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
        await in_thread(self.files.prepare)
        self.hosts = await start_hosts(
            self.config, self.files, self.promises.settle, self._backend_died
        )
        on_close(self.hosts.close)
        self._running.callback(self.promises.close)
        desk = OperationDesk(self.promises)
        self.models = ModelService(self.database, self.files, self.hosts, self.sessions, desk)
        self.training = TrainingService(self.models, desk)
        self.checkpoints = CheckpointService(self.database, self.files, self.models, desk)
        self.sampling = SamplingService(
            self.database,
            self.files,
            self.hosts,
            self.sessions,
            self.checkpoints,
            self.promises,
            self.config.scheduler,
        )
        on_close(self.sampling.close)
        on_close(self.sessions.close)
        await self.sessions.start()
        on_close(self.checkpoints.close)
        await self.checkpoints.start()
        await self._recover()

    async def close(self) -> None:
        await self._running.aclose()
        log.info("server.closed")

    async def _recover(self) -> None:
        """Tells the truth about what an earlier process left behind.

        Sampling requests run again. Adapters lived in the engine's memory: their models are lost,
        and the operations that waited for them fail.
        """
        for model in await self.database.read(
            models.with_status, [ModelStatus.CREATING, ModelStatus.READY]
        ):
            await self.database.write(models.move, model.model_id, ModelStatus.LOST)
            log.warning("model.lost", model_id=model.model_id, reason="server restarted")
        error = (
            "the server restarted before this operation was done, and the model's state was lost; "
            "go on from its last checkpoint"
        )
        await self.database.write(futures.fail_pending, error, utcnow(), FutureKind.SAMPLE)
        for stored in await self.database.read(futures.pending, FutureKind.SAMPLE):
            self.promises.adopt(stored.future)
            await self._resume_sample(stored)
        await self._collect_garbage()

    async def _resume_sample(self, stored: futures.Payload) -> None:
        try:
            await self.sampling.resume(stored)
        except TinkercloudError as error:
            await self.promises.settle(stored.future.request_id, failed(error))

    async def _collect_garbage(self) -> None:
        """Removes checkpoint directories that nothing refers to any longer."""
        used = await self.database.read(checkpoints.directories)
        used |= await self.database.read(sampling_sessions.live_snapshots)
        for name in await in_thread(self.files.names) - used:
            await in_thread(self.files.delete, name)
            log.info("checkpoint.orphan_removed", directory=name)

    async def _session_ended(self, session_id: str, reason: str) -> None:
        await self.models.unload_session(session_id, reason)
        await self.sampling.release_session(session_id)
        await self.database.write(futures.drop_bytes, session_id)

    async def _backend_died(self, base_model: str, reason: str) -> None:
        await self.models.lose_all(base_model, reason)
