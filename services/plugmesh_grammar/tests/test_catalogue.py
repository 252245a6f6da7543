"""The catalogue of compiled grammars: a cache that never costs a request anything."""

import sqlite3
import threading
import time

import alembic.autogenerate
import alembic.migration
import pytest
import sqlalchemy as sa

from plugmesh.errors import ConfigError
from plugmesh_grammar import catalogue as module
from plugmesh_grammar.catalogue import Catalogue
from plugmesh_grammar.database import VERSION_TABLE, connect, migrate
from plugmesh_grammar.pool import Compiled
from plugmesh_grammar.tables import Base


def compiled(data=b"form", engine="e"):
    return Compiled(engine, "1", 12.5, (("not", "/a", "why"),), data)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'deep' / 'c.sqlite3'}"


def test_what_is_put_is_found_by_request_and_by_key(database_url):
    catalogue = Catalogue(database_url, None, max_bytes=1000)
    catalogue.put("r", "k", "t", compiled())

    assert ("k", compiled()) == catalogue.get("r")
    assert ("t", "k", compiled()) == catalogue.get_by_key("k")
    assert catalogue.get("other") is None and catalogue.get_by_key("other") is None
    assert ("k", compiled()) == Catalogue(database_url, None, max_bytes=1000).get("r")  # of another process


def test_the_second_writer_changes_nothing(database_url):
    catalogue = Catalogue(database_url, None, max_bytes=1000)
    catalogue.put("r", "k", "t", compiled())
    Catalogue(database_url, None, max_bytes=1000).put("r", "k", "t", compiled(b"another"))

    assert ("k", compiled()) == catalogue.get("r")


def test_the_least_recently_used_leave_when_there_is_no_room(database_url, monkeypatch):
    monkeypatch.setattr(module, "_TOUCH_S", 0)
    catalogue = Catalogue(database_url, None, max_bytes=25)
    for name in "abcd":
        catalogue.put(name, name, "t", compiled(b"x" * 10))
        time.sleep(0.002)
        catalogue.get("a")

    assert [True, False, False, True] == [catalogue.get(name) is not None for name in "abcd"]


def test_a_damaged_form_is_a_miss_and_goes(url, tmp_path):
    catalogue = Catalogue(url, None, max_bytes=1000)
    catalogue.put("r", "k", "t", compiled())
    with sqlite3.connect(tmp_path / "deep" / "c.sqlite3") as raw:
        raw.execute("UPDATE grammars SET data = x'00'")

    assert catalogue.get("r") is None
    catalogue.put("r", "k", "t", compiled())
    assert catalogue.get("r") is not None


def test_a_database_that_is_no_database_costs_nothing_but_a_count(tmp_path):
    (tmp_path / "c.sqlite3").write_bytes(b"this is not a database" * 100)
    catalogue = Catalogue(f"sqlite:///{tmp_path / 'c.sqlite3'}", None, max_bytes=1000)
    catalogue.put("r", "k", "t", compiled())

    assert catalogue.get("r") is None
    assert catalogue.num_failures == 1  # the second call left it alone


def test_a_database_that_breaks_later_costs_nothing_either(url, tmp_path):
    catalogue = Catalogue(url, None, max_bytes=1000)
    catalogue.put("r", "k", "t", compiled())
    with sqlite3.connect(tmp_path / "deep" / "c.sqlite3") as raw:
        raw.execute("DROP TABLE grammars")

    assert catalogue.get("r") is None
    assert catalogue.num_failures == 1


def test_the_migrations_make_the_tables_of_the_code_beside_those_of_others(database_url):
    engine = connect(database_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE alembic_version (version_num TEXT)")  # the weightstore's, in a shared database
        connection.exec_driver_sql("INSERT INTO alembic_version VALUES ('0099')")
    migrate(engine)
    migrate(engine)
    with engine.begin() as connection:
        context = alembic.migration.MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "include_object": lambda o, name, kind, *_: name != "alembic_version"})
        assert [] == alembic.autogenerate.compare_metadata(context, Base.metadata)
        assert "0099" == connection.scalar(sa.text("SELECT version_num FROM alembic_version"))


def test_processes_that_start_together_migrate_once(database_url):
    errors = []

    def work():
        catalogue = Catalogue(database_url, None, max_bytes=1000)
        catalogue.put("r", "k", "t", compiled())
        if catalogue.get("r") != ("k", compiled()) or catalogue.num_failures:
            errors.append(catalogue.num_failures)
        catalogue.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []


@pytest.mark.postgres
def test_a_damaged_form_is_a_miss_on_postgresql_too(postgres_url):
    catalogue = Catalogue(postgres_url, None, max_bytes=1000)
    catalogue.put("r", "k", "t", compiled())
    engine = connect(postgres_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE grammars SET data = 'x'::bytea"))
    engine.dispose()

    assert catalogue.get("r") is None
    catalogue.put("r", "k", "t", compiled())
    assert catalogue.get("r") == ("k", compiled())
    catalogue.close()


@pytest.mark.postgres
def test_connections_that_were_ended_are_made_again(postgres_url):
    catalogue = Catalogue(postgres_url, None, max_bytes=1000)
    catalogue.put("r", "k", "t", compiled())
    engine = connect(postgres_url)
    with engine.begin() as connection:  # ends the catalogue's own connections
        connection.execute(sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"))
    engine.dispose()

    assert catalogue.get("r") == ("k", compiled())  # connections are tried before they are used
    assert catalogue.num_failures == 0
    catalogue.close()


@pytest.mark.parametrize("url", ["nonsense", "sqlite://", "mysql://u@h/d"])
def test_a_url_that_cannot_work_is_a_configuration_error(url):
    with pytest.raises(ConfigError):
        connect(url)
