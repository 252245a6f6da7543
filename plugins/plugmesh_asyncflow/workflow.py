"""How far apart generation and training may be, and which rows train next.

| preset | staleness | policy | what it is |
|---|---|---|---|
| synchronous | 0 | in_order | generation and training by turns |
| one_step_off | 1 | in_order | step k + 1 is generated while step k trains, always with the weights before |
| streaming | 2 | weight_fifo | every group with the newest weights at its start; training takes whole groups as they come |

| policy | a step trains | drops |
|---|---|---|
| in_order | the groups whose number is the step's, however long the slowest takes | nothing |
| weight_fifo | complete groups of the oldest weights first | nothing |
| ready_first | complete groups in the order of their prompts | nothing |
| windowed | complete groups of the newest weights first; admission is open | groups that became too old |

in_order, weight_fifo and ready_first hold a step back where taking other groups would make one that is still generated too old. The names are those of NeMo-RL's
policies over the same kind of table.

Sources: AsyncFlow, arXiv:2507.01663 (delayed parameter update, staleness threshold); AReaL, arXiv:2505.24298 (why admission must be bounded).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plugmesh.errors import InvalidRequest
from plugmesh.records import LoopPlan, LoopShape

PRESETS: dict[str, dict[str, Any]] = {
    "synchronous": {"staleness": 0, "policy": "in_order"},
    "one_step_off": {"staleness": 1, "policy": "in_order"},
    "streaming": {"staleness": 2, "policy": "weight_fifo"},
}
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "in_order": ("in_order", {}),
    "weight_fifo": ("version_window", {"order": "oldest", "wait": True}),
    "ready_first": ("version_window", {"order": "first", "wait": True}),
    "windowed": ("version_window", {"order": "newest", "wait": False}),
}
MAX_STALENESS = 64


def plan(options: Mapping[str, Any], shape: LoopShape) -> LoopPlan:
    """The plan of a run.

    Args:
        options: "preset", or "staleness" and "policy" (which also change a preset); "capacity_rows" (by default what is needed).

    Raises:
        InvalidRequest: Unknown or impossible options; a capacity below `needed_rows`, with which the loop would wait for ever.
    """
    unknown = set(options) - {"preset", "staleness", "policy", "capacity_rows"}
    if unknown:
        raise InvalidRequest(f"unknown option {sorted(unknown)[0]!r} of the workflow asyncflow", param="workflow")
    preset = options.get("preset", "streaming")
    if preset not in PRESETS:
        raise InvalidRequest(f"no preset {preset!r}; known: {', '.join(PRESETS)}", param="workflow.preset")
    chosen = {**PRESETS[preset], **options}
    staleness, policy = chosen["staleness"], chosen["policy"]
    if not isinstance(staleness, int) or isinstance(staleness, bool) or not 0 <= staleness <= MAX_STALENESS:
        raise InvalidRequest(f"staleness is a number from 0 to {MAX_STALENESS}, not {staleness!r}", param="workflow.staleness")
    if policy not in POLICIES:
        raise InvalidRequest(f"no policy {policy!r}; known: {', '.join(POLICIES)}", param="workflow.policy")
    sampler, sampler_options = POLICIES[policy]
    needed = needed_rows(policy, staleness, shape)
    capacity = int(chosen.get("capacity_rows", needed))
    if capacity < needed:
        raise InvalidRequest(
            f"capacity_rows {capacity} is below the {needed} rows that policy {policy} needs at staleness {staleness}: the loop would stop", param="workflow.capacity_rows"
        )
    return LoopPlan(
        staleness=staleness, is_gated=policy != "windowed", capacity_rows=capacity, train_sampler=sampler, train_options=sampler_options,
        is_pinned=policy == "in_order", evicts=policy == "windowed",
    )  # fmt: skip


def needed_rows(policy: str, staleness: int, shape: LoopShape) -> int:
    """Rows that the table must hold: a step's for every version in the window; with admission open, also those that are being generated meanwhile."""
    rows = (staleness + 1) * shape.batch_rows
    return rows + shape.groups_at_once * shape.group_size if policy == "windowed" else rows
