"""`python -m plugmesh_prefill`."""

from plugmesh.mesh.runtime import main

if __name__ == "__main__":
    main("prefill")
