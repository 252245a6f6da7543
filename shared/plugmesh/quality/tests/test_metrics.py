"""The core's metrics: against slow obvious formulas, on sides whose answers are known, and through the suite that plugins' metrics pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plugmesh.quality import divergence, greedy, needle, perplexity, tasks
from plugmesh.quality.core import CoreQualityMetrics
from plugmesh.records import Observation
from plugmesh.testing.conformance.quality_metric import QualityMetricConformance
from plugmesh.testing.quality import FakeSubject


class TestCore(QualityMetricConformance):
    """The same door, the same tests."""

    test_the_records_name_stays_the_same_from_load_to_load = None
    test_a_setting_that_does_not_exist_is_refused_with_its_name = None

    @pytest.fixture(params=CoreQualityMetrics().register_quality_metrics(), ids=lambda r: r.name)
    def record(self, request):
        return request.param


def slow_log_prob(row: np.ndarray, token: int) -> float:
    return float(row[token]) - math.log(sum(math.exp(float(x)) for x in row))


def test_the_likelihood_of_a_text_is_that_of_the_formula_whatever_the_chunks() -> None:
    subject = FakeSubject()
    ids = subject.encode(subject.english()[:50])
    expected = [-slow_log_prob(subject._row(ids[: i + 1]), ids[i + 1]) for i in range(len(ids) - 1)]

    assert perplexity.negative_log_likelihoods(subject, ids) == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_that_of_the_reference_model() -> None:
    from plugmesh_engine.reference import ReferenceLlama
    from plugmesh_engine.testing import random_weights, tiny_config

    config = tiny_config()
    model = ReferenceLlama(config, random_weights(config))

    class Subject(FakeSubject):
        def logits(self, token_ids, *, chunk_tokens=32):
            everything = model.logits(token_ids)
            for start in range(0, len(everything), chunk_tokens):
                yield everything[start : start + chunk_tokens]

    ids = np.random.default_rng(0).integers(0, config.vocab_size, 70).tolist()

    assert np.exp(perplexity.negative_log_likelihoods(Subject(), ids).mean()) == pytest.approx(model.perplexity(ids), rel=1e-4)


@pytest.mark.parametrize("num_kept_rows_chunk", [16, 7])
def test_the_divergence_is_that_of_the_formula(num_kept_rows_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [divergence.observe(FakeSubject(damage=d)) for d in (0.0, 1.0)]
    p, q = (np.exp(s.arrays["log_probs"].astype(np.float64)) for s in sides)
    expected = np.mean([sum(a * (math.log(a) - math.log(b)) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)])
    kl, same = divergence.compare(*sides)

    assert len(p) == 16
    assert p.sum(axis=1) == pytest.approx(1)
    assert kl.value == pytest.approx(expected, rel=1e-4)
    assert same.value == np.mean([x.argmax() == y.argmax() for x, y in zip(p, q, strict=True)])


def test_only_the_last_rows_of_a_window_count() -> None:
    """They stand behind a context, as tokens of a long request do."""
    subject = FakeSubject()
    window = perplexity.windows(subject, 1, 48)[0]
    rows = np.stack([subject._row(window[: i + 1]) for i in range(32, 48)])

    assert divergence.observe(subject).arrays["log_probs"] == pytest.approx(perplexity.log_softmax(rows), abs=1e-5)


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=5, max_size=5), st.lists(st.integers(0, 2), min_size=5, max_size=5)), min_size=1, max_size=5))
def test_the_common_beginning_ends_at_the_first_difference(rows: list[tuple[list[int], list[int]]]) -> None:
    def slow(a: list[int], b: list[int]) -> float:
        for i in range(5):
            if a[i] != b[i]:
                return i / 5
        return 1.0

    got = greedy.common_share(np.array([a for a, _ in rows]), np.array([b for _, b in rows]))

    assert got.tolist() == [slow(a, b) for a, b in rows]


def test_the_needle_is_in_the_text_once_at_its_depth_and_the_text_has_its_length() -> None:
    asked = needle.questions(FakeSubject(is_quick=False))

    assert len(asked) == len(needle.LENGTHS) * len(needle.DEPTHS)
    for (length, question, right), depth in zip(asked, needle.DEPTHS * len(needle.LENGTHS), strict=True):
        hay = question.rsplit("\n\nWhat is", 1)[0]
        assert question.count(right) == 1
        assert length <= len(hay) < length + 80
        assert abs(hay.index("The secret number") / length - depth) < 0.15


def test_lengths_beyond_the_context_are_not_asked() -> None:
    subject = FakeSubject(is_quick=False)
    subject.context_tokens = 1500

    assert {length for length, _, _ in needle.questions(subject)} == {512, 1024}


def test_a_solver_solves_every_task_and_a_guesser_none() -> None:
    class Solver(FakeSubject):
        offset = 0

        def complete(self, texts, max_tokens):
            found = []
            for text in texts:
                task = text.split("\n\n")[-1]
                if "+" in task:
                    a, b = task.removesuffix(" =").split(" + ")
                    found.append(f" {int(a) + int(b) + self.offset}\n\n1 + 1 = 2")
                elif "Again" in task:
                    found.append(" " + task.split("\n")[0].removeprefix("Words: ")[self.offset :])
                else:
                    name = task.split("Where does ")[1].split(" ")[0]
                    found.append(f" {task.split(f'{name} lives in ')[1].split('.')[self.offset].strip()}.")
            return found

    class Guesser(Solver):
        offset = 1

    assert set(tasks.observe(Solver(is_quick=False)).figures.values()) == {100.0}
    assert set(tasks.observe(Guesser(is_quick=False)).figures.values()) == {0.0}


def test_accuracy_is_compared_item_by_item() -> None:
    before = Observation({}, {"a": np.array([True, True, False, False]), "b": np.array([True])})
    after = Observation({}, {"a": np.array([True, False, False, False]), "b": np.array([True])})
    (delta,) = tasks.compare(before, after)

    assert delta.value == pytest.approx(-20)
    assert delta.low < -20 < delta.high
