"""Hooks and settings of plugmesh_aibrix_kv; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import EvictionContext, EvictionRecord

if TYPE_CHECKING:
    from plugmesh.host import PluginContext


class Settings(StrictModel):
    """`[plugins.aibrix_kv]`; the defaults are AIBrix's."""

    small_share: float = pydantic.Field(0.3, gt=0, lt=1)
    promote_hits: int = pydantic.Field(1, ge=1, le=3)
    max_ghosts: int = pydantic.Field(1 << 18, ge=0, le=1 << 26)


@hookimpl
def register_evictions(context: PluginContext) -> list[EvictionRecord]:
    """One order, named "aibrix-s3fifo"."""
    settings: Settings = context.settings(Settings)

    def build(facts: EvictionContext) -> Any:
        from plugmesh_aibrix_kv.s3fifo import S3Fifo

        return S3Fifo(facts.capacity_bytes, settings.small_share, settings.promote_hits, settings.max_ghosts)

    return [EvictionRecord("aibrix-s3fifo", build)]
