"""`plugmesh serve`: one service in the foreground, as `python -m plugmesh_<service>` with a resolved configuration."""

from __future__ import annotations

import difflib
import os
import pathlib
import sys

from plugmesh import config as configuration
from plugmesh.cli import output
from plugmesh.config import ALL_SERVICES
from plugmesh.errors import ConfigError, NotFound
from plugmesh.supervisor import plan, runs


def run_serve(service: str, *, config: pathlib.Path | None, nats: str, mesh: str | None) -> None:
    """Replaces this process by the service. Does not return.

    Raises:
        ConfigError: Unknown service, bad configuration, or no broker to join.
    """
    if service not in ALL_SERVICES:
        near = difflib.get_close_matches(service, ALL_SERVICES, n=1)
        raise ConfigError(f"there is no service {service!r}" + (f"; did you mean {near[0]!r}?" if near else f"; services: {', '.join(ALL_SERVICES)}"))
    settings = configuration.load(config, overrides={"mesh.nats.url": nats} if nats else None)
    if not settings.mesh.nats.url:
        settings = _join(settings, service, config is None, mesh)
    plan.check(settings, (service,))
    env = {k: v for k, v in os.environ.items() if not (k.startswith(configuration.ENV_PREFIX) and "__" in k) and k != "PLUGMESH_CONFIG"}
    env["PLUGMESH_CONFIG_JSON"] = configuration.dump_json(settings)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", f"plugmesh_{service}"], env)  # noqa: S606  our own interpreter and module


def _join(settings: configuration.MeshConfig, service: str, take_model: bool, mesh: str | None) -> configuration.MeshConfig:
    """The configuration of an instance that joins the mesh running here, with the credential of its role."""
    try:
        run = runs.find_run(mesh)
    except NotFound as e:
        raise ConfigError(f"no broker to join: {e.message}, or name one with --nats URL") from e
    password_file = pathlib.Path(run.nats_password_file) if run.nats_password_file else None
    user = run.nats_user
    if password_file is not None and password_file.with_name(f"{service}.password").is_file():
        password_file, user = password_file.with_name(f"{service}.password"), service
    nats = settings.mesh.nats.model_copy(
        update={"url": run.nats_url, "user": user, "password_file": password_file, "tls_ca_file": pathlib.Path(run.nats_tls_ca_file) if run.nats_tls_ca_file else None}
    )
    changes = {"nats": nats, "name": run.name, **({"model": run.model} if take_model else {})}
    output.err.print(f"[dim]joining mesh {run.name} at {run.nats_url}[/]")
    return settings.model_copy(update={"mesh": settings.mesh.model_copy(update=changes)})
