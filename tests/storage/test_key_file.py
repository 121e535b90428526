"""The server's own secret: made once, readable by its user alone, the same for all who ask."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from training.core.errors import StorageError
from training.storage.key_file import load_or_create_key


def test_it_is_made_once_and_only_its_user_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "signing.key"
    old = os.umask(0)
    try:
        key = load_or_create_key(path, 32)
    finally:
        os.umask(old)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_key(path, 32) == key
    assert [file.name for file in path.parent.iterdir()] == ["signing.key"]


def test_all_who_start_at_once_get_the_same(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    with ThreadPoolExecutor(16) as pool:
        keys = set(pool.map(lambda _: load_or_create_key(path, 32), range(64)))
    assert len(keys) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["signing.key"]


def test_a_damaged_one_is_never_used(tmp_path: Path) -> None:
    path = tmp_path / "signing.key"
    path.write_bytes(b"short")
    with pytest.raises(StorageError, match="damaged"):
        load_or_create_key(path, 32)


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot read or create"):
        load_or_create_key(tmp_path / "file" / "signing.key", 32)
