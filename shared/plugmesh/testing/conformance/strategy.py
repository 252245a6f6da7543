"""What every strategy must do: one answer, within the budget, repeatable, and no child left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import random
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, ClassVar

import pytest

from plugmesh.errors import InvalidRequest, PlugmeshError, Unavailable
from plugmesh.records import StrategyEvent, StrategyRecord, StrategyRequest
from plugmesh.testing.conformance.base import RecordConformance, num_reachable
from plugmesh.testing.strategies import ReplayApi, Script, strategy_request
from plugmesh.types import FinishReason, SamplingParams, TokenInfo

LIMIT_S = 20.0  # for one run; nothing in it waits for anything but children


def script_of(seed: int, *, length: int = 12, answer: Callable[[int], str] = lambda child: f" Answer: {child % 3}") -> Callable[[int, SamplingParams], Script]:
    """Children with different lengths, confidences and ends; the same for the same seed."""

    def script(child: int, sampling: SamplingParams) -> Script:
        rng = random.Random(f"{seed}/{child}")
        num = max(1, rng.randrange(length // 2, length + 1))
        texts = [f"w{rng.randrange(9)} " for _ in range(num - 1)] + [answer(child)]
        wants = sampling.confidence_top_k > 0
        tokens = [TokenInfo(rng.randrange(1000), logprob=-0.5 if sampling.logprobs else 0.0, confidence=rng.uniform(1, 20) if wants else 0.0) for _ in texts]
        return Script(tokens, texts, FinishReason.LENGTH if rng.random() < 0.2 else FinishReason.STOP)

    return script


class StrategyConformance(RecordConformance):
    """`options` is what a request says beside the strategy's name; a class with {} and one per interesting set of them is a good start."""

    kind = "strategies"
    options: ClassVar[Mapping[str, Any]] = {}

    def request(self, **sampling: Any) -> StrategyRequest:
        return strategy_request(self.options, **sampling)

    async def play(self, strategy: Any, api: ReplayApi, request: StrategyRequest) -> list[StrategyEvent]:
        """All events of a run that ends by itself."""
        async with asyncio.timeout(LIMIT_S):
            return [e async for e in strategy.run(request, api)]

    def check_nothing_is_left(self, api: ReplayApi) -> None:
        assert api.open == set(), "children still run"
        assert api.ledger.num_reserved == 0
        assert api.ledger.num_tokens <= api.ledger.budget_tokens and api.ledger.num_calls <= api.ledger.budget_calls

    async def test_a_run_gives_text_and_ends_with_exactly_one_final_event(self, record: StrategyRecord) -> None:
        for seed in range(8):
            request = self.request(seed=seed)
            api = ReplayApi(request, script_of(seed))
            events = await self.play(record.build(), api, request)

            assert [e.finish_reason is not None for e in events] == [False] * (len(events) - 1) + [True]
            assert all(isinstance(e, StrategyEvent) for e in events)
            assert "".join(e.text for e in events)
            json.dumps(events[-1].detail, allow_nan=False)
            self.check_nothing_is_left(api)

    async def test_the_same_children_give_the_same_answer(self, record: StrategyRecord) -> None:
        strategy = record.build()
        for seed in range(4):
            request = self.request(seed=seed)
            runs = [await self.play(s, ReplayApi(request, script_of(seed)), request) for s in (strategy, strategy, record.build())]

            assert runs[0] == runs[1] == runs[2]

    async def test_requests_at_the_same_time_do_not_touch_each_other(self, record: StrategyRecord) -> None:
        strategy = record.build()
        requests = [self.request(seed=seed) for seed in range(6)]
        alone = [await self.play(strategy, ReplayApi(r, script_of(i)), r) for i, r in enumerate(requests)]
        together = await asyncio.gather(*(self.play(strategy, ReplayApi(r, script_of(i)), r) for i, r in enumerate(requests)))

        assert together == alone

    @pytest.mark.parametrize(("budget_tokens", "budget_calls"), [(0, 100), (63, 100), (64, 100), (200, 100), (1000, 100), (1 << 20, 1), (1 << 20, 3), (1 << 20, 0)])
    async def test_any_budget_gives_an_answer_or_a_typed_error(self, record: StrategyRecord, budget_tokens: int, budget_calls: int) -> None:
        """A request of 64 tokens; a strategy must live with fewer children than it asked for, and with none."""
        request = self.request(max_tokens=64)
        api = ReplayApi(request, script_of(1), budget_tokens=budget_tokens, budget_calls=budget_calls, late_steps=3)
        with contextlib.suppress(PlugmeshError):
            events = await self.play(record.build(), api, request)
            assert events[-1].finish_reason is not None

        self.check_nothing_is_left(api)

    @pytest.mark.parametrize("failing", [0, 1, 5])
    async def test_a_child_that_fails_ends_in_an_answer_or_its_own_error_and_no_other_child_goes_on(self, record: StrategyRecord, failing: int) -> None:
        error = Unavailable("the decode instance is gone", retry_after_s=1)
        plain = script_of(2)

        def script(child: int, sampling: SamplingParams) -> Script:
            s = plain(child, sampling)
            return Script(s.tokens[:3], s.texts[:3], FinishReason.STOP, error) if child == failing else s

        request = self.request()
        api = ReplayApi(request, script)
        raised: list[Unavailable] = []
        try:
            events = await self.play(record.build(), api, request)
            assert events[-1].finish_reason is not None
        except Unavailable as e:
            raised.append(e)
        assert raised in ([], [error])
        gc.collect()
        await asyncio.sleep(0)
        self.check_nothing_is_left(api)

    @pytest.mark.parametrize("after", [1, 2, 7])
    async def test_a_run_that_is_cancelled_leaves_no_child_running(self, record: StrategyRecord, after: int) -> None:
        request = self.request()
        api = ReplayApi(request, script_of(3, length=40))
        task = asyncio.create_task(self.play(record.build(), api, request))
        for _ in range(100_000):
            await asyncio.sleep(0)
            if api.num_steps >= after or task.done():
                break
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        gc.collect()
        await asyncio.sleep(0)
        self.check_nothing_is_left(api)

    async def test_a_client_that_leaves_after_the_first_event_leaves_no_child_running(self, record: StrategyRecord) -> None:
        request = self.request()
        api = ReplayApi(request, script_of(4))
        stream = record.build().run(request, api)
        assert isinstance(stream, AsyncGenerator), "run must be an async generator, so that it can be closed"
        async for _ in stream:
            break
        await stream.aclose()
        gc.collect()
        await asyncio.sleep(0)
        self.check_nothing_is_left(api)

    @pytest.mark.parametrize("kind", ["empty", "no tokens", "one token", "no answer", "long", "strange text", "all the same"])
    async def test_whatever_children_say_is_taken(self, record: StrategyRecord, kind: str) -> None:
        def script(child: int, sampling: SamplingParams) -> Script:
            token = TokenInfo(1, confidence=5.0 if sampling.confidence_top_k else 0.0)
            long = [f"{i} " for i in range(sampling.max_tokens)]
            texts = {"empty": [""], "no tokens": [], "one token": ["4"], "no answer": ["?", "..."], "long": long,
                     "strange text": ["\x00", "\u202e", "\\boxed{", "}}}", "𝟙", "-" * 5000], "all the same": ["Answer: 7"]}[kind]
            return Script([token] * len(texts), texts, FinishReason.LENGTH if kind == "long" else FinishReason.STOP)

        request = self.request(max_tokens=40)
        api = ReplayApi(request, script)
        events = await self.play(record.build(), api, request)

        assert events[-1].finish_reason is not None
        self.check_nothing_is_left(api)

    async def test_an_option_that_does_not_exist_is_refused_by_name(self, record: StrategyRecord) -> None:
        request = strategy_request({**self.options, "no_such_option": 1})
        with pytest.raises(InvalidRequest, match="no_such_option"):
            await self.play(record.build(), ReplayApi(request, script_of(1)), request)

    async def test_greedy_and_seeded_requests_with_and_without_log_probabilities_are_served(self, record: StrategyRecord) -> None:
        for sampling in ({"temperature": 0.0}, {"temperature": 2.0, "top_p": 0.5}, {"logprobs": True, "top_logprobs": 2}, {"max_tokens": 1}):
            request = self.request(**sampling)
            api = ReplayApi(request, script_of(5))
            events = await self.play(record.build(), api, request)

            assert events[-1].finish_reason is not None
            self.check_nothing_is_left(api)

    async def test_ended_requests_are_forgotten(self, record: StrategyRecord) -> None:
        strategy, sizes = record.build(), []
        for _ in range(3):
            for seed in range(6):
                request = self.request(seed=seed)
                await self.play(strategy, ReplayApi(request, script_of(seed)), request)
            gc.collect()
            sizes.append(num_reachable(strategy))

        assert sizes[2] <= sizes[1] + 20, "it grows by what it keeps of every request"
