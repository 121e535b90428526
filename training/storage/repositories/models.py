"""Models, which are training runs too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime

import sqlalchemy as sa

from training.core.records import MODEL_TRANSITIONS, Model, ModelStatus, SessionStatus
from training.storage.repositories.rows import (
    Row,
    count,
    every,
    first,
    insert_new,
    lora_from_json,
    lora_to_json,
    owned_page,
)
from training.storage.tables import models as table
from training.storage.tables import sessions


def insert(connection: sa.Connection, model: Model) -> bool:
    return insert_new(connection, table, {**asdict(model), "lora": lora_to_json(model.lora)})


def get(connection: sa.Connection, model_id: str) -> Model | None:
    row = first(connection, sa.select(table).where(table.c.model_id == model_id))
    return None if row is None else _model(row)


def of_session(connection: sa.Connection, session_id: str) -> list[Model]:
    query = sa.select(table).where(table.c.session_id == session_id).order_by(table.c.model_seq_id)
    return [_model(row) for row in every(connection, query)]


def with_status(connection: sa.Connection, statuses: Iterable[ModelStatus]) -> list[Model]:
    query = sa.select(table).where(table.c.status.in_(list(statuses)))
    return [_model(row) for row in every(connection, query)]


def is_live(connection: sa.Connection, model_id: str) -> bool:
    """Whether it may still be trained."""
    live = [ModelStatus.CREATING, ModelStatus.READY]
    return count(connection, table, table.c.model_id == model_id, table.c.status.in_(live)) == 1


def left_over(connection: sa.Connection) -> list[Model]:
    """Models of sessions that have ended which nobody has unloaded yet."""
    query = (
        sa.select(table)
        .join(sessions, sessions.c.session_id == table.c.session_id)
        .where(
            sessions.c.status != SessionStatus.ACTIVE,
            table.c.status.in_([ModelStatus.CREATING, ModelStatus.READY]),
        )
    )
    return [_model(row) for row in every(connection, query)]


def page(connection: sa.Connection, owner: str, limit: int, offset: int) -> list[Model]:
    rows = owned_page(connection, table, owner, table.c.last_request_at, limit, offset)
    return [_model(row) for row in rows]


def num_owned(connection: sa.Connection, owner: str) -> int:
    return count(connection, table, table.c.owner == owner)


def move(
    connection: sa.Connection, model_id: str, to: ModelStatus, fault: str | None = None
) -> bool:
    """Changes the status where the transition is allowed; tells whether it did."""
    sources = [source for source, targets in MODEL_TRANSITIONS.items() if to in targets]
    values = {"status": to} if fault is None else {"status": to, "fault": fault}
    statement = (
        sa.update(table)
        .where(table.c.model_id == model_id, table.c.status.in_(sources))
        .values(**values)
    )
    return connection.execute(statement).rowcount == 1


def mark_corrupted(connection: sa.Connection, model_id: str, fault: str) -> None:
    """The first fault is kept."""
    connection.execute(
        sa.update(table)
        .where(table.c.model_id == model_id, table.c.corrupted.is_(False))
        .values(corrupted=True, fault=fault)
    )


def touch(connection: sa.Connection, model_id: str, at: datetime) -> None:
    connection.execute(_TOUCH, {"id_": model_id, "last_request_at": at})


_TOUCH = sa.update(table).where(table.c.model_id == sa.bindparam("id_"))
"""With every operation."""


def _model(row: Row) -> Model:
    return Model(
        **{**row, "status": ModelStatus(row["status"]), "lora": lora_from_json(row["lora"])}
    )
