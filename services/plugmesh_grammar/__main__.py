"""`python -m plugmesh_grammar`: one grammar instance."""

from plugmesh.mesh.runtime import main

if __name__ == "__main__":
    main("grammar")
