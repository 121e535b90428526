"""Disks and files that fail: a clear error, what was acknowledged stays, nothing is deleted."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.servers import REPOSITORY
from training.core.errors import StorageError
from training.storage import connections
from training.storage.connections import Sqlite
from training.storage.database import Database
from training.storage.files import CheckpointFiles

WRITER = """
import asyncio, sys
import sqlalchemy as sa
from training.storage.database import Database

def add(connection, number):
    connection.execute(sa.text("INSERT INTO log VALUES (:number)"), {"number": number})
    return number

async def main():
    database = Database(sys.argv[1])
    await database.start()
    await database.write(lambda c: c.execute(sa.text("CREATE TABLE log (number integer)")) and None)
    number = 0
    while True:
        for done in await asyncio.gather(*(database.write(add, number + i) for i in range(3))):
            print(done, flush=True)
        number += 3

asyncio.run(main())
"""

SAVER = """
import os, sys
from pathlib import Path
from training.storage.files import CheckpointFiles

files = CheckpointFiles(Path(sys.argv[1]))
files.prepare()
number = 0
while True:
    staged = files.stage()
    for part in range(4):
        (staged / str(part)).write_bytes(os.urandom(100_000))
    files.commit(staged, f"{os.getpid()}-{number}")
    print(f"{os.getpid()}-{number}", flush=True)
    number += 1
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
from training.core.errors import StorageError
from training.storage.files import CheckpointFiles

