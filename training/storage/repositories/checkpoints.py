"""Checkpoints that have a ``tinker://`` path."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from training.core.ids import CheckpointKind, TinkerPath
from training.core.records import Checkpoint
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
from training.storage.tables import checkpoints as table


def insert(connection: sa.Connection, checkpoint: Checkpoint) -> bool:
    return insert_new(connection, table, _values(checkpoint))


def replace(connection: sa.Connection, checkpoint: Checkpoint) -> str | None:
    """Stores, in place of one of the same path; returns the directory that is no longer used."""
    old = get(connection, checkpoint.path)
    connection.execute(sa.delete(table).where(table.c.path == str(checkpoint.path)))
    connection.execute(sa.insert(table).values(**_values(checkpoint)))
    return None if old is None else old.directory


def get(connection: sa.Connection, path: TinkerPath) -> Checkpoint | None:
    row = first(connection, sa.select(table).where(table.c.path == str(path)))
    return None if row is None else _checkpoint(row)


def owned_bytes(connection: sa.Connection, owner: str) -> int:
    query = sa.select(sa.func.sum(table.c.size_bytes)).where(table.c.owner == owner)
    return int(connection.execute(query).scalar_one() or 0)


def delete(connection: sa.Connection, checkpoint: Checkpoint) -> bool:
    """Only this one: False where another has taken its path."""
    statement = sa.delete(table).where(
        table.c.path == str(checkpoint.path), table.c.directory == checkpoint.directory
    )
    return connection.execute(statement).rowcount == 1


def of_run(connection: sa.Connection, training_run_id: str) -> list[Checkpoint]:
    query = (
        sa.select(table)
        .where(table.c.training_run_id == training_run_id)
        .order_by(table.c.created_at.desc(), table.c.path)
    )
    return [_checkpoint(row) for row in every(connection, query)]


def latest_of_run(
    connection: sa.Connection, training_run_id: str
) -> Mapping[CheckpointKind, Checkpoint]:
    """Of each kind the newest one, however many there are."""
    newest = (
        sa.select(table)
        .where(table.c.training_run_id == training_run_id, table.c.kind == kind)
        .order_by(table.c.created_at.desc(), table.c.path)
        .limit(1)
        for kind in CheckpointKind
    )
    query = sa.union_all(*(sa.select(each.subquery()) for each in newest))
    found = [_checkpoint(dict(row)) for row in connection.execute(query).mappings()]
    return {checkpoint.kind: checkpoint for checkpoint in found}


def page(connection: sa.Connection, owner: str, limit: int, offset: int) -> list[Checkpoint]:
    rows = owned_page(connection, table, owner, table.c.created_at, limit, offset)
    return [_checkpoint(row) for row in rows]


def num_owned(connection: sa.Connection, owner: str) -> int:
    return count(connection, table, table.c.owner == owner)


def set_expiry(connection: sa.Connection, path: TinkerPath, expires_at: datetime | None) -> bool:
    statement = sa.update(table).where(table.c.path == str(path)).values(expires_at=expires_at)
    return connection.execute(statement).rowcount == 1


def expired(connection: sa.Connection, now: datetime) -> list[Checkpoint]:
    return [
        _checkpoint(row)
        for row in every(connection, sa.select(table).where(table.c.expires_at <= now))
    ]


def directories(connection: sa.Connection) -> set[str]:
    return set(connection.execute(sa.select(table.c.directory)).scalars())


def _values(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": str(checkpoint.path),
        "training_run_id": checkpoint.path.training_run_id,
        "kind": checkpoint.kind,
        "owner": checkpoint.owner,
        "base_model": checkpoint.base_model,
        "lora": lora_to_json(checkpoint.lora),
        "optimizer": checkpoint.optimizer,
        "directory": checkpoint.directory,
        "size_bytes": checkpoint.size_bytes,
        "created_at": checkpoint.created_at,
        "user_metadata": dict(checkpoint.user_metadata),
        "public": checkpoint.public,
        "expires_at": checkpoint.expires_at,
    }


def _checkpoint(row: Row) -> Checkpoint:
    return Checkpoint(
        path=TinkerPath.parse(row["path"]),
        owner=row["owner"],
        base_model=row["base_model"],
        lora=lora_from_json(row["lora"]),
        optimizer=row["optimizer"],
        directory=row["directory"],
        size_bytes=row["size_bytes"],
        created_at=row["created_at"],
        user_metadata=row["user_metadata"],
        public=row["public"],
        expires_at=row["expires_at"],
    )
