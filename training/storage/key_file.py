"""A secret of the server's own, made once and kept in a file that only its user can read."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

import structlog

from training.core.errors import StorageError
from training.storage.directories import make_directory, sync

log = structlog.get_logger(__name__)


def load_or_create_key(path: Path, num_bytes: int) -> bytes:
    """Of several processes that start at once, all get the same key. Raises ``StorageError``."""
    try:
        if not path.exists():
            make_directory(path.parent)
            _create(path, secrets.token_bytes(num_bytes))
        key = path.read_bytes()
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise StorageError(f"cannot read or create {path}: {error.strerror}") from error
    if len(key) != num_bytes:
        raise StorageError(f"{path} is damaged: delete it, and a new key is made")
    if mode & 0o077:
        log.warning("key_file.readable_by_others", path=str(path), mode=f"{mode:03o}")
    return key


def _create(path: Path, key: bytes) -> None:
    """Whole or not at all: written aside, then linked, which fails where another was faster."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(aside, path)
    finally:
        aside.unlink()
    sync(path.parent)
