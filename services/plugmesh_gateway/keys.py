"""API keys: random tokens of which only hashes are kept.

    [[keys]]
    name = "laptop"
    hash = "sha256:9f86d0..."
    scopes = ["inference"]

`python -m plugmesh_gateway.keys NAME [SCOPE ...]` prints a new key once and the table to put into the file. SHA-256 without
a salt or stretching is enough because keys are 256 random bits, never passwords: there is nothing to guess from a dictionary.
"""

from __future__ import annotations

import hashlib
import hmac
import pathlib
import re
import secrets
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from plugmesh.errors import ConfigError, PermissionDenied, Unauthenticated

SCOPES = ("inference", "models", "metrics", "docs")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of the file. `digest` is 32 bytes."""

    name: str
    digest: bytes
    scopes: frozenset[str]


def new_key() -> str:
    """A key of 256 random bits."""
    return f"pm-{secrets.token_urlsafe(32)}"


def hash_key(key: str) -> str:
    """What goes into the file instead of the key."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def toml_entry(name: str, key: str, scopes: Sequence[str] = ("inference", "models")) -> str:
    """The table of one key. Raises ConfigError on an unknown scope or a name that is not a plain word."""
    for scope in scopes:
        if scope not in SCOPES:
            raise ConfigError(f"unknown scope {scope!r}; valid scopes: {', '.join(SCOPES)}", key="scopes")
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigError("a key's name is 1 to 64 letters, digits, '.', '_' or '-'", key="name")
    listed = ", ".join(f'"{s}"' for s in scopes)
    return f'[[keys]]\nname = "{name}"\nhash = "{hash_key(key)}"\nscopes = [{listed}]\n'


class KeyRing:
    """The keys that open this gateway. Without a file everybody is let in; with one, nobody but its keys."""

    def __init__(self, keys: Sequence[ApiKey] | None) -> None:
        self._keys = keys

    @classmethod
    def load(cls, path: pathlib.Path | None) -> KeyRing:
        """Raises ConfigError on an unreadable or malformed file; an empty file lets nobody in."""
        if path is None:
            return cls(None)
        try:
            data = tomllib.loads(path.expanduser().read_text())
        except OSError as e:
            raise ConfigError(f"services.gateway.keys_file: cannot read {path}: {e.strerror}", key="keys_file") from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise ConfigError(f"services.gateway.keys_file: {path} is not valid TOML: {e}", key="keys_file") from e
        entries = data.get("keys", [])
        if set(data) - {"keys"} or not isinstance(entries, list):
            raise ConfigError(f"services.gateway.keys_file: {path} holds something else than [[keys]]", key="keys_file")
        return cls([_entry(e, i, path) for i, e in enumerate(entries)])

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return self._keys is None

    def check(self, authorization: str, scope: str) -> str:
        """The name of the key ("" without authentication).

        Args:
            authorization: The header or metadata value: "Bearer KEY".
            scope: What the call needs; "" accepts any valid key.

        Raises:
            Unauthenticated: No key, or none that is known.
            PermissionDenied: The key's scopes do not cover `scope`.
        """
        if self._keys is None:
            return ""
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            raise Unauthenticated("an API key is needed: send 'Authorization: Bearer KEY'")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:  # always all of them: the time must not tell which one came near
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise Unauthenticated("this API key is not known")
        if scope and scope not in found.scopes:
            raise PermissionDenied(f"key {found.name!r} has no scope {scope!r}", scope=scope)
        return found.name


def _entry(entry: object, index: int, path: pathlib.Path) -> ApiKey:
    where = f"services.gateway.keys_file: {path}: key {index + 1}"
    if not isinstance(entry, dict) or set(entry) - {"name", "hash", "scopes"}:
        raise ConfigError(f"{where} has other entries than name, hash, scopes", key="keys_file")
    algorithm, _, digest = str(entry.get("hash", "")).partition(":")
    if algorithm != "sha256" or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ConfigError(f"{where}: hash must be 'sha256:' and 64 hexadecimal digits", key="keys_file")
    scopes = entry.get("scopes", [])
    if not isinstance(scopes, list) or any(s not in SCOPES for s in scopes):
        raise ConfigError(f"{where}: scopes must be among {', '.join(SCOPES)}", key="keys_file")
    return ApiKey(str(entry.get("name", index)), bytes.fromhex(digest), frozenset(scopes))


def main(arguments: Sequence[str]) -> int:
    """`NAME [SCOPE ...]`: the key goes to stderr (shown once), the table for the file to stdout."""
    if not arguments:
        sys.stderr.write("usage: python -m plugmesh_gateway.keys NAME [SCOPE ...] >> keys.toml\n")
        return 2
    key = new_key()
    try:
        entry = toml_entry(arguments[0], key, tuple(arguments[1:]) or ("inference", "models"))
    except ConfigError as e:
        sys.stderr.write(f"{e.message}\n")
        return 2
    sys.stdout.write(entry)
    sys.stderr.write(f"key (not shown again): {key}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
