"""One request into many: a strategy of a plugin makes the answer out of children, which are ordinary generations.

The parent is a `Generation` like any other to those who read it; what it emits comes from the strategy instead of from decode.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from plugmesh.errors import Cancelled, ConfigError, InvalidRequest, PluginError, PlugmeshError
from plugmesh.host import PluginHost
from plugmesh.ledger import Ledger
from plugmesh.limits import Limits, check_sampling, check_token_ids, fit_context
from plugmesh.records import AdmissionRequest, ChildEvent, Strategy, StrategyEvent, StrategyRequest
from plugmesh.types import FinishReason, SamplingParams
from plugmesh.wire import token_from_pb, token_to_pb

from .admit import Admissions, Admitted
from .generation import Engine, Event, Generation
from .prepare import ServedModel, TokenizerFacts
from .request import Prepared, StrategyChoice, Wanted

log = structlog.get_logger()

_CLOSE_S = 2.0  # for a strategy to clean up after its request ended


class Strategies:
    """The strategies of this process by name."""

    def __init__(self, strategies: dict[str, Strategy], default: str) -> None:
        self._strategies = strategies
        self._default = default

    @classmethod
    def load(cls, host: PluginHost, default: str) -> Strategies:
        """Asks the plugins once per process. Raises ConfigError, also when nobody registers the default."""
        found = {record.name: host.guard(record.name, record.build) for record in host.records("strategies")}
        if default and default not in found:
            raise ConfigError(f"services.gateway.default_strategy: no plugin registers {default!r}", key="services.gateway.default_strategy")
        return cls(found, default)

    def choose(self, wanted: Wanted) -> tuple[Strategy, StrategyChoice] | None:
        """What makes the answer to this request; None for the model alone.

        Raises:
            InvalidRequest: An unknown name, or a strategy for more than one prompt or choice.
        """
        choice = wanted.strategy
        is_single = len(wanted.prompts) == 1 and wanted.sampling.num_sequences == 1
        if choice is None:
            if not self._default or not is_single:
                return None
            choice = StrategyChoice(self._default, {})
        if choice.name == "none":
            return None
        strategy = self._strategies.get(choice.name)
        if strategy is None:
            known = ", ".join(sorted(self._strategies)) or "no plugin registers one"
            raise InvalidRequest(f"strategy {choice.name[:64]!r} is not loaded here; known: {known}", param="strategy")
        if not is_single:
            raise InvalidRequest("a strategy takes one prompt and makes one choice", param="n" if len(wanted.prompts) == 1 else "prompt")
        return strategy, choice


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the children of one request need of its gateway.

    Attributes:
        instances: Decode instances that serve the model.
        on_child_end: Called with every ended batch of children and the name of the strategy.
    """

    engine: Engine
    admissions: Admissions
    limits: Limits
    model: ServedModel
    facts: TokenizerFacts
    instances: frozenset[str]
    on_child_end: Callable[[Generation, str], None]


