"""Hooks and settings of plugmesh_aibrix_routing; light to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import AdmissionRecord, RouterRecord

if TYPE_CHECKING:
    from plugmesh.host import PluginContext

Policy = Literal[
    "prefix-cache", "least-request", "power-of-two", "least-kv-cache", "least-latency", "throughput", "random", "round-robin"
]


class ClientLimits(StrictModel):
    """What one client may use in any 60 seconds; 0 is without limit."""

    requests_per_minute: int = pydantic.Field(0, ge=0)
    tokens_per_minute: int = pydantic.Field(0, ge=0)


class Settings(StrictModel):
    """`[plugins.aibrix_routing]`."""

    policy: Policy = "prefix-cache"
    imbalance_requests: int = pydantic.Field(8, ge=0)           # the project's documents say 16, its code 8
    load_sigma: float = pydantic.Field(2.0, ge=0)
    min_match_share: float = pydantic.Field(0.0, ge=0, le=1)
    max_blocks: int = pydantic.Field(200_000, ge=1, le=1 << 24)
    expect_s: float = pydantic.Field(30.0, ge=0, le=3600)
    requests_per_minute: int = pydantic.Field(0, ge=0)
    tokens_per_minute: int = pydantic.Field(0, ge=0)
    client_limits: Mapping[str, ClientLimits] = {}
    max_clients: int = pydantic.Field(10_000, ge=1, le=1 << 20)
    seed: int = 0


@hookimpl
def register_routers(context: PluginContext) -> list[RouterRecord]:
    """One router, named "aibrix"."""
    settings: Settings = context.settings(Settings)

    def build() -> Any:
        from plugmesh_aibrix_routing.router import build_router

        return build_router(settings)

    return [RouterRecord("aibrix", build, needs_block_ids=settings.policy == "prefix-cache")]


@hookimpl
def select_router(names: list[str]) -> str | None:
    return "aibrix" if "aibrix" in names else None


@hookimpl
def register_admission(context: PluginContext) -> list[AdmissionRecord]:
    """Rate limits, when any is set; named "aibrix-rate-limits"."""
    settings: Settings = context.settings(Settings)
    if not (settings.requests_per_minute or settings.tokens_per_minute or settings.client_limits):
        return []

    def build() -> Any:
        from plugmesh_aibrix_routing.rates import RateLimits

        return RateLimits(
            ClientLimits(requests_per_minute=settings.requests_per_minute, tokens_per_minute=settings.tokens_per_minute),
            settings.client_limits, max_clients=settings.max_clients,
        )

    return [AdmissionRecord("aibrix-rate-limits", build)]
