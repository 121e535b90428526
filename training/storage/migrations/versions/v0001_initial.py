"""The first schema: sessions, models, futures with payloads and results, samplers, checkpoints."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("path", sa.String(length=600), nullable=False),
        sa.Column("training_run_id", sa.String(length=250), nullable=False),
        sa.Column("kind", sa.String(length=30), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("base_model", sa.String(length=300), nullable=False),
        sa.Column("lora", sa.JSON(), nullable=False),
        sa.Column("optimizer", sa.String(length=50), nullable=False),
        sa.Column("directory", sa.String(length=300), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("public", sa.Boolean(), nullable=False),
        sa.Column("expires_at", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("path", name=op.f("pk_checkpoints")),
    )
    op.create_index(op.f("ix_checkpoints_expires_at"), "checkpoints", ["expires_at"], unique=False)
    op.create_index(
        op.f("ix_checkpoints_owner_created_at"),
        "checkpoints",
        ["owner", "created_at"],
        unique=False,
    )
    op.create_index(
        op.f("ix_checkpoints_training_run_id_created_at"),
        "checkpoints",
        ["training_run_id", "created_at"],
        unique=False,
    )
    op.create_table(
        "futures",
        sa.Column("request_id", sa.String(length=100), nullable=False),
        sa.Column("kind", sa.String(length=30), nullable=False),
        sa.Column("scope", sa.String(length=300), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=True),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("session_id", sa.String(length=200), nullable=False),
        sa.Column("model_id", sa.String(length=250), nullable=True),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("finished_at", sa.DateTime(), nullable=True),
        sa.Column("completion", sa.BigInteger(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("category", sa.String(length=20), nullable=True),
        sa.PrimaryKeyConstraint("request_id", name=op.f("pk_futures")),
        sa.UniqueConstraint("scope", "seq", name=op.f("uq_futures_scope_seq")),
    )
    op.create_index(
        "ix_futures_pending",
        "futures",
        ["status"],
        unique=False,
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    )
    op.create_index("ix_futures_scope_completion", "futures", ["scope", "completion"], unique=False)
    op.create_index("ix_futures_session_id", "futures", ["session_id"], unique=False)
    op.create_table(
        "models",
        sa.Column("model_id", sa.String(length=250), nullable=False),
        sa.Column("session_id", sa.String(length=200), nullable=False),
        sa.Column("model_seq_id", sa.BigInteger(), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("base_model", sa.String(length=300), nullable=False),
        sa.Column("lora", sa.JSON(), nullable=False),
        sa.Column("optimizer", sa.String(length=50), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("last_request_at", sa.DateTime(), nullable=False),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("loaded_from", sa.Text(), nullable=True),
        sa.Column("corrupted", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("model_id", name=op.f("pk_models")),
        sa.UniqueConstraint(
            "session_id", "model_seq_id", name=op.f("uq_models_session_id_model_seq_id")
        ),
    )
    op.create_index(
        op.f("ix_models_owner_last_request_at"),
        "models",
        ["owner", "last_request_at"],
        unique=False,
    )
    op.create_table(
        "payloads",
        sa.Column("request_id", sa.String(length=100), nullable=False),
        sa.Column("content_type", sa.String(length=100), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name=op.f("pk_payloads")),
    )
    op.create_table(
        "results",
        sa.Column("request_id", sa.String(length=100), nullable=False),
        sa.Column("content_type", sa.String(length=100), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name=op.f("pk_results")),
    )
    op.create_table(
        "sampling_sessions",
        sa.Column("sampling_session_id", sa.String(length=250), nullable=False),
        sa.Column("session_id", sa.String(length=200), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("base_model", sa.String(length=300), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("model_path", sa.Text(), nullable=True),
        sa.Column("model_id", sa.String(length=250), nullable=True),
        sa.Column("snapshot_id", sa.String(length=300), nullable=True),
        sa.Column("num_clones", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sampling_session_id", name=op.f("pk_sampling_sessions")),
    )
    op.create_index(
        op.f("ix_sampling_sessions_model_id"), "sampling_sessions", ["model_id"], unique=False
    )
    op.create_index(
        op.f("ix_sampling_sessions_session_id"), "sampling_sessions", ["session_id"], unique=False
    )
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.String(length=200), nullable=False),
        sa.Column("owner", sa.String(length=100), nullable=False),
        sa.Column("status", sa.String(length=20), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("last_heartbeat_at", sa.DateTime(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("user_metadata", sa.JSON(), nullable=False),
        sa.Column("sdk_version", sa.Text(), nullable=True),
        sa.Column("project_id", sa.Text(), nullable=True),
        sa.Column("display_name", sa.Text(), nullable=True),
        sa.Column("finished_at", sa.DateTime(), nullable=True),
        sa.Column("finish_reason", sa.String(length=20), nullable=True),
        sa.Column("finish_detail", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_sessions")),
    )
    op.create_index(
        op.f("ix_sessions_owner_created_at"), "sessions", ["owner", "created_at"], unique=False
    )
    op.create_index(
        op.f("ix_sessions_status_last_heartbeat_at"),
        "sessions",
        ["status", "last_heartbeat_at"],
        unique=False,
    )


def downgrade() -> None:
    for table in (
        "sessions",
        "sampling_sessions",
        "results",
        "payloads",
        "models",
        "futures",
        "checkpoints",
    ):
        op.drop_table(table)
