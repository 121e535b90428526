"""Snapshots of models; what a replay compares and needs to know of operations."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "snapshots",
        sa.Column("model_id", sa.String(length=250), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("directory", sa.String(length=300), nullable=False),
        sa.Column("with_optimizer", sa.Boolean(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("model_id", "seq", name=op.f("pk_snapshots")),
    )
    op.add_column("models", sa.Column("fault", sa.Text(), nullable=True))
    for column in (
        sa.Column("digest", sa.LargeBinary(length=32), nullable=True),
        sa.Column("effect", sa.String(length=20), nullable=True),
        sa.Column("num_tokens", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("deaths", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("delivered_at", sa.DateTime(), nullable=True),
    ):
        op.add_column("futures", column)
    op.create_index(
        "ix_futures_delivered_at",
        "futures",
        ["delivered_at"],
        unique=False,
        sqlite_where=sa.text("delivered_at IS NOT NULL"),
        postgresql_where=sa.text("delivered_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_futures_delivered_at", "futures")
    for column in ("digest", "effect", "num_tokens", "deaths", "delivered_at"):
        op.drop_column("futures", column)
    op.drop_column("models", "fault")
    op.drop_table("snapshots")
