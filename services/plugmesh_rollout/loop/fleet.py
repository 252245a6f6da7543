"""The mesh that a run generates with, seen from outside: its instances, and channels to them.

Either a mesh that is found, over its broker, by the record that `plugmesh up` leaves; or addresses, where there is no broker to reach.
"""

from __future__ import annotations

import asyncio
import pathlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import grpc.aio

from plugmesh.errors import ConfigError, PlugmeshError
from plugmesh.supervisor import runs
from plugmesh.supervisor.observe import Observer
from plugmesh.types import InstanceInfo
from plugmesh_rollout.loop.settings import RolloutPart

_OPTIONS = (
    ("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000),  # an instance that comes back is needed soon
)  # fmt: skip


class Fleet(Protocol):
    """Who is there now. The part of `plugmesh.mesh.api.Mesh` that a run needs, so that a mesh is one."""

    def instances(self, role: str) -> list[InstanceInfo]:
        """Those that may be asked. An instance that died may be among them for a while."""

    def direct_channel(self, info: InstanceInfo) -> grpc.aio.Channel:
        """Stays the fleet's to close."""


class _Channels:
    def __init__(self) -> None:
        self._channels: dict[str, grpc.aio.Channel] = {}

    def direct_channel(self, info: InstanceInfo) -> grpc.aio.Channel:
        if info.grpc_address not in self._channels:
            self._channels[info.grpc_address] = grpc.aio.insecure_channel(info.grpc_address, options=_OPTIONS)
        return self._channels[info.grpc_address]

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(c.close() for c in channels.values()), return_exceptions=True)


class Addresses(_Channels):
    """Instances that a file names. They are always there; who asks one that is not hears it from the call."""

    def __init__(self, addresses: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self._infos = {role: [InstanceInfo(role, a, "", a, "", 0) for a in given] for role, given in addresses.items()}

    def instances(self, role: str) -> list[InstanceInfo]:
        return self._infos.get(role, [])


class ObservedMesh(_Channels):
    """A mesh's own table of instances, which follows those that come and go."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer

    def instances(self, role: str) -> list[InstanceInfo]:
        return [i for i in self._observer.instances() if i.role == role and i.state == "ready"]

    async def close(self) -> None:
        await super().close()
        await self._observer.close()


async def connect(settings: RolloutPart) -> Addresses | ObservedMesh:
    """The mesh of `[rollout]`: addresses where they are given, else the one that runs here under that name.

    Raises:
        ConfigError: Half of the addresses, or no such mesh.
        Unavailable: Its broker does not answer.
    """
    if settings.address or settings.weightstore:
        if not (settings.address and settings.weightstore):
            raise ConfigError("rollout: backend mesh needs address (of decode instances, with commas between them) and weightstore, or neither")
        split = [a.strip() for a in settings.address.split(",")]
        return Addresses({"decode": [a for a in split if a], "weightstore": [settings.weightstore]})
    if settings.nats:
        return ObservedMesh(
            await Observer.connect(settings.mesh or "plugmesh", url=settings.nats, user=settings.nats_user, password_file=str(settings.nats_password_file or ""))
        )
    try:
        run = runs.find_run(settings.mesh or None)
    except PlugmeshError as e:
        raise ConfigError(f"rollout: backend mesh: {e.message}; start one with `plugmesh up`, or give address and weightstore") from e
    return ObservedMesh(
        await Observer.connect(
            run.name, url=run.nats_url, user=run.nats_user, password_file=str(pathlib.Path(run.nats_password_file)) if run.nats_password_file else "",
            tls_ca_file=run.nats_tls_ca_file,
        )
    )  # fmt: skip
