"""The suites see what they are for: records that break one promise each fail the test of that promise; fakes do as the real thing does."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import pathlib
import random
import time
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import hypothesis
import numpy as np
import pytest
import torch

from plugmesh.config import MeshConfig
from plugmesh.errors import DataLoss, InvalidRequest, UnsupportedGrammar
from plugmesh.host import PluginHost
from plugmesh.records import (
    DraftRecord,
    EvictionRecord,
    GrammarEngineRecord,
    HandOver,
    KvHandOverRecord,
    LoopPlan,
    LoopShape,
    LossRecord,
    PrefillPolicyRecord,
    RewardRecord,
    Route,
    RouterRecord,
    SamplerRecord,
    SchedulerRecord,
    WorkflowRecord,
)
from plugmesh.testing.conformance import (
    DraftConformance,
    EvictionConformance,
    GrammarEngineConformance,
    KvHandOverConformance,
    LossConformance,
    PrefillPolicyConformance,
    RecordConformance,
    RewardConformance,
    RouterConformance,
    SamplerConformance,
    SchedulerConformance,
    WorkflowConformance,
    fidelity,
)
from plugmesh.testing.conformance.grammar_engine import vocabulary
from plugmesh.testing.conformance.loads import CONFIG, Arrival, fake_engine, play
from plugmesh.types import BLOCK_TOKENS
from plugmesh_engine import EngineConfig, Executor, FcfsScheduler
from plugmesh_engine.batch import Rows
from plugmesh_engine.testing import FakeModel, random_weights, tiny_config, write_manifest
from plugmesh_rollout.loop.losses import CoreLosses
from plugmesh_rollout.loop.rewards import CoreRewards
from plugmesh_rollout.loop.workflows import CoreWorkflows


def broken(suite: type, test: str, record: object, **arguments: Any) -> None:
    """The suite's test fails on this record. What hypothesis finds is not made smaller, which would take long."""
    hypothesis.settings.register_profile("found-is-enough", deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate])
    hypothesis.settings.load_profile("found-is-enough")
    try:
        with pytest.raises((Exception, pytest.fail.Exception)) as info:
            getattr(suite(), test)(record=record, **arguments)
    finally:
        hypothesis.settings.load_profile("plugmesh")

    assert not isinstance(info.value, TypeError | AttributeError), info.value  # a mistake of this test


# -- schedulers ------------------------------------------------------------------------------------------------------------


class Core(FcfsScheduler):
    def __init__(self, context: Any) -> None:
        super().__init__(context.max_tokens_per_step, context.max_num_sequences)


class Doubles(Core):
    def schedule(self, waiting, running, kv):
        return super().schedule(waiting, running, kv) * 2


class Dice(Core):
    dice = random.Random(0)

    def schedule(self, waiting, running, kv):
        plan = super().schedule(waiting, running, kv)
        return plan if self.dice.random() < 0.7 else plan[:1]


class Keeps(Core):
    def __init__(self, context: Any) -> None:
        super().__init__(context)
        self.kept: list[object] = []

    def schedule(self, waiting, running, kv):
        self.kept.extend(s.request_id + "!" for s in running)
        return super().schedule(waiting, running, kv)


class NewestFirst(Core):
    def schedule(self, waiting, running, kv):
        decodes = [(s, 1) for s in running if s.is_decode]
        prompts = [(s, min(8, kv.pending(s))) for s in sorted([*waiting, *(r for r in running if not r.is_decode)], key=lambda s: -s.arrival)]
        return decodes + prompts[:1]


class Shared(Core):
    turn = [0]

    def schedule(self, waiting, running, kv):
        self.turn[0] += 1
        if self.turn[0] % 5 == 0:
            raise ValueError
        return super().schedule(waiting, running, kv)


@pytest.mark.parametrize(
    ("scheduler", "test"),
    [
        (Doubles, "test_a_plan_names_only_what_was_offered_once_and_within_its_pending_tokens"),
        (Doubles, "test_whatever_the_load_every_request_ends_with_the_tokens_of_the_engines_own_scheduler"),
        (Dice, "test_the_same_load_is_planned_the_same_way_again"),
        (Keeps, "test_finished_requests_are_forgotten"),
        (NewestFirst, "test_nobody_starves_behind_a_stream_of_newcomers"),
        (Shared, "test_two_engines_of_one_process_do_not_share_state"),
    ],
)
def test_a_broken_scheduler_is_seen(scheduler: type, test: str) -> None:
    broken(SchedulerConformance, test, SchedulerRecord("broken", scheduler))


def test_the_engines_own_scheduler_passes() -> None:
    suite, record = SchedulerConformance(), SchedulerRecord("core", Core)
    for name in dir(suite):
        if name.startswith("test_") and name not in ("test_the_smallest_and_the_largest_limits_work", *dir(SchedulerConformance.__mro__[1])):
            getattr(suite, name)(record)


# -- drafts ----------------------------------------------------------------------------------------------------------------


def method(propose: Callable[[Any], Any]) -> DraftRecord:
    class Method:
        def __init__(self, context: Any) -> None:
            self.kept: list[object] = []

        def propose(self, views, num_prompt_rows):
            return propose(views)

        def observe(self, outcome):
            self.kept.extend(v.request_id + "!" for v in outcome.views)

    return DraftRecord("broken", Method)


