"""The first catalogue: models, aliases, forms, tensors, assets, blobs, preferences."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "blobs",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "models",
        sa.Column("version", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("architecture", sa.String(64), nullable=False),
        sa.Column("config_json", sa.Text(), nullable=False),
        sa.Column("source", sa.String(32), nullable=False),
        sa.Column("license", sa.String(128), nullable=False),
        sa.Column("num_parameters", sa.BigInteger(), nullable=False),
        sa.Column("context_length", sa.Integer(), nullable=False),
        sa.Column("imported_unix_s", sa.Float(), nullable=False),
    )
    op.create_table(
        "aliases",
        sa.Column("alias", sa.String(128), primary_key=True),
        sa.Column("version", sa.String(64), sa.ForeignKey("models.version", ondelete="CASCADE"), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
    )
    op.create_index("ix_aliases_version", "aliases", ["version"])
    op.create_table(
        "forms",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("version", sa.String(64), sa.ForeignKey("models.version", ondelete="CASCADE"), nullable=False),
        sa.Column("format", sa.String(64), nullable=False),
        sa.Column("created_unix_s", sa.Float(), nullable=False),
        sa.UniqueConstraint("version", "format", name="uq_forms_version_format"),
    )
    op.create_table(
        "tensors",
        sa.Column("form_id", sa.Integer(), sa.ForeignKey("forms.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("dtype", sa.String(32), nullable=False),
        sa.Column("shape", sa.String(128), nullable=False),
        sa.Column("sha256", sa.String(64), sa.ForeignKey("blobs.sha256"), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_tensors_sha256", "tensors", ["sha256"])
    op.create_table(
        "assets",
        sa.Column("version", sa.String(64), sa.ForeignKey("models.version", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("sha256", sa.String(64), sa.ForeignKey("blobs.sha256"), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
    )
    op.create_index("ix_assets_sha256", "assets", ["sha256"])
    op.create_table(
        "preferences",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(256), nullable=False),
    )


def downgrade() -> None:
    for table in ("preferences", "assets", "tensors", "forms", "aliases", "models", "blobs"):
        op.drop_table(table)
