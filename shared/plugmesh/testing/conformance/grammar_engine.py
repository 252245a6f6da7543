"""What every grammar engine must do: allow exactly the tokens that the grammar allows, go back and fork without a trace, and trust no bytes."""

from __future__ import annotations

import concurrent.futures
import functools
import gc
import hashlib
import itertools
import os
import random
import subprocess
import sys
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh import cards
from plugmesh.errors import DataLoss, UnsupportedGrammar
from plugmesh.grammar.seams import CompiledGrammar, GrammarEngine, GrammarVocabulary, Matcher
from plugmesh.grammar.syntax import Alt, Grammar, Repeat, Seq, Text
from plugmesh.records import GrammarEngineRecord
from plugmesh.testing import grammar_oracle
from plugmesh.testing.conformance.base import RecordConformance
from plugmesh.testing.grammar_cases import CASES, grammars
from plugmesh.testing.grammar_oracle import Oracle, as_set, differing
from plugmesh.testing.native_matcher import ACCEPT, FORCED, STANDING, NativeSide

PACKAGES = ("shared", "services", "plugins")
QUICK: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@functools.lru_cache(maxsize=2)
def vocabulary(name: str = "oracle-vocabulary") -> GrammarVocabulary:
    return grammar_oracle.vocabulary(name=name)


@functools.lru_cache(maxsize=64)
def oracle_of(case: str) -> Oracle:
    """One for all engines: it remembers what it found out."""
    return Oracle(CASES[case])


def mask_of(matcher: Matcher, v: GrammarVocabulary) -> np.ndarray:
    """The next mask, in memory that held something else before; of a matcher that allows everything, all ones."""
    mask = np.full(v.num_words, 0xA5A5A5A5, np.uint32)
    if not matcher.fill(mask):
        bits = np.zeros(v.num_words * 32, np.uint8)
        bits[: v.vocab_size] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)
    return mask


