"""Hooks and settings of plugmesh_deepconf; light to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pydantic

from plugmesh.config import StrictModel
from plugmesh.hookspecs import hookimpl
from plugmesh.records import StrategyRecord
from plugmesh_deepconf.answers import AnswerKind

if TYPE_CHECKING:
    from plugmesh.host import PluginContext


class Settings(StrictModel):
    """`[plugins.deepconf]`; a request changes any of them by the same name in its `strategy`."""

    mode: Literal["online", "offline", "majority"] = "online"
    traces: int = pydantic.Field(32, ge=1, le=1024)                 # at most, warm-up included
    warmup: int = pydantic.Field(16, ge=1, le=1024)                 # online: traces that run to their end and set the bar
    batch: int = pydantic.Field(16, ge=1, le=256)                   # online: traces at once after the warm-up
    keep_percent: float = pydantic.Field(90.0, gt=0, le=100)        # the paper's eta: 90 "high", 10 "low"
    window: int = pydantic.Field(2048, ge=1, le=1 << 20)            # tokens of a group
    top_k: int = pydantic.Field(20, ge=1, le=64)                    # most likely tokens that a token's confidence is made of
    consensus: float = pydantic.Field(0.95, gt=0, le=1)             # online: enough of the weight for one answer to end early; 1 waits for all traces
    weight: Literal["lowest", "tail", "bottom", "mean", "none"] = "lowest"  # of a vote, and what offline filters by
    answer: AnswerKind = "auto"
    temperature: float = pydantic.Field(0.6, gt=0, le=2)            # in place of a greedy request's, whose traces would all be one
    top_p: float = pydantic.Field(0.95, gt=0, le=1)                 # likewise


@hookimpl
def register_strategies(context: PluginContext) -> list[StrategyRecord]:
    """One strategy, named "deepconf"."""
    settings: Settings = context.settings(Settings)

    def build() -> Any:
        from plugmesh_deepconf.strategy import DeepConf

        return DeepConf(settings)

    return [StrategyRecord("deepconf", build)]
