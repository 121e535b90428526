"""The database schema as it is now; ``migrations/`` tells how it came to be."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(sa.TypeDecorator[datetime]):
    """Aware datetimes in and out; stored as naive UTC, because SQLite drops time zones."""

    impl = sa.DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("session_id", sa.String(200), primary_key=True),
    sa.Column("owner", sa.String(100), nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("last_heartbeat_at", UtcDateTime, nullable=False),
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("sdk_version", sa.Text),
    sa.Column("project_id", sa.Text),
    sa.Column("display_name", sa.Text),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("finish_reason", sa.String(20)),
    sa.Column("finish_detail", sa.Text),
    sa.Index(None, "status", "last_heartbeat_at"),
    sa.Index(None, "owner", "created_at"),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("model_id", sa.String(250), primary_key=True),
    sa.Column("session_id", sa.String(200), nullable=False),
    sa.Column("model_seq_id", sa.BigInteger, nullable=False),
    sa.Column("owner", sa.String(100), nullable=False),
    sa.Column("base_model", sa.String(300), nullable=False),
    sa.Column("lora", sa.JSON, nullable=False),
    sa.Column("optimizer", sa.String(50), nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("last_request_at", UtcDateTime, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("loaded_from", sa.Text),
    sa.Column("corrupted", sa.Boolean, nullable=False),
    sa.Column("fault", sa.Text),
    sa.UniqueConstraint("session_id", "model_seq_id"),
    sa.Index(None, "owner", "last_request_at"),
)

futures = sa.Table(
    "futures",
    metadata,
    sa.Column("request_id", sa.String(100), primary_key=True),
    sa.Column("kind", sa.String(30), nullable=False),
    sa.Column("scope", sa.String(300), nullable=False),
    sa.Column("seq", sa.BigInteger),
    sa.Column("owner", sa.String(100), nullable=False),
    sa.Column("session_id", sa.String(200), nullable=False),
    sa.Column("model_id", sa.String(250)),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("finished_at", UtcDateTime),
    sa.Column("completion", sa.BigInteger),
    sa.Column("error", sa.Text),
    sa.Column("category", sa.String(20)),
    # For bringing a model back: what the result was, what a failure did, who is to blame.
    sa.Column("digest", sa.LargeBinary(32)),
    sa.Column("effect", sa.String(20)),
    sa.Column("num_tokens", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("deaths", sa.Integer, nullable=False, server_default="0"),
    sa.Column("delivered_at", UtcDateTime),
    sa.UniqueConstraint("scope", "seq"),
    # Few futures are pending at any time, however long the history grows.
    sa.Index(
        "ix_futures_pending_scope",
        "scope",
        "seq",
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    ),
    # With the status, or SQLite would take the index of the session's whole history.
    sa.Index(
        "ix_futures_pending",
        "status",
        "session_id",
        sqlite_where=sa.text("status = 'pending'"),
        postgresql_where=sa.text("status = 'pending'"),
    ),
    sa.Index("ix_futures_scope_completion", "scope", "completion"),
    # The second column: a session's promises are gone through a piece at a time.
    sa.Index("ix_futures_session_id", "session_id", "request_id"),
    # Results that were fetched and still take room.
    sa.Index(
        "ix_futures_delivered_at",
        "delivered_at",
        sqlite_where=sa.text("delivered_at IS NOT NULL"),
        postgresql_where=sa.text("delivered_at IS NOT NULL"),
    ),
)

# Large bytes live beside the rows, so that scans of futures stay small.
payloads = sa.Table(
    "payloads",
    metadata,
    sa.Column("request_id", sa.String(100), primary_key=True),
    sa.Column("content_type", sa.String(100), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

results = sa.Table(
    "results",
    metadata,
    sa.Column("request_id", sa.String(100), primary_key=True),
    sa.Column("content_type", sa.String(100), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

snapshots = sa.Table(
    "snapshots",
    metadata,
    sa.Column("model_id", sa.String(250), primary_key=True),
    sa.Column("seq", sa.BigInteger, primary_key=True),
    sa.Column("directory", sa.String(300), nullable=False),
    sa.Column("with_optimizer", sa.Boolean, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
)

sampling_sessions = sa.Table(
    "sampling_sessions",
    metadata,
    sa.Column("sampling_session_id", sa.String(250), primary_key=True),
    sa.Column("session_id", sa.String(200), nullable=False),
    sa.Column("owner", sa.String(100), nullable=False),
    sa.Column("base_model", sa.String(300), nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("model_path", sa.Text),
    sa.Column("model_id", sa.String(250)),
    sa.Column("snapshot_id", sa.String(300)),
    sa.Column("num_clones", sa.BigInteger, nullable=False),
    # Of weights of its own: which operation saved them, and how large they are.
    sa.Column("saved_seq", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("size_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Index(None, "session_id"),
    sa.Index(None, "model_id"),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("path", sa.String(600), primary_key=True),
    sa.Column("training_run_id", sa.String(250), nullable=False),
    sa.Column("kind", sa.String(30), nullable=False),
    sa.Column("owner", sa.String(100), nullable=False),
    sa.Column("base_model", sa.String(300), nullable=False),
    sa.Column("lora", sa.JSON, nullable=False),
    sa.Column("optimizer", sa.String(50), nullable=False),
    sa.Column("directory", sa.String(300), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("public", sa.Boolean, nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.Index(None, "training_run_id", "created_at"),
    sa.Index(None, "training_run_id", "kind", "created_at"),
    sa.Index(None, "owner", "created_at"),
    sa.Index(None, "expires_at"),
)

identity = sa.Table(
    "identity",
    metadata,
    sa.Column("database_id", sa.String(40), primary_key=True),
)
"""One row."""
