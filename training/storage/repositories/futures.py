"""Promises: what was accepted, what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from training.core.errors import ErrorCategory
from training.core.records import (
    STATEFUL_KINDS,
    Future,
    FutureKind,
    FutureResult,
    FutureStatus,
    ModelStatus,
    NewFuture,
    SessionStatus,
)
from training.storage.repositories.operations import IS_PENDING
from training.storage.repositories.rows import (
    MAX_PARAMETERS,
    Row,
    every,
    first,
    insert_new,
)
from training.storage.tables import futures as table
from training.storage.tables import models, payloads, results, sessions


class Stored(NamedTuple):
    """``is_new`` False: the request is a repetition; ``request_id`` is the first one's."""

    request_id: str
    is_new: bool


class Payload(NamedTuple):
    future: Future
    content_type: str
    body: bytes


# Of every promise; making them anew each time took as long as running them.
_INSERT_PAYLOAD = sa.insert(payloads)
_INSERT_RESULT = sa.insert(results)
_DELETE_PAYLOAD = sa.delete(payloads).where(payloads.c.request_id == sa.bindparam("id_"))
_IS_PENDING = (table.c.request_id == sa.bindparam("id_"), IS_PENDING)
_PENDING = sa.select(table.c.scope, table.c.kind).where(*_IS_PENDING)
_NEWEST = sa.select(sa.func.max(table.c.completion)).where(table.c.scope == sa.bindparam("scope_"))
_FINISH = sa.update(table).where(*_IS_PENDING)


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
        "num_tokens": new.num_tokens,
    }
    if not insert_new(connection, table, values):
        query = sa.select(table.c.request_id).where(
            table.c.scope == new.scope, table.c.seq == new.seq
        )
        return Stored(connection.execute(query).scalar_one(), is_new=False)
    body = {"request_id": new.request_id, "content_type": new.content_type, "body": new.payload}
    connection.execute(_INSERT_PAYLOAD, body)
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
            error="this result was deleted: it had been fetched, or its session has ended",
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
    """Settles a pending promise, once. Returns its completion number, or None if it was settled.

    The payload goes, unless the operation may have to be run again to bring its model back.
    """
    row = connection.execute(_PENDING, {"id_": request_id}).mappings().first()
    if row is None:
        return None
    completion = _newest(connection, row["scope"]) + 1
    is_done = outcome.status is FutureStatus.DONE
    values = {
        "status": outcome.status,
        "finished_at": at,
        "completion": completion,
        "error": outcome.error or None,
        "category": None if is_done else outcome.category,
        "effect": outcome.effect,
        "digest": outcome.digest() if is_done else None,
        "deaths": 0,  # whatever ended engines while it ran, it did not
    }
    if connection.execute(_FINISH, {"id_": request_id, **values}).rowcount != 1:
        return None
    if is_done:
        body = {
            "request_id": request_id,
            "content_type": outcome.content_type,
            "body": outcome.body,
        }
        connection.execute(_INSERT_RESULT, body)
    if not (is_done and row["kind"] in STATEFUL_KINDS):
        connection.execute(_DELETE_PAYLOAD, {"id_": request_id})
    return completion


def _newest(connection: sa.Connection, scope: str) -> int:
    return int(connection.execute(_NEWEST, {"scope_": scope}).scalar_one() or 0)


def pending(connection: sa.Connection, kind: FutureKind) -> list[Payload]:
    """Every unsettled promise of a kind with its payload, in the order of acceptance."""
    query = (
        _columns(payloads.c.content_type, payloads.c.body)
        .select_from(table.join(payloads, table.c.request_id == payloads.c.request_id))
        .where(IS_PENDING, table.c.kind == kind)
        .order_by(table.c.created_at, table.c.seq)
    )
    found = []
    for row in every(connection, query):
        values = dict(row)
        content_type, body = values.pop("content_type"), values.pop("body")
        found.append(Payload(_future(values), content_type, body))
    return found


def unsettled(connection: sa.Connection) -> list[Future]:
    """Every unsettled promise, without its payload."""
    query = _columns().where(IS_PENDING)
    return [_future(row) for row in every(connection, query)]


