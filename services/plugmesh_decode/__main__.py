"""`python -m plugmesh_decode`."""

from plugmesh.mesh.runtime import main

if __name__ == "__main__":
    main("decode")
