"""Checkpoint directories on disk: written aside, checksummed, synced, then renamed into place.

A directory under the root is complete and immutable, or it is not there. ``remote_files`` has the
same for object stores.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from training.core import ids
from training.core.errors import DamagedFile, NotFound, StorageError
from training.storage.directories import make_directory, reason, sync, write_durably
from training.storage.lock import FileLock

MANIFEST = "manifest.json"
LOCK = ".lock"
OWNER = ".owner"
_STAGING = ".staging"
_BLOCK_BYTES = 1 << 20


class Owner(NamedTuple):
    """A database that knows of checkpoints; ``is_new``: it never held anything."""

    database_id: str
    is_new: bool


class CheckpointFiles:
    """Blocking; call through ``in_thread``."""

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._lock = FileLock(self._root / LOCK)
        self.location = str(self._root)

    def prepare(self) -> None:
        """Takes the root for this server alone and clears what unfinished writes left behind."""
        try:
            make_directory(self._root)
            self._lock.acquire()
            shutil.rmtree(self._root / _STAGING, ignore_errors=True)
            make_directory(self._root / _STAGING)
        except OSError as error:
            raise StorageError(f"checkpoint directory {self._root}: {error}") from error

    def claim(self, owner: Owner) -> None:
        """Notes whose checkpoints these are. What a database does not know of is removed as left
        over; another one's must never be taken for that.

        Raises ``StorageError`` for those of another database, and for checkpoints that an earlier
        version left unmarked where ``owner`` is too new to know of them.
        """
        holder = self._read_owner()
        is_unknown = owner.is_new and any(map(ids.is_directory, self.names()))
        if holder is None and not is_unknown:
            self._write_owner(owner.database_id)
            holder = self._read_owner()
        if holder != owner.database_id:
            raise StorageError(
                f"{self.location} holds checkpoints that belong to another database: check "
                "storage.database_url and storage.metadata_dir, or give this server a place of "
                f"its own for them. Nothing was changed. (It names {holder or 'no database'}, "
                f"this one is {owner.database_id}.)"
            )

    def _read_owner(self) -> str | None:
        try:
            return (self._root / OWNER).read_text().strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise StorageError(f"{self._root / OWNER} cannot be read: {error}") from error

    def _write_owner(self, database_id: str) -> None:
        try:
            write_durably(self._root / OWNER, f"{database_id}\n".encode())
        except OSError as error:
            raise StorageError(f"checkpoint directory {self._root}: {error}") from error

    def close(self) -> None:
        self._lock.release()

    def stage(self) -> Path:
        """An empty directory that ``commit`` can move into place."""
        directory = self._root / _STAGING / uuid.uuid4().hex
        try:
            directory.mkdir()
        except OSError as error:
            raise StorageError(f"cannot write checkpoints: {reason(error)}") from error
        return directory

    def commit(self, staged: Path, name: str) -> int:
        """Makes ``staged`` durable as ``name`` and returns its size in bytes."""
        try:
            size_bytes = write_manifest(staged)
            sync(staged / MANIFEST)
            sync(staged)
            os.rename(staged, self._root / name)
            sync(self._root)
        except OSError as error:
            self.discard(staged)
            raise StorageError(f"cannot store checkpoint: {reason(error)}") from error
        return size_bytes

    def discard(self, staged: Path) -> None:
        shutil.rmtree(staged, ignore_errors=True)

    def path(self, name: str) -> Path:
        """Where ``verify``, ``fetch`` and ``hold`` put the files, if they are there."""
        return self._root / name

    def fetch(self, name: str) -> Path:
        """The directory of ``name`` on this machine, without looking for damage again.

        Raises ``NotFound``, ``DamagedFile`` or ``StorageError`` where it had to be brought first.
        """
        return self.path(name)

    def hold(self, name: str) -> Path:
        """As ``fetch``; the directory stays on this machine until ``let_go``."""
        return self.fetch(name)

    def let_go(self, name: str) -> None:
        """Ends one ``hold``; one that is not held passes."""

    def verify(self, name: str) -> Path:
        """The directory of ``name``, every file compared with its checksum.

        Raises ``NotFound`` or ``DamagedFile``; nothing damaged is ever loaded.
        """
        directory = self._root / name
        try:
            manifest = (directory / MANIFEST).read_bytes()
        except FileNotFoundError:
            raise NotFound("the checkpoint's files are gone from the server's disk") from None
        except OSError as error:
            raise DamagedFile(f"checkpoint manifest cannot be read: {reason(error)}") from error
        for file_name, entry in read_manifest(manifest).items():
            compare(directory / file_name, entry)
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
            raise StorageError(f"cannot delete checkpoint: {reason(error)}") from error
        shutil.rmtree(doomed, ignore_errors=True)

    def names(self) -> set[str]:
        return {path.name for path in self._root.iterdir() if not path.name.startswith(".")}


Entry = Mapping[str, int | str]
"""What a manifest says of a file: its ``sha256`` and ``size_bytes``."""


def write_manifest(directory: Path, sync: bool = True) -> int:
    """Describes every file that is there; returns their size in bytes. Raises ``OSError``."""
    files = {path.name: _describe(path, sync) for path in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps({"version": 1, "files": files}, indent=1))
    return sum(int(entry["size_bytes"]) for entry in files.values())


def read_manifest(content: bytes) -> Mapping[str, Entry]:
    """File name -> what it must be. Raises ``DamagedFile``."""
    try:
        files: Mapping[str, Entry] = json.loads(content)["files"]
        if any(Path(name).name != name for name in files):
            raise ValueError("a file's name leads out of the checkpoint")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(f"checkpoint manifest cannot be read: {error}") from error
    return files


def compare(path: Path, entry: Entry) -> None:
    """Raises ``DamagedFile``."""
    try:
        found = _describe(path, sync=False)
    except OSError as error:
        raise DamagedFile(f"checkpoint file {path.name} cannot be read: {reason(error)}") from error
    if found != entry:
        raise DamagedFile(f"checkpoint file {path.name} is damaged: checksum differs")


def _describe(path: Path, sync: bool) -> dict[str, int | str]:
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
