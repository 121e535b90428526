"""Snapshots of models: where the newest good state of each is."""

from __future__ import annotations

from dataclasses import asdict

import sqlalchemy as sa

from training.core.records import ModelStatus, SessionStatus, Snapshot
from training.storage.repositories import models, operations
from training.storage.repositories.rows import Row, every
from training.storage.tables import models as model_table
from training.storage.tables import sessions
from training.storage.tables import snapshots as table


def add(connection: sa.Connection, snapshot: Snapshot, kept: int) -> list[str] | None:
    """Stores one, forgets all but the newest ``kept`` of its model, and deletes the payloads that
    the oldest of those covers. Returns the directories that are no longer used.

    None, and nothing stored, where it would cover an operation that has no outcome yet, because
    what that would have been could not be told any more; and where the model has ended.
    """
    if not models.is_live(connection, snapshot.model_id):
        return None
    if operations.has_pending_until(connection, snapshot.model_id, snapshot.seq):
        return None
    before = of_model(connection, snapshot.model_id)
    unused = [old.directory for old in before if old.seq == snapshot.seq]
    forget(connection, snapshot.model_id, snapshot.seq)
    connection.execute(sa.insert(table).values(**asdict(snapshot)))
    held = [snapshot, *(old for old in before if old.seq != snapshot.seq)]
    held.sort(key=lambda each: -each.seq)
    for old in held[kept:]:
        unused.append(old.directory)
        forget(connection, old.model_id, old.seq)
    if len(held) >= kept:
        after = held[kept].seq if len(held) > kept else -1
        operations.drop_covered_payloads(connection, snapshot.model_id, after, held[kept - 1].seq)
    return unused


def of_model(connection: sa.Connection, model_id: str) -> list[Snapshot]:
    """Newest first."""
    query = sa.select(table).where(table.c.model_id == model_id).order_by(table.c.seq.desc())
    return [_snapshot(row) for row in every(connection, query)]


def newest_seqs(connection: sa.Connection) -> dict[str, int]:
    """Per model."""
    query = sa.select(table.c.model_id, sa.func.max(table.c.seq)).group_by(table.c.model_id)
    return {row[0]: int(row[1]) for row in connection.execute(query)}


def forget(connection: sa.Connection, model_id: str, seq: int) -> None:
    connection.execute(sa.delete(table).where(table.c.model_id == model_id, table.c.seq == seq))


def forget_model(connection: sa.Connection, model_id: str) -> list[str]:
    """Returns the directories that are no longer used."""
    unused = [snapshot.directory for snapshot in of_model(connection, model_id)]
    connection.execute(sa.delete(table).where(table.c.model_id == model_id))
    return unused


def forget_ended(connection: sa.Connection) -> None:
    """Of models that were unloaded, or whose session has ended whatever became of them."""
    ended = sa.select(model_table.c.model_id).where(
        sa.or_(
            model_table.c.status == ModelStatus.UNLOADED,
            model_table.c.session_id.in_(
                sa.select(sessions.c.session_id).where(sessions.c.status != SessionStatus.ACTIVE)
            ),
        )
    )
    connection.execute(sa.delete(table).where(table.c.model_id.in_(ended)))


def directories(connection: sa.Connection) -> set[str]:
    return set(connection.execute(sa.select(table.c.directory)).scalars())


def _snapshot(row: Row) -> Snapshot:
    return Snapshot(**row)
