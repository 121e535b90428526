"""Which database this is: directories of checkpoints say to which one they belong."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "identity",
        sa.Column("database_id", sa.String(length=40), nullable=False),
        sa.PrimaryKeyConstraint("database_id", name=op.f("pk_identity")),
    )


def downgrade() -> None:
    op.drop_table("identity")
