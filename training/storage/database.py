"""Migrations and the group commit. Knows no table and no driver.

Statements are written once, as functions of a ``Connection``; ``Database.read`` and
``Database.write`` run them on SQLite or PostgreSQL. Writes that wait at the same moment share one
transaction, so a burst of small requests costs few disk syncs. ``write`` returns after the commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import sqlalchemy as sa
import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import DBAPIError, IntegrityError

from training.core.errors import StorageError
from training.storage.connections import Connections, connect

log = structlog.get_logger(__name__)

Connection = sa.Connection
"""What a statement runs on; callers name it without knowing SQLAlchemy."""

P = ParamSpec("P")
T = TypeVar("T")
Statement = Callable[Concatenate[Connection, P], T]

_FAILURES = (DBAPIError, OSError)
"""Of the database or the way to it; asyncpg raises ``OSError`` where nobody listens."""

MAX_GROUP = 256
MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(eq=False)
class _Pending:
    statement: Statement[[], Any]
    done: asyncio.Future[Any]


class _Outcome(NamedTuple):
    result: Any
    error: Exception | None


class Database:
    def __init__(self, url: str) -> None:
        self._url = sa.make_url(url)
        self._connections: Connections | None = None
        self._queue: asyncio.Queue[_Pending] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Opens the database and brings its schema up to date. Raises ``StorageError``."""
        try:
            self._connections = connect(self._url)
            await self._connections.transact(_upgrade)
        except _FAILURES as error:
            await self.close()
            raise StorageError(
                f"cannot open database {self._url.render_as_string(hide_password=True)}: "
                f"{_reason(error)}"
            ) from error
        self._task = asyncio.create_task(self._commit_groups(), name="database-writer")

    async def close(self) -> None:
        """Commits what is waiting, then lets go of the database."""
        if self._task is not None:
            await self._queue.join()
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._connections is not None:
            await self._connections.close()
            self._connections = None

    async def read(self, statement: Statement[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        assert self._connections is not None, "database is not started"
        try:
            return await self._connections.read(lambda c: statement(c, *args, **kwargs))
        except _FAILURES as error:
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

    async def _commit(self, group: Sequence[_Pending]) -> None:
        assert self._connections is not None
        statements = [pending.statement for pending in group]
        try:
            outcomes = await self._connections.transact(lambda c: _run_group(c, statements))
        except Exception as error:
            if len(group) > 1:
                # The transaction itself failed: find out who can still be served, one by one.
                for pending in group:
                    await self._commit([pending])
                return
            outcomes = [_Outcome(None, error)]
        for pending, outcome in zip(group, outcomes, strict=True):
            _settle(pending.done, outcome)


def _run_group(connection: Connection, statements: Sequence[Statement[[], Any]]) -> list[_Outcome]:
    """A statement alone fails with its transaction; in a group a savepoint protects the others."""
    if len(statements) == 1:
        return [_Outcome(statements[0](connection), None)]
    outcomes = []
    for statement in statements:
        try:
            with connection.begin_nested():
                outcomes.append(_Outcome(statement(connection), None))
        except Exception as error:
            if _is_failure(error):
                raise
            outcomes.append(_Outcome(None, error))
    return outcomes


def _settle(done: asyncio.Future[Any], outcome: _Outcome) -> None:
    if done.done():
        return
    error = outcome.error
    if error is None:
        done.set_result(outcome.result)
    elif _is_failure(error):
        log.error("database.write_failed", error=_reason(error))
        done.set_exception(StorageError(f"database write failed: {_reason(error)}"))
    else:
        done.set_exception(error)


def _is_failure(error: Exception) -> bool:
    """Whether the database failed, not the statement."""
    return isinstance(error, _FAILURES) and not isinstance(error, IntegrityError)


def _reason(error: Exception) -> str:
    return str(error.orig) if isinstance(error, DBAPIError) else str(error)


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
