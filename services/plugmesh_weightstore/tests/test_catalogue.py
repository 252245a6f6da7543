"""The catalogue on SQLite and on PostgreSQL."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from plugmesh.errors import ConfigError, InvalidRequest, NotFound
from plugmesh.types import ModelConfig
from plugmesh_weightstore.blobs import Blob
from plugmesh_weightstore.catalogue import Catalogue, StoredModel, StoredTensor, alias_from, check_alias
from plugmesh_weightstore.database import connect, migrate
from plugmesh_weightstore.tables import Base

CONFIG = ModelConfig(
    architecture="llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
    max_position=64, rms_norm_eps=1e-5, rope_theta=1e4, rope_style="half", tie_word_embeddings=True,
)  # fmt: skip


def blob(n: int, num_bytes: int = 10) -> Blob:
    return Blob(f"{n:064x}", num_bytes)


def add(c: Catalogue, tensors: tuple[int, ...] = (1, 2), assets: tuple[int, ...] = (9,), name: str = "Tiny", alias: str = "", **kwargs) -> StoredModel:
    stored = [StoredTensor(f"t{n}", "Q4_1", (2, 3), blob(n)) for n in tensors]
    return c.add_model(
        CONFIG, stored, [(f"a{n}.json", blob(n)) for n in assets], source="gguf", name=name, license="x", num_parameters=6, alias=alias, **kwargs
    )


@pytest.fixture
def catalogue(database_url: str):
    c = Catalogue(database_url)
    yield c
    c.close()


def test_tables_are_those_of_the_migrations(database_url: str) -> None:
    reader, writer = connect(database_url)
    migrate(writer)
    migrate(writer)  # nothing to do
    with reader.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
        revision = MigrationContext.configure(connection).get_current_revision()
    reader.dispose()

    assert differences == []
    assert revision == "0002"


def test_processes_that_start_together_migrate_once(database_url: str) -> None:
    errors: list[BaseException] = []

    def start() -> None:
        try:
            Catalogue(database_url).close()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)

    assert errors == []


def test_a_model_is_found_by_alias_title_version_and_as_default(catalogue: Catalogue) -> None:
    with pytest.raises(NotFound):
        catalogue.find("")
    model = add(catalogue, name="Tiny Model 1B", alias="tiny")

    assert model.aliases == ("tiny", "tiny-model-1b")
    for name in ("tiny", "tiny-model-1b", "Tiny Model 1B", model.version, model.version[:12], ""):
        assert catalogue.find(name) == model
    for name in ("tin", model.version[:11], "0" * 64, "x" * 5000):
        with pytest.raises(NotFound):
            catalogue.find(name)
    assert (model.stored_bytes, model.formats, model.assets) == (30, ("source",), (("a9.json", blob(9)),))
    assert catalogue.tensors(model.version, "source") == [StoredTensor("t1", "Q4_1", (2, 3), blob(1)), StoredTensor("t2", "Q4_1", (2, 3), blob(2))]
    assert catalogue.tensors(model.version, "bfloat16") is None


def test_the_same_content_again_only_adds_a_name(catalogue: Catalogue) -> None:
    first = add(catalogue, alias="one")
    second = add(catalogue, alias="two")

    assert second.version == first.version
    assert second.aliases == ("one", "tiny", "two")
    assert len(catalogue.list_models()) == 1


def test_a_wanted_name_moves_and_a_title_does_not(catalogue: Catalogue) -> None:
    old, new = add(catalogue, (1,), alias="prod"), add(catalogue, (2,), alias="prod")

    assert catalogue.find("prod").version == new.version
    assert catalogue.find("tiny").version == old.version
    assert catalogue.find(f"tiny-{new.version[:8]}").version == new.version
    assert catalogue.find("").version == old.version  # the first model stays the default until told otherwise
    catalogue.set_default(new.version)
    assert catalogue.find("").version == new.version


def test_the_version_follows_content_and_nothing_else(catalogue: Catalogue) -> None:
    base = add(catalogue)

    assert add(catalogue, name="Other Title").version == base.version
    assert add(catalogue, (2, 1)).version == base.version
    assert add(catalogue, (1, 3)).version != base.version
    assert add(catalogue, assets=(8,)).version != base.version
    other = catalogue.add_model(
        dataclasses.replace(CONFIG, rope_theta=2e4), [StoredTensor("t1", "Q4_1", (2, 3), blob(1)), StoredTensor("t2", "Q4_1", (2, 3), blob(2))],
        [("a9.json", blob(9))], source="gguf", name="Tiny", license="", num_parameters=6,
    )  # fmt: skip
    assert other.version != base.version


def test_a_form_is_added_once_and_forgotten_alone(catalogue: Catalogue) -> None:
    model = add(catalogue)
    packed = [StoredTensor("t1", "bfloat16", (2, 3), blob(5)), StoredTensor("t2", "bfloat16", (2, 3), blob(1))]
    errors: list[BaseException] = []

    def pack() -> None:
        try:
            catalogue.add_form(model.version, "bfloat16", packed)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=pack) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)

    assert errors == []
    assert catalogue.find("").formats == ("source", "bfloat16")
    assert catalogue.find("").stored_bytes == 40  # one blob is shared by both forms
    assert catalogue.tensors(model.version, "bfloat16") == packed
    catalogue.drop_form(model.version, "bfloat16")
    assert catalogue.find("").formats == ("source",)
    assert catalogue.referenced_blobs() == {blob(n).sha256 for n in (1, 2, 9)}


def test_removing_keeps_what_others_use(catalogue: Catalogue) -> None:
    one, two = add(catalogue, (1, 2), alias="one"), add(catalogue, (2, 3), alias="two")
    catalogue.add_form(one.version, "float32", [StoredTensor("t1", "float32", (2, 3), blob(6))])

    catalogue.remove("one")

    assert [m.version for m in catalogue.list_models()] == [two.version]
    assert catalogue.referenced_blobs() == {blob(n).sha256 for n in (2, 3, 9)}
    assert (catalogue.has_blob(blob(1).sha256), catalogue.has_blob(blob(2).sha256)) == (None, 10)
    for name in ("one", one.version, ""):  # it was the default
        with pytest.raises(NotFound):
            catalogue.find(name)
    with pytest.raises(NotFound):
        catalogue.add_form(one.version, "bfloat16", [])
    with pytest.raises(NotFound):
        catalogue.remove("one")
    with pytest.raises(InvalidRequest):
        catalogue.remove("")


def test_concurrent_imports_of_overlapping_models_all_arrive(catalogue: Catalogue) -> None:
    errors: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for _ in range(3):
                add(catalogue, (1, 2, n % 2 + 3), alias=f"m{n}", name=f"title {n}")
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)

    assert errors == []
    assert len(catalogue.list_models()) == 2
    assert {catalogue.find(f"m{n}").version for n in (0, 2)}.isdisjoint({catalogue.find(f"m{n}").version for n in (1, 3)})


def test_an_interrupted_transaction_shows_nothing(catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise OSError("power is gone")

    monkeypatch.setattr(catalogue, "_add_aliases", fail)
    with pytest.raises(OSError, match="power"):
        add(catalogue)

    assert catalogue.list_models() == [] and catalogue.referenced_blobs() == set()


def test_a_readers_view_does_not_wait_for_a_writer(catalogue: Catalogue) -> None:
    add(catalogue, alias="one")
    with catalogue._write.begin() as session:
        session.execute(sa.text("DELETE FROM preferences"))

        assert catalogue.find("one").aliases[0] == "one"
        assert catalogue.find("").aliases[0] == "one"  # not yet committed


def test_imports_of_unchanged_files_are_remembered_while_the_model_is_there(catalogue: Catalogue) -> None:
    model = add(catalogue)
    catalogue.note_import("f" * 64, model.version)

    assert catalogue.noted_import("f" * 64) == model.version
    assert catalogue.noted_import("e" * 64) is None
    catalogue.remove(model.version)
    assert catalogue.noted_import("f" * 64) is None


def test_names() -> None:
    assert alias_from("Smollm2 135M 8k Lc100K Mix1 Ep2") == "smollm2-135m-8k-lc100k-mix1-ep2"
    assert alias_from("///") == "model" and alias_from("deadbeefdeadbeef") == "model-deadbeefdeadbeef"
    assert check_alias("hf:owner/repo@v1") == "hf:owner/repo@v1"
    for bad in ("", " x", "-x", "a b", "a\n", "ü", "x" * 129, "0123456789ab"):
        with pytest.raises(InvalidRequest):
            check_alias(bad)


def test_other_databases_and_nonsense_are_configuration_errors() -> None:
    for url in ("mysql://x/y", "nonsense", "", "sqlite://", "sqlite:///:memory:"):
        with pytest.raises(ConfigError) as e:
            connect(url)
        assert e.value.fields["key"] == "services.weightstore.database_url"


def test_sqlite_runs_with_a_write_ahead_log_and_foreign_keys(tmp_path: Path) -> None:
    reader, _ = connect(f"sqlite:///{tmp_path / 'c.sqlite3'}")
    with reader.connect() as c:
        assert c.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert c.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    reader.dispose()
