"""The native executor against the textbook, against itself in other company, and with functions from outside in its seams."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import mmap
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plugmesh_kernels
from plugmesh.types import ModelConfig
from plugmesh_engine.batch import Rows
from plugmesh_engine.config import EngineConfig
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.testing import FileManifest, FileTensor, random_weights, tiny_config
from plugmesh_kernels.pack import native_dtype, pack

pytestmark = pytest.mark.skipif(not plugmesh_kernels.available(), reason=f"no native kernels: {plugmesh_kernels.why_not()}")

WIDE = {"hidden_size": 96, "intermediate_size": 160, "num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "max_position": 1400}
KINDS = {"f32": None, "bf16": "bfloat16", "q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_1": gguf.GGMLQuantizationType.Q4_1}


def stored(weights: dict[str, np.ndarray], kind: str) -> tuple[dict[str, tuple[str, np.ndarray]], dict[str, np.ndarray]]:
    """Matrices as (stored type, bytes), and what they mean in float32."""
    packed, meaning = {}, {}
    for name, w in weights.items():
        if w.ndim == 1 or kind == "f32":
            packed[name], meaning[name] = ("float32", w), w
        elif kind == "bf16":
            bits = (w.view(np.uint32) >> 16).astype(np.uint16)
            packed[name], meaning[name] = ("bfloat16", bits), (bits.astype(np.uint32) << 16).view(np.float32)
        else:
            data = gguf.quantize(w, KINDS[kind])
            packed[name] = (KINDS[kind].name, data.view(np.uint8).reshape(-1))
            meaning[name] = gguf.dequantize(data, KINDS[kind]).reshape(w.shape).astype(np.float32)
    return packed, meaning


def manifest(folder: pathlib.Path, config: ModelConfig, tensors: dict[str, tuple[str, np.ndarray]], weights: dict[str, np.ndarray]) -> FileManifest:
    """A manifest of format "native" in one file."""
    path = folder / "model.native"
    entries, digest = [], hashlib.sha256(config.to_json().encode())
    with path.open("wb") as f:
        for name, (kind, data) in tensors.items():
            shape = weights[name].shape
            raw = data.tobytes() if len(shape) == 1 else pack(kind, data, *shape).tobytes()
            dtype = "float32" if len(shape) == 1 else native_dtype(kind, data)
            f.write(b"\0" * (-f.tell() % 64))
            entries.append(FileTensor(name, dtype, shape, str(path), f.tell(), len(raw)))
            f.write(raw)
            digest.update(raw)
    return FileManifest(config.name, digest.hexdigest(), config.architecture, config.to_json(), tuple(entries), "native")


@functools.cache
def native_model(kind: str, **changes):
    """A random model and its reference, kept for the module."""
    from plugmesh_engine.executors import native

    config = tiny_config(**dict(changes))
    weights = random_weights(config, seed=3)
    packed, meaning = stored(weights, kind)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="plugmesh-native-"))
    return native.load(manifest(folder, config, packed, weights)), ReferenceLlama(config, meaning)


def executor(model, **changes):
    return model.build_executor(EngineConfig(**{"executor": "native", "num_blocks": 340, "num_threads": 2} | changes))


def run_alone(e, tokens: list[int], chunks: list[int], first_block: int = 1) -> np.ndarray:
    """Logits of the last token, the sequence computed alone in chunks of these lengths."""
    blocks = list(range(first_block, first_block + len(tokens) // 16 + 1))
    at, result = 0, None
    for n in chunks:
        result = e.run([Rows(tokens[at : at + n], at, blocks, 1, True)])
        at += n
    assert at == len(tokens) and result is not None
    return result.logits[-1].copy()


def prompt(n: int, seed: int, vocab: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, n).tolist()


@pytest.mark.parametrize("shape", ["odd", "wide"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_are_those_of_the_textbook(kind, shape):
    """bfloat16 KV and int8 activations leave a percent or so of the logits' spread; float32 weights a good deal less."""
    if kind in ("q8_0", "q4_1") and shape == "odd":
        changes = {"hidden_size": 32, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}  # K of a GGUF is a multiple of 32
    else:
        changes = WIDE if shape == "wide" else {}
    model, reference = native_model(kind, **changes)
    tokens = prompt(70, 1, model.config.vocab_size)
    e = executor(model)
    got = run_alone(e, tokens, [33, 36, 1])
    e.close()
    want = reference.next_logits(tokens)

    error = np.abs(got - want).max() / want.std()
    assert error < {"f32": 0.06, "bf16": 0.08, "q8_0": 0.12, "q4_1": 0.12}[kind]
    assert error > 0


