"""Connections, migrations and the group commit. Knows no table.

Statements are written once, as functions of a ``Connection``; ``Database.read`` and
``Database.write`` run them on SQLite or PostgreSQL. Writes that wait at the same moment share one
transaction, so a burst of small requests costs few disk syncs. ``write`` returns after the commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from training.core.errors import StorageError

log = structlog.get_logger(__name__)

Connection = sa.Connection
"""What a statement runs on; callers name it without knowing SQLAlchemy."""

P = ParamSpec("P")
T = TypeVar("T")
Statement = Callable[Concatenate[Connection, P], T]

MAX_GROUP = 256
MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(eq=False)
class _Pending:
    statement: Statement[[], Any]
    done: asyncio.Future[Any]


class Database:
    """One writer connection, a small pool of readers."""

    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url)
        self._is_sqlite = self._url.get_backend_name() == "sqlite"
        self._writer: AsyncEngine | None = None
        self._reader: AsyncEngine | None = None
        self._queue: asyncio.Queue[_Pending] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Opens the database and brings its schema up to date. Raises ``StorageError``."""
        try:
            if self._is_sqlite and self._url.database:
                Path(self._url.database).parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._create_engine(pool_size=1, begin="BEGIN IMMEDIATE")
            self._reader = self._create_engine(pool_size=4, begin="BEGIN")
            async with self._writer.begin() as connection:
                await connection.run_sync(_upgrade)
        except (OSError, DBAPIError) as error:
            await self.close()
            raise StorageError(
                f"cannot open database {self._url.render_as_string(hide_password=True)}: "
                f"{_reason(error)}"
            ) from error
        self._task = asyncio.create_task(self._commit_groups(), name="database-writer")

    async def close(self) -> None:
        if self._task is not None:
            await self._queue.join()
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        for engine in (self._writer, self._reader):
            if engine is not None:
                await engine.dispose()
        self._writer = self._reader = None

    async def read(self, statement: Statement[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        assert self._reader is not None, "database is not started"
        try:
            async with self._reader.connect() as connection:
                return await connection.run_sync(lambda c: statement(c, *args, **kwargs))
        except DBAPIError as error:
            raise StorageError(f"database read failed: {_reason(error)}") from error

    async def write(self, statement: Statement[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs ``statement`` in a transaction and returns once it is committed.

        Errors of the statement itself (a ``TinkercloudError``, ``IntegrityError``) undo it alone.
        """
        assert self._task is not None, "database is not started"
        pending = _Pending(
            lambda connection: statement(connection, *args, **kwargs),
            asyncio.get_running_loop().create_future(),
        )
        self._queue.put_nowait(pending)
        result: T = await asyncio.shield(pending.done)
        return result

    async def _commit_groups(self) -> None:
        while True:
            group = [await self._queue.get()]
            while len(group) < MAX_GROUP and not self._queue.empty():
                group.append(self._queue.get_nowait())
            try:
                await self._commit(group)
            finally:
                for _ in group:
                    self._queue.task_done()

    async def _commit(self, group: list[_Pending]) -> None:
        assert self._writer is not None
        outcomes: list[tuple[_Pending, Any, Exception | None]] = []
        try:
            async with self._writer.begin() as connection:
                for pending in group:
                    result, error = await _run_alone(connection, pending.statement, len(group) > 1)
                    outcomes.append((pending, result, error))
                    if error is not None and len(group) == 1:
                        raise error
        except Exception as error:
            if len(group) > 1:
                # The commit itself failed: find out who can still be served, one by one.
                for pending in group:
                    await self._commit([pending])
                return
            reported = _as_storage_error(error)
            if not isinstance(error, IntegrityError) and reported is not error:
                log.error("database.write_failed", error=str(reported))
            _settle(group[0].done, None, reported)
            return
        for pending, result, failure in outcomes:
            _settle(pending.done, result, None if failure is None else _as_storage_error(failure))

    def _create_engine(self, pool_size: int, begin: str) -> AsyncEngine:
        if not self._is_sqlite:
            return create_async_engine(self._url, pool_size=pool_size, max_overflow=4)
        engine = create_async_engine(self._url, pool_size=pool_size, max_overflow=0)

        # The driver would begin transactions at moments of its own choosing and break savepoints.
        @sa.event.listens_for(engine.sync_engine, "connect")
        def _configure(connection: Any, record: Any) -> None:
            connection.isolation_level = None
            cursor = connection.cursor()
            for pragma in (
                "journal_mode=WAL",
                # FULL syncs the log at every commit: what was answered survives a power cut.
                "synchronous=FULL",
                "busy_timeout=10000",
                "wal_autocheckpoint=4000",
            ):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()

        @sa.event.listens_for(engine.sync_engine, "begin")
        def _begin(connection: sa.Connection) -> None:
            connection.exec_driver_sql(begin)

        return engine


async def _run_alone(
    connection: AsyncConnection, statement: Statement[[], Any], guarded: bool
) -> tuple[Any, Exception | None]:
    """Runs one statement of a group; ``guarded`` keeps its failure from undoing the others."""
    try:
        if not guarded:
            return await connection.run_sync(statement), None
        async with connection.begin_nested():
            return await connection.run_sync(statement), None
    except Exception as error:
        if guarded and isinstance(error, DBAPIError) and not isinstance(error, IntegrityError):
            raise
        return None, error


def _settle(done: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)


def _as_storage_error(error: Exception) -> Exception:
    if isinstance(error, DBAPIError) and not isinstance(error, IntegrityError):
        return StorageError(f"database write failed: {_reason(error)}")
    return error


def _reason(error: Exception) -> str:
    return str(error.orig) if isinstance(error, DBAPIError) else str(error)


def _upgrade(connection: sa.Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
