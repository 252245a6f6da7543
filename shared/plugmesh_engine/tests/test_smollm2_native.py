"""The default model on the native executor: as good as the float32 reference of the same weights, and the same bits in any company."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import gguf as gguf_file
import numpy as np
import pytest

import plugmesh_kernels
from plugmesh import models as known_models
from plugmesh.types import SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.batch import Rows
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.testing import english, gguf_tokenizer, read_gguf, run_to_end
from plugmesh_kernels.pack import native_dtype, pack

pytestmark = [pytest.mark.model, pytest.mark.skipif(not plugmesh_kernels.available(), reason=f"no native kernels: {plugmesh_kernels.why_not()}")]
WINDOWS = (0, 15_000, 30_000, 45_000, 60_000, 90_000)
WINDOW = 512


@pytest.fixture(scope="module")
def path() -> str:
    found = known_models.find("smollm2")
    if found is None:
        pytest.skip("the default model is not here; `plugmesh pull smollm2` fetches it")
    return str(found)


@pytest.fixture(scope="module")
def reference(path: str) -> ReferenceLlama:
    return ReferenceLlama(*read_gguf(path))


@pytest.fixture(scope="module")
def model(path: str, reference: ReferenceLlama) -> Any:
    """The GGUF's own blocks, packed; names as `read_gguf` gives them."""
    from plugmesh_engine.executors.native import NativeModel
    from plugmesh_engine.foreign import Packed

    tensors, shapes = {}, {name: w.shape for name, w in reference.w.items()}
    for t, (name, shape) in zip(gguf_file.GGUFReader(path).tensors, shapes.items(), strict=True):
        data = np.ascontiguousarray(t.data).view(np.uint8).reshape(-1)
        if len(shape) == 1:
            tensors[name] = Packed("float32", shape, data.view(np.float32))
        else:
            kind = t.tensor_type.name
            tensors[name] = Packed(native_dtype(kind, data), shape, pack(kind, data, *shape))
    return NativeModel(reference.config, "native", 0, 0, tensors)


@pytest.fixture
def build(model: Any) -> Iterator[Callable[..., Any]]:
    built = []

    def make(**changes: Any) -> Any:
        built.append(model.build_executor(EngineConfig(executor="native", **({"num_blocks": 200} | changes))))
        return built[-1]

    yield make
    for e in built:
        e.close()


@pytest.fixture(scope="module")
def tokenizer(path: str) -> Any:
    return gguf_tokenizer(path)


@pytest.fixture(scope="module")
def text(tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer.encode(english(), add_special_tokens=False).ids
    return ids


def log_likelihood(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    shifted = logits[:-1].astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(shifted).sum(axis=1))


def compare(e: Any, reference: ReferenceLlama, text: list[int], windows: tuple[int, ...], window: int = WINDOW) -> tuple[float, float]:
    """Perplexity over that of the reference, and the share of positions with the same best token."""
    ours, theirs, same = [], [], []
    for start in windows:
        ids = [1, *text[start : start + window - 1]]
        logits = e.run([Rows(ids, 0, list(range(1, window // 16 + 1)), window, True)]).logits
        want = reference.logits(ids)
        ours.append(log_likelihood(logits, ids))
        theirs.append(log_likelihood(want, ids))
        same.append((logits.argmax(axis=1) == want.argmax(axis=1)).mean())
    return float(np.exp(np.mean(theirs) - np.mean(ours))), float(np.mean(same))


def test_most_best_tokens_are_those_of_the_reference(build: Callable[..., Any], reference: ReferenceLlama, text: list[int]) -> None:
    ratio, same = compare(build(), reference, text, WINDOWS[2:3], 160)

    assert 0.97 < ratio < 1.03  # few tokens; the next test has enough of them for a bound
    assert same > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_perplexity_is_within_one_percent_of_the_reference(build: Callable[..., Any], reference: ReferenceLlama, text: list[int], kv_dtype: str) -> None:
    """Measured: 1.008 with bfloat16 KV, 1.009 with int8 KV, greedy agreement 0.955 and 0.953."""
    ratio, same = compare(build(kv_dtype=kv_dtype), reference, text, WINDOWS)

    assert 0.99 < ratio < 1.01
    assert same > 0.94


def test_a_chat_answer_is_right_and_the_same_in_a_crowd(model: Any, tokenizer: Any, text: list[int]) -> None:
    """bfloat16 logits would not tell "The" from "L'" here (ADR 2)."""
    start, end = 1, 2  # <|im_start|>, <|im_end|>

    def ids(part: str) -> list[int]:
        found: list[int] = tokenizer.encode(part, add_special_tokens=False).ids
        return found

    system = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    prompt = [start, *ids(system), end, *ids("\n"), start, *ids("user\nWhat is the capital of France?"), end, *ids("\n"), start, *ids("assistant\n")]
    sampling = SamplingParams(temperature=0, max_tokens=24)
    answers = []
    for crowd in (0, 7):
        engine = Engine(model, EngineConfig(executor="native", num_blocks=400, num_threads=1 + crowd % 2, max_tokens_per_step=100))
        others = [EngineRequest(f"o{i}", tuple(text[i * 99 : i * 99 + 60 + i]), dataclasses.replace(sampling, ignore_eos=True)) for i in range(crowd)]
        answers.append(run_to_end(engine, EngineRequest("r", tuple(prompt), sampling), *others)["r"])
        engine.close()

    assert answers[0] == answers[1]
    assert tokenizer.decode(answers[0][0]).startswith("The capital of France is Paris")


def test_forks_and_scores_of_the_default_model_are_those_of_fresh_runs_bit_for_bit(model: Any, text: list[int]) -> None:
    def fresh() -> Engine:
        return Engine(model, EngineConfig(executor="native", num_blocks=64, num_threads=1))

    def told(engine: Engine) -> list[Any]:
        found = []
        while engine.has_work():
            found += [t for e in engine.step().tokens for t in e.tokens]
        return found

    prompt, sampling = tuple(text[100:170]), SamplingParams(temperature=0.8, seed=3, max_tokens=10, ignore_eos=True, logprobs=True)
    engine = fresh()
    engine.add(EngineRequest("p", prompt, sampling, hold=True))
    out = told(engine)
    ids = tuple(t.token_id for t in out)
    engine.fork("p", 0, EngineRequest("f", (500,), sampling), 75)
    forked = told(engine)
    engine.add(EngineRequest("s", prompt, sampling, score=(ids, tuple(text[:33]), ids[:4])))
    scores = told(engine)
    alone = fresh()
    alone.add(EngineRequest("f", (*prompt, *ids[:5], 500), sampling))
    want = told(alone)
    engine.release("p")

    assert forked == want
    assert scores[: len(ids)] == out and scores[-4:] == out[:4]
    assert engine.stats().kv_blocks_used == engine.stats().kv_blocks_leaked == 0
    engine.close()
    alone.close()
