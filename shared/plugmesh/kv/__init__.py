"""Clients of the kvstore: `KvClient` reads and writes blocks, `KvIndex` follows what each store has. No torch."""

from plugmesh.kv.attachment import BlockRef
from plugmesh.kv.client import KvClient, KvClientStats
from plugmesh.kv.index import KvIndex

__all__ = ["BlockRef", "KvClient", "KvClientStats", "KvIndex"]
