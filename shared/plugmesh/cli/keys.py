"""`plugmesh keys new`: an API key whose hash goes into the gateway's keys file."""

from __future__ import annotations

import importlib
import os
import pathlib

from plugmesh import config as configuration
from plugmesh.cli import output
from plugmesh.errors import ConfigError


def run_new(name: str, *, scopes: tuple[str, ...], config: pathlib.Path | None, file: pathlib.Path | None) -> None:
    """Appends the hash to the keys file and prints the key to standard output, once.

    The gateway owns the format; it is loaded by name because the command line stands below the services.

    Raises:
        ConfigError: A bad name or scope, or a keys file that cannot be written.
    """
    settings = configuration.load(config)
    configured = settings.services.get("gateway", {}).get("keys_file")
    path = file or (pathlib.Path(configured) if configured else settings.mesh.data_dir / "keys.toml")
    path = path.expanduser()
    gateway_keys = importlib.import_module("plugmesh_gateway.keys")
    key = gateway_keys.new_key()
    entry = gateway_keys.toml_entry(name, key, scopes) if scopes else gateway_keys.toml_entry(name, key)
    if path.exists():
        gateway_keys.KeyRing.load(path)  # do not add to a file that the gateway would refuse
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as f:
            f.write(("\n" if path.stat().st_size else "") + entry)
    except OSError as e:
        raise ConfigError(f"cannot write {path}: {e.strerror}", file=path) from e
    output.err.print(f"stored the hash of key [bold]{name}[/] in {path}; the key itself is shown only now:", soft_wrap=True)
    output.out.print(key, markup=False)
    if not configured:
        output.err.print(f'[yellow]the gateway does not ask for keys yet:[/] set  keys_file = "{path}"  below [services.gateway]', soft_wrap=True, markup=True)
