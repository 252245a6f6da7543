"""The selection against a slow reference, its edges, and the suites of its record."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugmesh.errors import ConfigError
from plugmesh.records import PromptFilterContext
from plugmesh.testing.conformance import CardConformance, PromptFilterConformance
from plugmesh_engine.testing import english, tiny_config
from plugmesh_gemfilter.needles import needle
from plugmesh_gemfilter.plugin import Settings
from plugmesh_gemfilter.selection import GemFilter, build_filter, choose, pooled, scores


class TestCard(CardConformance):
    slug = "gemfilter"


class TestDefaults(PromptFilterConformance):
    slug = "gemfilter"


class TestPaper(PromptFilterConformance):
    """Nothing protected, one query, small selections of short prompts, as in Algorithm 1."""

    slug = "gemfilter"
    settings = {"layer": 3, "keep_tokens": 10, "keep_first": 0, "keep_last": 0, "min_prompt_tokens": 1, "num_queries": 1}
    lengths = (1, 2, 9, 10, 11, 16, 17, 60, 200)


class TestManyQueries(PromptFilterConformance):
    slug = "gemfilter"
    settings = {"num_queries": 32, "keep_tokens": 20, "keep_first": 1, "keep_last": 19, "min_prompt_tokens": 16, "chunk_tokens": 24, "pool_width": 1}
    lengths = (1, 15, 16, 20, 21, 48, 100)


def reference(q: np.ndarray, k: np.ndarray, keep: int, width: int, first: int, last: int) -> list[int]:
    """Algorithm 1 of the paper, one product at a time, in float64; protected tokens are moved to the front of the ranking."""
    n, group = len(k), q.shape[1] // k.shape[1]
    score = [sum(float(q[i, h].astype(np.float64) @ k[j, h // group]) for i in range(len(q)) for h in range(q.shape[1])) for j in range(n)]
    half = width // 2
    mean = [sum(score[i] for i in range(j - half, j + half + 1) if 0 <= i < n) / width for j in range(n)]
    ranking = sorted(range(n), key=lambda j: (not (j < first or j >= n - last), -mean[j], j))
    return sorted(ranking[:keep])


@given(
    st.integers(1, 40), st.integers(1, 45), st.sampled_from([1, 3, 5, 9]), st.integers(0, 3), st.integers(0, 6), st.integers(1, 4), st.integers(0, 10**6)
)
@settings(max_examples=60, deadline=None)
def test_the_selection_is_that_of_the_papers_algorithm(n: int, keep: int, width: int, first: int, last: int, num_queries: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((min(num_queries, n), 6, 8)).astype(np.float32)
    k = rng.standard_normal((n, 3, 8)).astype(np.float32)
    keep = max(keep, first + last)
    chosen = GemFilter(3, keep, keep_first=first, keep_last=last, pool_width=width).select(q, k)

    assert chosen.tolist() == reference(q, k, keep, width, first, last)


def test_of_equal_scores_the_first_tokens_win() -> None:
    assert choose(np.zeros(10), 3).tolist() == [0, 1, 2]
    assert choose(np.array([0, 1, 0, 1, 0, 1.0]), 2).tolist() == [1, 3]


def test_protected_ends_are_chosen_whatever_their_scores() -> None:
    values = np.array([-9, -9, 5, 1, 7, 6, -9, -9, -9.0])

    assert choose(values, 6, keep_first=2, keep_last=3).tolist() == [0, 1, 4, 6, 7, 8]
    assert choose(values, 3).tolist() == [2, 4, 5]


def test_a_window_at_the_edge_counts_zeros_outside() -> None:
    assert pooled(np.array([5.0, 0, 0, 0, 10]), 5).tolist() == [1.0, 1.0, 3.0, 2.0, 2.0]
    assert pooled(np.array([3.0]), 5).tolist() == [0.6]


def test_the_heads_of_a_group_are_summed_before_the_product() -> None:
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 9, 64)).astype(np.float32), rng.standard_normal((50, 3, 64)).astype(np.float32)
    slow = np.einsum("qhd,nhd->n", q, k.repeat(3, axis=1))

    assert np.abs(scores(q, k) - slow).max() < 1e-3


@pytest.mark.parametrize(("n", "wanted"), [(1, 0), (1023, 0), (1024, 0), (1025, 0), (3071, 0), (3072, 18), (8000, 18)])
def test_short_prompts_are_left_alone(n: int, wanted: int) -> None:
    made = build_filter(Settings(), PromptFilterContext(tiny_config(num_layers=30), 8192, 512))

    assert made.layers(n) == wanted


def test_a_prompt_that_is_kept_whole_is_not_looked_at() -> None:
    made = GemFilter(3, keep=100)

    assert [made.layers(n) for n in (99, 100, 101)] == [0, 0, 3]


def test_a_layer_that_the_model_has_not_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"plugins.gemfilter.layer: 30 must lie between 1 and 29"):
        build_filter(Settings(layer=30), PromptFilterContext(tiny_config(num_layers=30), 8192, 512))


@pytest.mark.parametrize("bad", [{"pool_width": 4}, {"keep_tokens": 10, "keep_last": 11}, {"depth": 1.0}])
def test_settings_that_make_no_sense_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"pool_width|keep_last|depth"):
        Settings.model_validate(bad)


def test_the_needle_lies_where_it_says() -> None:
    def encode(text: str) -> list[int]:
        return [10 + b for b in text.encode()]

    def decode(ids: tuple[int, ...]) -> str:
        return bytes(i - 10 for i in ids).decode()

    for depth in (0.0, 0.5, 1.0):
        made = needle(encode, english(), 2000, depth, 4)
        ids = made.token_ids

        assert len(ids) == 2000
        assert decode(ids[made.places.start : made.places.stop]).endswith(f"is {made.answer}")
        assert decode(ids[made.number_places.start : made.number_places.stop]) == f" {made.answer}"
        assert "What is the secret number" in decode(tuple(i for i in ids[made.question :] if i >= 10))
