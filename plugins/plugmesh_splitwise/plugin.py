"""Hooks and settings of Splitwise."""

from __future__ import annotations

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import HandOver, KvHandOverRecord, RouterRecord


class Settings(StrictModel):
    """`[plugins.splitwise]`; the paper's simulator uses 8192 and 512 on A100s."""

    mixed_threshold_tokens: int = pydantic.Field(2048, ge=0)
    decode_threshold_tokens: int = pydantic.Field(4096, ge=0)
    overlap_min_tokens: int = pydantic.Field(512, ge=0)


@hookimpl
def register_routers(context):  # type: ignore[no-untyped-def]
    from plugmesh_splitwise.pools import SplitwiseRouter

    settings = context.settings(Settings)
    return [RouterRecord("splitwise", lambda: SplitwiseRouter(settings.mixed_threshold_tokens, settings.decode_threshold_tokens))]


@hookimpl
def select_router(names):  # type: ignore[no-untyped-def]
    return "splitwise" if "splitwise" in names else None


@hookimpl
def register_kv_hand_overs(context):  # type: ignore[no-untyped-def]
    settings = context.settings(Settings)

    def plan(num_prompt_tokens: int, layout: object) -> HandOver:
        return HandOver(overlap=num_prompt_tokens >= settings.overlap_min_tokens)

    return [KvHandOverRecord("splitwise", plan)]