@pytest.mark.parametrize(
    ("record", "test", "arguments"),
    [
        (method(lambda views: [[1]]), "test_beside_prompts_and_in_full_batches_it_answers_for_every_sequence", {}),
        (method(lambda views: [[CONFIG.vocab_size] for _ in views]), "test_output_is_that_without_drafts", {}),
        (method(lambda views: [[1] * 9 for _ in views]), "test_odd_sequences_get_drafts_within_their_limits", {"tokens": [1, 2], "room": 8}),
        (method(lambda views: [v.tokens.append(1) or [] for v in views]), "test_odd_sequences_get_drafts_within_their_limits", {"tokens": [1], "room": 8}),
        (method(lambda views: [[] for _ in views]), "test_finished_requests_are_forgotten", {}),
    ],
)
def test_a_broken_draft_method_is_seen(record: DraftRecord, test: str, arguments: dict[str, Any]) -> None:
    broken(DraftConformance, test, record, **arguments)


# -- routers, policies, hand-overs -----------------------------------------------------------------------------------------


class Sticky:
    """Remembers everything, and goes on sending requests to instances that have left."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def route(self, request, decode, prefill):
        if not decode:
            return Route(next(iter(self.seen.values()), "d0"))
        return Route(self.seen.setdefault(request.request_id, decode[0].instance_id))

    def on_progress(self, request_id, num_tokens):
        pass

    def on_finished(self, request_id):
        pass


class Slow(Sticky):
    def route(self, request, decode, prefill):
        time.sleep(0.055)
        return Route(decode[0].instance_id)


class Global(Sticky):
    turn = [0]

    def route(self, request, decode, prefill):
        self.turn[0] += 1
        return Route(decode[(self.turn[0] // 3) % len(decode)].instance_id)


@pytest.mark.parametrize(
    ("router", "test"),
    [
        (Sticky, "test_whoever_lives_it_chooses_among_what_it_is_offered"),
        (Sticky, "test_ended_requests_are_forgotten"),
        (Sticky, "test_without_any_instance_it_raises_and_works_again_later"),
        (Slow, "test_it_does_not_hold_up_the_event_loop"),
        (Global, "test_two_gateways_do_not_share_state"),
    ],
)
def test_a_broken_router_is_seen(router: type, test: str) -> None:
    broken(RouterConformance, test, RouterRecord("broken", router))


def test_broken_policies_and_hand_overs_are_seen() -> None:
    always = PrefillPolicyRecord("broken", lambda *_: "remote")
    broken(PrefillPolicyConformance, "test_a_prompt_that_is_cached_but_for_a_token_is_computed_here_when_nobody_waits", always)
    broken(PrefillPolicyConformance, "test_any_numbers_get_one_of_the_two_answers", PrefillPolicyRecord("broken", cast(Any, lambda *n: "local" if n[0] < 10**6 else "")))
    broken(KvHandOverConformance, "test_any_prompt_and_layout_gets_a_plan", KvHandOverRecord("broken", cast(Any, lambda n, layout: True)))
    dice = random.Random(0)
    broken(KvHandOverConformance, "test_the_same_prompt_travels_the_same_way", KvHandOverRecord("broken", lambda n, layout: HandOver(dice.random() < 0.5)))


# -- eviction orders ----------------------------------------------------------------------------------------------------------


class Recency:
    """As the kvstore's own."""

    def __init__(self, context: Any = None) -> None:
        self.idle: dict[bytes, int] = {}

    def add(self, key: bytes, num_bytes: int) -> None:
        self.idle.setdefault(key, num_bytes)

    def discard(self, key: bytes) -> None:
        self.idle.pop(key, None)

    def touch(self, key: bytes) -> None:
        if key in self.idle:
            self.idle[key] = self.idle.pop(key)

    def left(self, key: bytes, evicted: bool) -> None:
        self.idle.pop(key, None)

    def victim(self) -> bytes | None:
        return next(iter(self.idle), None)

    def coldest(self, n: int) -> list[bytes]:
        return list(self.idle)[:n]


class Newest(Recency):
    def victim(self):
        return next(reversed(self.idle), None)


class NamesBusy(Recency):
    def discard(self, key):
        pass


class Loses(Recency):
    def discard(self, key):
        if key not in self.idle:
            return
        self.idle.pop(key)
        self.seen = {*getattr(self, "seen", ()), key}

    def add(self, key, num_bytes):
        if key not in getattr(self, "seen", ()):
            super().add(key, num_bytes)


class Rolls(Recency):
    dice = random.Random(0)

    def victim(self):
        return self.dice.choice(list(self.idle)) if self.idle else None


class Pops(Recency):
    def coldest(self, n):
        found = super().coldest(n)
        for key in found:
            self.touch(key)
        return found


class Remembers(Recency):
    def left(self, key, evicted):
        super().left(key, evicted)
        self.gone = [*getattr(self, "gone", ()), key]


class Late(Recency):
    def victim(self):
        time.sleep(0.0015)
        return super().victim()


