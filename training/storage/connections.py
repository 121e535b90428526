"""How statements reach the two databases: a transaction at a time, off the event loop.

SQLite is called in threads of its own, one hop per transaction: an async driver would hop once per
statement, and a durable commit (0.25 ms) then took 5 ms. PostgreSQL is called through asyncpg.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

T = TypeVar("T")
Run = Callable[[sa.Connection], T]

_NUM_READERS = 4
_PRAGMAS = (
    "journal_mode=WAL",
    # FULL syncs the log at every commit: what was answered survives a power cut.
    "synchronous=FULL",
    "busy_timeout=10000",
    "wal_autocheckpoint=4000",
)


class Connections(Protocol):
    async def transact(self, run: Run[T]) -> T:
        """Runs in one transaction; returns once it is committed. One at a time."""

    async def read(self, run: Run[T]) -> T: ...

    async def close(self) -> None: ...


def connect(url: sa.URL) -> Connections:
    """Opens nothing yet: the first use does."""
    if url.get_backend_name() == "sqlite":
        return _Sqlite(url)
    return _Postgres(url)


class _Sqlite:
    def __init__(self, url: sa.URL) -> None:
        if url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        self._writer = _sqlite_engine(url, 1, "BEGIN IMMEDIATE")
        self._reader = _sqlite_engine(url, _NUM_READERS, "BEGIN")
        self._write_thread = ThreadPoolExecutor(1, "sqlite-writer")
        self._read_threads = ThreadPoolExecutor(_NUM_READERS, "sqlite-reader")

    async def transact(self, run: Run[T]) -> T:
        return await self._in(self._write_thread, _begin_and_run, self._writer, run)

    async def read(self, run: Run[T]) -> T:
        return await self._in(self._read_threads, _connect_and_run, self._reader, run)

    async def close(self) -> None:
        for threads in (self._write_thread, self._read_threads):
            await asyncio.to_thread(threads.shutdown)
        self._writer.dispose()
        self._reader.dispose()

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


def _sqlite_engine(url: sa.URL, pool_size: int, begin: str) -> sa.Engine:
    engine = sa.create_engine(
        url.set(drivername="sqlite"),
        poolclass=sa.QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        connect_args={"check_same_thread": False},
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


class _Postgres:
    def __init__(self, url: sa.URL) -> None:
        self._engine = create_async_engine(url, pool_size=_NUM_READERS + 1, max_overflow=4)

    async def transact(self, run: Run[T]) -> T:
        async with self._engine.begin() as connection:
            return await connection.run_sync(run)

    async def read(self, run: Run[T]) -> T:
        async with self._engine.connect() as connection:
            return await connection.run_sync(run)

    async def close(self) -> None:
        await self._engine.dispose()
