"""Codebooks: what they learn, what they are good for, and how they are kept."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from plugmesh import models
from plugmesh.errors import ConfigError
from plugmesh.testing.conformance.kv_codec import exact_attention
from plugmesh_million import native, pq, train
from plugmesh_million.bench import int4
from plugmesh_million.plugin import Settings
from plugmesh_million.tests import made

CONFIG = dataclasses.replace(made.CONFIG, num_layers=1)
QUICK = train.Recipe("layer", iterations=6)


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def quantise(x: np.ndarray, books: train.Codebooks, part: int) -> np.ndarray:
    return np.stack([pq.decode(pq.encode(x[:, g], book := pq.widen(books.centroids[books.index[0, part, g]])), book) for g in range(x.shape[1])], axis=1)


def test_an_outlier_channel_breaks_int4_but_not_the_codes() -> None:
    """The paper's point: a channel that is 20 times larger takes all steps of an even scale, but only a subspace of the codes."""
    q, k, v = made.rows(CONFIG, 600, 1)
    _, k2, v2 = made.rows(CONFIG, 3000, 2)
    errors = {}
    for factor in (1, 20):
        keys, trained = k.copy(), k2.copy()
        keys[..., 5] *= factor
        trained[..., 5] *= factor
        queries = q.copy()
        queries[..., 5] /= factor  # the same scores, so that only the error of K differs
        books = train.fit(CONFIG, trained[None], v2[None], QUICK)
        want = exact_attention(queries, keys, v)
        errors[factor] = [error(exact_attention(queries, x, v), want) for x in (int4(keys), quantise(keys, books, 0))]

    assert errors[20][0] > 2 * errors[1][0]
    assert errors[20][1] < 1.2 * errors[1][1]
    assert errors[20][1] < errors[20][0]


def test_the_centroids_are_used_and_mean_what_was_trained() -> None:
    k, v = made.rows(CONFIG, 3000, 3)[1:]
    books = train.fit(CONFIG, k[None], v[None], QUICK)
    book = pq.widen(books.centroids[books.index[0, 0, 0]])
    codes = pq.encode(k[:, 0], book)
    shares = np.stack([np.bincount(c, minlength=256) for c in codes.T]) / len(codes)
    entropy = -(shares * np.log2(np.maximum(shares, 1e-12))).sum(1)

    assert entropy.min() > 6
    assert error(pq.decode(codes, book), k[:, 0]) < 0.15
    assert error(pq.decode(codes, book[..., ::-1]), k[:, 0]) > 1


