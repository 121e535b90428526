"""Checkpoints in an object store (S3, Google Cloud Storage, whatever fsspec reaches).

A checkpoint is the objects under ``prefix/name/``, its manifest last: without one it does not
exist. What is read is kept on disk, compared with its checksums, up to a number of bytes.
Credentials are found by the store's own library, in the environment or on the machine.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import fsspec  # type: ignore[import-untyped]
import structlog

from training.core import ids
from training.core.errors import (
    ConfigError,
    DamagedFile,
    NotFound,
    StorageError,
    TinkercloudError,
)
from training.core.threads import OwnThreads
from training.storage.files import (
    MANIFEST,
    OWNER,
    CheckpointFiles,
    Owner,
    compare,
    read_manifest,
    write_manifest,
)

log = structlog.get_logger(__name__)

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
"""Scheme of a URL -> the extra of this package that brings its library."""
SPARED_S = 3600.0
"""Objects without a manifest are an upload in progress, until they are this old."""
KEPT_S = 600.0
"""What was read this recently may still be being loaded and stays in the cache."""
_UPLOADS = ".uploads"
_NUM_THREADS = 8
"""Transfers at a time; more do not make a network faster."""
_UNUSABLE = "cannot use the checkpoint storage"


def open_files(location: str, cache: Path, cache_bytes: int) -> CheckpointFiles:
    """Of a directory or a URL. Raises ``ConfigError`` for one that nothing here can open."""
    if "://" not in location:
        return CheckpointFiles(Path(location))
    return RemoteFiles(location, cache, cache_bytes)


class RemoteFiles(CheckpointFiles, OwnThreads):
    """Uploads of this server that were cut off are noted on disk and removed when it starts."""

    def __init__(self, url: str, cache: Path, cache_bytes: int) -> None:
        super().__init__(cache)
        self.location = url
        self._remote, self._prefix = _filesystem(url)
        self._cache_bytes = cache_bytes
        self._guard = threading.Lock()
        self._held: Counter[str] = Counter()
        # Whoever waits for one keeps it there.
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        self._uploading: set[str] = set()
        self._cleaned_s = 0.0
        self.threads = ThreadPoolExecutor(_NUM_THREADS, "checkpoint-storage")

    def claim(self, owner: Owner) -> None:
        """Also removes what an earlier process left unfinished, once it is known to be ours."""
        super().claim(owner)
        with _errors(_UNUSABLE):
            probe = f"{self._prefix}/{_UPLOADS}-{uuid.uuid4().hex}"
            self._remote.pipe_file(probe, b"may this server write here?")
            self._remote.rm_file(probe)
            (self._root / _UPLOADS).mkdir(exist_ok=True)
            for note in (self._root / _UPLOADS).iterdir():
                if MANIFEST not in self._objects(note.name):
                    self._remove(note.name)
                note.unlink()
        self._clean()

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _read_owner(self) -> str | None:
        with _errors(_UNUSABLE):
            try:
                return str(self._remote.cat_file(f"{self._prefix}/{OWNER}").decode().strip())
            except FileNotFoundError:
                return None

    def _write_owner(self, database_id: str) -> None:
        with _errors(_UNUSABLE):
            self._remote.pipe_file(f"{self._prefix}/{OWNER}", f"{database_id}\n".encode())

    def commit(self, staged: Path, name: str) -> int:
        """Uploads the files, and the manifest when they are all there."""
        note = self._root / _UPLOADS / name
        self._uploading.add(name)
        try:
            with _errors("cannot store checkpoint"):
                size_bytes = write_manifest(staged, sync=False)
                if self._objects(name):
                    raise StorageError(f"cannot store checkpoint: {name} exists already")
                note.touch()
                self._upload(staged, name)
        except BaseException:
            self.discard(staged)
            raise
        finally:
            self._uploading.discard(name)
        # It is stored: what goes wrong from here on must not make the save a failed one.
        with _told():
            note.unlink()
            os.rename(staged, self._root / name)
        self.discard(staged)  # where it could not become the copy on this disk
        with _told():
            self._make_room()
        with _told():
            if time.time() - self._cleaned_s > SPARED_S:
                self._clean()
        return size_bytes

    def verify(self, name: str) -> Path:
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            try:
                directory = super().verify(name)
            except (NotFound, DamagedFile) as error:
                if isinstance(error, DamagedFile):
                    log.warning("checkpoint.cache_damaged", directory=name, error=str(error))
                super().delete(name)
                directory = self._download(name)
            os.utime(directory)
        with _told():
            self._make_room()
        return directory

    def fetch(self, name: str) -> Path:
        with suppress(OSError):
            if (self._root / name / MANIFEST).exists():
                os.utime(self._root / name)
                return self._root / name
        return self.verify(name)

    def hold(self, name: str) -> Path:
        with self._guard:
            self._held[name] += 1
        try:
            return self.fetch(name)
        except BaseException:
            self.let_go(name)
            raise

    def let_go(self, name: str) -> None:
        with self._guard:
            self._held[name] -= 1
            if self._held[name] <= 0:
                del self._held[name]

    def delete(self, name: str) -> None:
        with _errors("cannot delete checkpoint"):
            self._remove(name)
        super().delete(name)

    def names(self) -> set[str]:
        with _errors("cannot list checkpoints"):
            return {name for name, files in self._listing().items() if MANIFEST in files}

    # ----------------------------------------------------------------- the store

    def _upload(self, staged: Path, name: str) -> None:
        files = sorted(path for path in staged.iterdir() if path.name != MANIFEST)
        for path in (*files, staged / MANIFEST):
            self._remote.put_file(str(path), f"{self._prefix}/{name}/{path.name}")

    def _download(self, name: str) -> Path:
        staged = self.stage()
        try:
            with _errors("cannot read checkpoint"):
                try:
                    manifest = self._remote.cat_file(f"{self._prefix}/{name}/{MANIFEST}")
                except FileNotFoundError:
                    raise NotFound("the checkpoint is gone from the checkpoint storage") from None
                for file_name, entry in read_manifest(manifest).items():
                    source = f"{self._prefix}/{name}/{file_name}"
                    try:
                        self._remote.get_file(source, str(staged / file_name))
                    except FileNotFoundError:
                        raise DamagedFile(f"checkpoint file {file_name} is missing") from None
                    compare(staged / file_name, entry)
                (staged / MANIFEST).write_bytes(manifest)
                os.rename(staged, self._root / name)
        except BaseException:
            self.discard(staged)
            raise
        return self._root / name

    def _remove(self, name: str) -> None:
        """The manifest first, so that a half-deleted checkpoint is none."""
        files = self._objects(name)
        for file_name in sorted(files, key=lambda file_name: file_name != MANIFEST):
            with suppress(FileNotFoundError):
                self._remote.rm_file(f"{self._prefix}/{name}/{file_name}")

    def _objects(self, name: str) -> set[str]:
        return self._listing(name).get(name, set())

    def _listing(self, name: str = "") -> dict[str, set[str]]:
        """Checkpoint -> its files, complete or not."""
        start = f"{self._prefix}/{name}".rstrip("/")
        found: dict[str, set[str]] = {}
        for path in self._remote.find(start):
            parts = path.removeprefix(f"{self._prefix}/").split("/")
            if len(parts) == 2:
                found.setdefault(parts[0], set()).add(parts[1])
        return found

    def _clean(self) -> None:
        """Removes what was left of uploads, also by servers that are gone."""
        self._cleaned_s = time.time()
        # As it was before the listing: what ends meanwhile is listed without its manifest.
        spared = set(self._uploading)
        with _errors("cannot clean the checkpoint storage"):
            for name, files in self._listing().items():
                if MANIFEST in files or name in spared or not ids.is_directory(name):
                    continue
                newest_s = max(
                    self._remote.modified(f"{self._prefix}/{name}/{file}").timestamp()
                    for file in files
                )
                if time.time() - newest_s > SPARED_S:
                    self._remove(name)
                    log.info("checkpoint.partial_removed", directory=name)

    # ----------------------------------------------------------------- the cache

    def _make_room(self) -> None:
        """Removes what was not read for longest, but nothing that is held or was read just now."""
        cached = []
        for name in super().names():
            with suppress(OSError):  # deleted meanwhile
                directory = self._root / name
                size_bytes = sum(path.stat().st_size for path in directory.iterdir())
                cached.append((directory.stat().st_mtime, name, size_bytes))
        excess_bytes = sum(size_bytes for _, _, size_bytes in cached) - self._cache_bytes
        for used_s, name, size_bytes in sorted(cached):
            if excess_bytes <= 0 or time.time() - used_s < KEPT_S:
                return
            if name not in self._held:
                super().delete(name)
                excess_bytes -= size_bytes


@contextmanager
def _errors(what: str) -> Iterator[None]:
    """The stores' libraries raise what they like."""
    try:
        yield
    except TinkercloudError:
        raise
    except Exception as error:
        raise StorageError(f"{what}: {type(error).__name__}: {error}") from error


@contextmanager
def _told() -> Iterator[None]:
    """Around what may fail without harm."""
    try:
        yield
    except (OSError, StorageError) as error:
        log.warning("checkpoint.not_tidied", error=str(error))


def _filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. Raises ``ConfigError``."""
    scheme = url.split("://")[0]
    if "@" in url:
        raise ConfigError("the checkpoint storage's URL must not hold credentials")
    try:
        # Listings are not kept: others may write there.
        remote = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        advice = f"pip install 'tinkercloud[{extra}]'" if extra else str(error)
        raise ConfigError(f"checkpoints in {scheme}:// need a library: {advice}") from None
    except ValueError:
        raise ConfigError(f"nothing here can open checkpoints in {scheme}://") from None
    except Exception as error:  # of the library that looks for its credentials
        raise ConfigError(f"checkpoints in {scheme}://: {type(error).__name__}: {error}") from error
    return remote, str(remote._strip_protocol(url)).rstrip("/")
