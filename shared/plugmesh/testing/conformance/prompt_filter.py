"""What every prompt filter must do: answer for every length, choose tokens that exist, the same ones each time, and keep nothing of what it saw."""

from __future__ import annotations

import dataclasses
import gc
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh.records import PromptFilterContext, PromptFilterRecord
from plugmesh.testing.conformance.base import RecordConformance, num_reachable
from plugmesh.types import SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.filtering import checked
from plugmesh_engine.testing import FakeModel, run_to_end, tiny_config


class PromptFilterConformance(RecordConformance):
    """`lengths` are tried as prompts; the filter must want at least one of them. `model` is what it is built for: of 8 layers, 6 heads and 3 KV heads."""

    kind = "prompt_filters"
    model: ClassVar[Any] = tiny_config(vocab_size=61, num_layers=8, max_position=8192)
    lengths: ClassVar[tuple[int, ...]] = (1, 2, 16, 17, 100, 513, 1025, 2048, 4096)
    max_examples: ClassVar[int] = 8

    def context(self) -> PromptFilterContext:
        return PromptFilterContext(self.model, self.model.max_position, 512)

    def wanted(self, made: Any) -> list[int]:
        """Those of `lengths` that it filters."""
        found = [n for n in self.lengths if made.layers(n) > 0]

        assert found, "it leaves prompts of all these lengths alone; give it other settings or the suite other lengths"
        return found

    def seen(self, record: PromptFilterRecord, num_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys of a made-up prompt, as the engine hands them over."""
        rng, c = np.random.default_rng(seed), self.model
        q = rng.standard_normal((min(record.num_queries, num_tokens), c.num_heads, c.head_dim)).astype(np.float32)
        return q, rng.standard_normal((num_tokens, c.num_kv_heads, c.head_dim)).astype(np.float32)

    def engine(self, record: PromptFilterRecord | None, **config: Any) -> Engine:
        return Engine(FakeModel(self.model), EngineConfig(**{"num_blocks": 1200, "max_tokens_per_step": 512, **config}), prompt_filter=record)

    def request(self, name: str, num_tokens: int, seed: int = 0, **sampling: Any) -> EngineRequest:
        ids = np.random.default_rng(seed).integers(3, self.model.vocab_size, num_tokens)
        wanted = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, "seed": 5, **sampling}
        wanted["max_tokens"] = max(1, min(int(wanted["max_tokens"]), self.model.max_position - num_tokens))
        return EngineRequest(name, tuple(int(i) for i in ids), SamplingParams(**wanted))

    # -- the filter ------------------------------------------------------------------------------------------------------

    def test_it_asks_for_layers_that_the_model_has_and_for_the_same_ones_each_time(self, record: PromptFilterRecord) -> None:
        made, again = record.build(self.context()), record.build(self.context())
        first = [made.layers(n) for n in self.lengths]

        assert all(0 <= layer < self.model.num_layers for layer in first)
        assert first == [made.layers(n) for n in self.lengths] == [again.layers(n) for n in reversed(self.lengths)][::-1]

    def test_it_chooses_tokens_of_the_prompt_in_their_order(self, record: PromptFilterRecord) -> None:
        made = record.build(self.context())
        lengths = self.wanted(made)

        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(lengths), st.integers(0, 1000), st.sampled_from([0.0, 1e-30, 1.0, 1e15]))
        def check(num_tokens: int, seed: int, scale: float) -> None:
            q, k = self.seen(record, num_tokens, seed)
            chosen = checked(made.select(q * np.float32(scale), k), num_tokens)

            assert chosen == sorted(set(chosen))
            assert 0 <= chosen[0] <= chosen[-1] < num_tokens

        check()

    def test_a_selection_depends_on_its_arguments_only_and_leaves_them_as_they_are(self, record: PromptFilterRecord) -> None:
        """So that a request that moves to another instance is filtered there as it was here."""
        made, again = record.build(self.context()), record.build(self.context())
        num_tokens = self.wanted(made)[0]
        q, k = self.seen(record, num_tokens)
        before = q.copy(), k.copy()
        first = checked(made.select(q, k), num_tokens)
        for seed in (1, 2, 3):
            made.select(*self.seen(record, num_tokens, seed))

        assert first == checked(made.select(q, k), num_tokens) == checked(again.select(q, k), num_tokens)
        assert (before[0] == q).all()
        assert (before[1] == k).all()

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_refused_or_survived(self, record: PromptFilterRecord, value: float) -> None:
        made = record.build(self.context())
        num_tokens = self.wanted(made)[0]
        q, k = self.seen(record, num_tokens)
        k[num_tokens // 2] = value
        try:
            chosen = made.select(q, k)
        except ValueError:
            return  # the engine reads the prompt whole

        assert checked(chosen, num_tokens)

    def test_it_keeps_nothing_of_the_prompts_it_saw(self, record: PromptFilterRecord) -> None:
        made = record.build(self.context())
        num_tokens = self.wanted(made)[0]
        sizes = []
        for _ in range(3):
            for seed in range(10):
                made.select(*self.seen(record, num_tokens, seed))
            gc.collect()
            sizes.append(num_reachable(made))

        assert sizes[2] <= sizes[1] + 20, "it grows by what it keeps of every prompt"

    # -- in an engine ----------------------------------------------------------------------------------------------------

    def test_a_filtered_prompt_goes_on_as_its_chosen_tokens_would(self, record: PromptFilterRecord) -> None:
        made = record.build(self.context())
        num_tokens = self.wanted(made)[0]
        asked = [self.request("greedy", num_tokens), self.request("seeded", num_tokens, 1, temperature=0.9, num_sequences=2)]
        chosen: dict[int, tuple[int, ...]] = {}
        watched = dataclasses.replace(record, build=lambda context: Watched(record.build(context), chosen))
        got = run_to_end(self.engine(watched), *asked)
        plain = [dataclasses.replace(r, token_ids=tuple(r.token_ids[i] for i in chosen[n])) for n, r in enumerate(asked)]

        assert got == run_to_end(self.engine(None), *plain)

    def test_prompts_that_it_leaves_alone_are_answered_as_without_it(self, record: PromptFilterRecord) -> None:
        made = record.build(self.context())
        asked = [self.request(str(n), n, n) for n in self.lengths if made.layers(n) == 0]
        engine = self.engine(record)

        assert run_to_end(engine, *asked) == run_to_end(self.engine(None), *asked)
        assert engine.stats().num_filtered_prompts == 0

    def test_the_company_makes_no_difference_and_nothing_is_left_behind(self, record: PromptFilterRecord) -> None:
        lengths = self.wanted(record.build(self.context()))[:2]
        asked = [self.request(f"long {n}", n, n) for n in lengths] + [self.request(f"short {n}", n, n, max_tokens=30) for n in (1, 40)]
        engine = self.engine(record)
        together = run_to_end(engine, *asked)
        stats = engine.stats()

        assert together == {r.request_id: run_to_end(self.engine(record), r)[r.request_id] for r in asked}
        assert (stats.kv_blocks_used, stats.kv_blocks_leaked, stats.num_filter_errors) == (0, 0, 0)
        assert stats.num_filtered_prompts >= len(lengths)

    def test_a_request_that_is_cancelled_in_stage_one_leaves_nothing(self, record: PromptFilterRecord) -> None:
        num_tokens = self.wanted(record.build(self.context()))[-1]
        for num_steps in range(4):
            engine = self.engine(record)
            engine.add(self.request("gone", num_tokens))
            for _ in range(num_steps):
                engine.step()
            engine.cancel("gone")
            stats = engine.stats()

            assert not engine.has_work()
            assert (stats.kv_blocks_used, stats.kv_blocks_leaked, stats.num_waiting) == (0, 0, 0)


class Watched:
    """Hands on what a filter says and keeps what it chose, in the order of its answers."""

    def __init__(self, made: Any, chosen: dict[int, tuple[int, ...]]) -> None:
        self._made, self._chosen = made, chosen

    def layers(self, num_prompt_tokens: int) -> int:
        return int(self._made.layers(num_prompt_tokens))

    def select(self, q: np.ndarray, k: np.ndarray) -> Any:
        answer = self._made.select(q, k)
        self._chosen[len(self._chosen)] = tuple(int(i) for i in answer)
        return answer
