"""The first catalogue of compiled grammars."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "grammars",
        sa.Column("request", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("tokenizer_hash", sa.String(64), nullable=False),
        sa.Column("engine", sa.String(64), nullable=False),
        sa.Column("engine_version", sa.String(128), nullable=False),
        sa.Column("compile_ms", sa.Float(), nullable=False),
        sa.Column("unenforced_json", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("used_unix_s", sa.Float(), nullable=False),
    )
    op.create_index("ix_grammars_key", "grammars", ["key"])
    op.create_index("ix_grammars_used_unix_s", "grammars", ["used_unix_s"])


def downgrade() -> None:
    op.drop_table("grammars")
