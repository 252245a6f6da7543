"""Compiled grammars that outlive the process, in SQL. It is a cache: what goes wrong here costs a compilation, never a request."""

from __future__ import annotations

import hashlib
import json
import time

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from plugmesh_grammar.database import connect, migrate
from plugmesh_grammar.pool import Compiled
from plugmesh_grammar.tables import GrammarRow

log = structlog.get_logger()

_RETRY_S = 10.0   # leave a database that failed alone for this long
_TOUCH_S = 3600.0 # how exactly the time of the last use is kept


class Catalogue:
    """All methods block, and none raises because of the database. Thread-safe.

    Args:
        max_bytes: Of compiled forms; the least recently used are deleted.
    """

    def __init__(self, url: str, password: str | None, *, max_bytes: int) -> None:
        self._engine = connect(url, password)
        self._max_bytes = max_bytes
        self._is_ready = False
        self._not_before = 0.0
        self.num_failures = 0

    def close(self) -> None:
        self._engine.dispose()

    def open(self) -> bool:
        """Brings the table up to date, unless that was done or failed a moment ago; whether the catalogue can be used."""
        if self._is_ready:
            return time.monotonic() >= self._not_before
        if time.monotonic() < self._not_before:
            return False
        try:
            migrate(self._engine)
            self._is_ready = True
        except (SQLAlchemyError, OSError) as e:
            self._failed("open", e)
        return self._is_ready

    def get(self, request: str) -> tuple[str, Compiled] | None:
        """Key and compiled form; None where there is none, or one whose bytes are not those that were written."""
        return self._find(GrammarRow.request == request)

    def get_by_key(self, key: str) -> tuple[str, str, Compiled] | None:
        """Tokenizer hash, key and compiled form."""
        found = self._find(GrammarRow.key == key, with_tokenizer=True)
        return found if found is not None else None  # type: ignore[return-value] # three, as asked for

    def put(self, request: str, key: str, tokenizer_hash: str, compiled: Compiled) -> None:
        """Writes one; another process may have done so already."""
        if not self.open():
            return
        now = time.time()
        row = {
            "request": request, "key": key, "tokenizer_hash": tokenizer_hash, "engine": compiled.engine, "engine_version": compiled.engine_version,
            "compile_ms": compiled.compile_ms, "unenforced_json": json.dumps(compiled.unenforced), "sha256": hashlib.sha256(compiled.data).hexdigest(),
            "num_bytes": len(compiled.data), "data": compiled.data, "used_unix_s": now,
        }
        try:
            with self._engine.begin() as connection:
                dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
                connection.execute(dialect.insert(GrammarRow).on_conflict_do_nothing(), row)
                self._make_room(connection)
        except SQLAlchemyError as e:
            self._failed("put", e)

    def _make_room(self, connection: sa.Connection) -> None:
        excess = int(connection.scalar(sa.select(sa.func.coalesce(sa.func.sum(GrammarRow.num_bytes), 0))) or 0) - self._max_bytes
        if excess <= 0:
            return
        gone = []
        for request, num_bytes in connection.execute(sa.select(GrammarRow.request, GrammarRow.num_bytes).order_by(GrammarRow.used_unix_s, GrammarRow.request)):
            gone.append(request)
            excess -= num_bytes
            if excess <= 0:
                break
        for at in range(0, len(gone), 500):
            connection.execute(sa.delete(GrammarRow).where(GrammarRow.request.in_(gone[at : at + 500])))

    def _find(self, where: sa.ColumnElement[bool], *, with_tokenizer: bool = False) -> tuple | None:  # type: ignore[type-arg]
        if not self.open():
            return None
        try:
            with self._engine.begin() as connection:
                row = connection.execute(sa.select(GrammarRow.__table__).where(where).limit(1)).one_or_none()
                if row is None:
                    return None
                if hashlib.sha256(row.data).hexdigest() != row.sha256:
                    log.warning("grammar.catalogue_corrupt", key=row.key[:16])
                    connection.execute(sa.delete(GrammarRow).where(GrammarRow.request == row.request))
                    return None
                if time.time() - row.used_unix_s > _TOUCH_S:
                    connection.execute(sa.update(GrammarRow).where(GrammarRow.request == row.request).values(used_unix_s=time.time()))
                unenforced = tuple((k, p, r) for k, p, r in json.loads(row.unenforced_json))
                compiled = Compiled(row.engine, row.engine_version, row.compile_ms, unenforced, bytes(row.data))
                return (row.tokenizer_hash, row.key, compiled) if with_tokenizer else (row.key, compiled)
        except (SQLAlchemyError, ValueError) as e:
            self._failed("get", e)
            return None

    def _failed(self, what: str, e: Exception) -> None:
        self.num_failures += 1
        self._not_before = time.monotonic() + _RETRY_S
        log.warning("grammar.catalogue_failed", what=what, error=type(e).__name__)
