"""The inference engine that prefill and decode both run.

`Engine.step()` reads as: schedule, run, sample, emit. Policy is in `scheduler`, memory in `kv`, the device in `runner`, randomness in `sampler`.
"""

from plugmesh_engine.config import EngineConfig
from plugmesh_engine.engine import Engine
from plugmesh_engine.requests import BlockReady, EngineRequest, EngineStats, KvSource, StepOutput, TokenEvent
from plugmesh_engine.scheduler import FcfsScheduler, plan_prompts
from plugmesh_engine.seams import KvView, Scheduler, SequenceView
from plugmesh_engine.weights import LoadedModel, load_model

__all__ = [
    "BlockReady", "Engine", "EngineConfig", "EngineRequest", "EngineStats", "FcfsScheduler", "KvSource", "KvView", "LoadedModel",
    "Scheduler", "SequenceView", "StepOutput", "TokenEvent", "load_model", "plan_prompts",
]  # fmt: skip
