"""The inference engine that prefill and decode both run.

`Engine.step()` reads as: schedule, draft, run, sample, emit. Policy is in `scheduler`, guesses in `speculate`, memory in `kv`, the device in
`executors`, randomness in `sampler`. Nothing here imports torch before the torch executor is used.
"""

from plugmesh_engine.config import EngineConfig, resolve_executor, weight_format
from plugmesh_engine.engine import Engine
from plugmesh_engine.plugins import EnginePlugins
from plugmesh_engine.requests import BlockReady, EngineRequest, EngineStats, KvSource, StepOutput, TokenEvent
from plugmesh_engine.scheduler import FcfsScheduler, plan_prompts
from plugmesh_engine.seams import (
    DraftMethod,
    DraftOutcome,
    DraftView,
    Executor,
    KvCodec,
    KvMemory,
    KvView,
    Model,
    Scheduler,
    SequenceView,
)  # fmt: skip
from plugmesh_engine.weights import build_engine, load_model

__all__ = [
    "BlockReady", "DraftMethod", "DraftOutcome", "DraftView", "Engine", "EngineConfig", "EnginePlugins", "EngineRequest", "EngineStats", "Executor", "FcfsScheduler",
    "KvCodec", "KvMemory", "KvSource", "KvView", "Model", "Scheduler", "SequenceView", "StepOutput", "TokenEvent", "build_engine", "load_model", "plan_prompts",
    "resolve_executor", "weight_format",
]  # fmt: skip
