"""Looking at a mesh from outside: its instance table, read over the broker without being an instance."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import replace

from plugmesh.mesh import subjects
from plugmesh.mesh.discovery import Discovery
from plugmesh.mesh.hostid import host_id
from plugmesh.mesh.rpc.nats_carrier import NatsCarrier
from plugmesh.supervisor.runs import process_start
from plugmesh.types import InstanceInfo


class Observer:
    """A connection that follows the leases. Make it with `connect`, end it with `close`."""

    def __init__(self, carrier: NatsCarrier, discovery: Discovery) -> None:
        self._carrier = carrier
        self._discovery = discovery

    @classmethod
    async def connect(
        cls, mesh: str, *, url: str, user: str = "", password_file: str = "", tls_ca_file: str = "", lease_ttl_s: float = 5.0, timeout_s: float = 10.0
    ) -> Observer:
        """Connects and reads the leases that are there.

        Raises:
            Unavailable: No broker, or it refused the credential.
            ConfigError: The password file cannot be read.
        """
        carrier = await NatsCarrier.connect(
            url, mesh=mesh, role=subjects.OPERATOR, user=user, timeout_s=timeout_s, name=f"{mesh}.observer",
            password_file=pathlib.Path(password_file) if password_file else None,
            tls_ca_file=pathlib.Path(tls_ca_file) if tls_ca_file else None,
        )  # fmt: skip
        discovery = Discovery(carrier, mesh, lease_ttl_s)
        try:
            await discovery.start()
        except BaseException:
            await carrier.close()
            raise
        return cls(carrier, discovery)

    @property
    def connected(self) -> bool:
        return self._carrier.connected

    def instances(self) -> list[InstanceInfo]:
        """All rows, by role and id. A row of this machine whose process is gone says "gone", before its lease is over."""
        here = host_id()
        return [
            replace(i, state="gone") if i.host == here and process_start(i.pid) == 0 else i
            for i in self._discovery.table.live("", include_suspect=True)
        ]

    def watch(self, callback: Callable[[str, InstanceInfo], None]) -> Callable[[], None]:
        """See `Mesh.watch`."""
        return self._discovery.table.watch(callback)

    async def close(self) -> None:
        await self._discovery.stop()
        await self._carrier.close()
