"""How many bytes a model's weights are on the way from one host to another, and how long they take: a real weightstore process, a real copy over gRPC.

The copying side is this process, which calls itself another host, so it does what an engine there does: asks for the manifest over the mesh, reads every blob
and checks its hash.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plugmesh.config import MeshConfig
from plugmesh.errors import Unavailable
from plugmesh.mesh.broker import EmbeddedBroker
from plugmesh.mesh.real import RealMesh
from plugmesh_engine.fetch import fetch_manifest


@dataclass(frozen=True, slots=True)
class Copied:
    """One format, copied into an empty folder. `seconds` is the fastest of the rounds; packing is not part of it."""

    format: str
    num_bytes: int
    seconds: float


def measure(model: pathlib.Path, formats: Sequence[str], rounds: int = 3, settings: Mapping[str, object] | None = None) -> list[Copied]:
    """Copies the model in each of the formats, `rounds` times in turn.

    Raises:
        Unavailable: The weightstore ended, or did not answer in time.
        PlugmeshError: What it said.
    """
    before = os.environ.get("PLUGMESH_HOST_ID")
    with tempfile.TemporaryDirectory() as folder:
        try:
            return asyncio.run(_measure(model, formats, rounds, dict(settings or {}), pathlib.Path(folder)))
        finally:
            if before is None:
                os.environ.pop("PLUGMESH_HOST_ID", None)
            else:
                os.environ["PLUGMESH_HOST_ID"] = before


async def _measure(model: pathlib.Path, formats: Sequence[str], rounds: int, settings: dict[str, object], folder: pathlib.Path) -> list[Copied]:
    async with EmbeddedBroker(folder / "broker") as broker:

        def config(role: str, **more: object) -> MeshConfig:
            address = broker.credential(role)
            nats = {"url": address.url, "user": address.user, "password_file": str(address.password_file)}
            paths = {"data_dir": str(folder / "data"), "cache_dir": str(folder / "cache"), "model": str(model)}
            return MeshConfig.model_validate({"mesh": {"name": broker.mesh, "nats": nats, **paths}, **more})

        served = config("weightstore", services={"weightstore": {"plugins": ["dfloat11"], "pull": False}}, plugins={"dfloat11": settings} if settings else {})
        python_path = os.pathsep.join(p for p in sys.path if p)
        environment = {**os.environ, "PLUGMESH_HOST_ID": "here", "PLUGMESH_CONFIG_JSON": served.model_dump_json(), "PYTHONPATH": python_path}
        with (folder / "weightstore.log").open("wb") as log:
            command = (sys.executable, "-m", "plugmesh_weightstore")
            process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=log, stderr=log, stdin=asyncio.subprocess.DEVNULL)
        os.environ["PLUGMESH_HOST_ID"] = "there"
        mesh = await RealMesh.connect(config("decode"), "decode")
        try:
            found: dict[str, Copied] = {}
            for _ in range(rounds):
                for format in formats:
                    target = pathlib.Path(tempfile.mkdtemp(dir=folder))
                    try:
                        if format not in found:
                            await fetch_manifest(mesh, "", format, cache_dir=folder / "first")  # packs it, and reads the blobs into the page cache
                        start = time.perf_counter()
                        manifest = await fetch_manifest(mesh, "", format, cache_dir=target)
                    except Unavailable as e:
                        raise Unavailable(f"{e.message}; the weightstore said: {(folder / 'weightstore.log').read_text()[-500:]}", retry_after_s=1.0) from e
                    seconds = time.perf_counter() - start
                    num_bytes = sum(p.stat().st_size for p in (target / "blobs").iterdir())
                    assert num_bytes == sum({t.sha256: t.num_bytes for t in manifest.tensors}.values())
                    found[format] = Copied(format, num_bytes, min(seconds, found[format].seconds if format in found else seconds))
                    for path in (target / "blobs").iterdir():
                        path.unlink()
            return list(found.values())
        finally:
            await mesh.close()
            process.terminate()
            try:
                async with asyncio.timeout(20):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
