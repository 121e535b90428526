"""PostgreSQL through asyncpg: one connection writes, a few read.

The writing connection holds an advisory lock of the database. Who has lost the connection has lost
the lock too, so a server never writes beside another one that took its place.

A COMMIT whose answer was lost may have happened. Every transaction leaves a token of its own in a
table of one row; who has the lock again reads there how the last one ended, and runs again only
what was not committed. (PostgreSQL's own ``pg_xact_status`` does not do: after a crash it can speak
of another transaction that got the same number.)
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import uuid
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from training.core.errors import ConfigError, StorageError
from training.storage import lock
from training.storage.connections import FAILURES, NUM_READERS, Run, reason_of

log = structlog.get_logger(__name__)

T = TypeVar("T")

_LOCK_KEY = 0x74696E6B6572  # "tinker"; advisory locks belong to one database
_CONNECT_TIMEOUT_S = 10.0
_COMMAND_TIMEOUT_S = 30.0
"""Of a statement; a server that gives no answer for so long is lost. Most that are gone are noticed
sooner, by ``_WATCH``."""
_POOL_TIMEOUT_S = 2 * _COMMAND_TIMEOUT_S
"""All connections may be lost at once: who waits for one outlasts that."""
_CLOSE_TIMEOUT_S = 5.0
_WATCH = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 20_000,
}
"""Of sockets, where the system knows them: who waits for an answer learns within 25 s that the
other machine, or the way to it, is gone."""
_POLL_S = 0.1
_MAX_RETRY_DELAY_S = 5.0


_commits = sa.Table(
    "last_commit",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("token", sa.String(32), nullable=False),
)
"""The one row says which transaction was committed last. The driver's own, not of the schema."""


class _NotCommitted(Exception):
    """The connection was lost, and the transaction with it."""


class Postgres:
    def __init__(self, url: sa.URL) -> None:
        if find_spec("asyncpg") is None:
            raise ConfigError("PostgreSQL needs asyncpg: pip install 'tinkercloud[postgresql]'")
        # It names this process to people, and to itself after a lost connection.
        name = f"tinkercloud {socket.gethostname()[:20]} pid {os.getpid()} {uuid.uuid4().hex[:8]}"
        self._name = name[:63]
        self._url = url = _for_asyncpg(url)
        limit_s = _COMMAND_TIMEOUT_S
        self._writer = _engine(url, self._name, 1, limit_s)
        self._reader = _engine(
            url, f"{name[:55]} reader", NUM_READERS, limit_s, default_transaction_read_only="on"
        ).execution_options(isolation_level="REPEATABLE READ")
        self._trouble: str | None = None
        self._closing = asyncio.Event()

        @sa.event.listens_for(self._writer.sync_engine, "connect")
        def _take_over(connection: Any, record: Any) -> None:
            asyncpg = connection.dbapi.asyncpg
            try:
                connection.run_async(self._prepare_writer)
            except (
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
            ) as error:
                # Unlike what connects or runs a statement, an event translates nothing.
                raise ConnectionError(str(error)) from error

    async def open(self) -> None:
        async with self._writer.begin() as connection:
            await connection.execute(sa.schema.CreateTable(_commits, if_not_exists=True))
            first = insert(_commits).values(id=1, token="").on_conflict_do_nothing()
            await connection.execute(first)
            settings = "current_setting('fsync'), current_setting('synchronous_standby_names')"
            fsync, standbys = (await connection.execute(sa.text(f"SELECT {settings}"))).one()
        if fsync != "on":
            log.warning("database.fsync_off", risk="a power cut may lose what was acknowledged")
        log.info("database.opened", synchronous_standbys=standbys)

    async def upgrade(self, run: Run[T]) -> T:
        """On a connection of its own without a limit; that of the writer holds the lock."""
        engine = _engine(self._url, f"{self._name[:54]} upgrade", 1, limit_s=None)
        try:
            async with engine.begin() as connection:
                return await connection.run_sync(run)
        finally:
            await engine.dispose()

    async def transact(self, run: Run[T]) -> T:
        """Once more where the connection turns out to be lost, as after the server's restart."""
        try:
            return await self._attempt(run)
        except _NotCommitted:
            pass
        try:
            return await self._attempt(run)
        except _NotCommitted as error:
            raise StorageError(f"database write failed: {error}") from error

    async def read(self, run: Run[T]) -> T:
        try:
            return await self._read(run)
        except sa.exc.DBAPIError as error:
            if not error.connection_invalidated:
                raise
        return await self._read(run)

    def trouble(self) -> str | None:
        return self._trouble

    def stop_waiting(self) -> None:
        self._closing.set()

    async def close(self) -> None:
        self.stop_waiting()
        for engine in (self._writer, self._reader):
            with suppress(TimeoutError):  # of a server that is gone without a word
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await engine.dispose()

    async def _read(self, run: Run[T]) -> T:
        async with self._reader.connect() as connection:
            return await connection.run_sync(run)

    async def _attempt(self, run: Run[T]) -> T:
        """Raises ``_NotCommitted`` when the connection was lost and nothing came of it."""
        token = uuid.uuid4().hex
        async with self._writer.connect() as connection:
            try:
                transaction = await connection.begin()
                result = await connection.run_sync(run)
                await connection.execute(sa.update(_commits).values(token=token))
            except sa.exc.DBAPIError as error:
                if error.connection_invalidated:
                    raise _NotCommitted(reason_of(error)) from error
                raise
            try:
                await transaction.commit()
                return result
            except FAILURES as error:
                reason = reason_of(error)
                await connection.invalidate()
        if await self._was_committed(token, reason):
            return result
        raise _NotCommitted(reason)

    async def _was_committed(self, token: str, reason: str) -> bool:
        """What became of a transaction whose COMMIT was not answered. Waits for the database."""
        log.warning("database.commit_unanswered", error=reason)
        self._trouble = f"the database did not answer a commit ({reason})"
        delay_s = _POLL_S
        try:
            while True:
                try:
                    # With the lock, so the connection it was sent on has ended, and it with it.
                    async with self._writer.connect() as connection:
                        found = await connection.scalar(sa.select(_commits.c.token))
                except FAILURES as error:
                    if self._closing.is_set():
                        raise
                    log.warning("database.unreachable", error=reason_of(error))
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._closing.wait(), delay_s)
                    delay_s = min(2 * delay_s, _MAX_RETRY_DELAY_S)
                else:
                    log.info("database.commit_settled", committed=found == token)
                    return bool(found == token)
        finally:
            self._trouble = None

    async def _prepare_writer(self, connection: Any) -> None:
        """Every new writing connection: durable commits, and the lock."""
        try:
            await self._take_lock(connection)
        except BaseException:
            connection.terminate()  # the pool forgets one whose event failed
            raise

    async def _take_lock(self, connection: Any) -> None:
        await connection.execute(
            "SELECT set_config('synchronous_commit', 'on', false)"
            " WHERE current_setting('synchronous_commit') = 'off'"
        )
        deadline_s = asyncio.get_running_loop().time() + lock.WAIT_S
        while not await connection.fetchval("SELECT pg_try_advisory_lock($1)", _LOCK_KEY):
            holder = await self._evict_myself(connection)
            if asyncio.get_running_loop().time() >= deadline_s:
                raise StorageError(lock.held_by("this database", holder))
            await asyncio.sleep(_POLL_S)

    async def _evict_myself(self, connection: Any) -> str:
        """Who holds the lock. A connection of ours that we have lost, but not the database, ends.

        Without this it would be held until TCP gives up, and a transaction on it stay open.
        """
        rows = await connection.fetch(
            "SELECT pid, application_name FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE locktype = 'advisory' AND granted"
            " AND (classid::bigint << 32 | objid::bigint) = $1"
            " AND pg_locks.database = (SELECT oid FROM pg_database"
            " WHERE datname = current_database())",
            _LOCK_KEY,
        )
        for row in rows:
            if row["application_name"] == self._name:
                await connection.execute("SELECT pg_terminate_backend($1)", row["pid"])
        return ", ".join(row["application_name"] for row in rows) or "unknown"