@pytest.mark.parametrize(
    ("order", "test", "arguments"),
    [
        (Newest, "test_most_of_what_is_asked_for_all_the_time_stays", {}),
        (NamesBusy, "test_it_names_only_idle_blocks_and_every_block_leaves_in_the_end", {}),
        (Loses, "test_it_names_only_idle_blocks_and_every_block_leaves_in_the_end", {}),
        (Rolls, "test_it_names_only_idle_blocks_and_every_block_leaves_in_the_end", {}),
        (Pops, "test_the_same_history_has_the_same_victims_whatever_else_it_is_asked", {}),
        (Remembers, "test_blocks_that_left_are_forgotten", {}),
        (Late, "test_it_does_not_hold_up_the_event_loop", {"num_busy": 0}),
    ],
)
def test_a_broken_eviction_order_is_seen(order: type, test: str, arguments: dict[str, Any]) -> None:
    broken(EvictionConformance, test, EvictionRecord("broken", order), **arguments)


def test_recency_is_an_eviction_order_that_passes() -> None:
    suite, record = EvictionConformance(), EvictionRecord("recency", Recency)
    suite.test_it_names_only_idle_blocks_and_every_block_leaves_in_the_end(record)
    suite.test_the_same_history_has_the_same_victims_whatever_else_it_is_asked(record)
    suite.test_most_of_what_is_asked_for_all_the_time_stays(record)
    suite.test_blocks_that_left_are_forgotten(record)
    suite.test_it_does_not_hold_up_the_event_loop(record, 4999)


# -- grammar engines -------------------------------------------------------------------------------------------------------


