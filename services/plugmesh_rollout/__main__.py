"""Starts the rollout service."""

from plugmesh.mesh.runtime import main

if __name__ == "__main__":
    main("rollout")
