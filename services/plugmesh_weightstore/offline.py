"""A model's manifest without a mesh: `python -m plugmesh_weightstore.offline --model FILE --format F --store FOLDER` prints it as JSON.

For tools that run the engine by itself (`plugmesh bench engine`). Imports and packs as the service does, into a store of the same form; one
process at a time may use a store. What it prints has the fields of protobuf's ModelManifest, in their own names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plugmesh import logs
from plugmesh.config import MeshConfig
from plugmesh.errors import PlugmeshError
from plugmesh.host import PluginHost
from plugmesh.records import WeightFormatRecord
from plugmesh_weightstore.blobs import BlobStore
from plugmesh_weightstore.catalogue import Catalogue
from plugmesh_weightstore.importing import AllowedRoots, import_model
from plugmesh_weightstore.resolving import Resolver


def manifest(path: Path, format: str, store: Path, formats: Sequence[WeightFormatRecord] = ()) -> dict[str, Any]:
    """Imports the file where the store does not have it, packs it in the format, and tells where everything lies.

    Raises what `import_model` and `Resolver.tensors` raise.

    Args:
        formats: Of plugins, beside the core's.
    """
    path = path.expanduser().resolve()
    store.mkdir(parents=True, exist_ok=True)
    blobs = BlobStore(store)
    catalogue = Catalogue(f"sqlite:///{blobs.root / 'catalogue.sqlite3'}")
    try:
        stat = path.stat()
        key = hashlib.sha256(f"{path}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()[:48]
        version = catalogue.noted_import(key)
        if version is None:
            model = import_model(path, catalogue, blobs, AllowedRoots([path.parent, path]))
            catalogue.note_import(key, model.version)
        else:
            model = catalogue.find(version)
        tensors = Resolver(catalogue, blobs, formats).tensors(model, format)
        return {
            "model": model.aliases[0], "version": model.version, "architecture": model.architecture, "config_json": model.config_json, "format": format,
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "path": str(blobs.path(t.blob.sha256)), "offset": 0,
                 "num_bytes": t.blob.num_bytes, "sha256": t.blob.sha256}
                for t in tensors
            ],
            "assets": [{"name": name, "path": str(blobs.path(blob.sha256)), "num_bytes": blob.num_bytes} for name, blob in model.assets],
        }  # fmt: skip
    finally:
        catalogue.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Print a model's manifest as JSON.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--format", required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--plugins", default="", metavar="SLUG,...", help="plugins whose weight formats may be named")
    parser.add_argument("--plugin-settings", type=json.loads, default={}, metavar="JSON", help='their settings: {"slug": {"key": value}}')
    args = parser.parse_args()
    logs.configure("error")  # standard output is for the manifest
    try:
        slugs = [s for s in args.plugins.split(",") if s]
        host = PluginHost.load(slugs, MeshConfig(plugins=args.plugin_settings), service="weightstore")
        print(json.dumps(manifest(args.model, args.format, args.store, host.records("weight_formats"))))
    except PlugmeshError as e:
        print(e.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
