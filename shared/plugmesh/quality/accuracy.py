"""What tests with right and wrong answers have in common: a share per side, and the difference item by item."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from plugmesh.quality import statistics
from plugmesh.records import Observation, QualityDelta


def observation(correct: Mapping[str, list[bool]]) -> Observation:
    """Figures are shares in percent, per group and over all items."""
    figures = {name: 100 * float(np.mean(items)) for name, items in correct.items()}
    arrays = {name: np.array(items, dtype=bool) for name, items in correct.items()}
    return Observation({**figures, "all": 100 * float(np.mean(np.concatenate(list(arrays.values()))))}, arrays)


def compare(name: str, without: Observation, with_: Observation) -> list[QualityDelta]:
    """The difference in percentage points over all items, which are the same on both sides."""
    differences = np.concatenate([with_.arrays[k].astype(float) - without.arrays[k] for k in sorted(without.arrays)])
    found = statistics.mean(100 * differences)
    return [QualityDelta(f"{name}_points", found.value, found.low, found.high, "higher")]
