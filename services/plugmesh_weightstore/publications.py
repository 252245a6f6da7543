"""Which versions were published under which alias, and which of the older ones nobody needs any more. Parts of the catalogue's transactions."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from plugmesh_weightstore.tables import AliasRow, ModelRow, PreferenceRow, PublicationRow

SOURCE = "published"
IN_USE_S = 60.0  # after a version was resolved its reader may not have mapped it yet


@dataclass(frozen=True, slots=True)
class Publication:
    """The last publication of a version. `number` grows over all aliases and is never used again."""

    number: int
    version: str
    alias: str
    base_version: str
    metadata: Mapping[str, str]


def add(session: Session, version: str, alias: str, base_version: str, metadata: Mapping[str, str]) -> Publication:
    """Notes that a version was published, in the transaction that makes it visible."""
    now = time.time()
    row = PublicationRow(
        version=version, alias=alias, base_version=base_version, metadata_json=json.dumps(dict(metadata), sort_keys=True), published_unix_s=now,
        resolved_unix_s=now,
    )  # fmt: skip
    session.add(row)
    session.flush()
    return Publication(row.number, version, alias, base_version, dict(metadata))


def last_of(session: Session, version: str) -> Publication | None:
    """The last publication of a version; None for one that was imported only."""
    row = session.scalar(sa.select(PublicationRow).where(PublicationRow.version == version).order_by(PublicationRow.number.desc()).limit(1))
    return None if row is None else Publication(row.number, row.version, row.alias, row.base_version, json.loads(row.metadata_json))


def touch(session: Session, version: str) -> None:
    """Somebody asked for the version; it stays for IN_USE_S at least."""
    session.execute(sa.update(PublicationRow).where(PublicationRow.version == version).values(resolved_unix_s=time.time()))


def expendable(session: Session, alias: str, keep: int, in_use: frozenset[str], now: float) -> list[str]:
    """Published versions of an alias beyond the newest `keep` that may go.

    Not those that came by import, that the default or another name means, that are among the newest of another alias, that an instance serves (`in_use`), or
    that were asked for within IN_USE_S.
    """
    default = session.scalar(sa.select(PreferenceRow.value).where(PreferenceRow.key == "default_model"))
    newest: dict[str, list[str]] = {}
    for other, version in session.execute(sa.select(PublicationRow.alias, PublicationRow.version).order_by(PublicationRow.number.desc())):
        versions = newest.setdefault(other, [])
        if version not in versions:
            versions.append(version)
    kept = {v for versions in newest.values() for v in versions[:keep]}
    found = []
    for version in newest.get(alias, [])[keep:]:
        row = session.get(ModelRow, version)
        asked = session.scalar(sa.select(sa.func.max(PublicationRow.resolved_unix_s)).where(PublicationRow.version == version)) or 0.0
        names = session.scalars(sa.select(AliasRow.alias).where(AliasRow.version == version)).all()
        is_named = any(not name.endswith(f"-{version[:8]}") for name in names)  # more than a title's copy
        if row is not None and row.source == SOURCE and version not in kept | in_use and version != default and not is_named and asked < now - IN_USE_S:
            found.append(version)
    return found
