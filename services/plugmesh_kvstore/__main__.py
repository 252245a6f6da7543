"""Starts the kvstore service."""

from plugmesh.mesh.runtime import main

if __name__ == "__main__":
    main("kvstore")
