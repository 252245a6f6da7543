"""Fixtures of databases for the tests of services with a catalogue; a package's conftest.py imports those it wants. Tests with PostgreSQL carry the mark `postgres`."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

__all__ = ["database_url", "postgres_server", "postgres_url"]


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a database on PLUGMESH_TEST_POSTGRES_URL's server, or on one started here and stopped at the end."""
    given = os.environ.get("PLUGMESH_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    found = [p for p in (shutil.which("initdb"), *sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"), reverse=True)) if p]
    if not found:
        pytest.skip("no PostgreSQL: set PLUGMESH_TEST_POSTGRES_URL or install its server")
    # The file behind a link on PATH lies beside the other programs.
    programs = Path(next((p for p in map(os.path.realpath, found) if (Path(p).parent / "postgres").exists()), found[0])).parent
    folder = Path(tempfile.mkdtemp(prefix="plugmesh-postgres-", dir="/tmp"))  # a short path, for the socket's sake
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        names = {u.pw_name for u in pwd.getpwall()}
        as_user = {"user": "postgres" if "postgres" in names else "nobody", "extra_groups": []}
        shutil.chown(folder, as_user["user"])
    env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC", "HOME": str(folder)}

    def run(*command: str) -> None:
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=60, **as_user)
        assert done.returncode == 0, done.stdout + done.stderr

    data = folder / "data"
    try:
        run(str(programs / "initdb"), "-D", str(data), "-U", "plugmesh", "-A", "trust", "-E", "UTF8", "--no-sync")
        # Only a socket in our own folder: no port to choose and nothing to reach from elsewhere.
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
        run(str(programs / "pg_ctl"), "-D", str(data), "-w", "-t", "50", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://plugmesh@/postgres?host={folder}"
        finally:
            run(str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A database of one test's own."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    engine = sa.create_engine(sa.make_url(postgres_server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as c:
        c.execute(sa.text(f"CREATE DATABASE {name}"))
    yield sa.make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
    with engine.connect() as c:
        c.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Every test that takes this runs on both databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store' / 'catalogue.sqlite3'}"
    return request.getfixturevalue("postgres_url")