class Passing:
    """A matcher that does what the real one in it does; the broken ones below change a method each."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    @property
    def is_completed(self) -> bool:
        return self.inner.is_completed

    @property
    def is_terminated(self) -> bool:
        return self.inner.is_terminated

    def fill(self, mask: np.ndarray) -> bool:
        return self.inner.fill(mask)

    def accept(self, token_id: int) -> bool:
        return self.inner.accept(token_id)

    def rollback(self, num_tokens: int) -> None:
        self.inner.rollback(num_tokens)

    def forced(self) -> bytes:
        return self.inner.forced()

    def fork(self) -> Any:
        return type(self)(self.inner.fork())


class OneBitOff(Passing):
    def fill(self, mask):
        narrows = self.inner.fill(mask)
        mask[8] ^= 1 << 20
        return narrows


class AllowsEnds(Passing):
    def fill(self, mask):
        narrows = self.inner.fill(mask)
        for token in vocabulary().eos_token_ids:
            mask[token // 32] |= 0 if self.is_terminated else 1 << token % 32
        return narrows


class AcceptsEnds(Passing):
    def accept(self, token_id):
        return self.inner.accept(token_id) or token_id in vocabulary().eos_token_ids


class SaysCompleted(Passing):
    is_completed = True


class NeverOver(Passing):
    is_terminated = False


class AcceptsMore(Passing):
    def accept(self, token_id):
        return self.inner.accept(token_id) or token_id == 4 + ord("%")


class GoesOnWhenItRefuses(Passing):
    def accept(self, token_id):
        if not self.inner.accept(token_id):
            self.inner.accept(4 + ord("a"))
            return False
        return True


class OneBackTooFew(Passing):
    def rollback(self, num_tokens):
        self.inner.rollback(max(0, num_tokens - 1))


class BackToTheBeginning(Passing):
    num = 0

    def accept(self, token_id):
        is_allowed = self.inner.accept(token_id)
        self.num += is_allowed
        return is_allowed

    def rollback(self, num_tokens):
        self.inner.rollback(self.num if num_tokens else 0)
        self.num = 0


class ShortMemory(Passing):
    def rollback(self, num_tokens):
        if num_tokens > 128:
            raise ValueError("too many to be taken back")
        self.inner.rollback(num_tokens)


class BackAsFarAsItGoes(Passing):
    def rollback(self, num_tokens):
        try:
            self.inner.rollback(num_tokens)
        except ValueError:
            self.rollback(num_tokens - 1) if num_tokens > 0 else None


class ForkIsItself(Passing):
    def fork(self):
        return self


class ForcesMore(Passing):
    def forced(self):
        return self.inner.forced() + b"a"


class ForcesNothing(Passing):
    def forced(self):
        return b""


class GuidedEngine:
    """A grammar engine around a real one, with matchers of ours."""

    def __init__(self, inner: Any, matcher: type[Passing] = Passing) -> None:
        self.inner, self._matcher = inner, matcher

    def compile(self, language: str, source: str) -> bytes:
        return self.inner.compile(language, source)

    def load(self, compiled: bytes) -> Any:
        return GuidedGrammar(self.inner.load(compiled), self._matcher)


class GuidedGrammar:
    def __init__(self, inner: Any, matcher: type[Passing]) -> None:
        self.inner, self._matcher = inner, matcher

    @property
    def num_bytes(self) -> int:
        return self.inner.num_bytes

    def matcher(self) -> Passing:
        return self._matcher(self.inner.matcher())


class OneMatcher(GuidedEngine):
    def load(self, compiled):
        grammar = super().load(compiled)
        only = grammar.matcher()
        grammar.matcher = lambda: only
        return grammar


class Stamped(GuidedEngine):
    num = 0

    def compile(self, language, source):
        Stamped.num += 1
        return super().compile(language, source) + Stamped.num.to_bytes(4, "little")

    def load(self, compiled):
        return super().load(compiled[:-4])


class Trusting(GuidedEngine):
    """Takes what is no form for the last one that was."""

    last: bytes = b""

    def load(self, compiled):
        try:
            found = super().load(compiled)
            Trusting.last = compiled
            return found
        except DataLoss:
            return super().load(Trusting.last)


class AnyTokenizer(GuidedEngine):
    def __init__(self, inner: Any) -> None:
        super().__init__(real_engine().build(vocabulary()))


class RaisesAnything(GuidedEngine):
    def load(self, compiled):
        try:
            return super().load(compiled)
        except DataLoss as e:
            raise ValueError("no form") from e


class Lenient(GuidedEngine):
    def compile(self, language, source):
        try:
            return super().compile(language, source)
        except UnsupportedGrammar:
            return super().compile("regex", "a")


class Leaking(GuidedEngine):
    kept: ClassVar[list[object]] = []

    def load(self, compiled):
        self.kept.append(bytearray(b"x" * (1 << 20)))
        return super().load(compiled)


def real_engine() -> GrammarEngineRecord:
    pytest.importorskip("llguidance")
    return PluginHost.load(["llguidance"], MeshConfig(), service="decode").records("grammar_engines")[0]


def engines(of: type[Any]) -> GrammarEngineRecord:
    real = real_engine()

    def build(v: Any) -> Any:
        return GuidedEngine(real.build(v), of) if issubclass(of, Passing) else of(real.build(v))

    return dataclasses.replace(real, build=build)


class FewExamples(GrammarEngineConformance):
    max_examples = 6
    num_loads = 2


MASKS = "test_masks_are_those_of_trying_every_token"
BACK = "test_going_back_forking_and_repeating_leave_no_trace"
END = "test_after_an_end_nothing_comes_until_it_is_taken_back"
FAR_BACK = "test_many_tokens_can_be_taken_back_and_no_more_than_there_are"
NO_FORM = "test_bytes_that_are_no_form_are_refused"
BROKEN_ENGINES: list[tuple[type, str, dict[str, Any]]] = [
    (OneBitOff, MASKS, {"case": "a class"}),
    (AllowsEnds, MASKS, {"case": "one text"}),
    (AcceptsEnds, MASKS, {"case": "one text"}),
    (AcceptsEnds, END, {}),
    (SaysCompleted, MASKS, {"case": "one text"}),
    (NeverOver, END, {}),
    (AcceptsMore, MASKS, {"case": "counts"}),
    (GoesOnWhenItRefuses, MASKS, {"case": "counts"}),
    (OneMatcher, MASKS, {"case": "one text"}),
    (OneBackTooFew, BACK, {"case": "an object"}),
    (OneBackTooFew, END, {}),
    (BackToTheBeginning, BACK, {"case": "counts"}),
    (ForkIsItself, BACK, {"case": "an object"}),
    (ShortMemory, FAR_BACK, {}),
    (BackAsFarAsItGoes, FAR_BACK, {}),
    (ForcesMore, "test_forced_bytes_are_what_must_come", {"case": "an object"}),
    (ForcesNothing, "test_a_text_without_choice_is_forced_as_a_whole", {}),
    (Stamped, "test_compiling_gives_the_same_bytes_in_every_process", {"card": None}),
    (Trusting, NO_FORM, {}),
    (RaisesAnything, NO_FORM, {}),
    (AnyTokenizer, "test_a_form_is_good_for_another_engine_of_the_same_tokenizer_only", {}),
    (Lenient, "test_what_is_no_grammar_is_refused_and_harms_nobody", {"language": "regex", "source": "("}),
    (Leaking, "test_memory_is_released", {}),
]


@pytest.mark.parametrize(("engine", "test", "arguments"), BROKEN_ENGINES, ids=lambda x: getattr(x, "__name__", None))
def test_a_broken_grammar_engine_is_seen(engine: type, test: str, arguments: dict[str, Any]) -> None:
    record = engines(engine)
    broken(FewExamples, test, record, engine=record.build(vocabulary()), **arguments)


@pytest.mark.parametrize(("test", "arguments"), [(t, a) for _, t, a in BROKEN_ENGINES if "card" not in a], ids=lambda x: None if isinstance(x, str) else "")
def test_the_engine_that_the_broken_ones_are_made_of_passes(test: str, arguments: dict[str, Any]) -> None:
    record = engines(Passing)
    getattr(FewExamples(), test)(record=record, engine=record.build(vocabulary()), **arguments)


# -- samplers --------------------------------------------------------------------------------------------------------------


class Groups:
    """The first whole groups: correct."""

    def sample(self, ready, batch_size, context):
        rows = self.choose(ready, batch_size, context)
        return rows, rows

    def choose(self, ready, batch_size, context):
        if batch_size % context.group_size:
            raise InvalidRequest("no whole number of groups")
        groups: dict[str, list[int]] = {}
        for row in ready:
            groups.setdefault(row.group or row.id, []).append(row.index)
        whole = [g for g in groups.values() if len(g) == context.group_size][: batch_size // context.group_size]
        rows = [i for group in whole for i in group]
        return rows if len(rows) >= context.min_rows else []


class Twice(Groups):
    def choose(self, ready, batch_size, context):
        return (super().choose(ready, batch_size, context)[:1] * 2)[:batch_size]


class HandsOutTwice(Groups):
    def sample(self, ready, batch_size, context):
        rows = self.choose(ready, batch_size, context)
        return (rows[:1] * batch_size), rows[:1]


class Invents(Groups):
    def sample(self, ready, batch_size, context):
        rows = self.choose(ready, batch_size, context)
        return [i + 1000 for i in rows], rows


class Again(Groups):
    """Goes on with rows that it has handed out."""

    had: list[int] | None = None

    def choose(self, ready, batch_size, context):
        self.had = self.had or super().choose(ready, batch_size, context)
        return self.had


class Generous(Groups):
    def choose(self, ready, batch_size, context):
        return super().choose(ready, batch_size + context.group_size, context)


class Swallows(Groups):
    def sample(self, ready, batch_size, context):
        return [], self.choose(ready, batch_size, context)


class HalfGroups(Groups):
    def choose(self, ready, batch_size, context):
        return super().choose(ready, batch_size, context)[1:]


class Sorts(Groups):
    def choose(self, ready, batch_size, context):
        ready.sort(key=lambda row: -row.index)
        return super().choose(ready, batch_size, context)


class Shuffles(Groups):
    dice = random.Random(0)

    def choose(self, ready, batch_size, context):
        return super().choose(self.dice.sample(list(ready), len(ready)), batch_size, context)


class SharedRows(Groups):
    taken: ClassVar[set[int]] = set()

    def choose(self, ready, batch_size, context):
        rows = super().choose([row for row in ready if row.index not in self.taken], batch_size, context)
        self.taken.update(rows)
        return rows


class NeverAgain(Groups):
    def __init__(self) -> None:
        self.taken: set[int] = set()

    def choose(self, ready, batch_size, context):
        rows = super().choose([row for row in ready if row.index not in self.taken], batch_size, context)
        self.taken.update(rows)
        return rows


class NeedsOne(Groups):
    def choose(self, ready, batch_size, context):
        assert ready[0].index >= 0
        return super().choose(ready, batch_size, context)


class Pauses(Groups):
    def choose(self, ready, batch_size, context):
        time.sleep(0.3)
        return super().choose(ready, batch_size, context)


class WholeGroups(SamplerConformance):
    keeps_groups = True


ANY_ROWS = "test_whatever_is_ready_it_takes_rows_of_it_and_each_once"


@pytest.mark.parametrize(("sampler", "test"), [
    (Twice, ANY_ROWS), (HandsOutTwice, ANY_ROWS), (Invents, ANY_ROWS), (Again, ANY_ROWS), (Generous, ANY_ROWS), (Swallows, ANY_ROWS), (HalfGroups, ANY_ROWS),
    (Sorts, ANY_ROWS), (Shuffles, "test_the_same_rows_give_the_same_batch"), (SharedRows, "test_two_topics_do_not_share_state"),
    (NeverAgain, "test_rows_that_come_back_are_handed_out_again"), (NeedsOne, "test_nothing_ready_is_no_batch"), (Pauses, "test_it_is_quick_with_many_rows"),
])  # fmt: skip
def test_a_broken_sampler_is_seen(sampler: type, test: str) -> None:
    broken(WholeGroups, test, SamplerRecord("broken", lambda options: sampler()))


def test_the_sampler_that_the_broken_ones_are_made_of_passes() -> None:
    suite, record = WholeGroups(), SamplerRecord("groups", lambda options: Groups())
    for name in dir(suite):
        if name.startswith("test_") and name not in dir(SamplerConformance.__mro__[1]):
            getattr(suite, name)(record)


# -- rewards, losses, workflows ----------------------------------------------------------------------------------------------


def passes(suite: Any, record: object) -> None:
    """Every test of the suite, of those that need nothing but the record and the host."""
    for name in dir(suite):
        if name.startswith("test_") and not hasattr(RecordConformance, name):
            test = getattr(suite, name)
            if "card" in inspect.signature(test).parameters:
                continue
            marks = {m.name: m.args for m in getattr(test, "pytestmark", [])}
            wanted = {"host": PluginHost.load([], MeshConfig(), service="rollout")} if "host" in inspect.signature(test).parameters else {}
            for values in marks["parametrize"][1] if "parametrize" in marks else [None]:
                extra = {} if values is None else {marks["parametrize"][0]: values}
                with contextlib.suppress(pytest.skip.Exception):
                    test(record=record, **wanted, **extra)


class Length:
    """Correct."""

    def score(self, prompt, answer, response):
        return float(response == answer) - min(len(response), 100) / 1e3


class Infinite(Length):
    def score(self, prompt, answer, response):
        return 1.0 / len(response) if response else float("inf")


class Parses(Length):
    def score(self, prompt, answer, response):
        return float(int(response) == int(answer))


class Encodes(Length):
    def score(self, prompt, answer, response):
        return super().score(prompt, answer.encode(), response.encode())


class NotANumber(Length):
    def score(self, prompt, answer, response):
        return np.float32(super().score(prompt, answer, response))


class Random(Length):
    def score(self, prompt, answer, response):
        return super().score(prompt, answer, response) + random.random()


class Novelty(Length):
    """Rewards what it has not seen."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def score(self, prompt, answer, response):
        return super().score(prompt, answer, response) + self.seen.setdefault(response, len(self.seen))


