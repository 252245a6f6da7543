"""Hooks and settings of plugmesh_qserve; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import KvCodecRecord, WeightFormatRecord

if TYPE_CHECKING:
    from plugmesh.host import PluginContext


class Settings(StrictModel):
    """`[plugins.qserve]`."""

    group: int = pydantic.Field(32, ge=8, le=128, multiple_of=8)
    rotate: bool = True
    key_alpha: float = pydantic.Field(0.5, ge=0, le=1)
    down_alpha: float = pydantic.Field(0.0, ge=0, le=1)
    down_beta: float = pydantic.Field(0.0, ge=0, le=1)
    search: bool = True
    gptq: bool = True
    calibration_tokens: int = pydantic.Field(1024, ge=0, le=8192)
    kv_bits: Literal[4, 16] = 4


@hookimpl
def register_weight_formats(context: PluginContext) -> list[WeightFormatRecord]:
    """One format, named "qserve"."""
    s: Settings = context.settings(Settings)
    from plugmesh_qserve.weights import Recipe, record

    return [record(Recipe(s.group, s.rotate, s.key_alpha, s.down_alpha, s.down_beta, s.search, s.gptq, s.calibration_tokens))]


@hookimpl
def register_kv_codecs(context: PluginContext) -> list[KvCodecRecord]:
    """One codec, unless KV is to stay as the executor has it."""
    s: Settings = context.settings(Settings)
    if s.kv_bits != 4:
        return []
    from plugmesh_qserve.kv4 import record

    return [record()]
