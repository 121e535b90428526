"""Checkpoint directories on disk: written aside, checksummed, synced, then renamed into place.

A directory under the root is complete and immutable, or it is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from training.core.errors import DamagedFile, NotFound, StorageError
from training.storage.directories import make_directory, sync

MANIFEST = "manifest.json"
_STAGING = ".staging"
_BLOCK_BYTES = 1 << 20


class CheckpointFiles:
    """Blocking; call through ``in_thread``."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()

    def prepare(self) -> None:
        """Creates the root and clears what unfinished writes left behind."""
        try:
            shutil.rmtree(self._root / _STAGING, ignore_errors=True)
            make_directory(self._root / _STAGING)
        except OSError as error:
            raise StorageError(f"checkpoint directory {self._root}: {error}") from error

    def stage(self) -> Path:
        """An empty directory that ``commit`` can move into place."""
        directory = self._root / _STAGING / uuid.uuid4().hex
        try:
            directory.mkdir()
        except OSError as error:
            raise StorageError(f"cannot write checkpoints: {error}") from error
        return directory

    def commit(self, staged: Path, name: str) -> int:
        """Makes ``staged`` durable as ``name`` and returns its size in bytes."""
        try:
            files = {path.name: _describe(path) for path in sorted(staged.iterdir())}
            (staged / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1))
            sync(staged / MANIFEST)
            sync(staged)
            os.rename(staged, self._root / name)
            sync(self._root)
        except OSError as error:
            self.discard(staged)
            raise StorageError(f"cannot store checkpoint: {error}") from error
        return sum(int(entry["size_bytes"]) for entry in files.values())

    def discard(self, staged: Path) -> None:
        shutil.rmtree(staged, ignore_errors=True)

    def path(self, name: str) -> Path:
        return self._root / name

    def verify(self, name: str) -> Path:
        """The directory of ``name``, every file compared with its checksum.

        Raises ``NotFound`` or ``DamagedFile``; nothing damaged is ever loaded.
        """
        directory = self._root / name
        try:
            files = json.loads((directory / MANIFEST).read_text())["files"]
        except FileNotFoundError:
            raise NotFound("the checkpoint's files are gone from the server's disk") from None
        except (OSError, ValueError, KeyError) as error:
            raise DamagedFile(f"checkpoint manifest cannot be read: {error}") from error
        for file_name, entry in files.items():
            try:
                found = _describe(directory / file_name, sync=False)
            except OSError as error:
                raise DamagedFile(f"checkpoint file {file_name} cannot be read: {error}") from error
            if found != entry:
                raise DamagedFile(f"checkpoint file {file_name} is damaged: checksum differs")
        return directory

    def delete(self, name: str) -> None:
        """Removes a checkpoint; a name that is not there passes."""
        # Renamed first, so that a half-deleted directory is never seen under its name.
        doomed = self._root / _STAGING / uuid.uuid4().hex
        try:
            os.rename(self._root / name, doomed)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"cannot delete checkpoint: {error}") from error
        shutil.rmtree(doomed, ignore_errors=True)

    def names(self) -> set[str]:
        return {path.name for path in self._root.iterdir() if path.name != _STAGING}


def _describe(path: Path, sync: bool = True) -> dict[str, int | str]:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        for block in _blocks(file.fileno()):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "size_bytes": size}


def _blocks(descriptor: int) -> Iterator[bytes]:
    while block := os.read(descriptor, _BLOCK_BYTES):
        yield block