def test_more_codebooks_fit_better() -> None:
    rng = np.random.default_rng(4)
    config = dataclasses.replace(CONFIG, num_layers=3)
    k, v = (rng.standard_normal((3, 1200, 2, 16)).astype(np.float32) * np.array([[[[1]], [[3]]]]).reshape(1, 1, 2, 1) * np.arange(1, 4).reshape(3, 1, 1, 1) for _ in "kv")
    k, v = k.astype(np.float32), v.astype(np.float32)

    def loss(scope: train.Scope) -> float:
        books = train.fit(config, k, v, train.Recipe(scope, iterations=5))
        found = [pq.decode(pq.encode(k[i, :, g], b := pq.widen(books.centroids[books.index[i, 0, g]])), b) - k[i, :, g] for i in range(3) for g in range(2)]
        return float(np.mean([np.mean(f**2) / np.mean(k[i // 2, :, i % 2] ** 2) for i, f in enumerate(found)]))

    assert loss("head") < loss("layer") < loss("merged")


@settings(max_examples=40, deadline=None)
@given(arrays.arrays(np.float32, (5, 8), elements=st.floats(-100, 100, width=32)), st.integers(0, 9))
def test_a_code_names_the_nearest_centroid_and_lookup_is_the_product(x: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    book = pq.round_bfloat16(rng.standard_normal((4, 2, 256)).astype(np.float32) * 30)
    codes = pq.encode(x, book)
    decoded = pq.decode(codes, book).reshape(5, 4, 2)
    nearest = ((x.reshape(5, 4, 2)[..., None] - book) ** 2).sum(2).min(-1)
    query = rng.standard_normal(8).astype(np.float32)

    assert np.allclose(((x.reshape(5, 4, 2) - decoded) ** 2).sum(2), nearest, rtol=1e-5)
    assert np.allclose(pq.lookup_scores(pq.lookup_tables(query, book), codes), decoded.reshape(5, 8) @ query, rtol=1e-4, atol=1e-3)


def test_attention_by_tables_and_histograms_is_that_of_the_decoded_rows() -> None:
    q, k, v = made.rows(CONFIG, 50, 5)
    books = train.fit(CONFIG, k[None], v[None], QUICK)
    kb, vb = (pq.widen(books.centroids[books.index[0, part, 0]]) for part in (0, 1))
    codes = pq.encode(k[:48, 0], kb), pq.encode(v[:48, 0], vb)
    got = pq.attend(q[49, 0], *codes, kb, vb, k[48:, 0], v[48:, 0])
    keys, values = (np.concatenate([pq.decode(c, b), x[48:, 0]])[:, None] for c, b, x in ((codes[0], kb, k), (codes[1], vb, v)))

    assert error(got, exact_attention(q[49:, :1], keys, values)[0, 0]) < 1e-5


def test_rounding_is_to_the_nearest_bfloat16_and_ties_go_to_the_even_one() -> None:
    x = np.concatenate([np.random.default_rng(6).standard_normal(2000), [0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38]]).astype(np.float32)
    got, exact = pq.round_bfloat16(x), x.astype(np.float64)

    assert not (got.view(np.uint32) & 0xFFFF).any()
    assert got[2001:].tolist() == [1.0, 1 + 2**-6, np.inf]
    finite = slice(0, 2001)
    for step in (-0x10000, 0x10000):  # its neighbours are no nearer
        other = (got.view(np.int32) + step).view(np.float32)[finite].astype(np.float64)
        assert (np.abs(got[finite] - exact[finite]) <= np.abs(other - exact[finite]))[np.isfinite(other)].all()
    assert np.isnan(pq.round_bfloat16(np.array([np.nan], np.float32))[0])


@pytest.mark.skipif(native.library() is None, reason="no compiled code")
def test_the_same_seed_gives_the_same_codebooks_with_and_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    k, v = made.rows(CONFIG, 600, 7)[1:]
    first, again = (train.fit(CONFIG, k[None], v[None], train.Recipe(iterations=2)) for _ in range(2))
    other = train.fit(CONFIG, k[None], v[None], train.Recipe(iterations=2, seed=1))
    monkeypatch.setattr(native, "library", lambda: None)
    slow = train.fit(CONFIG, k[None], v[None], train.Recipe(iterations=2))

    assert first.digest() == again.digest() != other.digest()
    assert (first.centroids != slow.centroids).mean() < 0.01  # a tie may fall the other way


def test_files_are_found_again_and_what_does_not_fit_is_refused(tmp_path: pathlib.Path) -> None:
    k, v = made.rows(CONFIG, 300, 8)[1:]
    books = train.fit(CONFIG, k[None], v[None], train.Recipe(iterations=1))
    given = Settings(codebooks=str(tmp_path), model="none", iterations=1)
    path = train.file_of(tmp_path, "v1", train.Recipe("layer", given.tokens, 1, 0))
    train.save(path, books)

    assert train.codebooks(given, CONFIG, "v1").digest() == books.digest()
    with pytest.raises(ConfigError, match="no codebooks are trained"):
        train.codebooks(given, CONFIG, "v2")
    with pytest.raises(ConfigError, match="another shape"):
        train.codebooks(given, dataclasses.replace(CONFIG, num_layers=2), "v1")
    path.write_bytes(b"no codebooks")
    with pytest.raises(ConfigError, match="cannot be read"):
        train.codebooks(given, CONFIG, "v1")


@pytest.mark.model
@pytest.mark.slow
def test_codebooks_of_the_default_model_keep_its_perplexity(tmp_path: pathlib.Path) -> None:
    """Trained anew, on less text than by default."""
    from plugmesh_engine.bench import load_manifest
    from plugmesh_engine.executors import native as native_executor
    from plugmesh_million import bench

    path = models.find("smollm2")
    if path is None or native.library() is None:
        pytest.skip("needs the default model and the compiled code")
    model = native_executor.load(load_manifest(path, "native", tmp_path))
    (ids,) = bench.token_windows(path, bench.texts()["prose"], 1)
    nll = []
    for record in (None, bench.codec(codebooks=str(tmp_path), tokens=2048, iterations=4)):
        executor = model.build_executor(bench._config("bfloat16", 2, 40), record)
        nll.append(bench.nll(executor, ids).mean())
        executor.close()

    assert 0 < nll[1] - nll[0] < 0.25, nll