def walk(matcher: Matcher, oracle: Oracle, v: GrammarVocabulary, rng: random.Random, num_steps: int) -> list[int]:
    """Random tokens, each mask compared with every token tried by itself; returns what was accepted."""
    prefix, taken = b"", []
    for _ in range(num_steps):
        allowed = oracle.allowed(prefix, v)
        assert differing(mask_of(matcher, v), allowed) == [], f"after {prefix!r}"
        assert matcher.is_completed == oracle.is_complete(prefix)
        assert not matcher.is_terminated
        refused = [t for t in rng.sample(range(v.vocab_size), 12) if t not in allowed]
        assert [t for t in (*refused, -1, v.vocab_size, 1 << 40) if matcher.accept(t)] == []
        assert differing(mask_of(matcher, v), allowed) == [], "a refused token changed something"
        texts = sorted(allowed - set(v.eos_token_ids))
        if not texts:
            break
        longest = sorted(texts, key=lambda t: -len(v.token_bytes[t] or b""))[: 1 + len(texts) // 4]
        token = rng.choice(longest if rng.random() < 0.5 else texts)
        assert matcher.accept(token)
        taken.append(token)
        prefix += v.token_bytes[token] or b""
    return taken


class GrammarEngineConformance(RecordConformance):
    """Runs on a vocabulary of some 600 tokens in which every kind of token occurs; the model's own is used by the slow test at the end.

    Attributes:
        max_examples: Random grammars, and random ways through them.
        num_steps: Tokens of one way.
        num_loads: How often the test of memory loads a grammar and matches with it.
        model_cases: Grammars for the slow test on the default model's vocabulary.
    """

    kind = "grammar_engines"
    max_examples: ClassVar[int] = 12
    num_steps: ClassVar[int] = 6
    num_loads: ClassVar[int] = 15
    model_cases: ClassVar[tuple[str, ...]] = ("json", "an object", "split characters", "any characters but", "ambiguity", "tokens over three rules", "numbers")

    @pytest.fixture
    def engine(self, record: GrammarEngineRecord) -> GrammarEngine:
        return record.build(vocabulary())

    @staticmethod
    def ready(record: GrammarEngineRecord, engine: GrammarEngine, grammar: Grammar) -> CompiledGrammar:
        """Compiled and loaded; skips the test when no language of the engine's can say the grammar."""
        found = grammar_oracle.write(grammar, record.languages)
        if found is None:
            pytest.skip(f"{record.name} takes {', '.join(sorted(record.languages))}")
        return engine.load(engine.compile(*found))

    # -- which tokens -------------------------------------------------------------------------------------------------------

    def test_the_record_says_what_it_takes(self, record: GrammarEngineRecord) -> None:
        assert record.languages & {"ebnf", "regex", "lark"}, "the suite writes its grammars in one of these"
        assert 0 < len(record.version) <= 64

    @pytest.mark.parametrize("case", CASES)
    def test_masks_are_those_of_trying_every_token(self, record: GrammarEngineRecord, engine: GrammarEngine, case: str) -> None:
        compiled = self.ready(record, engine, CASES[case])
        for seed in range(2):
            walk(compiled.matcher(), oracle_of(case), vocabulary(), random.Random(seed), self.num_steps)

    @pytest.mark.parametrize("case", ["one text", "an object", "split characters", "json", "any characters", "nullable in a row"])
    def test_the_native_side_is_the_same_matcher(self, record: GrammarEngineRecord, engine: GrammarEngine, case: str) -> None:
        """Both sides of one matcher in turns, beside another that knows its methods only."""
        compiled, v = self.ready(record, engine, CASES[case]), vocabulary()
        for seed in range(3):
            rng, plain, matcher = random.Random(seed), compiled.matcher(), compiled.matcher()
            offered = getattr(matcher, "native", None)  # of a `NativeMatcher`
            capsule = offered() if offered is not None else None
            if capsule is None:
                pytest.skip(f"{record.name} has none here")
            native = NativeSide(capsule, v.num_words)
            for _ in range(self.num_steps):
                assert native.call(STANDING) == plain.is_completed | plain.is_terminated << 1
                assert native.call(FORCED) == bool(plain.forced())
                mask = np.zeros(v.num_words, np.uint32)
                is_needed, found = plain.fill(mask), native.fill()
                assert (found is not None) == is_needed and (found is None or np.array_equal(found, mask))
                allowed = sorted(as_set(mask_of(plain, v)))
                refused = [t for t in rng.sample(range(v.vocab_size), 12) if t not in allowed]
                assert [native.call(ACCEPT, t) for t in (*refused, -1, v.vocab_size, 1 << 30)] == [0] * (len(refused) + 3)
                token = rng.choice(allowed)
                assert plain.accept(token)
                assert matcher.accept(token) if rng.random() < 0.5 else native.call(ACCEPT, token) == 1
                if plain.is_terminated:
                    break
                if rng.random() < 0.3:
                    plain.rollback(1)
                    matcher.rollback(1)
            assert native.call(STANDING) == plain.is_completed | plain.is_terminated << 1
            assert native.call(99) < 0, "an unknown question is a failure"

    def test_each_of_its_languages_means_the_same(self, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        names = ["any characters but", "counts", "control characters", "signs of every notation", "split characters", "numbers", "nullable in a row"]
        for case, language in itertools.product(names, sorted(record.languages & {"ebnf", "regex", "lark"})):
            found = grammar_oracle.write(CASES[case], [language])
            if found is not None:
                walk(engine.load(engine.compile(*found)).matcher(), oracle_of(case), vocabulary(), random.Random(5), 4)

    def test_masks_of_random_grammars_are_those_of_trying_every_token(self, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        is_recursive = st.booleans() if record.languages & {"ebnf", "lark"} else st.just(False)

        @settings(max_examples=self.max_examples, **QUICK)
        @given(is_recursive.flatmap(lambda r: grammars(is_recursive=r)), st.integers(0, 1 << 30))
        def check(grammar: Grammar, seed: int) -> None:
            found = grammar_oracle.write(grammar, record.languages)
            if found is not None:
                walk(engine.load(engine.compile(*found)).matcher(), Oracle(grammar), vocabulary(), random.Random(seed), 4)

        check()

    @pytest.mark.parametrize("case", ["one text", "an object", "split characters", "nothing", "counts", "json", "any characters"])
    def test_forced_bytes_are_what_must_come(self, record: GrammarEngineRecord, engine: GrammarEngine, case: str) -> None:
        oracle, v, rng = oracle_of(case), vocabulary(), random.Random(3)
        matcher = self.ready(record, engine, CASES[case]).matcher()
        prefix = b""
        for _ in range(self.num_steps):
            found = matcher.forced()
            assert oracle.forced(prefix).startswith(found[:64])
            if oracle.is_complete(prefix):
                assert found == b""
            assert matcher.forced() == found, "asking changes nothing"
            texts = sorted(oracle.allowed(prefix, v) - set(v.eos_token_ids))
            if not texts:
                break
            token = rng.choice(texts)
            assert matcher.accept(token)
            prefix += v.token_bytes[token] or b""

    def test_a_text_without_choice_is_forced_as_a_whole(self, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        matcher = self.ready(record, engine, CASES["one text"]).matcher()

        assert matcher.forced() == b"abcab"

    # -- ends ---------------------------------------------------------------------------------------------------------------

    def test_after_an_end_nothing_comes_until_it_is_taken_back(self, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        v = vocabulary()
        compiled = self.ready(record, engine, Grammar("root", {"root": Seq((Text("a"), Repeat(Text("b"), 0, 3)))}))
        for eos in v.eos_token_ids:
            matcher = compiled.matcher()
            assert not matcher.accept(eos)
            assert matcher.accept(4 + ord("a"))
            before = mask_of(matcher, v)
            assert set(v.eos_token_ids) <= as_set(before)
            assert matcher.accept(eos)
            assert (matcher.is_terminated, matcher.is_completed, matcher.forced()) == (True, True, b"")
            assert [t for t in range(v.vocab_size) if matcher.accept(t)] == []
            assert as_set(mask_of(matcher, v)) == set()
            assert as_set(mask_of(matcher.fork(), v)) == set()
            matcher.rollback(1)
            assert not matcher.is_terminated
            assert np.array_equal(before, mask_of(matcher, v))
            assert matcher.accept(4 + ord("b"))

    # -- back and forth -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("case", ["json", "ambiguity", "split characters", "an object", "counts", "a greedy beginning"])
    def test_going_back_forking_and_repeating_leave_no_trace(self, record: GrammarEngineRecord, engine: GrammarEngine, case: str) -> None:
        v, oracle = vocabulary(), oracle_of(case)
        compiled = self.ready(record, engine, CASES[case])

        @settings(max_examples=self.max_examples, **QUICK)
        @given(st.integers(0, 1 << 30), st.integers(1, 12), st.data())
        def check(seed: int, num_steps: int, data: st.DataObject) -> None:
            rng = random.Random(seed)
            matcher, masks, taken = compiled.matcher(), [], []
            for _ in range(num_steps):
                masks.append(mask_of(matcher, v))
                choices = sorted(as_set(masks[-1]))
                if not choices or matcher.is_terminated:
                    break
                token = rng.choice(choices)
                assert matcher.accept(token)
                taken.append(token)
            masks.append(mask_of(matcher, v))
            back = data.draw(st.integers(0, len(taken)))
            fork = matcher.fork()
            matcher.rollback(back)
            at = len(taken) - back
            assert np.array_equal(mask_of(matcher, v), masks[at])
            assert np.array_equal(mask_of(fork, v), masks[len(taken)]), "a fork goes its own way"
            again = compiled.matcher()
            for i, token in enumerate(taken):
                if i >= at:
                    assert np.array_equal(mask_of(matcher, v), masks[i])
                    assert matcher.accept(token)
                assert again.accept(token)
            assert np.array_equal(mask_of(matcher, v), mask_of(again, v))
            fork.rollback(len(taken))
            assert np.array_equal(mask_of(fork, v), masks[0])
            prefix = b"".join(v.token_bytes[t] or b"" for t in taken if t not in v.eos_token_ids)
            assert oracle.is_viable(prefix)

        check()

    def test_many_tokens_can_be_taken_back_and_no_more_than_there_are(self, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        v = vocabulary()
        matcher = self.ready(record, engine, Grammar("root", {"root": Seq((Repeat(Alt((Text("a"), Text("b"))), 0, None), Text("z")))})).matcher()
        for i in range(300):
            assert matcher.accept(4 + (ord("a") if i % 3 else ord("b")))
        before = mask_of(matcher, v)
        matcher.rollback(290)
        assert matcher.accept(4 + ord("z"))
        assert as_set(mask_of(matcher, v)) == set(v.eos_token_ids)
        with pytest.raises(ValueError, match="taken back"):
            matcher.rollback(12)
        matcher.rollback(11)
        matcher.rollback(0)
        assert np.array_equal(before, mask_of(matcher, v))
        with pytest.raises(ValueError, match="taken back"):
            matcher.rollback(1)
        with pytest.raises(ValueError, match="taken back"):
            matcher.rollback(-1)
        assert np.array_equal(before, mask_of(matcher, v))

    # -- forms --------------------------------------------------------------------------------------------------------------

    def test_compiling_gives_the_same_bytes_in_every_process(self, card: cards.Card, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        sources = [s for s in (grammar_oracle.write(CASES[c], record.languages) for c in ("json", "an object", "many texts", "numbers", "split characters")) if s]
        here = [hashlib.sha256(engine.compile(*s)).hexdigest() for s in sources]
        assert here == [hashlib.sha256(engine.compile(*s)).hexdigest() for s in sources]
        code = (
            f"import sys, hashlib; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
            f"from plugmesh.config import MeshConfig; from plugmesh.host import PluginHost; from plugmesh.testing import grammar_oracle\n"
            f"config = MeshConfig(plugins={ {self.slug: dict(self.settings)} if self.settings else {} !r})\n"
            f"records = PluginHost.load([{self.slug!r}], config, service={self.service_of(card)!r}).records('grammar_engines')\n"
            f"engine = next(r for r in records if r.name == {record.name!r}).build(grammar_oracle.vocabulary())\n"
            f"print(*[hashlib.sha256(engine.compile(*s)).hexdigest() for s in {sources!r}], 'torch' in sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False, env={**os.environ, "PYTHONHASHSEED": "1"})
        assert done.stdout.split() == [*here, "False"], done.stderr[-2000:]

    def test_a_form_is_good_for_another_engine_of_the_same_tokenizer_only(self, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        source = grammar_oracle.write(CASES["numbers"], record.languages)
        assert source is not None
        form = engine.compile(*source)
        v = vocabulary()

        assert np.array_equal(mask_of(record.build(v).load(form).matcher(), v), mask_of(engine.load(form).matcher(), v))
        with pytest.raises(DataLoss):
            record.build(vocabulary("another tokenizer")).load(form)

    def test_bytes_that_are_no_form_are_refused(self, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        source = grammar_oracle.write(CASES["an object"], record.languages)
        assert source is not None
        form = engine.compile(*source)
        engine.load(form)

        @settings(max_examples=150, **QUICK)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            at = data.draw(st.integers(0, len(form) - 1))
            what = data.draw(st.sampled_from(["flip", "cut", "insert", "double", "drop", "else"]))
            odd = {
                "flip": lambda: form[:at] + bytes([form[at] ^ data.draw(st.integers(1, 255))]) + form[at + 1 :],
                "cut": lambda: form[:at],
                "insert": lambda: form[:at] + data.draw(st.binary(min_size=1, max_size=9)) + form[at:],
                "double": lambda: form + form,
                "drop": lambda: form[:at] + form[at + 1 :],
                "else": lambda: data.draw(st.binary(max_size=200)),
            }[what]()
            if odd != form:
                with pytest.raises(DataLoss):
                    engine.load(odd)

        check()

    @pytest.mark.parametrize(("language", "source"), [
        ("ebnf", ""), ("ebnf", "root ::= ("), ("ebnf", "root ::= nowhere"), ("ebnf", 'root ::= "a'), ("ebnf", "root ::= [a"), ("ebnf", "\x00"),
        ("regex", "("), ("regex", "[a"), ("regex", "a{3,2}"), ("regex", "(?=a)b"), ("regex", "(a)\\1"), ("regex", "\\bword"), ("regex", "*"), ("regex", "a\\"),
        ("lark", ""), ("lark", "start: ("), ("lark", "start: nowhere"), ("no such language", "a"),
    ])  # fmt: skip
    def test_what_is_no_grammar_is_refused_and_harms_nobody(self, record: GrammarEngineRecord, engine: GrammarEngine, language: str, source: str) -> None:
        v = vocabulary()
        matcher = self.ready(record, engine, CASES["numbers"]).matcher()
        before = mask_of(matcher, v)
        if language in record.languages or language == "no such language":
            with pytest.raises(UnsupportedGrammar) as raised:
                engine.compile(language, source)
            assert raised.value.message
        assert np.array_equal(before, mask_of(matcher, v))
        assert np.array_equal(before, mask_of(self.ready(record, engine, CASES["numbers"]).matcher(), v))

    def test_extreme_grammars_are_compiled_right(self, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        v = vocabulary()
        long = "abcab" * 400
        matcher = self.ready(record, engine, Grammar("root", {"root": Text(long)})).matcher()
        assert long.encode().startswith(matcher.forced()[:64])
        for c in long:
            assert matcher.accept(4 + ord(c))
        assert as_set(mask_of(matcher, v)) == set(v.eos_token_ids)

        wide = self.ready(record, engine, Grammar("root", {"root": Alt(tuple(Text(f"{i:03d}x") for i in range(400)))})).matcher()
        assert all(wide.accept(4 + ord(c)) for c in "39")
        assert as_set(mask_of(wide, v)) & {4 + b for b in range(256)} == {4 + b for b in b"0123456789"}

        node = Text("a")
        for _ in range(40):
            node = Seq((Text("("), Alt((node, Text("b"))), Text(")")))  # type: ignore[assignment]
        deep = self.ready(record, engine, Grammar("root", {"root": node})).matcher()
        for _ in range(40):
            assert deep.accept(4 + ord("("))
        assert as_set(mask_of(deep, v)) & {4 + b for b in range(256)} == {4 + ord("a"), 4 + ord("b")}

    # -- company ------------------------------------------------------------------------------------------------------------

    def test_matchers_in_many_threads_do_not_disturb_each_other(self, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        v = vocabulary()
        cases = [c for c in ("json", "numbers", "an object", "split characters") if grammar_oracle.write(CASES[c], record.languages)]
        compiled = {c: self.ready(record, engine, CASES[c]) for c in cases}

        def run(job: tuple[str, int]) -> str:
            case, seed = job
            rng, matcher, digest = random.Random(seed), compiled[case].matcher(), hashlib.sha256()
            for step in range(25):
                mask = mask_of(matcher, v)
                digest.update(mask.tobytes() + matcher.forced())
                choices = sorted(as_set(mask) - set(v.eos_token_ids))
                if not choices or (step % 9 == 8):
                    matcher.rollback(min(step // 9, 1))
                    continue
                assert matcher.accept(rng.choice(choices))
            return digest.hexdigest()

        jobs = [(c, s) for c in cases for s in range(6)]
        alone = [run(j) for j in jobs]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(run, jobs)) == alone

    def test_memory_is_released(self, record: GrammarEngineRecord, engine: GrammarEngine) -> None:
        """Of matchers, of loaded grammars and of compilations."""
        v = vocabulary()
        source = grammar_oracle.write(CASES["an object"], record.languages)
        assert source is not None
        form = engine.compile(*source)
        mask = np.zeros(v.num_words, np.uint32)

        def work() -> int:
            for _ in range(self.num_loads):
                compiled = engine.load(form)
                for _ in range(5):
                    matcher = compiled.matcher()
                    for c in b'{"name"':
                        matcher.fill(mask)
                        matcher.accept(4 + c)
                    matcher.fork().forced()
            for _ in range(3):
                engine.compile(*source)
            gc.collect()
            return int(psutil.Process().memory_info().rss)

        work()
        sizes = [work() for _ in range(4)]

        assert min(sizes[2:]) - min(sizes[:2]) < 3 << 20
        assert 0 < engine.load(form).num_bytes < 1 << 30

    # -- the real thing -----------------------------------------------------------------------------------------------------

    @pytest.mark.model
    @pytest.mark.slow
    @pytest.mark.timeout(900)
    def test_masks_over_the_models_vocabulary_have_no_bit_that_differs(self, record: GrammarEngineRecord) -> None:
        v = model_vocabulary() if self.model_cases else None
        if v is None:
            pytest.skip("the default model is not here, or not wanted")
        engine = record.build(v)
        for case in self.model_cases:
            found = grammar_oracle.write(CASES[case], record.languages)
            if found is not None:
                walk(engine.load(engine.compile(*found)).matcher(), oracle_of(case), v, random.Random(11), 6)


@functools.lru_cache(maxsize=1)
def model_vocabulary() -> GrammarVocabulary | None:
    """That of the default model; None where its file is not."""
    import json

    import gguf

    from plugmesh import models
    from plugmesh.grammar.vocabulary import vocabulary_of
    from plugmesh.tokenization.load import load_vocabulary

    path = models.find("smollm2")
    if path is None:
        return None
    fields = gguf.GGUFReader(path).fields.items()
    meta = {key: value.contents() for key, value in fields if key.startswith("tokenizer.")}
    return vocabulary_of(load_vocabulary({"tokenizer.gguf.json": json.dumps(meta).encode()}), 0)
