"""One server per data directory, and none that a dead one would keep out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.servers import REPOSITORY
from training.core.errors import StorageError
from training.storage import lock
from training.storage.database import Database
from training.storage.lock import FileLock

HOLDER = """
import asyncio, sys
from training.storage.database import Database

async def hold():
    database = Database(sys.argv[1])
    await database.start()
    print("held", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await database.close()

asyncio.run(hold())
"""


@contextmanager
def holder(url: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the database open."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, url],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        while process.stdout.readline() != "held\n":
            assert process.poll() is None, "the other process ended"
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


async def test_a_second_server_is_told_who_has_the_database(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "WAIT_S", 0.2)
    with holder(database_url) as process:
        database = Database(database_url)
        with pytest.raises(StorageError, match=rf"another tinkercloud server.*pid {process.pid}\b"):
            await database.start()
    await database.start()
    await database.close()


async def test_a_restart_right_after_a_kill_succeeds(database_url: str) -> None:
    for _ in range(3):
        with holder(database_url) as process:
            process.send_signal(signal.SIGKILL)
            database = Database(database_url)
            await database.start()
            await database.close()


def test_a_lock_is_free_after_release_and_waits_for_its_holder(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    first.acquire()
    with pytest.raises(StorageError, match=f"pid {os.getpid()}"):
        second.acquire(wait_s=0.1)
    first.release()
    first.release()
    second.acquire(wait_s=0.1)
    second.release()