def _engine(
    url: sa.URL, name: str, size: int, limit_s: float | None, **settings: str
) -> AsyncEngine:
    """``limit_s``: of a statement."""
    engine = create_async_engine(
        url,
        pool_size=size,
        max_overflow=0,
        pool_timeout=_POOL_TIMEOUT_S,
        connect_args={
            "timeout": _CONNECT_TIMEOUT_S,
            "command_timeout": limit_s,
            "connection_class": _watchful_connection(),
            "server_settings": {
                "application_name": name,
                # A server that lost its network gives its lock back within a minute.
                "tcp_keepalives_idle": "30",
                "tcp_keepalives_interval": "10",
                "tcp_keepalives_count": "3",
                "idle_session_timeout": "0",
                "idle_in_transaction_session_timeout": "0",
                **settings,
            },
        },
    )
    sa.event.listen(engine.sync_engine, "before_cursor_execute", _without_nul, retval=True)
    sa.event.listen(engine.sync_engine, "handle_error", _translated)
    return engine


def _watchful_connection() -> type[Any]:
    """The driver's, with sockets that notice when nobody is there any more."""
    import asyncpg  # type: ignore[import-untyped]

    class Watchful(asyncpg.Connection):  # type: ignore[misc]
        def __init__(self, protocol: Any, transport: Any, *args: Any) -> None:
            super().__init__(protocol, transport, *args)
            found: socket.socket = transport.get_extra_info("socket")
            if found.family == socket.AF_UNIX:
                return
            found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _WATCH.items():
                if hasattr(socket, name):
                    found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    return Watchful


def _without_nul(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
) -> tuple[str, Any]:
    """PostgreSQL's text holds no NUL; SQLite's does. U+FFFD stands for it, as in JSON viewers."""
    rows = [tuple(_clean(value) for value in row) for row in (parameters if many else [parameters])]
    return statement, rows if many else rows[0]


def _clean(value: Any) -> Any:
    return value.replace("\0", "\ufffd") if isinstance(value, str) and "\0" in value else value


def _translated(context: sa.ExceptionContext) -> Exception | None:
    """Errors under the names that they should have."""
    error = context.original_exception
    if str(getattr(error, "sqlstate", "")).startswith("22"):  # a value fits no column
        return sa.exc.DataError(context.statement, None, error)
    if isinstance(error, TimeoutError) and context.connection is not None:
        # The connection is lost: on it a ROLLBACK would wait as long once more.
        context.is_disconnect = True
        silence = TimeoutError("the database did not answer in time")
        return sa.exc.OperationalError(
            context.statement, None, silence, connection_invalidated=True
        )
    return None


def _for_asyncpg(url: sa.URL) -> sa.URL:
    """Also takes URLs in libpq's words: any driver, and ``sslmode``. Raises ``ConfigError``."""
    import asyncpg

    query = dict(url.query)
    if "sslmode" in query:
        query["ssl"] = query.pop("sslmode")
    known = set(inspect.signature(asyncpg.connect).parameters)
    if unknown := set(query) - known:
        raise ConfigError(f"the database's URL has parameters that asyncpg lacks: {unknown}")
    return url.set(drivername="postgresql+asyncpg", query=query)
