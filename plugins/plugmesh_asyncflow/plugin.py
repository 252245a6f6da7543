"""Hooks and settings of plugmesh_asyncflow; light to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import LoopPlan, LoopShape, SamplerRecord, WorkflowRecord

if TYPE_CHECKING:
    from plugmesh.records import Sampler


class Settings(StrictModel):
    """`[plugins.asyncflow]` has none: what can be chosen is chosen per run, in its `[workflow.options]`."""


@hookimpl
def register_workflows() -> list[WorkflowRecord]:
    """One workflow, named "asyncflow"; its options are the run's."""

    def plan(options: Mapping[str, Any], shape: LoopShape) -> LoopPlan:
        from plugmesh_asyncflow.workflow import plan as make

        return make(options, shape)

    return [WorkflowRecord("asyncflow", plan)]


@hookimpl
def register_samplers() -> list[SamplerRecord]:
    """One sampler, named "in_order", for the policy of that name."""

    def build(options: Mapping[str, Any]) -> Sampler:
        from plugmesh_asyncflow.in_order import InOrder

        return InOrder(options)

    return [SamplerRecord("in_order", build)]
