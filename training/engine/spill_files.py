"""Flat files for named buffers that are not needed for a while, and the directory they lie in.

They live no longer than their process and are never read by another one: what a file holds is known
in memory (``SpillFile``), names and checksums included. Knows nothing of adapters.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import shutil
import struct
import tempfile
import uuid
import weakref
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from training.core.errors import DamagedFile

_log = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
"""Written between two yields: about 5 ms with its checksum."""
_HEADER = struct.Struct("<8s16sQ")  # magic, the file's own id, its size
_MAGIC = b"tkspill1"
_PREFIX = "engine-"
_LOCK = "lock"


class Section(NamedTuple):
    """Where a buffer lies in its file, and its CRC-32."""

    offset: int
    num_bytes: int
    checksum: int


class SpillFile:
    """What a finished file holds, by name. Sections may be renamed or forgotten here; the file
    itself never changes."""

    def __init__(self, path: Path, header: bytes, sections: dict[str, Section]) -> None:
        self.path = path
        self.sections = sections
        self._header = header

    @property
    def num_bytes(self) -> int:
        """Of the sections that are still known."""
        return sum(section.num_bytes for section in self.sections.values())

    def read(self, buffer_for: Callable[[str, int], memoryview]) -> None:
        """Fills ``buffer_for(name, num_bytes)`` with each section.

        Raises ``DamagedFile`` where the content is not what was written, ``OSError`` where the file
        cannot be read; the buffers are then of no use.
        """
        with open(self.path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(_HEADER.size) != self._header or size != _HEADER.unpack(self._header)[2]:
                raise DamagedFile(f"{self.path.name} is not the file that was written")
            for name, section in self.sections.items():
                file.seek(section.offset)
                if _read(file, buffer_for(name, section.num_bytes)) != section.checksum:
                    raise DamagedFile(f"{self.path.name}: the checksum of {name!r} does not match")

    def delete(self) -> None:
        """One that cannot be deleted is left for the end of the directory."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("a spill file is left behind: %s", error)


def _read(file: BinaryIO, into: memoryview) -> int:
    """Fills ``into``; returns the checksum of what was read, also where the file ends early."""
    checksum = 0
    for start in range(0, len(into), CHUNK_BYTES):
        chunk = into[start : start + CHUNK_BYTES]
        num_read = file.readinto(chunk)  # type: ignore[attr-defined]
        checksum = zlib.crc32(chunk[:num_read], checksum)
    return checksum


def write_spill(
    path: Path, buffers: Mapping[str, memoryview], open_file: Callable[[Path], BinaryIO]
) -> Generator[None, None, SpillFile]:
    """Yields after each chunk; ``buffers`` must not change until the end.

    The file appears whole at ``path`` or not at all: closing the generator, or an ``OSError`` such
    as a full disk, leaves nothing behind.
    """
    partial = path.with_suffix(".partial")
    total = _HEADER.size + sum(len(buffer) for buffer in buffers.values())
    header = _HEADER.pack(_MAGIC, uuid.uuid4().bytes, total)
    sections: dict[str, Section] = {}
    offset = _HEADER.size
    try:
        with open_file(partial) as file:
            _write(file, memoryview(header))
            for name, buffer in buffers.items():
                checksum = 0
                for start in range(0, len(buffer), CHUNK_BYTES):
                    chunk = buffer[start : start + CHUNK_BYTES]
                    _write(file, chunk)
                    checksum = zlib.crc32(chunk, checksum)
                    yield
                sections[name] = Section(offset, len(buffer), checksum)
                offset += len(buffer)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return SpillFile(path, header, sections)


def _write(file: BinaryIO, chunk: memoryview) -> None:
    """Unbuffered files may write less than asked, on a disk that is filling up for instance."""
    while chunk:
        chunk = chunk[file.write(chunk) :]


def open_for_writing(path: Path) -> BinaryIO:
    return open(path, "wb", buffering=0)


class SpillDirectory:
    """One process's directory below ``parent``, made at its first file and removed with the
    process. What killed processes left there is removed when the next one starts."""

    def __init__(self, parent: Path) -> None:
        self._parent = parent
        self._own: Path | None = None
        self._numbers = itertools.count()
        if parent.is_dir():
            with _locked(parent):
                _remove_abandoned(parent)

    def new_path(self) -> Path:
        """Of a file that does not exist yet. Raises ``OSError``."""
        if self._own is None:
            self._own = self._make()
        return self._own / f"{next(self._numbers)}.spill"

    def files(self) -> list[Path]:
        return sorted(self._own.glob("*.spill")) if self._own is not None else []

    def _make(self) -> Path:
        self._parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._parent):
            own = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._parent))
            # Held for as long as we live: it tells others that this directory is in use.
            lock = os.open(own / _LOCK, os.O_CREAT | os.O_RDWR)
            fcntl.flock(lock, fcntl.LOCK_EX)
        weakref.finalize(self, _remove, own, lock)
        return own


def _remove(own: Path, lock: int) -> None:
    shutil.rmtree(own, ignore_errors=True)
    os.close(lock)


@contextmanager
def _locked(parent: Path) -> Iterator[None]:
    """Between making a directory and locking it nobody may look for abandoned ones."""
    lock = os.open(parent / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    for directory in parent.glob(f"{_PREFIX}*"):
        try:
            lock = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR)
        except OSError:
            continue  # being removed by its owner, or not ours to remove
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(lock)
