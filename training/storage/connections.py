"""How statements reach a database: a transaction at a time, off the event loop.

SQLite is called in threads of its own, one hop per transaction: an async driver would hop once per
statement, and a durable commit (0.25 ms) then took 5 ms. PostgreSQL: ``postgres.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
import structlog

from training.core.errors import StorageError
from training.core.threads import in_thread
from training.storage.directories import make_directory
from training.storage.lock import FileLock

log = structlog.get_logger(__name__)

T = TypeVar("T")
Run = Callable[[sa.Connection], T]

NUM_READERS = 4
BUSY_TIMEOUT_S = 10.0
"""How long a write waits for another process that writes to the same SQLite file."""
CHECKED_BYTES = 4 * 2**30
"""A larger database is not read through at the start (about 1 s per GiB that is cached)."""
_PRAGMAS = (
    "journal_mode=WAL",
    # FULL syncs the log at every commit: what was answered survives a power cut.
    "synchronous=FULL",
    "wal_autocheckpoint=4000",
)

FAILURES = (sa.exc.DBAPIError, sa.exc.TimeoutError, OSError)
"""Of the database or the way to it; asyncpg raises ``OSError`` where nobody listens."""


def reason_of(error: BaseException) -> str:
    """What the driver says, without the statement; never empty, as timeouts are."""
    if isinstance(error, sa.exc.DBAPIError):
        return reason_of(error.orig) if error.orig is not None else str(error)
    return str(error) or ("no answer in time" if isinstance(error, TimeoutError) else repr(error))


class Connections(Protocol):
    async def open(self) -> None:
        """Takes the database for this process alone; raises ``StorageError`` or ``FAILURES``."""

    async def upgrade(self, run: Run[T]) -> T:
        """As ``transact``, before anything else runs, and however long it takes."""

    async def transact(self, run: Run[T]) -> T:
        """Runs in one transaction; returns once it is committed. One at a time.

        An exception means that nothing was committed; ``run`` may be called again after one.
        """

    async def read(self, run: Run[T]) -> T:
        """Runs on one snapshot of the database; may be called again when a connection is lost."""

    def trouble(self) -> str | None:
        """Why new writes had better not wait; None in good days."""

    def stop_waiting(self) -> None:
        """From now on nothing waits until a database that is away is back."""

    async def close(self) -> None: ...


class Sqlite:
    def __init__(self, url: sa.URL) -> None:
        self._path = None if url.database in (None, "", ":memory:") else Path(str(url.database))
        self._lock: FileLock | None = None
        self._writer = _sqlite_engine(url, 1, "BEGIN IMMEDIATE")
        self._reader = _sqlite_engine(url, NUM_READERS, "BEGIN")
        self._write_thread = ThreadPoolExecutor(1, "sqlite-writer")
        self._read_threads = ThreadPoolExecutor(NUM_READERS, "sqlite-reader")

    async def open(self) -> None:
        if self._path is None:
            return
        make_directory(self._path.parent)
        self._lock = FileLock(self._path.with_name(f"{self._path.name}.lock"))
        await in_thread(self._lock.acquire)
        await self.transact(_check)

    async def upgrade(self, run: Run[T]) -> T:
        return await self.transact(run)

    async def transact(self, run: Run[T]) -> T:
        return await self._in(self._write_thread, _begin_and_run, self._writer, run)

    async def read(self, run: Run[T]) -> T:
        return await self._in(self._read_threads, _connect_and_run, self._reader, run)

    def trouble(self) -> str | None:
        return None

    def stop_waiting(self) -> None:
        """Who waits for another process waits ``BUSY_TIMEOUT_S`` at most."""

    async def close(self) -> None:
        for threads in (self._write_thread, self._read_threads):
            await asyncio.to_thread(threads.shutdown)
        self._writer.dispose()
        self._reader.dispose()
        if self._lock is not None:
            self._lock.release()

    async def _in(
        self,
        threads: ThreadPoolExecutor,
        call: Callable[[sa.Engine, Run[T]], T],
        engine: sa.Engine,
        run: Run[T],
    ) -> T:
        return await asyncio.get_running_loop().run_in_executor(threads, call, engine, run)


def _begin_and_run(engine: sa.Engine, run: Run[T]) -> T:
    with engine.begin() as connection:
        return run(connection)


def _connect_and_run(engine: sa.Engine, run: Run[T]) -> T:
    with engine.connect() as connection:
        return run(connection)


def _check(connection: sa.Connection) -> None:
    """Reads every page once: a damaged file is told at the start, and never written to."""
    num_pages = int(connection.exec_driver_sql("PRAGMA page_count").scalar_one())
    size_bytes = num_pages * int(connection.exec_driver_sql("PRAGMA page_size").scalar_one())
    if size_bytes > CHECKED_BYTES:
        log.info("database.not_checked", size_bytes=size_bytes, limit_bytes=CHECKED_BYTES)
        return
    found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
    if found != "ok":
        raise StorageError(
            f"the database file is damaged ({found}); it was left as it is: restore a copy, or "
            "rescue what is readable with sqlite3's .recover"
        )


def _sqlite_engine(url: sa.URL, pool_size: int, begin: str) -> sa.Engine:
    engine = sa.create_engine(
        url.set(drivername="sqlite"),
        poolclass=sa.QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        connect_args={"check_same_thread": False, "timeout": BUSY_TIMEOUT_S},
    )

    # The driver would begin transactions at moments of its own choosing and break savepoints.
    @sa.event.listens_for(engine, "connect")
    def _configure(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in _PRAGMAS:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine
