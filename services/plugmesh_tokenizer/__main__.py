"""`python -m plugmesh_tokenizer`: one tokenizer instance."""

from plugmesh.mesh.runtime import main

if __name__ == "__main__":
    main("tokenizer")
