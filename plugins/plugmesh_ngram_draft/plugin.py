"""Hooks and settings of plugmesh_ngram_draft; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import DraftContext, DraftRecord, WorkloadRecord

if TYPE_CHECKING:
    from plugmesh.host import PluginContext


class Settings(StrictModel):
    """`[plugins.ngram_draft]`."""

    min_match: int = pydantic.Field(2, ge=1, le=16)
    max_match: int = pydantic.Field(16, ge=1, le=256)
    max_tokens: int = pydantic.Field(12, ge=1, le=256)
    min_gain: float = pydantic.Field(0.03, ge=0, le=10)

    @pydantic.model_validator(mode="after")
    def _a_match_has_lengths(self) -> Settings:
        if self.max_match < self.min_match:
            raise ValueError(f"max_match {self.max_match} must not be below min_match {self.min_match}")
        return self


@hookimpl
def register_drafts(context: PluginContext) -> list[DraftRecord]:
    """One method, named "ngram"."""
    settings: Settings = context.settings(Settings)

    def build(engine: DraftContext) -> Any:
        from plugmesh_ngram_draft.draft import build_method  # only in processes that draft

        return build_method(settings, engine)

    return [DraftRecord("ngram", build)]


@hookimpl
def register_workloads(context: PluginContext) -> list[WorkloadRecord]:
    """Text that repeats itself, and text that does not."""
    context.settings(Settings)
    from plugmesh_ngram_draft.workloads import WORKLOADS

    return WORKLOADS
