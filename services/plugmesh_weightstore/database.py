"""Connections to the catalogue's database (SQLite in WAL mode, or PostgreSQL) and its migrations."""

from __future__ import annotations

from pathlib import Path

import alembic.command
import alembic.config
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from plugmesh.errors import ConfigError

_MIGRATION_LOCK = 0x706C7567  # any number, the same in all processes


def connect(url: str, password: str | None = None) -> tuple[sa.Engine, sa.Engine]:
    """Engines on one pool: (for reading, for writing). A write transaction excludes other writers on SQLite from its start.

    Without that, SQLite fails a transaction that reads first and writes later whenever somebody else wrote in between.

    Raises:
        ConfigError: The URL is not valid, or of another database.
    """
    try:
        parsed = sa.make_url(url)
        if password is not None:
            parsed = parsed.set(password=password)
        if parsed.get_backend_name() == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
            engine = sa.create_engine(parsed, pool_size=8, pool_pre_ping=True, pool_timeout=30, connect_args={"connect_timeout": 10})
            return engine, engine
        if parsed.get_backend_name() != "sqlite":
            raise ConfigError(f"the catalogue needs sqlite or postgresql, not {parsed.get_backend_name()!r}", key="services.weightstore.database_url")
    except (ArgumentError, NoSuchModuleError) as e:
        raise ConfigError("not a valid database URL", key="services.weightstore.database_url") from e
    if parsed.database in (None, "", ":memory:"):
        raise ConfigError("the catalogue needs a database file", key="services.weightstore.database_url")
    Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed.set(drivername="sqlite"), connect_args={"timeout": 30, "check_same_thread": False}, pool_size=8, pool_timeout=30)

    @event.listens_for(engine, "connect")
    def _on_connect(dbapi_connection, record):  # type: ignore[no-untyped-def] # the driver's own types
        dbapi_connection.isolation_level = None  # transactions begin where SQLAlchemy says, not at the first INSERT
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
            dbapi_connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("plugmesh_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine, engine.execution_options(plugmesh_writes=True)


def migrate(writer: sa.Engine, revision: str = "head") -> None:
    """Brings the tables to `revision` in one transaction; concurrent calls, also of other processes, wait for each other."""
    config = alembic.config.Config()
    config.set_main_option("script_location", "plugmesh_weightstore:migrations")
    config.set_main_option("path_separator", "os")
    with writer.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, revision)
