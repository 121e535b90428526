"""Sampling sessions."""

from __future__ import annotations

from dataclasses import asdict, replace

import sqlalchemy as sa

from training.core.records import SamplerKind, SamplingSession, SessionStatus
from training.storage.repositories.rows import Row, every, first, insert_new
from training.storage.tables import sampling_sessions as table
from training.storage.tables import sessions

_WEIGHTS = ("snapshot_id", "saved_seq", "size_bytes")


def insert(connection: sa.Connection, session: SamplingSession) -> bool:
    return insert_new(connection, table, asdict(session))


def get(connection: sa.Connection, sampling_session_id: str) -> SamplingSession | None:
    query = sa.select(table).where(table.c.sampling_session_id == sampling_session_id)
    row = first(connection, query)
    return None if row is None else _sampling_session(row)


def of_session(connection: sa.Connection, session_id: str) -> list[SamplingSession]:
    query = sa.select(table).where(table.c.session_id == session_id).order_by(table.c.created_at)
    return [_sampling_session(row) for row in every(connection, query)]


def join_inflight(connection: sa.Connection, session: SamplingSession) -> SamplingSession:
    """All inflight sessions of a model have the newest weights: moves the others to those of
    ``session``, or it to theirs where they were saved later. Returns it as it is to be stored."""
    where = (table.c.model_id == session.model_id, table.c.kind == SamplerKind.INFLIGHT)
    by_age = sa.select(table).where(*where).order_by(table.c.saved_seq.desc())
    newest = first(connection, by_age.limit(1))
    if newest is not None and newest["saved_seq"] > session.saved_seq:
        return replace(session, **{name: newest[name] for name in _WEIGHTS})
    moved = {name: value for name, value in asdict(session).items() if name in _WEIGHTS}
    connection.execute(sa.update(table).where(*where).values(moved))
    return session


def live(connection: sa.Connection) -> list[SamplingSession]:
    """Of every session that is still active."""
    query = (
        sa.select(table)
        .join(sessions, sessions.c.session_id == table.c.session_id)
        .where(sessions.c.status == SessionStatus.ACTIVE)
    )
    return [_sampling_session(row) for row in every(connection, query)]


def add_clone(connection: sa.Connection, sampling_session_id: str) -> int:
    """Counts one more client of the session and returns its number (1, 2, ...)."""
    where = table.c.sampling_session_id == sampling_session_id
    connection.execute(sa.update(table).where(where).values(num_clones=table.c.num_clones + 1))
    return int(connection.execute(sa.select(table.c.num_clones).where(where)).scalar_one())


def _sampling_session(row: Row) -> SamplingSession:
    return SamplingSession(**{**row, "kind": SamplerKind(row["kind"])})
