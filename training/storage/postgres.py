"""PostgreSQL through asyncpg: one connection writes, a few read.

The writing connection holds an advisory lock of the database. Who has lost the connection has lost
the lock too, so a server never writes beside another one that took its place.

A COMMIT whose answer was lost may have happened. PostgreSQL remembers what became of a transaction:
it is asked until it answers, and only what was not committed may be run again.
"""

from __future__ import annotations

import asyncio
import os
import socket
import uuid
from importlib.util import find_spec
from typing import Any, TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from training.core.errors import ConfigError, StorageError
from training.storage import lock
from training.storage.connections import FAILURES, NUM_READERS, Run

log = structlog.get_logger(__name__)

T = TypeVar("T")

_LOCK_KEY = 0x74696E6B6572  # "tinker"; advisory locks belong to one database
_CONNECT_TIMEOUT_S = 10.0
_COMMAND_TIMEOUT_S = 300.0
"""Only bounds a server that is gone without a word."""
_POLL_S = 0.1
_MAX_RETRY_DELAY_S = 5.0


class _NotCommitted(Exception):
    """The connection was lost, and the transaction with it."""


class Postgres:
    def __init__(self, url: sa.URL) -> None:
        if find_spec("asyncpg") is None:
            raise ConfigError("PostgreSQL needs asyncpg: pip install 'tinkercloud[postgresql]'")
        # It names this process to people, and to itself after a lost connection.
        name = f"tinkercloud {socket.gethostname()[:20]} pid {os.getpid()} {uuid.uuid4().hex[:8]}"
        self._name = name[:63]
        url = _for_asyncpg(url)
        self._writer = _engine(url, self._name, 1)
        self._reader = _engine(
            url, f"{name[:55]} reader", NUM_READERS, default_transaction_read_only="on"
        ).execution_options(isolation_level="REPEATABLE READ")
        self._trouble: str | None = None
        self._closing = asyncio.Event()

        @sa.event.listens_for(self._writer.sync_engine, "connect")
        def _take_over(connection: Any, record: Any) -> None:
            connection.run_async(self._prepare_writer)

    async def open(self) -> None:
        async with self._writer.connect() as connection:
            settings = (
                "current_setting('server_version_num')::int, current_setting('fsync')"
                ", current_setting('synchronous_standby_names')"
            )
            version, fsync, standbys = (
                await connection.execute(sa.text(f"SELECT {settings}"))
            ).one()
        if version < 130000:
            raise ConfigError("PostgreSQL 13 or newer is needed")
        if fsync != "on":
            log.warning("database.fsync_off", risk="a power cut may lose what was acknowledged")
        log.info("database.opened", version=version, synchronous_standbys=standbys)

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

    async def close(self) -> None:
        self._closing.set()
        await self._writer.dispose()
        await self._reader.dispose()

    async def _read(self, run: Run[T]) -> T:
        async with self._reader.connect() as connection:
            return await connection.run_sync(run)

    async def _attempt(self, run: Run[T]) -> T:
        """Raises ``_NotCommitted`` when the connection was lost and nothing came of it."""
        async with self._writer.connect() as connection:
            try:
                transaction = await connection.begin()
                result = await connection.run_sync(run)
                number = await _transaction_number(connection)
            except sa.exc.DBAPIError as error:
                if error.connection_invalidated:
                    raise _NotCommitted(str(error.orig)) from error
                raise
            try:
                await transaction.commit()
                return result
            except FAILURES as error:
                reason = str(error.orig) if isinstance(error, sa.exc.DBAPIError) else str(error)
                await connection.invalidate()
        if number is None or await self._was_committed(number, reason):
            return result
        raise _NotCommitted(reason)

    async def _was_committed(self, number: str, reason: str) -> bool:
        """What became of a transaction whose COMMIT was not answered. Waits for the database."""
        log.warning("database.commit_unanswered", transaction=number, error=reason)
        self._trouble = f"the database did not answer a commit ({reason})"
        delay_s = _POLL_S
        try:
            while True:
                try:
                    status = await self._status(number)
                except FAILURES as error:
                    if self._closing.is_set():
                        raise
                    log.warning("database.unreachable", transaction=number, error=str(error))
                else:
                    if status in ("committed", "aborted"):
                        log.info("database.commit_settled", transaction=number, status=status)
                        return status == "committed"
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _MAX_RETRY_DELAY_S)
        finally:
            self._trouble = None

    async def _status(self, number: str) -> str | None:
        """ "committed", "aborted", "in progress", or None if it is too long ago to be known."""
        async with self._writer.connect() as connection:
            query = sa.text("SELECT pg_xact_status(CAST(CAST(:number AS text) AS xid8))")
            status: str | None = await connection.scalar(query, {"number": number})
            return status

    async def _prepare_writer(self, connection: Any) -> None:
        """Every new writing connection: durable commits, and the lock."""
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
            " WHERE locktype = 'advisory' AND granted AND (classid::bigint << 32 | objid) = $1"
            " AND pg_locks.database = (SELECT oid FROM pg_database"
            " WHERE datname = current_database())",
            _LOCK_KEY,
        )
        for row in rows:
            if row["application_name"] == self._name:
                await connection.execute("SELECT pg_terminate_backend($1)", row["pid"])
        return ", ".join(row["application_name"] for row in rows) or "unknown"


def _engine(url: sa.URL, name: str, size: int, **settings: str) -> AsyncEngine:
    engine = create_async_engine(
        url,
        pool_size=size,
        max_overflow=0,
        pool_timeout=60.0,
        connect_args={
            "timeout": _CONNECT_TIMEOUT_S,
            "command_timeout": _COMMAND_TIMEOUT_S,
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
    return engine


async def _transaction_number(connection: AsyncConnection) -> str | None:
    """None where nothing was written, so that there is nothing to lose."""
    query = sa.text("SELECT CAST(pg_current_xact_id_if_assigned() AS text)")
    number: str | None = await connection.scalar(query)
    return number


def _without_nul(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
) -> tuple[str, Any]:
    """PostgreSQL's text holds no NUL; SQLite's does. U+FFFD stands for it, as in JSON viewers."""
    rows = [tuple(_clean(value) for value in row) for row in (parameters if many else [parameters])]
    return statement, rows if many else rows[0]


def _clean(value: Any) -> Any:
    return value.replace("\0", "\ufffd") if isinstance(value, str) and "\0" in value else value


def _for_asyncpg(url: sa.URL) -> sa.URL:
    """Also takes URLs in libpq's words: any driver, and ``sslmode``."""
    query = dict(url.query)
    if "sslmode" in query:
        query["ssl"] = query.pop("sslmode")
    return url.set(drivername="postgresql+asyncpg", query=query)
