"""Made-up work for an engine, and what it gave: shared by the suites of records that live in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np

from plugmesh.types import SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.testing import FakeModel, steps, tiny_config, tokens_of

CONFIG = tiny_config(vocab_size=61, max_position=400)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
Tokens = dict[str, list[list[int]]]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, and how many steps later the next one comes. `cancel_after` steps it is cancelled; 0 never."""

    length: int
    max_tokens: int
    num_sequences: int = 1
    gap: int = 0
    temperature: float = 0.0
    priority: int = 0
    cancel_after: int = 0
    seed: int = 0

    def request(self, name: str) -> EngineRequest:
        """Prompts of equal seeds begin alike, so that prefixes are found again."""
        ids = np.random.default_rng(self.seed).integers(3, CONFIG.vocab_size, 4096)[: self.length]
        sampling = dataclasses.replace(
            GREEDY, max_tokens=self.max_tokens, num_sequences=self.num_sequences, temperature=self.temperature, seed=self.seed + 1
        )
        return EngineRequest(name, tuple(int(i) for i in ids), sampling, priority=self.priority)


def loads(*, max_size: int = 7, cancels: bool = False) -> st.SearchStrategy[list[Arrival]]:
    """Bursts and trickles, short and long, siblings, priorities, shared prefixes."""
    arrival = st.builds(
        Arrival, length=st.integers(1, 90), max_tokens=st.integers(1, 16), num_sequences=st.sampled_from([1, 1, 1, 3]), gap=st.integers(0, 4),
        temperature=st.sampled_from([0.0, 0.0, 0.8]), priority=st.integers(-1, 1),
        cancel_after=st.sampled_from([0, 1, 5]) if cancels else st.just(0), seed=st.integers(0, 3),
    )  # fmt: skip
    return st.lists(arrival, min_size=1, max_size=max_size)


def fake_engine(*, window: int = 1 << 30, num_kinds: int = 1 << 30, scheduler: Any = None, drafts: Any = None, **config: object) -> Engine:
    """An engine over `plugmesh_engine.testing.FakeModel`: instant, and every token depends on all that came before it."""
    settings = EngineConfig(**{"num_blocks": 96, "max_tokens_per_step": 64, "max_num_sequences": 16, **config})  # type: ignore[arg-type]
    return Engine(FakeModel(CONFIG, num_kinds=num_kinds, window=window), settings, scheduler=scheduler, drafts=drafts)


def play(engine: Engine, load: Sequence[Arrival], *, on_step: Callable[[], None] = lambda: None) -> Tokens:
    """Runs a load to its end; tokens of the requests that were not cancelled."""
    outputs = []
    num_steps = 0
    cancels: dict[int, list[str]] = {}

    def step() -> None:
        nonlocal num_steps
        outputs.append(engine.step())
        on_step()
        num_steps += 1
        for name in cancels.pop(num_steps, ()):
            engine.cancel(name)

    for i, a in enumerate(load):
        engine.add(a.request(f"r{i}"))
        if a.cancel_after:
            cancels.setdefault(num_steps + a.cancel_after, []).append(f"r{i}")
        for _ in range(a.gap):
            step()
    while cancels:
        step()
    outputs += steps(engine)
    tokens = tokens_of(engine, outputs)
    return {f"r{i}": tokens[f"r{i}"] for i, a in enumerate(load) if not a.cancel_after}


def check_idle(engine: Engine) -> None:
    """Nothing runs, nothing leaks, no record failed."""
    stats = engine.stats()

    assert (stats.num_running, stats.num_waiting, stats.kv_blocks_leaked) == (0, 0, 0)
    assert (stats.num_scheduler_errors, stats.num_draft_errors) == (0, 0)
