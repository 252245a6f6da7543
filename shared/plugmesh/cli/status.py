"""`plugmesh status`: the instance table of a running mesh, as its members see it."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import time
from typing import Any

from rich.markup import escape

from plugmesh import config as configuration
from plugmesh.cli import output
from plugmesh.config import SERVICE_NAMES
from plugmesh.supervisor import runs
from plugmesh.types import InstanceInfo

EXIT_INCOMPLETE = 3
CONNECT_TIMEOUT_S = 5.0
WIDE_COLUMNS = 130  # narrower terminals get no process ids, addresses and models; --json always has them


def run_status(*, as_json: bool, mesh: str | None, config: pathlib.Path | None, nats: str) -> int:
    """0 when every role that a request needs has a live instance, 3 when one is missing.

    Raises:
        NotFound: No mesh runs here and no broker was named.
        Unavailable: The broker does not answer.
    """
    output.quiet_logs()
    settings = configuration.load(config, overrides={"mesh.nats.url": nats} if nats else None)
    if settings.mesh.nats.url:
        broker = settings.mesh.nats
        run = None
        where: dict[str, Any] = {
            "url": broker.url, "user": broker.user, "password_file": str(broker.password_file or ""), "tls_ca_file": str(broker.tls_ca_file or ""),
        }  # fmt: skip
        name = mesh or settings.mesh.name
    else:
        run = runs.find_run(mesh)
        where = {"url": run.nats_url, "user": run.nats_user, "password_file": run.nats_password_file, "tls_ca_file": run.nats_tls_ca_file}
        name = run.name
    instances = asyncio.run(_read(name, where, settings.mesh.lease_ttl_s)) if where["url"] else []
    present = {i.role for i in instances if i.state in ("ready", "draining")}
    missing = [role for role in SERVICE_NAMES if role not in present]
    if as_json:
        output.print_json(
            {
                "mesh": {"name": name, **({k: getattr(run, k) for k in _RUN_KEYS} if run else {"nats_url": where["url"]})},
                "missing_roles": missing,
                "instances": [dataclasses.asdict(i) for i in instances],
            }
        )
    else:
        _show(name, run, where["url"], instances, missing)
    return EXIT_INCOMPLETE if missing else 0


_RUN_KEYS = ("state", "model", "gateway_url", "nats_url", "pid", "started_unix_s", "version", "runtime_dir")


async def _read(mesh: str, where: dict[str, Any], lease_ttl_s: float) -> list[InstanceInfo]:
    from plugmesh.supervisor.observe import Observer

    observer = await Observer.connect(mesh, lease_ttl_s=lease_ttl_s, timeout_s=CONNECT_TIMEOUT_S, **where)
    try:
        return observer.instances()
    finally:
        await observer.close()


_STATES = {"ready": "green", "draining": "cyan", "suspect": "yellow", "gone": "red"}


def _show(name: str, run: runs.MeshRun | None, nats_url: str, instances: list[InstanceInfo], missing: list[str]) -> None:
    from rich import box
    from rich.table import Table

    state = run.state if run else "joined"
    colour = {"ready": "green", "starting": "cyan", "stopping": "cyan"}.get(state, "green") if not missing else "yellow"
    facts = [f"[bold {colour}]●[/] [bold]{name}[/] {state}"]
    if run is not None:
        facts += [f"[bold cyan]{run.gateway_url}/v1[/]", f"model [bold]{escape(run.model)}[/]", f"[dim]up {output.seconds(time.time() - run.started_unix_s)}[/]"]
    else:
        facts.append(f"[dim]{nats_url}[/]")
    output.out.print("   ".join(facts), soft_wrap=True)
    wide = output.out.width >= WIDE_COLUMNS
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for title in ("role", "instance", "state"):
        table.add_column(title, no_wrap=True)
    table.add_column("up", justify="right", no_wrap=True)
    if wide:
        table.add_column("pid", justify="right", no_wrap=True)
        table.add_column("gRPC", no_wrap=True)
    table.add_column("load", overflow="fold")
    if wide:
        table.add_column("model", overflow="fold")
    table.add_column("plugins", overflow="fold")
    table.add_column("version", no_wrap=True)
    for i in sorted(instances, key=lambda i: (SERVICE_NAMES.index(i.role) if i.role in SERVICE_NAMES else 99, i.instance_id)):
        model = " ".join(x for x in (i.model, f"[dim]{i.weight_version[:12]}[/]" if i.weight_version else "") if x)
        plugins = ", ".join(f"{s} [dim]{v}[/]" for s, v in i.plugins.items()) or "[dim]none[/]"
        table.add_row(
            f"[bold]{i.role}[/]", escape(i.instance_id.removeprefix(f"{i.role}-") if not wide else i.instance_id),
            f"[{_STATES.get(i.state, 'yellow')}]{i.state}[/]", _age(i.started_unix_s), *([str(i.pid), i.grpc_address] if wide else []),
            load_text(i), *([model] if wide else []), plugins, i.version,
        )  # fmt: skip
    output.out.print(table)
    if missing:
        output.out.print(f"[yellow]no instance of:[/] {', '.join(missing)}")


def _age(started_unix_s: float) -> str:
    return output.seconds(max(0.0, time.time() - started_unix_s)) if started_unix_s else ""


def load_text(info: InstanceInfo) -> str:
    """Load in few words: pairs of used and total become one, counts lose their prefix, zeros and ports are left out."""
    load = {k: v for k, v in info.load.items() if not k.endswith("_port")}
    parts = []
    for key in [k for k in load if k.endswith("_used") and k[:-5] + "_total" in load]:
        base = key[:-5]
        parts.append(f"{base.replace('_', ' ')} {load.pop(key):g}/{load.pop(base + '_total'):g}")
    parts = [f"{key.removeprefix('num_').replace('_', ' ')} {value:g}" for key, value in load.items() if value] + parts
    return ", ".join(parts) or "[dim]idle[/]"
