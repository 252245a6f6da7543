"""Fixtures with a real broker. Load with `pytest_plugins = ["plugmesh.testing.nats"]`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from plugmesh.config import MeshConfig
from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.mesh.subjects import OPERATOR


def mesh_config(broker: EmbeddedBroker, role: str = OPERATOR, **mesh: object) -> MeshConfig:
    """A configuration that joins this broker as `role`; further arguments are keys of `[mesh]`."""
    address = broker.credential(role)
    nats = {"url": address.url, "user": address.user, "password_file": str(address.password_file)}
    return MeshConfig.model_validate({"mesh": {"name": broker.mesh, "nats": nats, **mesh}})


@pytest_asyncio.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    """A broker of this test's own, on a free port, with the mesh's permissions."""
    embedded = EmbeddedBroker(tmp_path / "broker")
    await embedded.start()
    try:
        yield embedded
    finally:
        await embedded.stop()


@pytest.fixture
def broker_config(broker: EmbeddedBroker) -> Callable[..., MeshConfig]:
    """`broker_config("decode", lease_ttl_s=2.0)`: the configuration of a process of that role."""
    return lambda role=OPERATOR, **mesh: mesh_config(broker, role, **mesh)