@pytest.mark.parametrize("kind", ["q4_1", "bf16"])
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_company_chunks_and_threads_change_no_bit(kind, kv_dtype, data):
    """The logits of a sequence are the same alone and token by token, in any chunks, beside any others, on one thread and on two."""
    model, _ = native_model(kind, **WIDE)
    vocab = model.config.vocab_size
    lengths = data.draw(st.lists(st.one_of(st.integers(1, 60), st.sampled_from([511, 512, 513, 1030])), min_size=1, max_size=5))
    sequences = [prompt(n, i, vocab) for i, n in enumerate(lengths)]
    alone = []
    one = executor(model, num_threads=1, kv_dtype=kv_dtype)
    for tokens in sequences:
        alone.append(run_alone(one, tokens, [len(tokens) - len(tokens) // 2, *[1] * (len(tokens) // 2)] if len(tokens) < 100 else [len(tokens)]))
    one.close()
    two = executor(model, num_threads=2, kv_dtype=kv_dtype)
    blocks, taken = [], 1
    for tokens in sequences:
        blocks.append(list(range(taken, taken + len(tokens) // 16 + 1)))
        taken += len(blocks[-1])
    done = [0] * len(sequences)
    together: list[np.ndarray | None] = [None] * len(sequences)
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        rows, who = [], []
        for i, tokens in enumerate(sequences):
            left = len(tokens) - done[i]
            n = min(left, data.draw(st.sampled_from([1030, 300, 17, 3, 2, 1, 0])))
            if n:
                rows.append(Rows(tokens[done[i] : done[i] + n], done[i], blocks[i], int(n == left), True))
                who.append((i, n))
        if not rows:  # nobody was drawn: the first who is left goes on, so that everybody is compared in the end
            i = next(i for i, tokens in enumerate(sequences) if done[i] < len(tokens))
            n = len(sequences[i]) - done[i]
            rows, who = [Rows(sequences[i][done[i] :], done[i], blocks[i], 1, True)], [(i, n)]
        logits = list(two.run(rows).logits)
        for i, n in who:
            done[i] += n
            if done[i] == len(sequences[i]):
                together[i] = logits.pop(0)
    two.close()

    for a, b in zip(alone, together, strict=True):
        assert b is not None
        assert np.array_equal(a, b)


@pytest.mark.parametrize("shape", ["odd", "wide"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("num_threads", [1, 2])
def test_many_rows_give_the_bits_of_few(num_threads, kind, shape):
    """Of a large step a thread takes rows through a whole layer, of a small one it takes columns: the same sums either way.

    All rows are wanted, or one, or none of a sequence, which the last layer treats in different ways.
    """
    changes = WIDE if shape == "wide" else {"hidden_size": 32, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_position": 1400}
    model, _ = native_model(kind, **changes)
    e = executor(model, num_threads=num_threads)
    first, second, third = (prompt(n, i, model.config.vocab_size) for i, n in enumerate((131, 90, 77)))
    blocks = [list(range(start, start + 10)) for start in (1, 11, 21)]
    few = [e.run([Rows(t, 0, b, w, True)]).logits.copy() for t, b, w in ((first[:100], blocks[0], 100), (second, blocks[1], 1), (third, blocks[2], 0))]
    last = e.run([Rows(first[100:], 100, blocks[0], 31, True)]).logits.copy()
    after = e.run([Rows([5], 77, blocks[2], 1, True)]).logits.copy()

    moved = [[b + 30 for b in of] for of in blocks]
    many = e.run([Rows(first, 0, moved[0], 131, True), Rows(second, 0, moved[1], 1, True), Rows(third, 0, moved[2], 0)]).logits.copy()
    after_many = e.run([Rows([5], 77, moved[2], 1, True)]).logits.copy()
    everything = e.run([Rows(first, 0, [b + 60 for b in blocks[0]], 131, True)]).logits.copy()
    nothing = e.run([Rows(first, 0, [b + 60 for b in blocks[0]], 0)])
    e.close()

    assert np.array_equal(many, np.concatenate([few[0], last, few[1]]))
    assert np.array_equal(everything, many[:131])
    assert np.array_equal(after_many, after)
    assert len(nothing.best) == 0


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("last", [1, 2, 5])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_keys_that_threads_share_give_the_bits_of_a_whole_prompt(num_threads, last, kv_dtype):
    """A few rows after a long context: their splits of the keys are computed apart and merged, which a whole prompt does within one unit."""
    model, reference = native_model("q4_1", **WIDE)
    e = executor(model, num_threads=num_threads, kv_dtype=kv_dtype)
    tokens = prompt(1100, 4, model.config.vocab_size)
    whole, apart = run_alone(e, tokens, [1100]), run_alone(e, tokens, [1100 - last, last], first_block=100)
    e.close()

    assert np.array_equal(whole, apart)
    assert np.abs(whole - reference.next_logits(tokens)).max() < 0.12 * whole.std()


def test_the_best_token_is_the_argmax_of_the_logits_for_every_wanted_row():
    model, _ = native_model("q4_1", **WIDE)
    e = executor(model)
    tokens = prompt(20, 5, model.config.vocab_size)
    result = e.run([Rows(tokens, 0, [1, 2], 7, True), Rows(tokens[:3], 0, [3], 3, False), Rows(tokens[:5], 0, [4], 0, False)])
    e.close()

    assert result.logits.shape == (7, model.config.vocab_size)
    assert result.best[:7].tolist() == result.logits.argmax(axis=1).tolist()
    assert len(result.best) == 10


def test_a_sequence_without_finite_logits_says_so_and_harms_nobody():
    """NaN keys of one sequence stay in it."""
    model, _ = native_model("q4_1", **WIDE)
    e = executor(model)
    good, bad = prompt(20, 1, model.config.vocab_size), prompt(20, 2, model.config.vocab_size)
    want = run_alone(e, good, [19, 1], first_block=10)
    e.run([Rows(good[:19], 0, [1, 2]), Rows(bad[:19], 0, [3, 4])])
    e.memory.storage[3].view(np.uint16)[:] = 0x7FC0
    result = e.run([Rows(bad[19:], 19, [3, 4], 1, True), Rows(good[19:], 19, [1, 2], 1, True)])

    assert result.best[0] == -1
    assert np.array_equal(want, result.logits[1])
    assert not e.memory.all_finite([2, 3]) and e.memory.all_finite([1, 2])
    e.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")
def test_memory_of_keys_is_committed_at_once_only_when_that_is_asked_for():
    def present(memory: np.ndarray) -> float:
        """Share of its pages that are there; the system tells of each."""
        first, num = memory.ctypes.data // mmap.PAGESIZE, memory.nbytes // mmap.PAGESIZE
        with open("/proc/self/pagemap", "rb") as f:
            f.seek(first * 8)
            entries = np.frombuffer(f.read(num * 8), np.uint64)
        return float((entries >> np.uint64(63)).mean())

    model, _ = native_model("f32", **WIDE)
    found = {}
    for commit in (False, True):
        e = executor(model, num_blocks=16_000, commit_kv=commit)
        found[commit] = present(e.memory.storage)
        assert e.memory.storage.nbytes > 30_000_000
        assert not e.memory.storage.any()
        e.close()
        del e
    assert found[False] < 0.2
    assert found[True] > 0.9


def test_what_lies_in_a_block_beyond_the_tokens_does_not_matter():
    """Drafted tokens that were rejected leave their keys behind, finite or not."""
    model, _ = native_model("q4_1", **WIDE)
    e = executor(model)
    tokens = prompt(21, 1, model.config.vocab_size)
    want = run_alone(e, tokens, [20, 1], first_block=10)
    e.memory.storage[1:3].view(np.uint16)[:] = 0x7FC0
    got = run_alone(e, tokens, [20, 1], first_block=1)
    e.close()

    assert np.array_equal(want, got)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 15, 16])
def test_a_block_travels_as_bytes_and_arrives_with_an_empty_tail(kv_dtype, num_tokens):
    model, _ = native_model("q4_1", **WIDE)
    source, target = executor(model, kv_dtype=kv_dtype), executor(model, kv_dtype=kv_dtype)
    tokens = prompt(17, 1, model.config.vocab_size)
    want = run_alone(source, tokens[: num_tokens + 1], [num_tokens + 1])
    run_alone(source, tokens[:16], [16], first_block=5)
    data = bytes(source.memory.read(5))
    assert len(data) == source.layout.block_bytes
    target.memory.write(1, data, num_tokens)
    partial = bytes(target.memory.read(1))
    got = target.run([Rows(tokens[num_tokens : num_tokens + 1], num_tokens, [1, 2], 1, True)]).logits[0]

    assert np.array_equal(want, got)
    assert (partial == data) == (num_tokens == 16)
    clean = executor(model, kv_dtype=kv_dtype)
    clean.run([Rows(tokens[:num_tokens], 0, [1])])
    assert bytes(clean.memory.read(1)) == partial
    for e in (source, target, clean):
        e.close()


def test_functions_from_outside_take_a_layers_place():
    """A linear layer and the attention in Python give what the native ones give, but for rounding; an exception of theirs comes out and the executor lives on."""
    model, reference = native_model("f32", **WIDE)
    calls = []

    def linear(name):
        w = reference.w[name]

        def compute(x, y):
            calls.append(x.shape)
            y[:] = x @ w.T

        return compute

    names = [f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")]
    tokens = prompt(40, 9, model.config.vocab_size)
    own, foreign = executor(model), executor(dataclasses.replace(model, foreign={n: linear(n) for n in names}))
    want, got = run_alone(own, tokens, [39, 1]), run_alone(foreign, tokens, [39, 1])
    assert np.abs(want - got).max() < 0.05 * want.std()
    assert {s[0] for s in calls} == {39, 1}
    foreign.close()

    kept: dict[int, list[np.ndarray]] = {}

    def attention(layer, q, k, v, out):
        c = model.config
        past = kept.setdefault(layer, [np.empty((0, c.num_kv_heads, c.head_dim), np.float32)] * 2)
        past[0], past[1] = np.concatenate((past[0], k)), np.concatenate((past[1], v))
        start = len(past[0]) - len(q)
        for t in range(len(q)):
            for h in range(c.num_heads):
                keys, values = (p[: start + t + 1, h // (c.num_heads // c.num_kv_heads)] for p in past)
                score = keys @ q[t, h] / np.sqrt(c.head_dim)
                weight = np.exp(score - score.max())
                out[t, h] = weight @ values / weight.sum()

    own.set_attention(attention)
    assert np.abs(want - run_alone(own, tokens, [39, 1], first_block=50)).max() < 0.05 * want.std()

    def broken(*_):
        raise RuntimeError("from a plugin")

    own.set_attention(broken)
    with pytest.raises(RuntimeError, match="from a plugin"):
        own.run([Rows(tokens, 0, [1, 2, 3], 1, False)])
    own.set_attention(None)
    assert np.array_equal(want, run_alone(own, tokens, [39, 1]))
    own.close()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Rows([211], 0, [1], 1), "token id"),
        (Rows([-1], 0, [1], 1), "token id"),
        (Rows([1], 0, [341], 1), "block"),
        (Rows([1] * 17, 0, [1], 1), "too few blocks"),
        (Rows([1], 1400, [1] * 100, 1), "context"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_anything_is_written(rows, message):
    model, _ = native_model("q4_1", **WIDE)
    e = executor(model)
    with pytest.raises(ValueError, match=message):
        e.run([rows])
    assert not e.memory.storage.any()
    e.close()


def test_the_native_path_never_imports_torch():
    code = (
        "import sys, plugmesh_engine, plugmesh_engine.executors.native\n"
        "from plugmesh_engine import Engine, EngineConfig, load_model\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=pathlib.Path(__file__).parents[2])


MASKS = ["all", "none", "one", "ten", "a tenth", "the lowest", "half"]


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_kept_logits_give_the_best_allowed_token_of_those_in_full(kind, isa):
    """To the last bit, ties and infinities included, whatever the mask, among other rows, and however many of them."""
    kernels = plugmesh_kernels.native()
    if not kernels.supports(isa):
        pytest.skip(f"this processor has no {isa}")
    before = kernels.isa()
    kernels.select_isa(isa)
    try:
        vocab = 1501  # three units of the head, the last of them not whole, nor its last sixteen
        e = executor(native_model(kind, **WIDE | {"vocab_size": vocab})[0])
        rng = np.random.default_rng(5)
        for num_rows in (1, 3, 9, 33):
            tokens = rng.integers(0, vocab, num_rows).tolist()
            full = e.run([Rows([t], 0, [1 + i], 1, True) for i, t in enumerate(tokens)])
            logits = full.logits.copy()
            keeps = rng.random(num_rows) < 0.8
            some = e.run([Rows([t], 0, [1 + i], 1, bool(rng.random() < 0.5) and not k, bool(k)) for i, (t, k) in enumerate(zip(tokens, keeps, strict=True))])
            assert some.best.tolist() == full.best.tolist() == logits.argmax(1).tolist()
            for row in np.flatnonzero(keeps):
                for how in MASKS:
                    allowed = np.zeros(vocab, bool)
                    size = {"all": vocab, "none": 0, "one": 1, "ten": 10, "a tenth": vocab // 10, "the lowest": 40, "half": vocab // 2}[how]
                    allowed[np.argsort(logits[row])[:size] if how == "the lowest" else rng.permutation(vocab)[:size]] = True
                    if how == "half":
                        allowed[logits[row].argmax()] = False
                    words = np.packbits(np.concatenate([allowed, np.ones(-vocab % 32, bool)]), bitorder="little").view(np.uint32)  # set beyond the vocabulary
                    want = int(np.where(allowed, logits[row], -np.inf).argmax()) if allowed.any() else -1
                    assert e._native.best_allowed(int(row), words) == want, how
        with pytest.raises(ValueError):
            e._native.best_allowed(int(np.flatnonzero(~keeps)[0]), words)
        e.close()
    finally:
        kernels.select_isa(before)
