"""Hooks and settings of plugmesh_gemfilter; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import PromptFilterContext, PromptFilterRecord, WorkloadRecord

if TYPE_CHECKING:
    from plugmesh.host import PluginContext


class Settings(StrictModel):
    """`[plugins.gemfilter]`."""

    layer: int = pydantic.Field(0, ge=0, le=1024)             # 0: at `depth`
    depth: float = pydantic.Field(0.6, gt=0, lt=1)            # share of the model's layers
    keep_tokens: int = pydantic.Field(1024, ge=1, le=1 << 20)
    keep_first: int = pydantic.Field(4, ge=0, le=1 << 20)     # 0, as in the paper, leaves the beginning to the scores
    keep_last: int = pydantic.Field(64, ge=0, le=1 << 20)     # 0, as in the paper, leaves the question to the scores
    num_queries: int = pydantic.Field(32, ge=1, le=1024)       # 1 as in the paper
    pool_width: int = pydantic.Field(5, ge=1, le=1025)
    min_prompt_tokens: int = pydantic.Field(3072, ge=1, le=1 << 20)
    chunk_tokens: int = pydantic.Field(0, ge=0, le=65536)

    @pydantic.model_validator(mode="after")
    def _sizes_fit(self) -> Settings:
        if self.pool_width % 2 == 0:
            raise ValueError(f"pool_width {self.pool_width} must be odd, so that a window has a middle")
        if self.keep_first + self.keep_last > self.keep_tokens:
            raise ValueError(f"keep_first {self.keep_first} and keep_last {self.keep_last} exceed keep_tokens {self.keep_tokens}")
        return self


@hookimpl
def register_prompt_filters(context: PluginContext) -> list[PromptFilterRecord]:
    """One filter, named "gemfilter"."""
    return [record(context.settings(Settings))]


@hookimpl
def register_workloads(context: PluginContext) -> list[WorkloadRecord]:
    """Questions about long texts."""
    context.settings(Settings)
    from plugmesh_gemfilter.workloads import WORKLOADS

    return WORKLOADS


def record(settings: Settings) -> PromptFilterRecord:
    """The filter with these settings, for those who build an engine themselves."""

    def build(engine: PromptFilterContext) -> Any:
        from plugmesh_gemfilter.selection import build_filter  # numpy, only in processes that run an engine

        return build_filter(settings, engine)

    return PromptFilterRecord("gemfilter", build, num_queries=settings.num_queries, chunk_tokens=settings.chunk_tokens)
