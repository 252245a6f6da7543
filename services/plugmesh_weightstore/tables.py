"""The tables of the catalogue. A change here needs a migration beside `migrations/versions`; a test compares the two."""

from __future__ import annotations

from sqlalchemy import BigInteger, Float, ForeignKey, Integer, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Base(DeclarativeBase):
    pass


class BlobRow(Base):
    """Bytes that some row refers to. The file itself may outlive its row until the next sweep."""

    __tablename__ = "blobs"
    sha256: Mapped[str] = mapped_column(String(64), primary_key=True)
    num_bytes: Mapped[int] = mapped_column(BigInteger)


class ModelRow(Base):
    """One version of a model: immutable once it is visible."""

    __tablename__ = "models"
    version: Mapped[str] = mapped_column(String(64), primary_key=True)
    name: Mapped[str] = mapped_column(String(256))
    architecture: Mapped[str] = mapped_column(String(64))
    config_json: Mapped[str] = mapped_column(Text)
    source: Mapped[str] = mapped_column(String(32))
    license: Mapped[str] = mapped_column(String(128))
    num_parameters: Mapped[int] = mapped_column(BigInteger)
    context_length: Mapped[int] = mapped_column(Integer)
    imported_unix_s: Mapped[float] = mapped_column(Float)

    aliases: Mapped[list[AliasRow]] = relationship(cascade="all, delete-orphan", order_by="AliasRow.position")
    forms: Mapped[list[FormRow]] = relationship(cascade="all, delete-orphan", order_by="FormRow.id")
    assets: Mapped[list[AssetRow]] = relationship(cascade="all, delete-orphan", order_by="AssetRow.name")


class AliasRow(Base):
    """A name by which a version is found; `position` 0 is the one that is shown."""

    __tablename__ = "aliases"
    alias: Mapped[str] = mapped_column(String(128), primary_key=True)
    version: Mapped[str] = mapped_column(ForeignKey("models.version", ondelete="CASCADE"), index=True)
    position: Mapped[int] = mapped_column(Integer)


class FormRow(Base):
    """All tensors of a version in one format: "source", "float32", "bfloat16"."""

    __tablename__ = "forms"
    __table_args__ = (UniqueConstraint("version", "format", name="uq_forms_version_format"),)
    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    version: Mapped[str] = mapped_column(ForeignKey("models.version", ondelete="CASCADE"))
    format: Mapped[str] = mapped_column(String(64))
    created_unix_s: Mapped[float] = mapped_column(Float)

    tensors: Mapped[list[TensorRow]] = relationship(cascade="all, delete-orphan", order_by="TensorRow.position")


class TensorRow(Base):
    """One tensor of a form. `shape` is written as "576,1536"."""

    __tablename__ = "tensors"
    form_id: Mapped[int] = mapped_column(ForeignKey("forms.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(String(256))
    dtype: Mapped[str] = mapped_column(String(32))
    shape: Mapped[str] = mapped_column(String(128))
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    num_bytes: Mapped[int] = mapped_column(BigInteger)


class AssetRow(Base):
    """A small file of a version: tokenizer, chat template, generation settings."""

    __tablename__ = "assets"
    version: Mapped[str] = mapped_column(ForeignKey("models.version", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(128), primary_key=True)
    sha256: Mapped[str] = mapped_column(ForeignKey("blobs.sha256"), index=True)
    num_bytes: Mapped[int] = mapped_column(BigInteger)


class PublicationRow(Base):
    """A version that a trainer published under an alias; the same version may come again."""

    __tablename__ = "publications"
    __table_args__ = {"sqlite_autoincrement": True}
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    version: Mapped[str] = mapped_column(ForeignKey("models.version", ondelete="CASCADE"), index=True)
    alias: Mapped[str] = mapped_column(String(128))
    base_version: Mapped[str] = mapped_column(String(64))
    metadata_json: Mapped[str] = mapped_column(Text)
    published_unix_s: Mapped[float] = mapped_column(Float)
    resolved_unix_s: Mapped[float] = mapped_column(Float)


class PreferenceRow(Base):
    """What holds for the whole catalogue; the key "default_model" holds a version."""

    __tablename__ = "preferences"
    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(String(256))