class NoveltyForAll(Length):
    seen: ClassVar[dict[str, int]] = {}

    def score(self, prompt, answer, response):
        self.seen[prompt] = self.seen.get(prompt, 0) + 1
        return super().score(prompt, answer, response) - self.seen[prompt]


class Punishes(Length):
    def score(self, prompt, answer, response):
        return -super().score(prompt, answer, response)


@pytest.mark.parametrize(("reward", "test"), [
    (Infinite, "test_it_is_finite_for_any_text"), (Parses, "test_it_is_finite_for_any_text"), (Encodes, "test_it_is_finite_for_any_text"),
    (NotANumber, "test_it_is_finite_for_any_text"), (Random, "test_the_same_row_is_worth_the_same_again"),
    (NoveltyForAll, "test_the_same_row_is_worth_the_same_again"), (Novelty, "test_a_row_is_worth_the_same_whatever_was_scored_before"),
    (Punishes, "test_a_good_response_is_worth_more_than_a_bad_one"), (Length, "test_an_option_that_does_not_exist_is_refused"),
])  # fmt: skip
def test_a_broken_reward_is_seen(reward: type, test: str) -> None:
    broken(RewardConformance, test, RewardRecord("broken", lambda options: reward()))


@pytest.mark.parametrize("record", [*CoreRewards().register_rewards(), RewardRecord("length", lambda options: refuse(options) or Length())], ids=lambda r: r.name)
def test_a_sound_reward_passes(record: RewardRecord) -> None:
    passes(RewardConformance(), record)


