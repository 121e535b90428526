"""What serves one base model: its backend, its task manager, its slots, its sampler snapshots."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from training.backends.base import Backend, Capabilities
from training.backends.registry import create_backend
from training.config import ModelConfig, TrainingConfig
from training.core.errors import BackendError, InvalidRequest
from training.core.keeper import Keeper
from training.core.progress import SnapshotPolicy
from training.core.slots import SlotPool
from training.core.task_manager import TaskManager, TaskPolicy
from training.core.threads import in_thread
from training.services.results import encode_output
from training.storage.files import CheckpointFiles

log = structlog.get_logger(__name__)


class Snapshots:
    """Which adapter directories the sampler has been told of."""

    def __init__(self, backend: Backend, files: CheckpointFiles) -> None:
        self._backend = backend
        self._files = files
        self._published: dict[str, asyncio.Future[None]] = {}

    async def ensure(self, snapshot_id: str) -> None:
        """Publishes once, however many requests ask at the same moment."""
        publishing = self._published.get(snapshot_id)
        if publishing is None:
            publishing = asyncio.ensure_future(self._publish(snapshot_id))
            self._published[snapshot_id] = publishing
        try:
            await asyncio.shield(publishing)
        except Exception:
            if self._published.get(snapshot_id) is publishing:
                del self._published[snapshot_id]
            raise

    async def _publish(self, snapshot_id: str) -> None:
        directory = await in_thread(self._files.hold, snapshot_id)
        try:
            await self._backend.publish(snapshot_id, directory)
        except BaseException:
            self._files.let_go(snapshot_id)
            raise

    async def retire(self, snapshot_id: str) -> None:
        """Of one that nobody uses any longer, published or not."""
        publishing = self._published.pop(snapshot_id, None)
        if publishing is None:
            return
        if not publishing.done():  # whoever had asked for it was cancelled
            await asyncio.wait([publishing])
        if publishing.cancelled() or publishing.exception() is not None:
            return
        self._files.let_go(snapshot_id)
        try:
            await self._backend.retire(snapshot_id)
        except BackendError as error:
            # It went with its engine, which will not be told of it again.
            log.warning("snapshot.not_retired", snapshot=snapshot_id, error=str(error))


@dataclass(frozen=True, eq=False)
class Host:
    model: ModelConfig
    backend: Backend
    tasks: TaskManager
    slots: SlotPool
    snapshots: Snapshots

    def capabilities(self) -> Capabilities:
        return self.backend.capabilities()

    async def release(self, slot: int | None) -> None:
        """Frees a slot that no plan can be using any longer; None passes."""
        if slot is None:
            return
        try:
            if self.backend.health().alive:  # else it went with its engine
                await self.backend.unload_slot(slot)
        except BackendError as error:
            # It went with its engine, or the next model that gets the slot replaces it.
            log.warning("slot.not_unloaded", slot=slot, error=str(error))
        finally:
            self.slots.free(slot)
            self.slots.check_integrity()


class Hosts:
    """Every served base model by name."""

    def __init__(self, hosts: Mapping[str, Host]) -> None:
        self._hosts = hosts

    def names(self) -> list[str]:
        return list(self._hosts)

    def all(self) -> list[Host]:
        return list(self._hosts.values())

    def get(self, base_model: str) -> Host:
        """Raises ``InvalidRequest`` with the names that would do."""
        host = self._hosts.get(base_model)
        if host is None:
            served = ", ".join(self._hosts)
            raise InvalidRequest(f"base model {base_model[:200]!r} is not served; served: {served}")
        return host

    async def drain(self, within_s: float) -> None:
        """Saves what trains, as far as the time goes; see ``TaskManager.drain``."""
        await asyncio.gather(*(host.tasks.drain(within_s) for host in self.all()))

    async def close(self) -> None:
        for host in self.all():
            await host.tasks.close()
            await host.backend.close()


async def start_hosts(
    config: TrainingConfig,
    files: CheckpointFiles,
    keeper: Keeper,
) -> Hosts:
    """Starts every engine at once."""
    models = config.served_models()
    backends = [create_backend(model, config) for model in models]
    try:
        await asyncio.gather(*(backend.start() for backend in backends))
    except BaseException:
        await asyncio.gather(*(backend.close() for backend in backends), return_exceptions=True)
        raise
    hosts: dict[str, Host] = {}
    for model, backend in zip(models, backends, strict=True):
        tasks = TaskManager(
            backend,
            keeper,
            encode_output,
            task_policy(config),
        )
        await tasks.start()
        slots = SlotPool(backend.capabilities().max_slots)
        hosts[model.name] = Host(model, backend, tasks, slots, Snapshots(backend, files))
    return Hosts(hosts)


def task_policy(config: TrainingConfig) -> TaskPolicy:
    durability = config.durability
    return TaskPolicy(
        unit_tokens=config.scheduler.unit_tokens,
        turn_tokens=config.scheduler.turn_tokens,
        gap_timeout_s=config.scheduler.gap_timeout_s,
        max_pending_per_model=config.scheduler.max_pending_per_model,
        snapshots=SnapshotPolicy(
            steps=durability.snapshot_steps,
            tokens=durability.snapshot_tokens,
            pause_s=durability.snapshot_pause_s,
            idle_s=durability.snapshot_idle_s,
            share=durability.snapshot_share,
        ),
    )
