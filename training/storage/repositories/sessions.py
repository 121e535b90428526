"""Sessions."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime

import sqlalchemy as sa

from training.core.records import Session, SessionStatus
from training.storage.repositories.rows import Row, every, first, insert_new
from training.storage.tables import sessions as table


def insert(connection: sa.Connection, session: Session) -> bool:
    return insert_new(connection, table, {**asdict(session), "tags": list(session.tags)})


def get(connection: sa.Connection, session_id: str) -> Session | None:
    row = first(connection, sa.select(table).where(table.c.session_id == session_id))
    return None if row is None else _session(row)


def touch(connection: sa.Connection, beats: dict[str, datetime]) -> None:
    """Stores the newest heartbeat of many sessions at once."""
    statement = (
        sa.update(table)
        .where(table.c.session_id == sa.bindparam("b_id"))
        .values(last_heartbeat_at=sa.bindparam("b_at"))
    )
    connection.execute(statement, [{"b_id": key, "b_at": at} for key, at in beats.items()])


def active(connection: sa.Connection) -> list[Session]:
    query = sa.select(table).where(table.c.status == SessionStatus.ACTIVE)
    return [_session(row) for row in every(connection, query)]


def stale(connection: sa.Connection, before: datetime) -> list[Session]:
    query = sa.select(table).where(
        table.c.status == SessionStatus.ACTIVE, table.c.last_heartbeat_at < before
    )
    return [_session(row) for row in every(connection, query)]


def end(
    connection: sa.Connection,
    session_id: str,
    status: SessionStatus,
    at: datetime,
    reason: str,
    detail: str | None,
) -> bool:
    """Ends an active session; the first reason given wins."""
    statement = (
        sa.update(table)
        .where(table.c.session_id == session_id, table.c.status == SessionStatus.ACTIVE)
        .values(status=status, finished_at=at, finish_reason=reason, finish_detail=detail)
    )
    return connection.execute(statement).rowcount == 1


def _session(row: Row) -> Session:
    return Session(
        **{**row, "status": SessionStatus(row["status"]), "tags": tuple(row["tags"])},
    )