def refuse(options: Any) -> Literal[False]:
    """False, for what follows an `or`, when there is nothing to refuse."""
    if options:
        raise InvalidRequest("no options")
    return False


class Capped:
    """Correct: a policy gradient with capped weights."""

    needs_proximal = False

    def ratio(self, logprobs, batch):
        return torch.exp(logprobs - batch["behaviour"])

    def terms(self, logprobs, batch):
        return -self.ratio(logprobs, batch).clamp(max=3.0) * batch["advantage"][:, None]

    def total(self, terms, batch):
        return torch.where(batch["mask"], terms, torch.zeros_like(terms)).sum() / batch["num_tokens"]

    def facts(self, logprobs, batch):
        return {"ratio": (self.ratio(logprobs, batch).detach() * batch["mask"]).sum()}

    def __call__(self, logprobs, batch):
        return self.total(self.terms(logprobs, batch), batch), self.facts(logprobs, batch)


class Squares(Capped):
    """Overflows."""

    def terms(self, logprobs, batch):
        return -(self.ratio(logprobs, batch) ** 4) * batch["advantage"][:, None]


class MeanOfNothing(Capped):
    def total(self, terms, batch):
        return (torch.where(batch["mask"], terms, torch.zeros_like(terms)).sum(1) / batch["mask"].sum(1)).sum() / batch["num_rows"]


class MeanOfPart(Capped):
    def total(self, terms, batch):
        return torch.where(batch["mask"], terms, torch.zeros_like(terms)).sum() / batch["mask"].sum().clamp(min=1)


class MeanFacts(Capped):
    def facts(self, logprobs, batch):
        return {"ratio": (self.ratio(logprobs, batch) * batch["mask"]).detach().mean()}


class CountsPadding(Capped):
    def total(self, terms, batch):
        return torch.where(batch["mask"], terms, torch.zeros_like(terms)).sum() / terms.numel()


class NoMask(Capped):
    def total(self, terms, batch):
        return terms.sum() / batch["num_tokens"]


class Ascends(Capped):
    def terms(self, logprobs, batch):
        return -super().terms(logprobs, batch)


class Entropy(Capped):
    def terms(self, logprobs, batch):
        return super().terms(logprobs, batch) + 0.1 * logprobs


class FixedWeight(Capped):
    def terms(self, logprobs, batch):
        return -self.ratio(logprobs, batch).detach() * logprobs * batch["advantage"][:, None]


class Noisy(Capped):
    def terms(self, logprobs, batch):
        return super().terms(logprobs, batch) * (1 + 0.1 * torch.rand(()))


class Whitens(Capped):
    """In place, what other epochs train with as well."""

    def __call__(self, logprobs, batch):
        batch["advantage"] -= batch["advantage"].mean()
        return super().__call__(logprobs, batch)


class PerRow(Capped):
    def total(self, terms, batch):
        return torch.where(batch["mask"], terms, torch.zeros_like(terms)).sum(1)


SHARES = "test_the_shares_of_parts_add_up_to_the_batchs"
FINITE = "test_it_is_finite_however_far_the_weights_have_moved"


@pytest.mark.parametrize(("loss", "test"), [
    (Squares, FINITE), (PerRow, FINITE), (Whitens, FINITE), (MeanOfNothing, "test_rows_without_tokens_are_no_trouble"), (MeanOfPart, SHARES), (MeanFacts, SHARES),
    (CountsPadding, "test_padding_changes_nothing"), (NoMask, "test_only_tokens_that_are_there_count"),
    (Ascends, "test_a_better_response_becomes_likelier_and_a_worse_one_less"), (Entropy, "test_no_advantage_is_no_gradient"),
    (FixedWeight, "test_the_gradient_is_that_of_the_value"), (Noisy, "test_the_same_batch_gives_the_same_bits"),
    (Capped, "test_an_option_that_does_not_exist_is_refused"),
])  # fmt: skip
def test_a_broken_loss_is_seen(loss: type, test: str) -> None:
    broken(LossConformance, test, LossRecord("broken", lambda options: loss()), **({"parts": [[0, 1], [2, 3, 4]]} if test == SHARES else {}))