files = CheckpointFiles(Path(sys.argv[1]))
files.prepare()
staged = files.stage()
(staged / "weights").write_bytes(b"w" * 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
try:
    files.commit(staged, "one")
except StorageError as error:
    said = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(said, staged.exists(), files.names())
"""


def script(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )


def killed_after(process: subprocess.Popen[str], num_lines: int, delay_s: float = 0.0) -> list[str]:
    """Every whole line that it printed, the last ones while it was already dying."""
    assert process.stdout is not None
    with process:
        lines = [process.stdout.readline() for _ in range(num_lines)]
        time.sleep(delay_s)
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    return [line.strip() for line in lines if line.endswith("\n")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "futures.db"


@pytest.fixture
async def database(path: Path) -> AsyncIterator[Database]:
    database = Database(f"sqlite:///{path}")
    await database.start()
    await database.write(create_log)
    yield database
    await database.close()


def create_log(connection: sa.Connection) -> None:
    connection.execute(sa.text("CREATE TABLE IF NOT EXISTS log (number integer, body blob)"))


def add(connection: sa.Connection, number: int, size_bytes: int = 0) -> int:
    connection.execute(
        sa.text("INSERT INTO log VALUES (:number, :body)"),
        {"number": number, "body": b"x" * size_bytes},
    )
    return number


def logged(connection: sa.Connection) -> list[int]:
    return list(connection.execute(sa.text("SELECT number FROM log ORDER BY number")).scalars())


async def test_on_a_full_disk_what_fits_is_stored_and_the_rest_is_refused(
    database: Database,
) -> None:
    """SQLite calls a file that may not grow a full disk."""

    def limit(connection: sa.Connection, num_pages: int) -> None:
        used = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={used + num_pages}")

    await database.write(limit, 10)
    outcomes = await asyncio.gather(
        *(database.write(add, number, 2**20 if number % 3 == 1 else 1) for number in range(9)),
        return_exceptions=True,
    )
    for number, outcome in enumerate(outcomes):
        if number % 3 == 1:
            assert isinstance(outcome, StorageError)
            assert "full" in str(outcome)
        else:
            assert outcome == number
    assert await database.read(logged) == [0, 2, 3, 5, 6, 8]
    await database.write(limit, 10_000)
    assert await database.write(add, 9, 2**20) == 9


async def test_who_waits_for_a_locked_database_waits_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one after another, each for as long as the lock is waited for."""
    monkeypatch.setattr(connections, "BUSY_TIMEOUT_S", 0.5)
    database = Database(f"sqlite:///{path}")
    await database.start()
    await database.write(create_log)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    attempts = 0

    def count(connection: sa.Connection) -> None:
        nonlocal attempts
        attempts += 1

    assert isinstance(database._connections, Sqlite)
    sa.event.listen(database._connections._writer, "begin", count)
    outcomes = await asyncio.gather(
        *(database.write(add, number) for number in range(100)), return_exceptions=True
    )
    assert {str(outcome) for outcome in outcomes} == {"database write failed: database is locked"}
    assert attempts <= 3, "a burst is one or two groups"
    assert await database.read(logged) == [], "reading goes on"
    other.execute("ROLLBACK")
    other.close()
    assert await database.write(add, 1) == 1
    await database.close()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def start_problem(path: Path) -> str | None:
    """None where the database can be used."""
    database = Database(f"sqlite:///{path}")
    try:
        await database.start()
        await database.read(logged)
    except StorageError as error:
        return str(error)
    finally:
        await database.close()
    return None


def test_a_file_that_is_no_database_is_left_alone(path: Path) -> None:
    path.write_bytes(b"my only copy of something" * 100)
    before = digest(path)
    assert "file is not a database" in (asyncio.run(start_problem(path)) or "")
    assert digest(path) == before


async def fill(path: Path) -> None:
    database = Database(f"sqlite:///{path}")
    await database.start()
    await database.write(create_log)
    for number in range(200):
        await database.write(add, number, 3000)
    await database.close()


def test_a_damaged_database_is_told_at_the_start_and_left_alone(path: Path) -> None:
    asyncio.run(fill(path))
    draw = random.Random(3)
    problems = []
    for number in range(10):
        copy = path.with_name(f"damaged-{number}.db")
        shutil.copy(path, copy)
        with copy.open("r+b") as file:
            file.seek(4096 * draw.randrange(1, path.stat().st_size // 4096))
            file.write(draw.randbytes(4096))
        before = digest(copy)
        problem = asyncio.run(start_problem(copy))
        if problem is not None:
            assert digest(copy) == before
            problems.append(problem)
    assert all("damaged" in problem or "malformed" in problem for problem in problems)
    assert len(problems) >= 5, "random bytes in the middle of a blob are no damage to the tree"


async def readable(path: Path) -> list[int]:
    database = Database(f"sqlite:///{path}")
    await database.start()
    await database.write(create_log)  # which may be in the part that is torn off
    numbers = await database.read(logged)
    await database.close()
    return numbers


def test_what_was_acknowledged_outlives_a_kill_and_a_torn_log_loses_only_its_end(
    path: Path,
) -> None:
    process = script(WRITER, f"sqlite:///{path}")
    acknowledged = [int(line) for line in killed_after(process, 200)]
    log = path.with_name(path.name + "-wal")
    size = log.stat().st_size
    draw = random.Random(5)
    num_kept = []
    for cut in sorted(draw.randrange(size) for _ in range(25)):
        copy = path.parent / f"torn-at-{cut}" / path.name
        copy.parent.mkdir()
        shutil.copy(path, copy)
        shutil.copy(log, copy.with_name(log.name))
        os.truncate(copy.with_name(log.name), cut)
        rows = asyncio.run(readable(copy))
        assert rows == list(range(len(rows))), "whole transactions, from the first on"
        num_kept.append(len(rows))
    assert num_kept == sorted(num_kept), "what is synced earlier is kept longer"
    rows = asyncio.run(readable(path))
    assert rows == list(range(len(rows)))
    assert len(acknowledged) >= 200
    assert set(acknowledged) <= set(rows)
    assert num_kept[0] < num_kept[-1]


def test_a_kill_in_the_middle_of_a_commit_leaves_nothing_half(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    draw = random.Random(7)
    committed: set[str] = set()
    leftovers = 0
    for _ in range(8):
        committed |= set(killed_after(script(SAVER, root), 2, 0.02 * draw.random()))
        leftovers += len(list((root / ".staging").iterdir()))
    files = CheckpointFiles(root)
    files.prepare()
    assert list((root / ".staging").iterdir()) == []
    assert committed <= files.names()
    for name in files.names():
        assert len(list(files.verify(name).iterdir())) == 5
    assert leftovers > 0, "no kill came in the middle of a commit"
    files.close()


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_none(tmp_path: Path) -> None:
    out, _ = script(FULL_DISK, tmp_path / "checkpoints").communicate()
    assert out.startswith("cannot store checkpoint: ")
    assert str(tmp_path) not in out, "a client reads it"
    assert out.endswith(" False set()\n")
