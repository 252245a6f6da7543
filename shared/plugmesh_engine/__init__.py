"""The inference engine that prefill and decode both run.

`Engine.step()` reads as: schedule, run, sample, emit. Policy is in `scheduler`, memory in `kv`, the device in `runner`, randomness in `sampler`.
"""

from plugmesh_engine.config import EngineConfig
from plugmesh_engine.engine import Engine
from plugmesh_engine.requests import BlockReady, EngineRequest, EngineStats, KvSource, StepOutput, TokenEvent
from plugmesh_engine.weights import LoadedModel, load_model

__all__ = ["BlockReady", "Engine", "EngineConfig", "EngineRequest", "EngineStats", "KvSource", "LoadedModel", "StepOutput", "TokenEvent", "load_model"]
