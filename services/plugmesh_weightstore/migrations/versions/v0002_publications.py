"""Versions that trainers publish: under which alias, in which order, from what, and when one was last asked for."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "publications",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("version", sa.String(64), sa.ForeignKey("models.version", ondelete="CASCADE"), nullable=False),
        sa.Column("alias", sa.String(128), nullable=False),
        sa.Column("base_version", sa.String(64), nullable=False),
        sa.Column("metadata_json", sa.Text(), nullable=False),
        sa.Column("published_unix_s", sa.Float(), nullable=False),
        sa.Column("resolved_unix_s", sa.Float(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_publications_version", "publications", ["version"])


def downgrade() -> None:
    op.drop_table("publications")
