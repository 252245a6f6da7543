"""What the engine costs on the default model's vocabulary: `python -m plugmesh_xgrammar.bench [--rounds N] [--json]`."""

from __future__ import annotations

from plugmesh.bench.grammar_engine import main
from plugmesh_xgrammar.engine import XgrammarEngine

if __name__ == "__main__":
    main(lambda v: XgrammarEngine(v))
