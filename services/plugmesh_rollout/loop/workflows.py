"""The workflow that needs no plugin: generation and training by turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plugmesh.errors import InvalidRequest
from plugmesh.hookspecs import hookimpl
from plugmesh.records import LoopPlan, LoopShape, WorkflowRecord


def synchronous(options: Mapping[str, Any], shape: LoopShape) -> LoopPlan:
    """Every token is trained by the step after the weights that made it."""
    if options:
        raise InvalidRequest("the workflow synchronous has no options", param="workflow")
    return LoopPlan(staleness=0, is_gated=True, capacity_rows=shape.batch_rows, train_sampler="grpo_groups")


class CoreWorkflows:
    """The core's own, through the plugins' door."""

    @hookimpl
    def register_workflows(self) -> list[WorkflowRecord]:
        return [WorkflowRecord("synchronous", synchronous)]
