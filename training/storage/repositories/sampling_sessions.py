"""Sampling sessions."""

from __future__ import annotations

from dataclasses import asdict

import sqlalchemy as sa

from training.core.records import SamplerKind, SamplingSession, SessionStatus
from training.storage.repositories.rows import Row, every, first, insert_new
from training.storage.tables import sampling_sessions as table
from training.storage.tables import sessions


def insert(connection: sa.Connection, session: SamplingSession) -> bool:
    return insert_new(connection, table, asdict(session))


def get(connection: sa.Connection, sampling_session_id: str) -> SamplingSession | None:
    query = sa.select(table).where(table.c.sampling_session_id == sampling_session_id)
    row = first(connection, query)
    return None if row is None else _sampling_session(row)


def of_session(connection: sa.Connection, session_id: str) -> list[SamplingSession]:
    query = sa.select(table).where(table.c.session_id == session_id).order_by(table.c.created_at)
    return [_sampling_session(row) for row in every(connection, query)]


def move_inflight(connection: sa.Connection, model_id: str, snapshot_id: str) -> list[str]:
    """Points every inflight session of a model at its newest weights; returns the old ones."""
    where = (table.c.model_id == model_id, table.c.kind == SamplerKind.INFLIGHT)
    old = set(connection.execute(sa.select(table.c.snapshot_id).where(*where)).scalars())
    connection.execute(sa.update(table).where(*where).values(snapshot_id=snapshot_id))
    return sorted(snapshot for snapshot in old if snapshot is not None)


def ephemeral_snapshots(connection: sa.Connection, session_id: str) -> list[str]:
    """Snapshots that exist only for this session's unnamed samplers."""
    query = (
        sa.select(table.c.snapshot_id)
        .where(table.c.session_id == session_id, table.c.model_id.is_not(None))
        .distinct()
    )
    return [snapshot for snapshot in connection.execute(query).scalars() if snapshot is not None]


def live_snapshots(connection: sa.Connection) -> set[str]:
    """Snapshots of every sampler whose session is still active."""
    query = (
        sa.select(table.c.snapshot_id)
        .join(sessions, sessions.c.session_id == table.c.session_id)
        .where(sessions.c.status == SessionStatus.ACTIVE, table.c.snapshot_id.is_not(None))
    )
    return set(connection.execute(query).scalars())


def add_clone(connection: sa.Connection, sampling_session_id: str) -> int:
    """Counts one more client of the session and returns its number (1, 2, ...)."""
    where = table.c.sampling_session_id == sampling_session_id
    connection.execute(sa.update(table).where(where).values(num_clones=table.c.num_clones + 1))
    return int(connection.execute(sa.select(table.c.num_clones).where(where)).scalar_one())


def _sampling_session(row: Row) -> SamplingSession:
    return SamplingSession(**{**row, "kind": SamplerKind(row["kind"])})
