"""The configuration of one deployment: `mesh.toml`, overridden by PLUGMESH_* variables.

    [mesh]
    name = "default"
    model = "smollm2"

    [services.decode]
    plugins = ["sarathi"]
    dtype = "float32"

    [plugins.sarathi]
    token_budget = 64

Variables name the path with double underscores: `PLUGMESH_SERVICES__DECODE__DTYPE=float32`. Unknown keys are errors that
name the key and the nearest valid one. Every service's own table is checked against the `Settings` model in its
`config.py`, every plugin's against the plugin's own settings.
"""

from __future__ import annotations

import difflib
import json
import os
import pathlib
import tomllib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import pydantic

from plugmesh.config_lines import line_of
from plugmesh.errors import ConfigError

SERVICE_NAMES = ("gateway", "tokenizer", "grammar", "weightstore", "prefill", "decode", "kvstore")
OPTIONAL_SERVICES = ("rollout",)  # started where their replicas say so; a mesh serves without them
ALL_SERVICES = (*SERVICE_NAMES, *OPTIONAL_SERVICES)
ENV_PREFIX = "PLUGMESH_"

S = TypeVar("S", bound=pydantic.BaseModel)


class StrictModel(pydantic.BaseModel):
    """Base of every settings model: frozen, unknown keys refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class NatsSettings(StrictModel):
    """How to reach the broker. An empty url means the embedded one that `plugmesh up` starts."""

    url: str = ""
    user: str = ""
    password_file: pathlib.Path | None = None  # a file that holds the password, mode 0600
    tls_ca_file: pathlib.Path | None = None


class MeshSettings(StrictModel):
    """`[mesh]`: what holds for the whole deployment."""

    name: str = pydantic.Field("default", pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    model: str = "smollm2"                     # alias, version, or path of a model file
    host: str = "127.0.0.1"                    # address that servers bind
    advertise_host: str = ""                   # address that others use; empty: `host`
    data_dir: pathlib.Path = pathlib.Path("~/.local/share/plugmesh")
    cache_dir: pathlib.Path = pathlib.Path("~/.cache/plugmesh")
    runtime_dir: pathlib.Path | None = None    # sockets, credentials, logs of one run; default below the user's runtime folder
    lease_ttl_s: float = pydantic.Field(5.0, gt=0.5, le=120)
    drain_s: float = pydantic.Field(30.0, ge=0, le=3600)
    log_level: str = pydantic.Field("info", pattern="^(debug|info|warning|error)$")
    otlp_endpoint: str = ""                    # OTLP/HTTP address for spans, "http://127.0.0.1:4318/v1/traces"; empty: none
    nats: NatsSettings = NatsSettings()


class ServiceSettings(StrictModel):
    """Keys that every `[services.<name>]` has; each service's `config.py` extends it."""

    plugins: tuple[str, ...] = ()
    replicas: int = pydantic.Field(1, ge=0, le=64)
    grpc_port: int = pydantic.Field(0, ge=0, le=65535)     # 0: a free one
    metrics_port: int = pydantic.Field(0, ge=0, le=65535)
    instance_id: str = ""                                  # empty: made from role and a random suffix


class MeshConfig(StrictModel):
    """The whole file. `services` and `plugins` stay raw here; `service_settings` and `plugin_settings` check them."""

    mesh: MeshSettings = MeshSettings()
    services: dict[str, dict[str, Any]] = {}
    plugins: dict[str, dict[str, Any]] = {}
    source: str = pydantic.Field("defaults", exclude=True)

    def service_settings(self, name: str, model: type[S]) -> S:
        """`[services.<name>]` as the service's own settings model. Raises ConfigError."""
        return _validate(model, self.services.get(name, {}), f"services.{name}", self.source)

    def plugin_settings(self, slug: str, model: type[S]) -> S:
        """`[plugins.<slug>]` as the plugin's own settings model. Raises ConfigError."""
        return _validate(model, self.plugins.get(slug, {}), f"plugins.{slug}", self.source)

    def at(self, path: str, item: str = "") -> str:
        """What an error begins with: "mesh.toml:12: [services.decode] plugins", or the variable that sets the key.

        Args:
            item: A string in the array that the key holds.
        """
        table, _, key = path.rpartition(".")
        name = f"[{table}] {key}" if table.count(".") else f"[{path}]"
        place = _place(self.source, path, item)
        return name if place == "defaults" else f"{place}: {name}"

    def plugin_slugs(self, service: str) -> list[str]:
        """Plugins that the configuration names for this service, in order."""
        return list(self.services.get(service, {}).get("plugins", []))


