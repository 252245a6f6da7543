"""The kvstores of a mesh as one instance uses them: a client per store, made when first needed."""

from __future__ import annotations

import asyncio

from plugmesh.kv.client import ROLE, KvClient
from plugmesh.mesh.api import Mesh
from plugmesh.mesh.hostid import host_id
from plugmesh.types import KvLayout


class KvStores:
    """Clients by store instance; one event loop owns it."""

    def __init__(self, mesh: Mesh, layout: KvLayout, *, holder: str, incarnation: str) -> None:
        self._mesh = mesh
        self._layout = layout
        self._holder = holder
        self._incarnation = incarnation
        self._clients: dict[str, KvClient] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def nearest(self) -> str:
        """A live store's instance id, of this host if there is one; empty when none lives."""
        infos = sorted(self._mesh.instances(ROLE), key=lambda i: (i.host != host_id(), i.instance_id))
        return infos[0].instance_id if infos else ""

    def client(self, store_instance: str) -> KvClient:
        """The client of one store. Clients of stores that left the mesh are closed on the way."""
        client = self._clients.get(store_instance)
        if client is None:
            live = {i.instance_id for i in self._mesh.instances(ROLE, include_suspect=True)} | {store_instance}
            for gone in [name for name in self._clients if name not in live]:
                task = asyncio.create_task(self._clients.pop(gone).close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
            client = self._clients[store_instance] = KvClient(
                self._mesh, self._layout, holder=self._holder, incarnation=self._incarnation, store_instance=store_instance
            )
        return client

    async def close(self) -> None:
        """Detaches from every store."""
        clients, self._clients = list(self._clients.values()), {}
        await asyncio.gather(*(c.close() for c in clients), *self._closing, return_exceptions=True)
