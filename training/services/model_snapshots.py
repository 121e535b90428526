"""Snapshots of models on disk: written beside training, adopted from checkpoints, read back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from training.core import ids
from training.core.errors import DamagedFile, NotFound, StorageError
from training.core.keeper import FinishSnapshot
from training.core.records import ModelStatus, Snapshot, utcnow
from training.core.threads import in_thread
from training.services.loaded import LoadedModel
from training.storage.database import Connection, Database
from training.storage.directories import reason
from training.storage.files import MANIFEST, CheckpointFiles, Owner
from training.storage.repositories import models, snapshots

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Adopted:
    """Files of a checkpoint as they were when it was loaded, whatever becomes of it."""

    directory: str
    size_bytes: int
    with_optimizer: bool


class ModelSnapshots:
    """``kept`` of each model stay; what operations the oldest of them covers is never run again."""

    def __init__(self, database: Database, files: CheckpointFiles, kept: int) -> None:
        self._database = database
        self._files = files
        self._kept = kept

    async def capture(self, loaded: LoadedModel, seq: int) -> FinishSnapshot:
        """Of a model that is as operation ``seq`` left it."""
        staged = await in_thread(self._files.stage)
        try:
            saving = await loaded.host.backend.save_state(loaded.held_slot(), staged)
        except BaseException:
            await in_thread(self._files.discard, staged)
            raise

        async def finish() -> bool:
            try:
                await saving.written()
            except BaseException:
                await in_thread(self._files.discard, staged)
                raise
            directory = ids.new_directory()
            size_bytes = await in_thread(self._files.commit, staged, directory)
            adopted = Adopted(directory, size_bytes, with_optimizer=True)
            return await self._add(loaded, seq, adopted)

        return finish

    async def _add(self, loaded: LoadedModel, seq: int, adopted: Adopted) -> bool:
        snapshot = _snapshot(loaded, seq, adopted)
        try:
            unused = await self._database.write(snapshots.add, snapshot, self._kept)
        except StorageError:
            await self.delete([adopted.directory])
            raise
        await self.delete([adopted.directory] if unused is None else unused)
        return unused is not None

    # ----------------------------------------------------------------- loading a checkpoint

    async def adopt(self, source: Path, with_optimizer: bool) -> Adopted:
        """Takes over a checkpoint's files: it may be deleted, the model still has to come back."""
        staged = await in_thread(self._files.stage)
        directory = ids.new_directory()
        try:
            await in_thread(_link_files, source, staged)
        except BaseException:
            await in_thread(self._files.discard, staged)
            raise
        size_bytes = await in_thread(self._files.commit, staged, directory)
        return Adopted(directory, size_bytes, with_optimizer)

    def path(self, adopted: Adopted) -> Path:
        return self._files.path(adopted.directory)

    def store(
        self, connection: Connection, loaded: LoadedModel, seq: int, adopted: Adopted
    ) -> list[str]:
        """In the transaction that settles the load; returns directories to delete after it."""
        unused = snapshots.add(connection, _snapshot(loaded, seq, adopted), self._kept)
        if unused is None:
            raise StorageError(f"operation {seq} was to be stored before earlier ones")
        return unused

    # ----------------------------------------------------------------- bringing back

    async def of_model(self, model_id: str) -> list[Snapshot]:
        """Newest first."""
        return await self._database.read(snapshots.of_model, model_id)

    async def verified(self, snapshot: Snapshot) -> Path | None:
        """Its files, every one compared with its checksum; None, with a line in the log, where
        one is missing or damaged."""
        try:
            return await in_thread(self._files.verify, snapshot.directory)
        except (DamagedFile, NotFound) as error:
            log.error(
                "snapshot.damaged",
                model_id=snapshot.model_id,
                seq=snapshot.seq,
                error=str(error),
            )
            return None

    # ----------------------------------------------------------------- the end

    async def end(self, model_id: str) -> None:
        """Of a model that is unloaded, in one transaction with that."""

        def store(connection: Connection) -> list[str]:
            models.move(connection, model_id, ModelStatus.UNLOADED)
            return snapshots.forget_model(connection, model_id)

        await self.delete(await self._database.write(store))

    async def delete(self, directories: Iterable[str]) -> None:
        """What cannot be deleted now is removed when the server starts again."""
        for directory in directories:
            try:
                await in_thread(self._files.delete, directory)
            except StorageError as error:
                log.warning("snapshot.not_deleted", directory=directory, error=str(error))

    async def prepare(self, owner: Owner) -> None:
        """Removes what an earlier process left unfinished."""
        await in_thread(self._files.prepare)
        await in_thread(self._files.claim, owner)
        await self._database.write(snapshots.forget_ended)
        used = await self._database.read(snapshots.directories)
        unused = await in_thread(self._files.names) - used
        await self.delete(filter(ids.is_directory, unused))

    def close(self) -> None:
        self._files.close()


def _snapshot(loaded: LoadedModel, seq: int, adopted: Adopted) -> Snapshot:
    return Snapshot(
        model_id=loaded.model.model_id,
        seq=seq,
        directory=adopted.directory,
        with_optimizer=adopted.with_optimizer,
        size_bytes=adopted.size_bytes,
        created_at=utcnow(),
    )


def _link_files(source: Path, target: Path) -> None:
    """Hard links where the file system has them; both are immutable."""
    try:
        for path in source.iterdir():
            if path.name == MANIFEST:
                continue
            try:
                os.link(path, target / path.name)
            except OSError:
                shutil.copyfile(path, target / path.name)
    except OSError as error:
        raise StorageError(f"cannot keep the files of a checkpoint: {reason(error)}") from error
