"""Promises: what was accepted, what came of it."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from training.core.errors import ErrorCategory
from training.core.records import (
    Future,
    FutureKind,
    FutureResult,
    FutureStatus,
    NewFuture,
)
from training.storage.repositories.rows import Row, every, first, insert_new
from training.storage.tables import futures as table
from training.storage.tables import payloads, results


class Stored(NamedTuple):
    """``is_new`` False: the request is a repetition; ``request_id`` is the first one's."""

    request_id: str
    is_new: bool


class Payload(NamedTuple):
    future: Future
    content_type: str
    body: bytes


def insert(connection: sa.Connection, new: NewFuture, at: datetime) -> Stored:
    """Stores promise and payload; a repeated (scope, seq) gets the promise of the first."""
    values = {
        "request_id": new.request_id,
        "kind": new.kind,
        "scope": new.scope,
        "seq": new.seq,
        "owner": new.owner,
        "session_id": new.session_id,
        "model_id": new.model_id,
        "status": FutureStatus.PENDING,
        "created_at": at,
    }
    if not insert_new(connection, table, values):
        query = sa.select(table.c.request_id).where(
            table.c.scope == new.scope, table.c.seq == new.seq
        )
        return Stored(connection.execute(query).scalar_one(), is_new=False)
    body = {"request_id": new.request_id, "content_type": new.content_type, "body": new.payload}
    connection.execute(sa.insert(payloads).values(**body))
    return Stored(new.request_id, is_new=True)


def get(connection: sa.Connection, request_id: str) -> Future | None:
    row = first(connection, _columns().where(table.c.request_id == request_id))
    return None if row is None else _future(row)


def result(connection: sa.Connection, request_id: str) -> FutureResult | None:
    """None for an id that was never given out."""
    query = (
        sa.select(
            table.c.status,
            table.c.error,
            table.c.category,
            results.c.content_type,
            results.c.body,
        )
        .select_from(table.outerjoin(results, table.c.request_id == results.c.request_id))
        .where(table.c.request_id == request_id)
    )
    row = first(connection, query)
    if row is None:
        return None
    if row["status"] == FutureStatus.DONE and row["body"] is None:
        return FutureResult(
            FutureStatus.FAILED,
            error="this result was deleted when its session ended",
            category=ErrorCategory.USER,
        )
    return FutureResult(
        status=FutureStatus(row["status"]),
        body=row["body"] or b"",
        content_type=row["content_type"] or "application/json",
        error=row["error"] or "",
        category=ErrorCategory(row["category"] or ErrorCategory.SERVER),
    )


def finish(
    connection: sa.Connection, request_id: str, outcome: FutureResult, at: datetime
) -> int | None:
    """Settles a pending promise, once. Returns its completion number, or None if it was settled."""
    scope = sa.select(table.c.scope).where(table.c.request_id == request_id).scalar_subquery()
    newest = sa.select(sa.func.max(table.c.completion)).where(table.c.scope == scope)
    completion = int(connection.execute(newest).scalar_one() or 0) + 1
    statement = (
        sa.update(table)
        .where(table.c.request_id == request_id, table.c.status == FutureStatus.PENDING)
        .values(
            status=outcome.status,
            finished_at=at,
            completion=completion,
            error=outcome.error or None,
            category=outcome.category if outcome.status is not FutureStatus.DONE else None,
        )
    )
    if connection.execute(statement).rowcount != 1:
        return None
    if outcome.status is FutureStatus.DONE:
        body = {
            "request_id": request_id,
            "content_type": outcome.content_type,
            "body": outcome.body,
        }
        connection.execute(sa.insert(results).values(**body))
    return completion


def pending(connection: sa.Connection, kind: FutureKind) -> list[Payload]:
    """Every unsettled promise of a kind with its payload, in the order of acceptance."""
    query = (
        _columns(payloads.c.content_type, payloads.c.body)
        .select_from(table.join(payloads, table.c.request_id == payloads.c.request_id))
        .where(table.c.status == FutureStatus.PENDING, table.c.kind == kind)
        .order_by(table.c.created_at, table.c.seq)
    )
    found = []
    for row in every(connection, query):
        values = dict(row)
        content_type, body = values.pop("content_type"), values.pop("body")
        found.append(Payload(_future(values), content_type, body))
    return found


def fail_pending(connection: sa.Connection, error: str, at: datetime, but: FutureKind) -> int:
    """Fails every unsettled promise except those of kind ``but``; returns how many."""
    statement = (
        sa.update(table)
        .where(table.c.status == FutureStatus.PENDING, table.c.kind != but)
        .values(
            status=FutureStatus.FAILED,
            error=error,
            category=ErrorCategory.SERVER,
            finished_at=at,
        )
    )
    return connection.execute(statement).rowcount


def drop_bytes(connection: sa.Connection, session_id: str) -> None:
    """Deletes payloads and results of a session's settled promises; the rows remain."""
    settled = sa.select(table.c.request_id).where(
        table.c.session_id == session_id, table.c.status != FutureStatus.PENDING
    )
    for bytes_of in (payloads, results):
        connection.execute(sa.delete(bytes_of).where(bytes_of.c.request_id.in_(settled)))


def completions(
    connection: sa.Connection, scope: str, after: int, low_seq: int, high_seq: int, limit: int
) -> list[Future]:
    """Settled promises of a scope with ``low_seq <= seq < high_seq``, oldest completion first."""
    query = (
        _columns()
        .where(
            table.c.scope == scope,
            table.c.completion > after,
            table.c.seq >= low_seq,
            table.c.seq < high_seq,
        )
        .order_by(table.c.completion)
        .limit(limit)
    )
    return [_future(row) for row in every(connection, query)]


def _columns(*more: sa.ColumnElement[object]) -> sa.Select[tuple[object, ...]]:
    return sa.select(
        table.c.request_id,
        table.c.kind,
        table.c.scope,
        table.c.seq,
        table.c.owner,
        table.c.session_id,
        table.c.model_id,
        table.c.status,
        table.c.created_at,
        table.c.finished_at,
        table.c.completion,
        *more,
    )


def _future(row: Row) -> Future:
    return Future(**{**row, "kind": FutureKind(row["kind"]), "status": FutureStatus(row["status"])})
