"""Which database this is, whatever URL leads to it."""

from __future__ import annotations

import uuid

import sqlalchemy as sa

from training.storage.files import Owner
from training.storage.tables import identity as table
from training.storage.tables import sessions


def get_or_create(connection: sa.Connection) -> Owner:
    database_id = connection.execute(sa.select(table.c.database_id)).scalar_one_or_none()
    if database_id is None:
        database_id = uuid.uuid4().hex
        connection.execute(sa.insert(table).values(database_id=database_id))
    used = connection.execute(sa.select(sa.exists(sa.select(sessions)))).scalar_one()
    return Owner(database_id, is_new=not used)
