"""What grammars become, without a mesh: `python -m plugmesh_grammar.offline` reads a JSON array of specifications and prints one of what they are lowered to.

For tools that run grammar engines by themselves (`plugmesh bench structured`). An entry of the output holds `candidates` (each a `language` and a
`source`, in order of preference) or an `error` with its `code`, `keyword` and `path`, and `lower_ms`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from plugmesh.errors import PlugmeshError
from plugmesh.grammar.spec import GrammarSpec
from plugmesh_grammar.schema import SchemaLimits, lower


def entry(spec: GrammarSpec) -> dict[str, Any]:
    """One specification."""
    began = time.perf_counter()
    try:
        lowered = lower(spec, limits=SchemaLimits())
        found: dict[str, Any] = {"candidates": [{"language": c.language, "source": c.source} for c in lowered.candidates]}
    except PlugmeshError as e:
        found = {"error": e.message, "code": e.code, "keyword": e.fields.get("keyword", ""), "path": e.fields.get("path", "")}
    return {**found, "lower_ms": (time.perf_counter() - began) * 1e3}


def main() -> int:
    specs = [GrammarSpec(**fields) for fields in json.load(sys.stdin)]
    json.dump([entry(spec) for spec in specs], sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