class StrategyGeneration(Generation):
    """A request whose answer a strategy makes. Usage counts all children."""

    def __init__(
        self, strategy: Strategy, choice: StrategyChoice, ledger: Ledger, wanted: Wanted, prompt: Prepared, around: Surroundings, *,
        arrived: float, deadline: float, on_end: Callable[[Generation], None],
    ) -> None:
        super().__init__(around.engine, request_id=wanted.request_id, route=wanted.route, arrived=arrived, deadline=deadline, on_end=on_end)
        self.strategy_name = choice.name
        self.ledger = ledger
        self.prompt = prompt
        self.around = around
        self.children: list[Generation] = []    # batches, ended ones too
        self.reason: FinishReason | None = None
        self._strategy = strategy
        self._request = StrategyRequest(wanted.request_id, prompt.model, prompt.token_ids, prompt.sampling, choice.options, deadline)
        self._task: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Starts the strategy."""
        self.start_timer()
        self._task = asyncio.create_task(self._drive(), name=f"strategy:{self.request_id}")

    @property
    def num_prompt_tokens(self) -> int:
        return sum(c.num_prompt_tokens for c in self.children)

    @property
    def num_completion_tokens(self) -> int:
        return sum(num_computed(c) for c in self.children)

    @property
    def num_cached_tokens(self) -> int:
        return sum(c.num_cached_tokens for c in self.children)

    @property
    def finish_reasons(self) -> set[FinishReason]:
        return set() if self.reason is None else {self.reason}

    def end(self, error: PlugmeshError | None) -> None:
        if self.is_ended:
            return
        for child in self.children:
            child.cancel("its strategy ended")
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self.num_migrations = sum(c.num_migrations for c in self.children)
        super().end(error)

    async def _drive(self) -> None:
        stream: AsyncIterator[StrategyEvent] | None = None
        try:
            stream = self._strategy.run(self._request, Api(self))
            async for event in stream:
                if self.is_ended:
                    return
                if self._take_event(event):
                    self.end(None)
                    return
            raise PluginError(f"strategy {self.strategy_name!r} ended without an answer", plugin=self.strategy_name)
        except asyncio.CancelledError:
            self.end(Cancelled("the strategy was cancelled"))
        except PlugmeshError as e:
            self.end(e)
        except Exception as e:
            log.warning("plugin.failed", plugin=self.strategy_name, error=type(e).__name__, request_id=self.request_id)
            self.end(PluginError(f"strategy {self.strategy_name!r} failed on this request", plugin=self.strategy_name))
        finally:
            if isinstance(stream, AsyncGenerator):
                await self._close(stream)

    async def _close(self, stream: AsyncGenerator[Any, None]) -> None:
        try:
            async with asyncio.timeout(_CLOSE_S):
                await stream.aclose()
        except (Exception, asyncio.CancelledError) as e:  # the request is over; nobody is left to tell
            log.warning("plugin.failed", plugin=self.strategy_name, error=type(e).__name__, request_id=self.request_id)

    def _take_event(self, event: Any) -> bool:
        """True for the last one."""
        if not isinstance(event, StrategyEvent) or not isinstance(event.text, str):
            raise PluginError(f"strategy {self.strategy_name!r} gave {type(event).__name__} in place of an event", plugin=self.strategy_name)
        if event.finish_reason is not None:
            try:
                self.detail = json.loads(json.dumps({**event.detail, "name": self.strategy_name, **self.ledger.as_row()}, allow_nan=False))
            except (TypeError, ValueError) as e:
                raise PluginError(f"strategy {self.strategy_name!r} told what JSON cannot carry", plugin=self.strategy_name) from e
            self.reason = event.finish_reason
        if not self.first_token_at:
            self.first_token_at = time.monotonic()
        self.emit(Event(0, event.text, [token_to_pb(t) for t in event.tokens], event.finish_reason))
        return event.finish_reason is not None


class Api:
    """`plugmesh.records.StrategyApi` of one request."""

    def __init__(self, parent: StrategyGeneration) -> None:
        self._parent = parent
        self._places: list[tuple[Generation, int]] = []   # child to its batch and its index there
        self._num_batches = 0
        self._num_runs = 0

    @property
    def ledger(self) -> Ledger:
        return self._parent.ledger

    def cancel(self, child: int) -> None:
        if not 0 <= child < len(self._places):
            raise ValueError(f"there is no child {child}")
        batch, index = self._places[child]
        for run in batch.runs:
            if 0 <= index - run.request.base_index < len(run.sequences):
                run.cancel_sequence(index - run.request.base_index)

    async def generate(
        self, n: int, *, sampling: SamplingParams | None = None, prefix: Sequence[int] = (),
    ) -> AsyncGenerator[ChildEvent, None]:
        parent = self._parent
        params = self._check(sampling or parent.prompt.sampling, prefix)
        grants: list[int] = []
        admitted: Admitted | None = None
        batch: Generation | None = None
        try:
            # 1. As many as the ledger affords in full.
            while len(grants) < n and self.ledger.num_left >= params.max_tokens and (granted := self.ledger.reserve(params.max_tokens)):
                grants.append(granted)
            if not grants:
                return
            # 2. Places, as for any other request.
            self._num_batches += 1
            name = f"{parent.request_id}.s{self._num_batches}"
            admitted = await parent.around.admissions.admit(
                AdmissionRequest(name, parent.prompt.client, parent.prompt.priority, len(grants), parent.deadline))
            prompts = self._prompts(name, len(grants), params, prefix)
            await admitted.take_tokens(sum(len(p.token_ids) for p in prompts), sum(grants))
            if parent.is_ended:
                raise Cancelled("the request ended")
            # 3. Run.
            first = len(self._places)
            batch = Generation(
                parent.engine, request_id=name, route="strategy", arrived=time.monotonic(), deadline=parent.deadline,
                on_end=lambda ended: self._on_end(ended, admitted, grants))
            parent.children.append(batch)
            self._places += [(batch, i) for i in range(len(grants))]
            batch.start(prompts, parent.around.instances, counts_exactly=True)
            cancelled: set[int] = set()
            async for events in batch.batches():
                for e in events:
                    if e.index in cancelled:
                        continue
                    _, index = self._places[first + e.index]
                    if e.finish_reason is None and self._is_cancelled(batch, index):
                        continue  # what was on its way to the strategy when it decided; its last event follows
                    if e.finish_reason is not None:
                        cancelled.add(e.index)
                    yield ChildEvent(first + e.index, e.text, tuple(token_from_pb(t) for t in e.tokens), e.finish_reason)
        finally:
            if batch is not None:
                batch.cancel("its strategy left it")  # no-op for one that ended
            else:
                self._give_back(grants)
                if admitted is not None:
                    admitted.release(0)

    def _check(self, params: SamplingParams, prefix: Sequence[int]) -> SamplingParams:
        around = self._parent.around
        params = dataclasses.replace(params, num_sequences=1)
        check_sampling(params, around.limits, vocab_size=around.facts.vocab_size)
        if prefix:
            if self._parent.prompt.grammar is not None:  # it would begin anew behind the prefix
                raise InvalidRequest(
                    f"strategy {self._parent.strategy_name!r} goes on from parts of answers, which a grammar does not allow", param="strategy")
            check_token_ids("prefix", prefix, around.facts.vocab_size)
        fit_context(len(self._parent.prompt.token_ids) + len(prefix), params.max_tokens, around.model.context_length)
        return params

    def _prompts(self, name: str, n: int, params: SamplingParams, prefix: Sequence[int]) -> list[Prepared]:
        """Runs of at most so many sequences as a request may have; each with a seed of its own, the very first with the request's."""
        prompt = self._parent.prompt
        assert prompt.sampling.seed is not None
        prompts = []
        for first in range(0, n, self._parent.around.limits.max_sequences):
            seed = prompt.sampling.seed if self._num_runs == 0 else _seed(prompt.sampling.seed, self._num_runs)
            self._num_runs += 1
            num = min(self._parent.around.limits.max_sequences, n - first)
            prompts.append(dataclasses.replace(
                prompt, request_id=f"{name}.{first}" if first else name, token_ids=(*prompt.token_ids, *prefix), base_index=first,
                sampling=dataclasses.replace(params, num_sequences=num, seed=seed)))
        return prompts

    def _is_cancelled(self, batch: Generation, index: int) -> bool:
        for run in batch.runs:
            if 0 <= index - run.request.base_index < len(run.sequences):
                return run.sequences[index - run.request.base_index].finish_reason is FinishReason.CANCELLED
        return False

    def _on_end(self, batch: Generation, admitted: Admitted, grants: list[int]) -> None:
        used = num_computed(batch)
        admitted.release(used)
        counts = [len(s.tokens) + s.num_late for run in batch.runs for s in run.sequences] or [0] * len(grants)
        for grant, count in zip(grants, counts, strict=True):
            self.ledger.settle(grant, min(grant, count))
        self._parent.around.on_child_end(batch, self._parent.strategy_name)

    def _give_back(self, grants: list[int]) -> None:
        for grant in grants:
            self.ledger.settle(grant, 0)


def num_computed(batch: Generation) -> int:
    """Tokens that decode computed for it, also those that came after their sequence was over here."""
    return sum(len(s.tokens) + s.num_late for run in batch.runs for s in run.sequences)


def _seed(seed: int, number: int) -> int:
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 2


def choice_of_json(text: str) -> StrategyChoice | None:
    """As `StrategyChoice.read`, for the text of a gRPC request; None when it is empty. Raises InvalidRequest."""
    if not text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequest("strategy_json is not valid JSON", param="strategy_json") from e
    return StrategyChoice.read(value)