def fail_pending(
    connection: sa.Connection, error: str, at: datetime, *where: sa.ColumnElement[bool]
) -> int:
    """Fails every unsettled promise of which ``where`` is true, as ``finish`` would; returns how
    many."""
    query = (
        sa.select(table.c.request_id, table.c.scope)
        .where(IS_PENDING, *where)
        .order_by(table.c.created_at, table.c.seq)
    )
    failure = {
        "status": FutureStatus.FAILED,
        "error": error,
        "category": ErrorCategory.USER,
        "finished_at": at,
    }
    newest: dict[str, int] = {}
    changes = []
    for request_id, scope in connection.execute(query).all():
        newest[scope] = 1 + (newest[scope] if scope in newest else _newest(connection, scope))
        changes.append({"id_": request_id, "completion": newest[scope], **failure})
    if changes:
        connection.execute(_FINISH, changes)
        connection.execute(_DELETE_PAYLOAD, [{"id_": change["id_"]} for change in changes])
    return len(changes)


def fail_pending_of_session(
    connection: sa.Connection, session_id: str, error: str, at: datetime
) -> int:
    return fail_pending(connection, error, at, table.c.session_id == session_id)


def pending_of_session(connection: sa.Connection, session_id: str) -> set[str]:
    query = sa.select(table.c.request_id).where(table.c.session_id == session_id, IS_PENDING)
    return set(connection.execute(query).scalars())


def drop_bytes(connection: sa.Connection, request_ids: Sequence[str]) -> None:
    """Deletes payloads and results, of at most ``MAX_PARAMETERS`` promises; the rows remain."""
    for bytes_of in (payloads, results):
        connection.execute(sa.delete(bytes_of).where(bytes_of.c.request_id.in_(request_ids)))


def drop_bytes_of_session(
    connection: sa.Connection, session_id: str, after: str, limit: int
) -> str | None:
    """Those of its next ``limit`` promises that are settled. Returns where to go on, None at the
    end."""
    query = (
        sa.select(table.c.request_id, table.c.status)
        .where(table.c.session_id == session_id, table.c.request_id > after)
        .order_by(table.c.request_id)
        .limit(limit)
    )
    found = connection.execute(query).all()
    settled = [request_id for request_id, status in found if status != FutureStatus.PENDING]
    drop_bytes(connection, settled)
    return found[-1][0] if len(found) == limit else None


def fail_orphans(connection: sa.Connection, error: str, at: datetime) -> int:
    """Operations whose model has ended, and samples whose request is gone: nobody else would ever
    settle them."""
    live = sa.select(models.c.model_id).where(
        models.c.status.in_([ModelStatus.CREATING, ModelStatus.READY])
    )
    no_model = sa.and_(table.c.kind != FutureKind.SAMPLE, table.c.model_id.not_in(live))
    known = sa.select(payloads.c.request_id)
    no_request = sa.and_(table.c.kind == FutureKind.SAMPLE, table.c.request_id.not_in(known))
    return fail_pending(connection, error, at, sa.or_(no_model, no_request))


def ended_sessions_with_pending(connection: sa.Connection) -> list[str]:
    query = _of_ended(table.c.session_id).where(IS_PENDING).distinct()
    return list(connection.execute(query).scalars())


def bytes_of_ended_sessions(connection: sa.Connection) -> list[str]:
    """Promises of sessions that have ended which still have a payload or a result."""
    # From the bytes, which are few, not from the history, which is long.
    ended = _of_ended(table.c.request_id)
    query = sa.union(
        ended.join(payloads, payloads.c.request_id == table.c.request_id),
        ended.join(results, results.c.request_id == table.c.request_id),
    )
    return list(connection.execute(query).scalars())


def _of_ended(column: sa.Column[str]) -> sa.Select[str]:
    ended = sa.and_(
        sessions.c.session_id == table.c.session_id, sessions.c.status != SessionStatus.ACTIVE
    )
    return sa.select(column).select_from(table).join(sessions, ended)


def mark_delivered(connection: sa.Connection, request_ids: Sequence[str], at: datetime) -> None:
    for start in range(0, len(request_ids), MAX_PARAMETERS):
        part = request_ids[start : start + MAX_PARAMETERS]
        connection.execute(
            sa.update(table)
            .where(table.c.request_id.in_(part), table.c.delivered_at.is_(None))
            .values(delivered_at=at)
        )


def drop_delivered(connection: sa.Connection, before: datetime, limit: int) -> int:
    """Deletes up to ``limit`` results that were fetched before that; returns how many."""
    query = sa.select(table.c.request_id).where(table.c.delivered_at < before).limit(limit)
    found = list(connection.execute(query).scalars())
    if found:
        connection.execute(sa.delete(results).where(results.c.request_id.in_(found)))
        connection.execute(
            sa.update(table).where(table.c.request_id.in_(found)).values(delivered_at=None)
        )
    return len(found)


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
        table.c.deaths,
        table.c.completion,
        *more,
    )


def _future(row: Row) -> Future:
    return Future(**{**row, "kind": FutureKind(row["kind"]), "status": FutureStatus(row["status"])})
