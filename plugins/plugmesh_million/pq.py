"""Product quantisation in numpy: the slow, obvious form of what `csrc/` does.

A head's vector is cut into subspaces of two neighbouring dimensions; each has 256 centroids, and a vector is kept as the numbers of the nearest ones: 4 bits
a value. Centroids are bfloat16 values. Source: MILLION, arXiv:2504.03661; product quantisation: Jegou et al., TPAMI 2011.
"""

from __future__ import annotations

import numpy as np

DIM, CENTROIDS = 2, 256


def round_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 values that bfloat16 can hold, to the nearest even; NaN stays NaN."""
    return widen(to_bfloat16(x))


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """uint16 bit patterns."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def encode(x: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Codes (..., M) uint8 of vectors (..., 2M) with a codebook (M, 2, 256) float32; the lowest of equally near centroids, 0 for NaN."""
    points = x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1] // DIM, DIM)
    codes = np.zeros(points.shape[:2], np.uint8)
    with np.errstate(all="ignore"):
        for m in range(points.shape[1]):
            distances = (book[m, 0] - points[:, m, :1]) ** 2 + (book[m, 1] - points[:, m, 1:]) ** 2
            codes[:, m] = np.argmin(np.where(np.isnan(distances), np.inf, distances), axis=1)
    return codes.reshape(*x.shape[:-1], points.shape[1])


def decode(codes: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Vectors (..., 2M) float32 of codes (..., M)."""
    subspaces = np.arange(codes.shape[-1])
    return np.stack([book[subspaces, 0, codes], book[subspaces, 1, codes]], axis=-1).reshape(*codes.shape[:-1], codes.shape[-1] * DIM)


def lookup_tables(query: np.ndarray, book: np.ndarray) -> np.ndarray:
    """The paper's LUT (M, 256): product of the query's part (2M,) with every centroid."""
    return np.einsum("md,mdc->mc", query.reshape(-1, DIM), book)


def lookup_scores(tables: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Products of a query with encoded keys: (n,) of tables (M, 256) and codes (n, M)."""
    scores: np.ndarray = tables[np.arange(len(tables)), codes].sum(axis=1)
    return scores


def attend(q: np.ndarray, key_codes: np.ndarray, value_codes: np.ndarray, key_book: np.ndarray, value_book: np.ndarray, exact_k: np.ndarray,
           exact_v: np.ndarray) -> np.ndarray:  # fmt: skip
    """One query head (D,) over n encoded positions (n, M), then exact ones (r, D), by the steps of the paper.

    Scores of codes come from tables; their values are summed per centroid first: W[m, c] is the weight of all positions with code c, and the output is W
    times the centroids. No key or value is put together again.
    """
    scores = np.concatenate([lookup_scores(lookup_tables(q, key_book), key_codes), exact_k @ q]) / np.sqrt(np.float32(len(q)))
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    n, num_subspaces = key_codes.shape
    histogram = np.zeros((num_subspaces, CENTROIDS), np.float32)
    for m in range(num_subspaces):
        np.add.at(histogram[m], value_codes[:, m], weights[:n])
    out: np.ndarray = np.einsum("mc,mdc->md", histogram, value_book).reshape(-1) + weights[n:] @ exact_v
    return out


def kmeans(points: np.ndarray, assign: object, iterations: int, rng: np.random.Generator) -> np.ndarray:
    """256 centroids (2, 256) float32 of points (n, 2), by Lloyd's rounds.

    Starts from points drawn at random, a third of them far from the middle, so that the tails get centroids as well; a centroid that no point is nearest to
    moves to a point drawn at random.

    Args:
        assign: function(points, centroids (2, 256)) -> codes.
    """
    order = rng.permutation(len(points))
    distance = np.sum((points - points.mean(0)) ** 2, axis=1)
    far = rng.choice(len(points), CENTROIDS // 3, p=distance / distance.sum()) if distance.sum() > 0 else order[: CENTROIDS // 3]
    near = np.resize(order, CENTROIDS - len(far))
    book = np.ascontiguousarray(points[np.concatenate([far, near])].T)
    for _ in range(iterations):
        codes = assign(points, book)  # type: ignore[operator] # a function
        counts = np.bincount(codes, minlength=CENTROIDS)
        sums = [np.bincount(codes, weights=points[:, i], minlength=CENTROIDS) for i in range(DIM)]
        empty = counts == 0
        book = np.stack([s / np.maximum(counts, 1) for s in sums]).astype(np.float32)
        book[:, empty] = points[rng.integers(0, len(points), int(empty.sum()))].T
    return book
