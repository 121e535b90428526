"""What the repositories share: records to rows and back, inserts that tolerate repetition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from training.backends.base import LoraSpec

Row = Mapping[str, Any]
MAX_PARAMETERS = 500
"""Ids in one statement, at most."""


def insert_new(connection: sa.Connection, table: sa.Table, values: Row) -> bool:
    """Inserts unless a unique key is taken; tells whether it did."""
    statement = _insert_new(table, connection.dialect.name)
    return connection.execute(statement, dict(values)).rowcount == 1


@lru_cache
def _insert_new(table: sa.Table, dialect: str) -> sa.Insert:
    insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
    return insert(table).on_conflict_do_nothing()


def first(connection: sa.Connection, query: sa.Select[Any]) -> Row | None:
    row = connection.execute(query).mappings().first()
    return None if row is None else dict(row)


def every(connection: sa.Connection, query: sa.Select[Any]) -> list[Row]:
    return [dict(row) for row in connection.execute(query).mappings()]


def count(connection: sa.Connection, table: sa.Table, *where: sa.ColumnElement[bool]) -> int:
    query = sa.select(sa.func.count()).select_from(table).where(*where)
    return int(connection.execute(query).scalar_one())


def owned_page(
    connection: sa.Connection,
    table: sa.Table,
    owner: str,
    newest: sa.ColumnElement[Any],
    limit: int,
    offset: int,
) -> list[Row]:
    """An owner's rows, newest first; the primary key decides between equals."""
    query = (
        sa.select(table)
        .where(table.c.owner == owner)
        .order_by(newest.desc(), *table.primary_key)
        .limit(limit)
        .offset(offset)
    )
    return every(connection, query)


def lora_to_json(lora: LoraSpec) -> dict[str, Any]:
    return asdict(lora)


def lora_from_json(value: Mapping[str, Any]) -> LoraSpec:
    return LoraSpec(**value)
