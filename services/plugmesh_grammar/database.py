"""The catalogue's database: SQLite in WAL mode or PostgreSQL, where it may live beside other services' tables."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import alembic.command
import alembic.config
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from plugmesh.errors import ConfigError

VERSION_TABLE = "grammar_alembic_version"  # not Alembic's default, which the weightstore has in the same database
_MIGRATION_LOCK = 0x6772616D               # any number, the same in all processes
_KEY = "services.grammar.database_url"


def connect(url: str, password: str | None = None) -> sa.Engine:
    """Nothing is opened yet, but for the folder of a SQLite file. Raises ConfigError: the URL is not valid, or of another database."""
    try:
        parsed = sa.make_url(url)
        if password is not None:
            parsed = parsed.set(password=password)
        backend = parsed.get_backend_name()
        if backend == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
            return sa.create_engine(parsed, pool_size=4, pool_pre_ping=True, pool_timeout=5, connect_args={"connect_timeout": 3})
        if backend != "sqlite" or parsed.database in (None, "", ":memory:"):
            raise ConfigError("the catalogue needs a PostgreSQL database or the file of a SQLite one", key=_KEY)
    except (ArgumentError, NoSuchModuleError) as e:
        raise ConfigError("not a valid database URL", key=_KEY) from e
    Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(parsed.set(drivername="sqlite"), connect_args={"timeout": 5, "check_same_thread": False}, pool_size=4, pool_timeout=5)

    @event.listens_for(engine, "connect")
    def _on_connect(dbapi_connection, record):  # type: ignore[no-untyped-def] # the driver's own types
        dbapi_connection.isolation_level = None  # transactions begin where SQLAlchemy says, not at the first INSERT
        for pragma in ("busy_timeout=5000", "synchronous=NORMAL"):
            dbapi_connection.execute(f"PRAGMA {pragma}")
        for attempt in range(100):  # two that make a new file a WAL at once do not wait for each other: one is told that it is locked
            try:
                dbapi_connection.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                if attempt == 99:
                    raise
                time.sleep(0.05)

    @event.listens_for(engine, "begin")
    def _on_begin(connection: sa.Connection) -> None:
        # Every transaction here writes, if only the time of use; a reader that becomes a writer later could fail.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def migrate(engine: sa.Engine, revision: str = "head") -> None:
    """Brings the table to `revision` in one transaction; concurrent calls, also of other processes, wait for each other."""
    config = alembic.config.Config()
    config.set_main_option("script_location", "plugmesh_grammar:migrations")
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, revision)
