"""What the engine costs on the default model's vocabulary: `python -m plugmesh_llguidance.bench [--rounds N] [--json]`."""

from __future__ import annotations

from plugmesh.bench.grammar_engine import main
from plugmesh_llguidance.engine import LlguidanceEngine
from plugmesh_llguidance.plugin import Settings

if __name__ == "__main__":
    main(lambda v: LlguidanceEngine(v, Settings()))
