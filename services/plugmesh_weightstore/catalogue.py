"""What models are visible, under which names, and which blobs they consist of."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, selectinload, sessionmaker

from plugmesh.errors import InvalidRequest, NotFound
from plugmesh.types import ModelConfig
from plugmesh_weightstore import publications
from plugmesh_weightstore.blobs import Blob
from plugmesh_weightstore.database import connect, migrate
from plugmesh_weightstore.tables import AliasRow, AssetRow, BlobRow, FormRow, ModelRow, PreferenceRow, TensorRow

_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")
_VERSION = re.compile(r"[0-9a-f]{12,64}")
_DEFAULT = "default_model"
_INSERT_ROWS = 1000
_DEADLOCKS = ("40P01", "40001")  # of PostgreSQL: deadlock, serialization failure

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor whose bytes are a blob."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blob: Blob


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One version as the catalogue holds it; `formats` are the packed forms at hand, `tensors` belong to one of them."""

    version: str
    aliases: tuple[str, ...]
    name: str
    architecture: str
    config_json: str
    source: str
    license: str
    num_parameters: int
    context_length: int
    imported_unix_s: float
    formats: tuple[str, ...]
    assets: tuple[tuple[str, Blob], ...]
    stored_bytes: int = 0


def content_version(config: ModelConfig, tensors: Iterable[StoredTensor], assets: Iterable[tuple[str, Blob]]) -> str:
    """sha256 over configuration, tensors and assets; equal content has the same version whatever its file or folder is called."""
    content = {
        "config": {k: v for k, v in json.loads(config.to_json()).items() if k != "name"},
        "tensors": sorted([t.name, t.dtype, list(t.shape), t.blob.sha256] for t in tensors),
        "assets": sorted([name, blob.sha256] for name, blob in assets),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_alias(alias: str) -> str:
    """The alias itself. Raises InvalidRequest for one that could be mistaken for a version or is unprintable."""
    if not _ALIAS.fullmatch(alias) or _VERSION.fullmatch(alias):
        raise InvalidRequest(f"{alias[:80]!r} is not a valid model name: letters, digits and ._:/@+- (at most 128)", param="model")
    return alias


def alias_from(text: str) -> str:
    """A valid alias made from a title: "SmolLM2 135M" gives "smollm2-135m"."""
    slug = re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-._")[:100]
    return f"model-{slug}".rstrip("-") if not slug or _VERSION.fullmatch(slug) else slug


class Catalogue:
    """Thread-safe; every method is one transaction and blocks. Opening it brings the tables up to date."""

    def __init__(self, url: str, password: str | None = None) -> None:
        self._reader, writer = connect(url, password)
        migrate(writer)
        self._read, self._write = sessionmaker(self._reader), sessionmaker(writer)

    def close(self) -> None:
        self._reader.dispose()

    def add_model(
        self, config: ModelConfig, tensors: Sequence[StoredTensor], assets: Sequence[tuple[str, Blob]], *,
        source: str, name: str, license: str, num_parameters: int, alias: str = "", make_default: bool = False,
        also: Callable[[Session, str], object] | None = None,
    ) -> StoredModel:  # fmt: skip
        """Makes a model visible with its form "source". The same content again only adds the alias.

        Args:
            alias: Moves to this version if another has it; empty: made from `name`, never taken from another version.
            also: Called with the session and the version at the end of the transaction, which may be repeated.
        """
        version = content_version(config, tensors, assets)

        def add(session: Session) -> StoredModel:
            row = session.get(ModelRow, version)
            if row is None:
                self._add_blobs(session, [t.blob for t in tensors] + [blob for _, blob in assets])
                row = ModelRow(
                    version=version, name=name[:256], architecture=config.architecture, config_json=config.to_json(), source=source,
                    license=license[:128], num_parameters=num_parameters, context_length=config.max_position, imported_unix_s=time.time(),
                )  # fmt: skip
                row.assets = [AssetRow(name=n, sha256=b.sha256, num_bytes=b.num_bytes) for n, b in assets]
                session.add(row)
                session.flush()
                self._add_form(session, version, "source", tensors)
            self._add_aliases(session, version, check_alias(alias) if alias else "", alias_from(name))
            if make_default or session.get(PreferenceRow, _DEFAULT) is None:
                session.merge(PreferenceRow(key=_DEFAULT, value=version))
            session.flush()
            if also is not None:
                also(session, version)
            session.expire_all()
            return self._stored(session, version)

        return self._writing(add)

    def add_form(self, version: str, format: str, tensors: Sequence[StoredTensor]) -> None:
        """Records a packed form; does nothing when somebody else was faster. Raises NotFound when the model is gone."""

        def add(session: Session) -> None:
            if session.get(ModelRow, version) is None:
                raise NotFound(f"the model {version} was removed", param="model")
            if session.scalar(sa.select(FormRow.id).where(FormRow.version == version, FormRow.format == format)) is None:
                self._add_blobs(session, [t.blob for t in tensors])
                self._add_form(session, version, format, tensors)

        self._writing(add)

    def drop_form(self, version: str, format: str) -> None:
        """Forgets a packed form, so that it is made again."""
        self._writing(lambda s: s.execute(sa.delete(FormRow).where(FormRow.version == version, FormRow.format == format)))

    def find(self, model: str) -> StoredModel:
        """By alias, title, version or a unique beginning of it (12 digits or more); empty: the default. Raises NotFound."""
        with self._read.begin() as session:
            return self._stored(session, self._find_version(session, model))

    def tensors(self, version: str, format: str) -> list[StoredTensor] | None:
        """The tensors of a form in file order, or None where there is no such form."""
        with self._read.begin() as session:
            form = session.scalar(
                sa.select(FormRow).where(FormRow.version == version, FormRow.format == format).options(selectinload(FormRow.tensors))
            )
            if form is None:
                return None
            return [StoredTensor(t.name, t.dtype, tuple(map(int, t.shape.split(","))), Blob(t.sha256, t.num_bytes)) for t in form.tensors]

    def list_models(self) -> list[StoredModel]:
        """Every version, oldest import first."""
        with self._read.begin() as session:
            versions = session.scalars(sa.select(ModelRow.version).order_by(ModelRow.imported_unix_s, ModelRow.version)).all()
            return [self._stored(session, v) for v in versions]

    def set_default(self, version: str) -> None:
        self._writing(lambda s: s.merge(PreferenceRow(key=_DEFAULT, value=version)))

    def note_import(self, key: str, version: str) -> None:
        """Remembers which version an unchanged file gave; see `noted_import`."""
        self._writing(lambda s: s.merge(PreferenceRow(key=f"file:{key[:56]}", value=version)))

    def noted_import(self, key: str) -> str | None:
        """The version noted under `key` if it is still visible."""
        with self._read.begin() as session:
            row = session.get(PreferenceRow, f"file:{key[:56]}")
            return row.value if row is not None and session.get(ModelRow, row.value) is not None else None

    def remove(self, model: str) -> StoredModel:
        """Takes a version out of sight, with all its aliases and forms; blobs nobody else uses lose their row. Raises NotFound."""

        def remove(session: Session) -> StoredModel:
            version = self._find_version(session, model)
            stored = self._stored(session, version)
            session.delete(session.get(ModelRow, version))
            session.flush()
            session.execute(sa.delete(PreferenceRow).where(PreferenceRow.key == _DEFAULT, PreferenceRow.value == version))
            self._forget_unused(session)
            return stored

        if not model:
            raise InvalidRequest("name the model to remove", param="model")
        return self._writing(remove)

    def publication(self, version: str) -> publications.Publication | None:
        """The last publication of a version, if there was any; it counts as asked for from now on."""
        with self._read.begin() as session:
            found = publications.last_of(session, version)
        if found is not None:
            self._writing(lambda s: publications.touch(s, version))
        return found

    def remove_expendable(self, alias: str, keep: int, in_use: frozenset[str]) -> list[str]:
        """Takes older publications of an alias out of sight; see `publications.expendable`. Their versions."""

        def remove(session: Session) -> list[str]:
            versions = publications.expendable(session, alias, keep, in_use, time.time())
            for version in versions:
                session.delete(session.get(ModelRow, version))
            session.flush()
            if versions:
                self._forget_unused(session)
            return versions

        return self._writing(remove)

    def referenced_blobs(self) -> set[str]:
        """Hashes that some model needs. Call below `BlobStore.sweeping()`; forgets rows that nothing refers to."""

        def collect(session: Session) -> set[str]:
            self._forget_unused(session)
            return set(session.scalars(sa.select(BlobRow.sha256)))

        return self._writing(collect)

    def has_blob(self, sha256: str) -> int | None:
        """Size of a blob that a visible model refers to, else None."""
        with self._read.begin() as session:
            return session.scalar(sa.select(BlobRow.num_bytes).where(BlobRow.sha256 == sha256))

    # Below: parts of a transaction.

    def _writing(self, work: Callable[[Session], T]) -> T:
        # Two processes may add the same rows at once; the second try finds those of the faster one.
        for attempt in (1, 2, 3):
            try:
                with self._write.begin() as session:
                    return work(session)
            except (IntegrityError, OperationalError) as e:
                conflict = isinstance(e, IntegrityError) or getattr(e.orig, "sqlstate", "") in _DEADLOCKS
                if attempt == 3 or not conflict:
                    raise
        raise AssertionError("unreachable")

    def _add_blobs(self, session: Session, blobs: Sequence[Blob]) -> None:
        unique = sorted({(b.sha256, b.num_bytes) for b in blobs})  # in one order everywhere, so that writers cannot deadlock
        dialect = sqlite if session.get_bind().dialect.name == "sqlite" else postgresql
        for i in range(0, len(unique), _INSERT_ROWS):
            rows = [{"sha256": s, "num_bytes": n} for s, n in unique[i : i + _INSERT_ROWS]]
            session.execute(dialect.insert(BlobRow).on_conflict_do_nothing(), rows)

    def _add_form(self, session: Session, version: str, format: str, tensors: Sequence[StoredTensor]) -> None:
        form = FormRow(version=version, format=format, created_unix_s=time.time())
        session.add(form)
        session.flush()
        session.execute(
            sa.insert(TensorRow),
            [
                {"form_id": form.id, "position": i, "name": t.name, "dtype": t.dtype, "shape": ",".join(map(str, t.shape)),
                 "sha256": t.blob.sha256, "num_bytes": t.blob.num_bytes}
                for i, t in enumerate(tensors)
            ],
        )  # fmt: skip

    def _add_aliases(self, session: Session, version: str, wanted: str, derived: str) -> None:
        position = session.scalar(sa.select(sa.func.count()).select_from(AliasRow).where(AliasRow.version == version)) or 0
        if wanted:
            row = session.get(AliasRow, wanted)
            if row is None:
                session.add(AliasRow(alias=wanted, version=version, position=position))
                position += 1
            elif row.version != version:
                row.version, row.position = version, position
                position += 1
        row = session.get(AliasRow, derived)
        if row is not None and row.version != version:  # somebody else has the title
            derived = f"{derived}-{version[:8]}"
            row = session.get(AliasRow, derived)
        if row is None:
            session.add(AliasRow(alias=derived, version=version, position=position))

    def _forget_unused(self, session: Session) -> None:
        used = sa.union_all(sa.select(TensorRow.sha256), sa.select(AssetRow.sha256)).subquery()
        session.execute(sa.delete(BlobRow).where(BlobRow.sha256.not_in(sa.select(used.c.sha256))))

    def _find_version(self, session: Session, model: str) -> str:
        if not model:
            default = session.get(PreferenceRow, _DEFAULT)
            if default is None or session.get(ModelRow, default.value) is None:
                raise NotFound("there is no default model", param="model")
            return default.value
        for alias in (model, alias_from(model)):
            row = session.get(AliasRow, alias)
            if row is not None:
                return row.version
        if _VERSION.fullmatch(model):
            found = session.scalars(sa.select(ModelRow.version).where(ModelRow.version.startswith(model)).limit(2)).all()
            if len(found) == 1:
                return found[0]
        raise NotFound(f"there is no model {model[:128]!r}", param="model")

    def _stored(self, session: Session, version: str) -> StoredModel:
        row = session.get_one(ModelRow, version)
        sizes = (
            sa.select(TensorRow.sha256, TensorRow.num_bytes).join(FormRow).where(FormRow.version == version)
            .union(sa.select(AssetRow.sha256, AssetRow.num_bytes).where(AssetRow.version == version)).subquery()
        )  # fmt: skip
        return StoredModel(
            version=version, aliases=tuple(a.alias for a in row.aliases), name=row.name, architecture=row.architecture, config_json=row.config_json,
            source=row.source, license=row.license, num_parameters=row.num_parameters, context_length=row.context_length,
            imported_unix_s=row.imported_unix_s, formats=tuple(f.format for f in row.forms),
            assets=tuple((a.name, Blob(a.sha256, a.num_bytes)) for a in row.assets),
            stored_bytes=int(session.scalar(sa.select(sa.func.coalesce(sa.func.sum(sizes.c.num_bytes), 0))) or 0),
        )  # fmt: skip