@pytest.mark.parametrize("record", [*CoreLosses().register_losses(), LossRecord("capped", lambda options: refuse(options) or Capped())], ids=lambda r: r.name)
def test_a_sound_loss_passes(record: LossRecord) -> None:
    passes(LossConformance(), record)


@pytest.mark.parametrize("options", [{"kl": 0.1}, {"normalise": "row", "clip_high": 0.3}], ids=str)
def test_a_core_loss_with_other_options_passes(options: dict[str, Any]) -> None:
    members = {"options": options, "has_reference": "kl" in options, "is_regularised": "kl" in options}
    passes(type("OtherOptions", (LossConformance,), members)(), CoreLosses().register_losses()[0])


def ahead(options: Any, shape: LoopShape, **other: Any) -> LoopPlan:
    """Two versions ahead: correct but for what is overridden."""
    if set(options) - {"capacity_rows"}:
        raise InvalidRequest("unknown option")
    plan = LoopPlan(2, True, options.get("capacity_rows", 3 * shape.batch_rows), "version_window", {"order": "oldest", "wait": True})
    if plan.capacity_rows < 3 * shape.batch_rows and "capacity_rows" not in other:
        raise InvalidRequest("the loop would stop")
    return dataclasses.replace(plan, **{"capacity_rows": plan.capacity_rows, **other})


def small(options: Any, shape: LoopShape) -> LoopPlan:
    return ahead({}, shape, capacity_rows=options.get("capacity_rows", 3 * shape.batch_rows))


def shared_options(options: Any, shape: LoopShape) -> LoopPlan:
    return ahead({"capacity_rows": options.setdefault("capacity_rows", 3 * shape.batch_rows)}, shape)


NEVER_STOPS = "test_a_plan_never_stops_and_trains_nothing_too_old"


@pytest.mark.parametrize(("plan", "test"), [
    (lambda o, s: ahead(o, s, train_options={"order": "first", "wait": False}), "test_an_ordinary_run_is_not_refused"),  # slow groups become too old
    (lambda o, s: ahead(o, s, train_options={"order": "newest", "wait": False}), NEVER_STOPS),
    (lambda o, s: ahead(o, s, is_gated=False, capacity_rows=12 * s.batch_rows), NEVER_STOPS),  # and nobody drops what is too old
    (lambda o, s: ahead(o, s, train_sampler="no_such"), NEVER_STOPS),
    (lambda o, s: ahead(o, s, train_options={"colour": 1}), "test_an_ordinary_run_is_not_refused"),
    (lambda o, s: ahead(o, s, capacity_rows=s.batch_rows - 1), NEVER_STOPS),
    (lambda o, s: ahead({}, dataclasses.replace(s, groups_per_step=100)) and refuse({"x": 1}), "test_an_ordinary_run_is_not_refused"),
    (small, "test_a_capacity_with_which_the_loop_would_stop_is_refused"),
    (lambda o, s: ahead(o, s, is_pinned=True), "test_a_pinned_run_is_the_same_every_time"),  # whichever come first
    (shared_options, "test_the_plan_follows_from_options_and_shape"),
    (lambda o, s: ahead({}, s), "test_an_option_that_does_not_exist_is_refused"),
])  # fmt: skip
def test_a_broken_workflow_is_seen(plan: Callable[[Any, LoopShape], LoopPlan], test: str) -> None:
    needs_host = "host" in inspect.signature(getattr(WorkflowConformance, test)).parameters
    broken(WorkflowConformance, test, WorkflowRecord("broken", plan), **({"host": PluginHost.load([], MeshConfig(), service="rollout")} if needs_host else {}))


@pytest.mark.parametrize("record", [*CoreWorkflows().register_workflows(), WorkflowRecord("ahead", ahead)], ids=lambda r: r.name)
def test_a_sound_workflow_passes(record: WorkflowRecord) -> None:
    passes(WorkflowConformance(), record)


# -- fidelity ----------------------------------------------------------------------------------------------------------------


def samples(seeds: Any, *, tilt: float = 0.0) -> list[list[int]]:
    out = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        p = np.array([0.4, 0.3, 0.2, 0.1]) + np.array([tilt, -tilt, 0, 0])
        out.append([int(t) for t in rng.choice(4, 3, p=p)])
    return out


def test_equal_distributions_pass_and_different_ones_do_not() -> None:
    assert min(t.p for t in fidelity.check_distribution(samples, samples)) > 1e-4
    with pytest.raises(fidelity.NotFaithful, match="not the same distribution"):
        fidelity.check_distribution(samples, lambda s: samples(s, tilt=0.08))
    with pytest.raises(fidelity.NotFaithful):  # the right tokens in the wrong company
        fidelity.check_distribution(samples, lambda s: [[t[0], t[0], t[2]] for t in samples(s)])


def test_p_values_are_those_of_the_tables() -> None:
    """Of a 2 x 2 table by hand, and of the chi-square tables: 3.84 and 18.31 are the 5 % points of 1 and 10 degrees."""
    test = fidelity.chi_square({"a": 60, "b": 40}, {"a": 40, "b": 60})
    many = fidelity.chi_square({i: 100 for i in range(11)}, {i: 100 for i in range(11)})

    assert test.statistic == pytest.approx(8.0) and test.num_degrees == 1 and test.p == pytest.approx(0.00468, abs=1e-3)
    assert (many.statistic, many.num_degrees) == (0, 10) and many.p > 0.99


