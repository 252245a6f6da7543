"""Runs one gateway instance: `python -m plugmesh_gateway`."""

from plugmesh.mesh.runtime import main

if __name__ == "__main__":
    main("gateway")
