"""What waits for operations that have not arrived."""

from __future__ import annotations

import sqlalchemy as sa

from training.storage.repositories.operations import IS_PENDING, model_scope
from training.storage.repositories.rows import first
from training.storage.tables import futures


def waits_for(connection: sa.Connection, model_id: str, seq: int) -> bool:
    """Whether later operations of the model were accepted and have no outcome."""
    query = sa.select(futures.c.request_id).where(
        futures.c.scope == model_scope(model_id), futures.c.seq > seq, IS_PENDING
    )
    return first(connection, query.limit(1)) is not None
