"""The operations of a model: what its state was computed from, and is computed from again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from training.core.errors import ErrorCategory
from training.core.records import (
    FutureKind,
    FutureResult,
    FutureStatus,
    Model,
    StoredOperation,
    WindowEffect,
)
from training.storage.repositories.rows import MAX_PARAMETERS, Row, every, first, insert_new
from training.storage.tables import futures as table
from training.storage.tables import payloads

IS_PENDING = table.c.status == sa.literal_column(f"'{FutureStatus.PENDING}'")
"""As a literal, so that the index of what is pending serves."""
_STORED = sa.select(
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
    query = _STORED.where(*where).order_by(table.c.seq)
    return [_stored_operation(row) for row in every(connection, query)]


def pending_of_model(
    connection: sa.Connection, model_id: str, until_seq: int | None
) -> list[StoredOperation]:
    """Those without an outcome, up to ``until_seq`` (None: all), in order."""
    where = [table.c.model_id == model_id, table.c.scope == model_scope(model_id), IS_PENDING]
    if until_seq is not None:
        where.append(table.c.seq <= until_seq)
    query = _STORED.where(*where).order_by(table.c.seq)
    return [_stored_operation(row) for row in every(connection, query)]


def fill_gap(
    connection: sa.Connection, model: Model, named: Sequence[tuple[int, str]], at: datetime
) -> list[StoredOperation]:
    """Failed operations in those places (with request ids for them) that are still empty. Nobody
    knows what was missing, so they do what a failed forward_backward does."""
    values = {
        "kind": FutureKind.FORWARD_BACKWARD,
        "scope": model_scope(model.model_id),
        "owner": model.owner,
        "session_id": model.session_id,
        "model_id": model.model_id,
        "status": FutureStatus.FAILED,
        "category": ErrorCategory.USER,
        "effect": WindowEffect.SPOILED,
        "created_at": at,
        "finished_at": at,
        "num_tokens": 0,
    }
    placed = []
    for seq, request_id in named:
        error = f"operation {seq} never arrived: the server stopped waiting for it"
        mine = {"seq": seq, "request_id": request_id, "error": error}
        if insert_new(connection, table, values | mine):
            outcome = FutureResult(FutureStatus.FAILED, error=error, effect=WindowEffect.SPOILED)
            kind = FutureKind.FORWARD_BACKWARD
            placed.append(StoredOperation(request_id, kind, seq, 0, 0, outcome, None))
    return placed


def pending_by_model(connection: sa.Connection) -> dict[str, int]:
    """Per model with unsettled operations, how many there are."""
    query = (
        sa.select(table.c.model_id, sa.func.count())
        .where(IS_PENDING, table.c.model_id.is_not(None), table.c.kind != FutureKind.SAMPLE)
        .group_by(table.c.model_id)
    )
    return {row[0]: int(row[1]) for row in connection.execute(query)}


def has_pending_until(connection: sa.Connection, model_id: str, seq: int) -> bool:
    query = sa.select(table.c.request_id).where(
        table.c.scope == model_scope(model_id), table.c.seq <= seq, IS_PENDING
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


def note_deaths(
    connection: sa.Connection, request_ids: Sequence[str], only_pending: bool = False
) -> None:
    """Of engines that ended while they ran them; ``only_pending`` spares what has an outcome."""
    where = [table.c.request_id.in_(request_ids), *([IS_PENDING] if only_pending else [])]
    connection.execute(sa.update(table).where(*where).values(deaths=table.c.deaths + 1))


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