def test_exact_names_the_first_difference() -> None:
    load = [Arrival(20, 6, seed=1), Arrival(9, 4, seed=2, temperature=0.8)]
    fidelity.check_exact(lambda w: play(fake_engine(), w), lambda w: play(fake_engine(max_tokens_per_step=7), w), load)

    with pytest.raises(fidelity.NotFaithful, match=r"r1: \[0\] \[0\] \d+ without it, \d+ with it"):
        fidelity.check_exact(lambda w: play(fake_engine(), w), lambda w: play(fake_engine(), [w[0], Arrival(9, 4, seed=3, temperature=0.8)]), load)


def test_a_loss_is_held_against_the_card() -> None:
    from plugmesh.cards import Card, Loss

    facts = {"slug": "t_x", "version": "1", "summary": "s", "services": ("decode",), "hooks": ()}
    card = Card(**facts, fidelity="lossy", loss=Loss(metric="perplexity_ratio", bound=1.05, setting="here"))
    fidelity.check_loss(card, {"perplexity_ratio": 1.05})

    for measured in ({"perplexity_ratio": 1.06}, {"perplexity_ratio": float("nan")}, {"other": 1.0}):
        with pytest.raises(fidelity.NotFaithful):
            fidelity.check_loss(card, measured)
    with pytest.raises(fidelity.NotFaithful, match="has no"):
        fidelity.check_loss(Card(**facts, fidelity="exact"), {"perplexity_ratio": 1.0})


# -- fakes against the real thing --------------------------------------------------------------------------------------------


class ExecutorContract:
    """What the suites take for granted of an executor; bound to the fake and to the real ones."""

    @pytest.fixture
    def executor(self, tmp_path: pathlib.Path) -> Executor:
        raise NotImplementedError

    ids = tuple(int(i) for i in np.random.default_rng(0).integers(3, 60, 50))

    def rows(self, start: int, end: int, first_block: int = 1, wanted: int = 1) -> Rows:
        """The prompt's tokens `start` to `end`, its blocks from `first_block` on."""
        blocks = tuple(range(first_block, first_block + -(-len(self.ids) // BLOCK_TOKENS)))
        return Rows(self.ids[start:end], start, blocks, wanted, True)

    def test_chunks_give_what_the_whole_prompt_gives(self, executor: Executor) -> None:
        whole = executor.run([self.rows(0, 50)])
        logits, best = whole.logits.copy(), whole.best.copy()
        for start, end in ((0, 7), (7, 16), (16, 33)):
            executor.run([self.rows(start, end, 5, 0)])
        rest = executor.run([self.rows(33, 50, 5)])

        assert best.tolist() == rest.best.tolist()
        np.testing.assert_allclose(logits, rest.logits, rtol=2e-2, atol=2e-2)

    def test_neighbours_change_nothing(self, executor: Executor) -> None:
        alone = executor.run([self.rows(0, 50)]).logits.copy()
        batch = executor.run([self.rows(0, 20, 9), self.rows(0, 50, 5), self.rows(0, 3, 13)]).logits

        np.testing.assert_allclose(alone[0], batch[1], rtol=1e-4, atol=1e-4)

    def test_every_token_before_a_row_counts(self, executor: Executor) -> None:
        right = executor.run([self.rows(0, 50)]).logits.copy()
        executor.memory.zero(2)
        wrong = executor.run([self.rows(49, 50)]).logits

        assert not np.allclose(right, wrong, rtol=1e-3, atol=1e-3)

    def test_blocks_travel_by_their_bytes(self, executor: Executor) -> None:
        right = executor.run([self.rows(0, 50)]).logits.copy()
        memory = executor.memory
        for i in range(4):
            data = bytes(memory.read(1 + i))
            assert len(data) == executor.layout.block_bytes
            memory.write(9 + i, data, min(BLOCK_TOKENS, 50 - 16 * i))
        moved = executor.run([self.rows(49, 50, 9)]).logits

        np.testing.assert_allclose(right, moved, rtol=2e-2, atol=2e-2)

    def test_rows_behind_the_tokens_of_a_written_block_are_zero(self, executor: Executor) -> None:
        executor.run([self.rows(0, 50)])
        memory = executor.memory
        memory.write(9, bytes(memory.read(1)), 5)
        memory.zero(10)
        memory.copy(10, 11)
        half = np.frombuffer(memory.read(9), np.uint8).astype(int).sum()

        assert 0 < half < np.frombuffer(memory.read(1), np.uint8).astype(int).sum()
        assert not np.frombuffer(memory.read(11), np.uint8).any()


class TestFake(ExecutorContract):
    @pytest.fixture
    def executor(self, tmp_path: pathlib.Path) -> Executor:
        return FakeModel(CONFIG).build_executor(EngineConfig(num_blocks=16))


class TestTorch(ExecutorContract):
    @pytest.fixture
    def executor(self, tmp_path: pathlib.Path) -> Executor:
        from plugmesh_engine.executors import torch as torch_executor

        config = tiny_config(vocab_size=61)
        model = torch_executor.load(write_manifest(tmp_path, config, random_weights(config)), "float32")
        return model.build_executor(EngineConfig(num_blocks=16, executor="torch", dtype="float32"))
