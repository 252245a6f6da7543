"""What every record of a kind must do: one base class of tests per record type, bound to a plugin by its slug.

    from plugmesh.testing.conformance import SchedulerConformance

    class TestMine(SchedulerConformance):
        slug = "mine"
        settings = {"token_budget": 32}     # [plugins.mine]; a class with the defaults and one per interesting setting is a good start

The tests run offline, on fakes that are themselves compared with the real thing, and look at behaviour: round trips, determinism,
independence of the batch, isolation of errors, memory released, empty and extreme input. `CardConformance` compares the card with the code.
Needs pytest and hypothesis.
"""

from __future__ import annotations

import importlib
import pathlib

from plugmesh.testing.conformance.admission import AdmissionConformance
from plugmesh.testing.conformance.base import RecordConformance
from plugmesh.testing.conformance.card import CardConformance
from plugmesh.testing.conformance.draft import DraftConformance
from plugmesh.testing.conformance.eviction import EvictionConformance
from plugmesh.testing.conformance.grammar_engine import GrammarEngineConformance
from plugmesh.testing.conformance.kv_codec import KvCodecConformance
from plugmesh.testing.conformance.kv_hand_over import KvHandOverConformance
from plugmesh.testing.conformance.loss import LossConformance
from plugmesh.testing.conformance.prefill_policy import PrefillPolicyConformance
from plugmesh.testing.conformance.prompt_filter import PromptFilterConformance
from plugmesh.testing.conformance.quality_metric import QualityMetricConformance
from plugmesh.testing.conformance.reward import RewardConformance
from plugmesh.testing.conformance.router import RouterConformance
from plugmesh.testing.conformance.sampler import SamplerConformance
from plugmesh.testing.conformance.scheduler import SchedulerConformance
from plugmesh.testing.conformance.strategy import StrategyConformance
from plugmesh.testing.conformance.weight_format import WeightFormatConformance
from plugmesh.testing.conformance.workflow import WorkflowConformance
from plugmesh.testing.conformance.workload import WorkloadConformance

__all__ = [
    "AdmissionConformance", "CardConformance", "DraftConformance", "EvictionConformance", "GrammarEngineConformance", "KvCodecConformance",
    "KvHandOverConformance", "LossConformance", "PrefillPolicyConformance", "PromptFilterConformance", "QualityMetricConformance", "RecordConformance",
    "RewardConformance", "RouterConformance", "SamplerConformance", "SchedulerConformance", "StrategyConformance", "WeightFormatConformance",
    "WorkflowConformance", "WorkloadConformance", "suites",
]  # fmt: skip


def suites() -> dict[str, type[RecordConformance]]:
    """Hook name to its suite, for every suite in this package: {"register_schedulers": SchedulerConformance, ...}."""
    found: dict[str, type[RecordConformance]] = {}
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        if path.stem.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{path.stem}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, RecordConformance) and value is not RecordConformance and value.__module__ == module.__name__:
                found[f"register_{value.kind}"] = value
    return found
