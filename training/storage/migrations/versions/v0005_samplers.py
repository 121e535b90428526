"""Which operation saved a sampler's own weights, so that inflight ones only move forward; and how
large they are, for quotas."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_COLUMNS = ("saved_seq", "size_bytes")


def upgrade() -> None:
    for name in _COLUMNS:
        column = sa.Column(name, sa.BigInteger(), nullable=False, server_default="0")
        op.add_column("sampling_sessions", column)


def downgrade() -> None:
    for name in _COLUMNS:
        op.drop_column("sampling_sessions", name)
