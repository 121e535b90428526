"""The operations of a model: what its state was computed from, and is computed from again."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from training.core.records import (
    FutureKind,
    FutureResult,
    FutureStatus,
    StoredOperation,
    WindowEffect,
)
from training.storage.repositories.rows import MAX_PARAMETERS, Row, every, first
from training.storage.tables import futures as table
from training.storage.tables import payloads


def model_scope(model_id: str) -> str:
    """The scope that numbers a model's operations."""
    return f"model:{model_id}"


def of_model(
    connection: sa.Connection, model_id: str, after_seq: int, until: int | None
) -> list[StoredOperation]:
    """A model's operations with ``after_seq < seq < until`` (None: to the last), in order."""
    where = [table.c.scope == model_scope(model_id), table.c.seq > after_seq]
    if until is not None:
        where.append(table.c.seq < until)
    query = (
        sa.select(
            table.c.request_id,
            table.c.kind,
            table.c.seq,
            table.c.num_tokens,
            table.c.deaths,
            table.c.digest,
            table.c.status,
            table.c.effect,
            table.c.error,
        )
        .where(*where)
        .order_by(table.c.seq)
    )
    return [_stored_operation(row) for row in every(connection, query)]


def pending_by_model(connection: sa.Connection) -> dict[str, int]:
    """Per model with unsettled operations, how many there are."""
    query = (
        sa.select(table.c.model_id, sa.func.count())
        .where(
            table.c.status == FutureStatus.PENDING,
            table.c.model_id.is_not(None),
            table.c.kind != FutureKind.SAMPLE,
        )
        .group_by(table.c.model_id)
    )
    return {row[0]: int(row[1]) for row in connection.execute(query)}


def has_pending_until(connection: sa.Connection, model_id: str, seq: int) -> bool:
    query = sa.select(table.c.request_id).where(
        table.c.scope == model_scope(model_id),
        table.c.seq <= seq,
        table.c.status == FutureStatus.PENDING,
    )
    return first(connection, query.limit(1)) is not None


def has_payloads(connection: sa.Connection, request_ids: Sequence[str]) -> bool:
    """Whether every one of them still has its payload."""
    found = 0
    for start in range(0, len(request_ids), MAX_PARAMETERS):
        part = request_ids[start : start + MAX_PARAMETERS]
        query = sa.select(sa.func.count()).where(payloads.c.request_id.in_(part))
        found += int(connection.execute(query).scalar_one())
    return found == len(request_ids)


def payload(connection: sa.Connection, request_id: str) -> bytes | None:
    query = sa.select(payloads.c.body).where(payloads.c.request_id == request_id)
    body = connection.execute(query).scalar_one_or_none()
    return None if body is None else bytes(body)


def drop_covered_payloads(
    connection: sa.Connection, model_id: str, after_seq: int, until_seq: int
) -> None:
    """Deletes what no replay needs any more: payloads with ``after_seq < seq <= until_seq``."""
    covered = sa.select(table.c.request_id).where(
        table.c.scope == model_scope(model_id),
        table.c.seq > after_seq,
        table.c.seq <= until_seq,
        table.c.status != FutureStatus.PENDING,
    )
    connection.execute(sa.delete(payloads).where(payloads.c.request_id.in_(covered)))


def note_deaths(connection: sa.Connection, request_ids: Sequence[str]) -> None:
    connection.execute(
        sa.update(table)
        .where(table.c.request_id.in_(request_ids))
        .values(deaths=table.c.deaths + 1)
    )


def _stored_operation(row: Row) -> StoredOperation:
    kind, status = FutureKind(row["kind"]), FutureStatus(row["status"])
    outcome = None
    if status is not FutureStatus.PENDING:
        effect = WindowEffect(row["effect"]) if row["effect"] else None
        if effect is None and status is not FutureStatus.DONE:
            # An older version did not say; a pass that failed left its window incomplete.
            effect = WindowEffect.SPOILED if kind is FutureKind.FORWARD_BACKWARD else None
        outcome = FutureResult(status, error=row["error"] or "", effect=effect)
    return StoredOperation(
        request_id=row["request_id"],
        kind=kind,
        seq=row["seq"],
        num_tokens=row["num_tokens"],
        deaths=row["deaths"],
        outcome=outcome,
        digest=None if row["digest"] is None else bytes(row["digest"]),
    )
