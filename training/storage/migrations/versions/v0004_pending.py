"""What is pending is found by model and by session, whatever the history; a session's promises are
gone through a piece at a time; the newest checkpoint of a kind is found at once."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_PENDING = sa.text("status = 'pending'")


def upgrade() -> None:
    op.drop_index("ix_futures_pending", "futures")
    for name, columns in (
        ("ix_futures_pending", ["status", "session_id"]),
        ("ix_futures_pending_scope", ["scope", "seq"]),
    ):
        op.create_index(
            name,
            "futures",
            columns,
            unique=False,
            sqlite_where=_PENDING,
            postgresql_where=_PENDING,
        )
    op.drop_index("ix_futures_session_id", "futures")
    op.create_index("ix_futures_session_id", "futures", ["session_id", "request_id"], unique=False)
    op.create_index(
        op.f("ix_checkpoints_training_run_id_kind_created_at"),
        "checkpoints",
        ["training_run_id", "kind", "created_at"],
        unique=False,
    )


def downgrade() -> None:
    op.drop_index("ix_checkpoints_training_run_id_kind_created_at", "checkpoints")
    op.drop_index("ix_futures_session_id", "futures")
    op.create_index("ix_futures_session_id", "futures", ["session_id"], unique=False)
    op.drop_index("ix_futures_pending_scope", "futures")
    op.drop_index("ix_futures_pending", "futures")
    op.create_index(
        "ix_futures_pending",
        "futures",
        ["status"],
        unique=False,
        sqlite_where=_PENDING,
        postgresql_where=_PENDING,
    )
