"""The table of the catalogue. A change here needs a migration beside `migrations/versions`; a test compares the two."""

from __future__ import annotations

from sqlalchemy import BigInteger, Float, Index, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class GrammarRow(Base):
    """One compiled form, by what was asked for; the grammar's text is not kept.

    `request`: hash of specification, tokenizer, front end, the engines that were there and their plugins' settings. `key`: what the compiled form is called.
    """

    __tablename__ = "grammars"
    __table_args__ = (Index("ix_grammars_key", "key"), Index("ix_grammars_used_unix_s", "used_unix_s"))
    request: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(64))
    tokenizer_hash: Mapped[str] = mapped_column(String(64))
    engine: Mapped[str] = mapped_column(String(64))
    engine_version: Mapped[str] = mapped_column(String(128))
    compile_ms: Mapped[float] = mapped_column(Float)
    unenforced_json: Mapped[str] = mapped_column(Text)
    sha256: Mapped[str] = mapped_column(String(64))
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    data: Mapped[bytes] = mapped_column(LargeBinary)
    used_unix_s: Mapped[float] = mapped_column(Float)
