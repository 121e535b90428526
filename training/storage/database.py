"""Migrations and the group commit. Knows no table and no driver.

Statements are written once, as functions of a ``Connection``; ``Database.read`` and
``Database.write`` run them on SQLite or PostgreSQL. Writes that wait at the same moment share one
transaction, so a burst of small requests costs few disk syncs. ``write`` returns after the commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import sqlalchemy as sa
import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import ArgumentError, DataError, IntegrityError

from training.core.errors import ConfigError, InvalidRequest, StorageError
from training.storage.connections import FAILURES, Connections, Sqlite, reason_of
from training.storage.postgres import Postgres

log = structlog.get_logger(__name__)

Connection = sa.Connection
"""What a statement runs on; callers name it without knowing SQLAlchemy."""

P = ParamSpec("P")
T = TypeVar("T")
Statement = Callable[Concatenate[Connection, P], T]

CONNECTIONS: Mapping[str, Callable[[sa.URL], Connections]] = {
    "sqlite": Sqlite,
    "postgresql": Postgres,
    "postgres": Postgres,
}
"""The first word of a database's URL -> how to reach it."""
_MISFITS = (DataError, OverflowError)
"""Of a value that no column could hold."""

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
        """Opens nothing yet. Raises ``ConfigError`` for a URL that nothing here can open."""
        try:
            self._url = sa.make_url(url)
        except (ArgumentError, ValueError):
            raise ConfigError("the database's URL cannot be read") from None
        if self._url.drivername.split("+")[0] not in CONNECTIONS:
            raise ConfigError(
                f"no such kind of database: {self._url.drivername}; there are {list(CONNECTIONS)}"
            )
        self._connections: Connections | None = None
        self._queue: asyncio.Queue[_Pending] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes the database for this process and brings its schema up to date.

        Raises ``StorageError``, also where another server has it; ``ConfigError`` where the
        driver is missing.
        """
        self._connections = CONNECTIONS[self._url.drivername.split("+")[0]](self._url)
        try:
            await self._connections.open()
            await self._connections.upgrade(_upgrade)
        except BaseException as error:
            await self.close()
            if not isinstance(error, (*FAILURES, StorageError)):
                raise
            raise StorageError(
                f"cannot open database {self._shown()}: {reason_of(error)}"
            ) from error
        self._task = asyncio.create_task(self._commit_groups(), name="database-writer")

    def stop_waiting(self) -> None:
        """The server is about to end: a database that is away is not waited for any longer."""
        if self._connections is not None:
            self._connections.stop_waiting()

    async def close(self) -> None:
        """Commits what is waiting, unless the database is away; then lets go of it."""
        self.stop_waiting()
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
        except _MISFITS as error:
            raise _misfit(error) from error
        except FAILURES as error:
            raise StorageError(f"database read failed: {reason_of(error)}") from error

    async def write(self, statement: Statement[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs ``statement`` in a transaction and returns once it is committed.

        Errors of the statement itself (a ``TinkercloudError``, ``IntegrityError``) undo it alone.
        After any error nothing of it was committed. A statement may be run again before its
        transaction commits, so it does nothing but to its connection.
        """
        assert self._task is not None, "database is not started"
        assert self._connections is not None
        if trouble := self._connections.trouble():
            raise StorageError(f"database write failed: {trouble}")
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

    async def _commit(self, group: Sequence[_Pending]) -> bool:
        """Settles every write of a group; False if the database could not be reached at all."""
        assert self._connections is not None
        statements = [pending.statement for pending in group]
        began = False

        def run(connection: Connection) -> list[_Outcome]:
            nonlocal began
            began = True
            return _run_group(connection, statements)

        try:
            outcomes = await self._connections.transact(run)
        except Exception as error:
            if began and len(group) > 1:
                await self._commit_singly(group)
                return True
            # Nobody can be served: one after another would wait for the same lock or host.
            outcomes = [_Outcome(None, error)] * len(group)
        for pending, outcome in zip(group, outcomes, strict=True):
            _settle(pending.done, outcome)
        return began

    async def _commit_singly(self, group: Sequence[_Pending]) -> None:
        """The transaction itself failed: finds out who can still be served."""
        for number, pending in enumerate(group):
            if not await self._commit([pending]):
                error = StorageError("database write failed: the database was lost")
                for other in group[number + 1 :]:
                    _settle(other.done, _Outcome(None, error))
                return

    def _shown(self) -> str:
        """The URL without what may be secret."""
        return self._url.set(query={}).render_as_string(hide_password=True)


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
    elif isinstance(error, _MISFITS):
        done.set_exception(_misfit(error))
    elif _is_failure(error):
        log.error("database.write_failed", error=reason_of(error))
        done.set_exception(StorageError(f"database write failed: {reason_of(error)}"))
    else:
        done.set_exception(error)


def _is_failure(error: Exception) -> bool:
    """Whether the database failed, not the statement."""
    return isinstance(error, FAILURES) and not isinstance(error, (IntegrityError, DataError))


def _misfit(error: Exception) -> InvalidRequest:
    """Repeating it would not help, so it is the request's fault and no failure."""
    return InvalidRequest(f"a value of the request cannot be stored: {reason_of(error)[:300]}")


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    found = MigrationContext.configure(connection).get_current_heads()
    if not known.issuperset(found):
        raise StorageError(
            f"it was used by a newer version of tinkercloud (schema {', '.join(found)}; this one "
            f"knows up to {max(known)}): use that one. Nothing was changed."
        )
    command.upgrade(config, "head")
