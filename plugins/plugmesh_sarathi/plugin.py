"""Hooks and settings of plugmesh_sarathi; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import SchedulerContext, SchedulerRecord

if TYPE_CHECKING:
    from plugmesh.host import PluginContext


class Settings(StrictModel):
    """`[plugins.sarathi]`."""

    token_budget: int = pydantic.Field(128, ge=2, le=65536)         # tokens of one step, decodes and prompt chunks together
    tbt_target_ms: float = pydantic.Field(0.0, ge=0)                # above 0: profile the budget at start, token_budget is then its upper limit
    min_prefill_tokens: int = pydantic.Field(8, ge=1, le=4096)      # of the budget, kept from decodes, so that prompts never starve
    expected_decodes: int = pydantic.Field(8, ge=0, le=4096)        # the load to profile for
    expected_kv_tokens: int = pydantic.Field(512, ge=0, le=1 << 20)

    @pydantic.model_validator(mode="after")
    def _prompts_leave_room_for_decodes(self) -> Settings:
        if self.min_prefill_tokens >= self.token_budget:
            raise ValueError(f"min_prefill_tokens {self.min_prefill_tokens} must be below token_budget {self.token_budget}")
        return self


@hookimpl
def register_schedulers(context: PluginContext) -> list[SchedulerRecord]:
    """One scheduler, named "sarathi"."""
    settings: Settings = context.settings(Settings)

    def build(engine: SchedulerContext) -> Any:
        from plugmesh_sarathi.scheduler import build_scheduler  # the engine, only in processes that run one

        return build_scheduler(settings, engine)

    return [SchedulerRecord("sarathi", build)]
