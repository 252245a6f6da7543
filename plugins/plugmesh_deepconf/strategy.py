"""DeepConf as a strategy: sample, stop, filter, vote."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pydantic

from plugmesh.errors import InvalidRequest, LimitExceeded
from plugmesh.records import StrategyApi, StrategyEvent, StrategyRequest
from plugmesh.types import FinishReason, SamplingParams, TokenInfo
from plugmesh_deepconf.answers import extract
from plugmesh_deepconf.confidence import GroupConfidence, scores
from plugmesh_deepconf.plugin import Settings
from plugmesh_deepconf.vote import consensus, keep_top, stop_bar, weighted_vote


class Trace:
    """One child. `answer` and `score` are set when it ended by itself; one that was stopped never votes."""

    __slots__ = ("_texts", "answer", "child", "confidences", "finish_reason", "group", "is_kept", "is_stopped", "score", "tokens")

    def __init__(self, child: int, window: int) -> None:
        self.child = child
        self.group = GroupConfidence(window)
        self.confidences: list[float] = []
        self.tokens: list[TokenInfo] = []
        self.finish_reason: FinishReason | None = None
        self.is_stopped = False
        self.is_kept = True
        self.answer: str | None = None
        self.score = 0.0
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    def take(self, text: str, tokens: Sequence[TokenInfo], bar: float) -> None:
        """More of it. Below the bar it is stopped: strictly below, since traces that are all alike equal a bar made of them."""
        self._texts.append(text)
        for token in tokens:
            self.tokens.append(token)
            self.confidences.append(token.confidence)
            mean = self.group.push(token.confidence)
            if self.group.is_full and mean < bar:
                self.is_stopped = True
                return

    def finish(self, settings: Settings) -> None:
        measured = scores(self.confidences, settings.window)
        self.score = 1.0 if settings.weight == "none" else float(getattr(measured, settings.weight))
        if not self.is_stopped:
            self.answer = extract(self.text, settings.answer)


class DeepConf:
    """`plugmesh.records.Strategy`; keeps nothing between requests."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    async def run(self, request: StrategyRequest, api: StrategyApi) -> AsyncIterator[StrategyEvent]:
        settings = merged(self._settings, request.options)
        sampling = dataclasses.replace(request.sampling, confidence_top_k=settings.top_k)
        if sampling.temperature == 0:
            sampling = dataclasses.replace(sampling, temperature=settings.temperature, top_p=settings.top_p)
        bar = -math.inf
        if settings.mode == "online":
            traces, bar = await self._online(settings, sampling, api)
        else:
            traces = await self._sample(settings, sampling, api, settings.traces, -math.inf)
            if settings.mode == "offline":
                kept = set(keep_top([t.score for t in traces], settings.keep_percent))
                for i, trace in enumerate(traces):
                    trace.is_kept = i in kept
        if not traces:
            raise LimitExceeded(f"the budget affords no trace of {sampling.max_tokens} tokens", param="strategy.budget_tokens")
        votes = vote(settings, traces)
        best = _speaker(traces, next(iter(votes), None))
        yield StrategyEvent(
            text=best.text, tokens=tuple(best.tokens) if request.sampling.logprobs else (), finish_reason=best.finish_reason,
            detail=_detail(settings, traces, votes, bar))

    async def _online(self, settings: Settings, sampling: SamplingParams, api: StrategyApi) -> tuple[list[Trace], float]:
        """Warm-up, bar, then batches until one answer has enough of the weight or the traces are used up."""
        traces = await self._sample(settings, sampling, api, min(settings.warmup, settings.traces), -math.inf)
        if not traces:
            return [], -math.inf
        bar = stop_bar([t.group.lowest for t in traces], settings.keep_percent)
        for trace in traces:
            trace.is_kept = not trace.group.lowest < bar
        while len(traces) < settings.traces:
            if settings.consensus < 1 and consensus(vote(settings, traces)) >= settings.consensus:
                break
            more = await self._sample(settings, sampling, api, min(settings.batch, settings.traces - len(traces)), bar)
            if not more:
                break  # the budget is used up
            traces += more
        return traces, bar

    async def _sample(self, settings: Settings, sampling: SamplingParams, api: StrategyApi, n: int, bar: float) -> list[Trace]:
        traces: dict[int, Trace] = {}
        async with contextlib.aclosing(api.generate(n, sampling=sampling)) as events:
            async for e in events:
                trace = traces.get(e.child)
                if trace is None:
                    trace = traces[e.child] = Trace(e.child, settings.window)
                if not trace.is_stopped:
                    trace.take(e.text, e.tokens, bar)
                    if trace.is_stopped and e.finish_reason is None:
                        api.cancel(e.child)
                if e.finish_reason is not None:
                    trace.finish_reason = e.finish_reason
                    trace.finish(settings)
        return [traces[child] for child in sorted(traces)]


def merged(settings: Settings, options: Mapping[str, Any]) -> Settings:
    """The settings as a request changes them. Raises InvalidRequest, which names the option."""
    try:
        return Settings.model_validate({**settings.model_dump(), **options})
    except pydantic.ValidationError as e:
        problem = e.errors(include_url=False, include_input=False, include_context=False)[0]
        name = ".".join(str(part) for part in ("strategy", *problem["loc"]))
        raise InvalidRequest(f"{name[:128]}: {problem['msg'][:1].lower()}{problem['msg'][1:]}", param=name[:128]) from None


def vote(settings: Settings, traces: Sequence[Trace]) -> dict[str, float]:
    """Of the kept traces that were not stopped."""
    is_plain = settings.mode == "majority" or settings.weight == "none"
    return weighted_vote((t.answer, 1.0 if is_plain else t.score) for t in traces if t.is_kept and not t.is_stopped)


def _speaker(traces: Sequence[Trace], winner: str | None) -> Trace:
    """The trace whose text is the answer: of those that voted for the winner the most confident; without a winner the most confident that ended by itself."""
    voters = [t for t in traces if t.is_kept and not t.is_stopped and t.answer == winner and winner is not None]
    return max(voters or [t for t in traces if not t.is_stopped] or list(traces), key=lambda t: t.score)


def _detail(settings: Settings, traces: Sequence[Trace], votes: Mapping[str, float], bar: float) -> dict[str, Any]:
    return {
        "mode": settings.mode, "answer": next(iter(votes), None), "votes": {k: round(v, 6) for k, v in votes.items()},
        "bar": bar if math.isfinite(bar) else None,
        "traces": [
            {"child": t.child, "answer": t.answer, "score": round(t.score, 6), "num_tokens": len(t.confidences), "is_kept": t.is_kept,
             "end": "stopped" if t.is_stopped else t.finish_reason.value if t.finish_reason else ""}
            for t in traces
        ],
    }  # fmt: skip