def load(path: pathlib.Path | str | None = None, environ: Mapping[str, str] | None = None, overrides: Mapping[str, Any] | None = None) -> MeshConfig:
    """Reads `path` (or ./mesh.toml when it exists, or nothing), then the environment, then `overrides`.

    Args:
        overrides: Dotted keys: {"services.gateway.port": 8080}. They win.

    Raises:
        ConfigError: Unreadable file, bad TOML, unknown or invalid key; names the key, the source and the nearest valid key.
    """
    environ = os.environ if environ is None else environ
    data: dict[str, Any] = {}
    source = "defaults"
    if path is None and environ.get("PLUGMESH_CONFIG"):
        path = environ["PLUGMESH_CONFIG"]
    if path is None and pathlib.Path("mesh.toml").is_file():
        path = "mesh.toml"
    if path is not None:
        source = str(path)
        try:
            data = tomllib.loads(pathlib.Path(path).read_text())
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}", file=path) from e
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path} is not valid TOML: {e}", file=path) from e
    for key, raw in sorted(environ.items()):
        if key.startswith(ENV_PREFIX) and "__" in key:
            _put(data, [part.lower() for part in key[len(ENV_PREFIX) :].split("__")], _env_value(raw), key)
    for key, value in (overrides or {}).items():
        _put(data, key.split("."), value, key)
    config = _validate(MeshConfig, data, "", source)
    for name in config.services:
        if name not in ALL_SERVICES:
            raise ConfigError(f"{_place(source, f'services.{name}')}: unknown service [services.{name}]{_nearest(name, ALL_SERVICES)}", key=f"services.{name}")
    return config.model_copy(update={"source": source})


def dump_json(config: MeshConfig) -> str:
    """The resolved configuration, for handing to child processes and for the log. Holds no secret by construction."""
    return config.model_dump_json()


def _env_value(raw: str) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw


def _put(data: dict[str, Any], parts: list[str], value: Any, origin: str) -> None:
    node = data
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{origin}: {part!r} is a value, not a table", key=origin)
    node[parts[-1]] = value


def _place(source: str, path: str, item: str = "") -> str:
    """The source with the line, as far as it can be found out: "mesh.toml:12"; a variable's name where one sets the key."""
    variable = ENV_PREFIX + path.upper().replace(".", "__")
    if variable in os.environ:
        return variable
    try:
        line = line_of(pathlib.Path(source).read_text(), path.split("."), item) if source != "defaults" else 0
    except (OSError, UnicodeDecodeError):
        line = 0
    return f"{source}:{line}" if line else source


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; valid keys: {', '.join(sorted(known))}"


def _validate(model: type[S], data: Mapping[str, Any], where: str, source: str) -> S:
    try:
        return model.model_validate(data)
    except pydantic.ValidationError as e:
        problem = e.errors()[0]
        path = ".".join([*([where] if where else []), *(str(p) for p in problem["loc"])])
        if problem["type"] == "extra_forbidden":
            fields = _fields_at(model, problem["loc"][:-1])
            raise ConfigError(f"{_place(source, path)}: unknown key {path!r}{_nearest(str(problem['loc'][-1]), fields)}", key=path) from e
        raise ConfigError(f"{_place(source, path)}: {path}: {problem['msg']} (got {problem.get('input')!r})", key=path) from e


def _fields_at(model: type[pydantic.BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
            model = annotation
    return list(model.model_fields)
