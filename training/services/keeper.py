"""Keeps models: stores what came of their operations, and brings them back after a crash.

State of a model = newest good snapshot + the operations accepted since, run again in their order.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

import structlog

from training.core import ids
from training.core.errors import (
    Gone,
    ModelLost,
    RequestError,
    StorageError,
    TinkercloudError,
    UserError,
)
from training.core.keeper import FinishSnapshot, Revival
from training.core.operations import Operation, Outcome, RefusedWork, StoredWork, Work
from training.core.records import FutureKind, ModelStatus, StoredOperation, utcnow
from training.core.unit_runner import failed
from training.services.loaded import Decoders, LoadedModel, LoadedModels
from training.services.model_snapshots import ModelSnapshots
from training.services.promises import Promises
from training.services.running import RunningRequests
from training.storage.database import Database
from training.storage.repositories import models, operations

log = structlog.get_logger(__name__)


class ModelKeeper:
    """``core.keeper.Keeper`` over the database. ``decoders`` are set once all services are made."""

    decoders: Decoders

    def __init__(
        self,
        database: Database,
        promises: Promises,
        loaded: LoadedModels,
        snapshots: ModelSnapshots,
        running: RunningRequests,
    ) -> None:
        self._database = database
        self._promises = promises
        self._loaded = loaded
        self._snapshots = snapshots
        self._running = running

    async def settle(self, operation: Operation, outcome: Outcome) -> None:
        await self._promises.settle_outcome(operation.request_id, outcome)

    async def snapshot(self, model_id: str, seq: int) -> FinishSnapshot:
        return await self._snapshots.capture(self._get(model_id), seq)

    async def fill_gap(self, model_id: str, missing: Sequence[int]) -> Sequence[Operation]:
        loaded = self._get(model_id)
        named = [(seq, ids.new_request_id()) for seq in missing]
        placed = await self._database.write(operations.fill_gap, loaded.model, named, utcnow())
        return self._operations(loaded, placed)

    def note_running(self, engine: str, request_ids: Sequence[str]) -> None:
        self._running.note(engine, request_ids)

    async def note_deaths(self, request_ids: Sequence[str]) -> None:
        try:
            await self._database.write(operations.note_deaths, request_ids)
        except StorageError as error:
            # This process remembers them too; only the next one would have to learn it again.
            log.error("operation.deaths_not_stored", error=str(error))

    async def mark_corrupted(self, operation: Operation) -> None:
        fault = (
            f"operation {operation.seq} ({operation.kind.value}) came to another result when it "
            "was run again after a crash"
        )
        await self._database.write(models.mark_corrupted, operation.model_id, fault)
        if (loaded := self._loaded.get(operation.model_id)) is not None:
            loaded.model = replace(loaded.model, corrupted=True, fault=fault)

    # ----------------------------------------------------------------- bringing back

    async def revive(self, model_id: str, until: int | None) -> Revival:
        loaded = self._get(model_id)
        found = await self._snapshots.of_model(model_id)
        for snapshot in found:
            stored = await self._database.read(operations.of_model, model_id, snapshot.seq, until)
            if not await self._can_replay(stored):
                break  # an older snapshot needs still more
            directory = await self._snapshots.verified(snapshot)
            if directory is None:
                continue
            slot, backend = loaded.held_slot(), loaded.host.backend
            try:
                await backend.load_slot(slot, loaded.model.lora, directory, snapshot.with_optimizer)
            except UserError as error:
                log.error("snapshot.damaged", model_id=model_id, error=str(error))
                continue
            generation = backend.health().generation
            # What came after its place was given up, and was not answered before a crash.
            late = await self._database.read(operations.pending_of_model, model_id, snapshot.seq)
            return Revival(snapshot.seq + 1, self._operations(loaded, [*late, *stored]), generation)
        stored = await self._database.read(operations.of_model, model_id, -1, until)
        if await self._can_replay(stored):
            return Revival(0, self._operations(loaded, stored), None)
        if await self._snapshots.of_model(model_id) != found:
            raise StorageError(f"the snapshots of model {model_id} changed while they were read")
        raise ModelLost(
            f"model {model_id} was lost: no snapshot of it can be read any more; go on from "
            "its last checkpoint with create_training_client_from_state_with_optimizer"
        )

    async def _can_replay(self, stored: Sequence[StoredOperation]) -> bool:
        """Whether the payloads are there that a replay needs. A creation needs none: what it asked
        for is part of the model."""
        needed = [
            item.request_id
            for item in stored
            if item.is_replayed and item.kind is not FutureKind.CREATE_MODEL
        ]
        return await self._database.read(operations.has_payloads, needed)

    def _operations(
        self, loaded: LoadedModel, stored: Sequence[StoredOperation]
    ) -> list[Operation]:
        return [
            Operation(
                request_id=item.request_id,
                model_id=loaded.model.model_id,
                seq=item.seq,
                kind=item.kind,
                work=StoredWork(self._loader(loaded, item), item.num_tokens),
                arrived_s=time.monotonic(),
                owner=loaded.model.owner,
                stored=item,
            )
            for item in stored
        ]

    def _loader(self, loaded: LoadedModel, item: StoredOperation) -> Callable[[], Awaitable[Work]]:
        async def load() -> Work:
            body = await self._database.read(operations.payload, item.request_id)
            if body is None and item.kind is not FutureKind.CREATE_MODEL:
                return RefusedWork(StorageError("the request's bytes are gone"))
            try:
                return await self.decoders[item.kind](loaded, item.seq, body or b"")
            except RequestError as error:
                return RefusedWork(error)

        return load

    async def give_up(self, model_id: str, error: TinkercloudError) -> None:
        """Ends what waits for the model, here and in the database, with ``error``."""
        loaded = self._loaded.get(model_id)
        if loaded is None:
            return
        log.error("model.lost", model_id=model_id, error=str(error))
        try:
            await self._database.write(models.move, model_id, ModelStatus.LOST, str(error))
        except StorageError as failure:
            # The next start finds out once more.
            log.error("model.status_not_stored", model_id=model_id, error=str(failure))
        self._loaded.remove(model_id)
        loaded.host.tasks.close_model(model_id, error)
        await self.end_operations(loaded, error)

    async def end_operations(self, loaded: LoadedModel, error: TinkercloudError) -> None:
        """Of a model whose queue is closed: fails what only the database has, and frees the slot
        once nothing uses it."""
        model_id = loaded.model.model_id
        await loaded.host.tasks.released(model_id)
        slot, loaded.slot = loaded.slot, None  # who else ends it does not free it again
        await loaded.host.release(slot)
        try:
            left = await self._database.read(operations.pending_of_model, model_id, None)
        except StorageError as failure:
            # They stay pending; the next start fails what belongs to no model.
            log.error("model.operations_not_ended", model_id=model_id, error=str(failure))
            return
        for item in left:
            await self._promises.settle(item.request_id, failed(error))

    def _get(self, model_id: str) -> LoadedModel:
        loaded = self._loaded.get(model_id)
        if loaded is None:
            raise Gone(f"model {model_id} has ended")
        return loaded
