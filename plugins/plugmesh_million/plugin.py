"""Hooks and settings of plugmesh_million; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import KvCodecContext, KvCodecRecord

if TYPE_CHECKING:
    from plugmesh.host import PluginContext


class Settings(StrictModel):
    """`[plugins.million]`."""

    model: str = pydantic.Field("smollm2", max_length=512)          # whose weights codebooks are trained with, where there are none yet
    codebooks: str = pydantic.Field("~/.cache/plugmesh/million", max_length=1024)
    scope: Literal["head", "layer", "merged"] = "layer"
    tokens: int = pydantic.Field(8192, ge=512, le=1 << 17)          # of text that codebooks are trained on
    iterations: int = pydantic.Field(15, ge=1, le=200)
    seed: int = pydantic.Field(0, ge=0)
    asynchronous: bool = True                                       # False: rows are encoded within their step
    max_open_blocks: int = pydantic.Field(64, ge=1, le=4096)        # half-filled blocks that are kept exact


@hookimpl
def register_kv_codecs(context: PluginContext) -> list[KvCodecRecord]:
    """One codec, named "million"."""
    settings: Settings = context.settings(Settings)

    def build(engine: KvCodecContext) -> Any:
        from plugmesh_million.codec import build_codec  # numpy and the compiler, only in processes that run an engine

        return build_codec(settings, engine)

    return [KvCodecRecord("million", build)]
