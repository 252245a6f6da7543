"""From a configuration to the processes that it means: checked settings, ports, arguments and environment of each."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pathlib
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plugmesh import cards
from plugmesh import config as configuration
from plugmesh.config import ALL_SERVICES, OPTIONAL_SERVICES, SERVICE_NAMES, MeshConfig, ServiceSettings
from plugmesh.errors import ConfigError
from plugmesh.supervisor.children import ChildSpec

# The gateway stops first, while the services behind it still answer what it has accepted; the engines next, and last
# the ones that the engines hand blocks back to.
STOP_RANKS = {"gateway": 0, "decode": 1, "prefill": 1, "tokenizer": 2, "grammar": 2, "kvstore": 2, "weightstore": 2, "rollout": 0}


def check(config: MeshConfig, roles: Sequence[str] | None = None) -> dict[str, ServiceSettings]:
    """Every role's settings, checked with its own model, and the plugins' cards, checked together.

    Args:
        roles: By default those that a mesh serves with, and the optional ones that the configuration mentions.

    A service's `config` module is loaded by name (it is light by contract): the supervisor stands below the services.

    Raises:
        ConfigError: Names the key and the file.
    """
    cards.check_mesh(config)
    if roles is None:
        roles = (*SERVICE_NAMES, *(r for r in OPTIONAL_SERVICES if r in config.services))
    checked: dict[str, ServiceSettings] = {}
    for role in roles:
        name = f"plugmesh_{role}.config"
        try:
            module = importlib.import_module(name)
        except ImportError as e:
            raise ConfigError(f"service {role!r} is not installed here ({e})", key=f"services.{role}") from e
        checked[role] = config.service_settings(role, module.Settings)
    for role in roles:
        if checked[role].replicas == 0 and role in ("gateway", "decode", "tokenizer", "weightstore"):
            raise ConfigError(f"{config.source}: services.{role}.replicas is 0, and nothing can be served without a {role}", key=f"services.{role}.replicas")
    return checked


def free_port(host: str) -> int:
    """A TCP port that is free now. Somebody else may take it before it is used; the service then fails to start and says so."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.bind((host, 0))
        return int(s.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Raises ConfigError when the port cannot be bound."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise ConfigError(f"the gateway cannot listen on {host}:{port}: {e.strerror}; choose another port with --port", key="services.gateway.port") from e


def specs(
    config: MeshConfig,
    settings: Mapping[str, ServiceSettings],
    *,
    nats: Callable[[str], Mapping[str, Any]],
    run_dir: pathlib.Path,
    gateway_port: int,
    arena_dir: pathlib.Path | None,
    environ: Mapping[str, str] | None = None,
) -> list[ChildSpec]:
    """One child per replica of every role, in the order of ALL_SERVICES.

    Args:
        nats: Role to what its `[mesh.nats]` gets: url, user, password_file.
        arena_dir: Where kvstores put shared memory unless the configuration says otherwise, so that the supervisor can
            remove it even when they were killed.
    """
    environ = os.environ if environ is None else environ
    base: dict[str, Any] = json.loads(configuration.dump_json(config))
    base["mesh"]["runtime_dir"] = str(run_dir)
    base["source"] = config.source  # for the line in a child's complaint
    # The resolved configuration is complete: variables that made it must not be applied to it a second time.
    env = {k: v for k, v in environ.items() if not (k.startswith(configuration.ENV_PREFIX) and "__" in k) and k != "PLUGMESH_CONFIG"}
    # A checkout's package folders may be on this process's path only (pytest puts them there).
    env["PYTHONPATH"] = os.pathsep.join([*_source_roots(), *filter(None, [env.get("PYTHONPATH", "")])])
    children = []
    for role in (r for r in ALL_SERVICES if r in settings):
        for i in range(settings[role].replicas):
            own = json.loads(json.dumps(base))
            own["mesh"]["nats"].update(nats(role))
            table = own["services"].setdefault(role, {})
            if role == "gateway":
                table["port"] = gateway_port + i if gateway_port else 0
            if role == "kvstore":
                _kvstore(table, i, arena_dir, config)
            for key in ("grpc_port", "metrics_port"):
                if table.get(key):
                    table[key] += i
            if table.get("instance_id") and settings[role].replicas > 1:
                table["instance_id"] += f"-{i + 1}"
            name = role if settings[role].replicas == 1 else f"{role}-{i + 1}"
            children.append(
                ChildSpec(
                    name=name,
                    role=role,
                    argv=(sys.executable, "-m", f"plugmesh_{role}"),
                    env={**env, "PLUGMESH_CONFIG_JSON": json.dumps(own), "PYTHONUNBUFFERED": "1"},
                    log_path=run_dir / "logs" / f"{name}.log",
                    stop_rank=STOP_RANKS[role],
                )
            )
    return children


def _source_roots() -> list[str]:
    return [p for p in sys.path if p and any(pathlib.Path(p).glob("plugmesh*/__init__.py")) and "site-packages" not in p]


def _kvstore(table: dict[str, Any], index: int, arena_dir: pathlib.Path | None, config: MeshConfig) -> None:
    if arena_dir is not None and not table.get("arena_dir"):
        table["arena_dir"] = str(arena_dir)
    if index > 0:  # a disk tier belongs to one store
        folder = pathlib.Path(table.get("disk_dir") or config.mesh.data_dir.expanduser() / "kvstore")
        table["disk_dir"] = str(folder.with_name(f"{folder.name}-{index + 1}"))
