"""`python -m plugmesh_weightstore`."""

from plugmesh.mesh.runtime import main

if __name__ == "__main__":
    main("weightstore")
