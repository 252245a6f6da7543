"""The default model: logits, perplexity and greedy output against the float32 reference on the same dequantised weights."""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from plugmesh import models as known_models
from plugmesh.types import ModelConfig, SamplingParams
from plugmesh_engine import Engine, EngineConfig, EngineRequest
from plugmesh_engine.batch import Rows
from plugmesh_engine.executors.ragged import Batch
from plugmesh_engine.executors.torch import TorchModel
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.testing import english, gguf_tokenizer, model_in_memory, read_gguf, run_to_end

pytestmark = pytest.mark.model
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def gguf() -> str:
    path = known_models.find("smollm2")
    if path is None:
        pytest.skip("the default model is not here; `plugmesh pull smollm2` fetches it")
    return str(path)


@pytest.fixture(scope="module")
def loaded(gguf: str) -> tuple[ModelConfig, Weights]:
    return read_gguf(gguf)


@pytest.fixture(scope="module")
def model(loaded: tuple[ModelConfig, Weights]) -> TorchModel:
    return model_in_memory(*loaded)


@pytest.fixture(scope="module")
def reference(loaded: tuple[ModelConfig, Weights]) -> ReferenceLlama:
    return ReferenceLlama(*loaded)


@pytest.fixture(scope="module")
def encode(gguf: str) -> Callable[[str], list[int]]:
    tokenizer: Any = gguf_tokenizer(gguf)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def all_logits(model: TorchModel, ids: list[int]) -> np.ndarray:
    """Logits of every row, through the engine's graph, attention and pool."""
    engine = Engine(model, EngineConfig(dtype=model.dtype, num_blocks=-(-len(ids) // 16)))
    blocks = [engine._pool.take() for _ in range(engine.config.num_blocks)]
    with torch.inference_mode():
        batch = Batch.build([Rows(ids, 0, blocks, num_wanted=1)], torch.device("cpu"))
        return model.graph.logits(model.graph.hidden(batch, engine._executor.attention)).numpy()


def perplexity(logits: np.ndarray, ids: list[int]) -> float:
    logp = torch.log_softmax(torch.from_numpy(logits).double(), dim=1)
    return float(torch.exp(-logp[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].mean()))


def test_logits_and_perplexity_equal_the_reference(model: TorchModel, reference: ReferenceLlama, encode: Callable[[str], list[int]]) -> None:
    ids = encode(english()[100_000:104_000])[:256]
    fast, slow = all_logits(model, ids), reference.logits(ids)

    assert np.abs(fast - slow).max() / np.abs(slow).max() < 1e-4
    assert (np.linalg.norm(fast - slow, axis=1) / np.linalg.norm(slow, axis=1)).max() < 1e-4
    assert perplexity(fast, ids) == pytest.approx(reference.perplexity(ids), rel=1e-4)
    assert 10 < perplexity(fast, ids) < 40  # the text differs a little between versions of Python


def test_the_wrong_rotation_ruins_the_model(loaded: tuple[ModelConfig, Weights], model: TorchModel, encode: Callable[[str], list[int]]) -> None:
    """The GGUF's Q and K are in the order for adjacent pairs."""
    config, weights = loaded
    ids = encode(english()[100_000:104_000])[:256]
    wrong = model_in_memory(dataclasses.replace(config, rope_style="half"), weights)

    assert perplexity(all_logits(wrong, ids), ids) > 4 * perplexity(all_logits(model, ids), ids)


def test_bfloat16_keeps_the_perplexity(loaded: tuple[ModelConfig, Weights], model: TorchModel, encode: Callable[[str], list[int]]) -> None:
    ids = encode(english()[100_000:104_000])[:256]
    rounded = perplexity(all_logits(model_in_memory(*loaded, dtype="bfloat16"), ids), ids)

    assert rounded == pytest.approx(perplexity(all_logits(model, ids), ids), rel=0.02)


def assert_greedy_equals_reference(model: TorchModel, reference: ReferenceLlama, prompts: list[list[int]], num_tokens: int) -> None:
    """All prompts in one batch, in chunks. The reference sees each prompt with the engine's tokens and must have chosen every one of them itself."""
    engine = Engine(model, EngineConfig(dtype="float32", num_blocks=1024, max_tokens_per_step=100))
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    found = run_to_end(engine, *[EngineRequest(str(i), tuple(p), sampling) for i, p in enumerate(prompts)])
    for i, p in enumerate(prompts):
        [tokens] = found[str(i)]
        assert len(tokens) == num_tokens
        wanted = reference.logits([*p, *tokens[:-1]])[len(p) - 1 :].argmax(axis=1)
        assert tokens == wanted.tolist()


def some_prompts(encode: Callable[[str], list[int]], n: int) -> list[list[int]]:
    """Pieces of English of 3 to 120 tokens."""
    rng, text = random.Random(0), english()
    starts = [rng.randrange(len(text) - 1000) for _ in range(n)]
    return [encode(text[s : s + 1000])[: rng.randrange(3, 120)] for s in starts]


def test_greedy_output_equals_the_reference(model: TorchModel, reference: ReferenceLlama, encode: Callable[[str], list[int]]) -> None:
    assert_greedy_equals_reference(model, reference, some_prompts(encode, 6), 24)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_greedy_output_of_50_prompts_equals_the_reference(model: TorchModel, reference: ReferenceLlama, encode: Callable[[str], list[int]]) -> None:
    assert_greedy_equals_reference(model, reference, some_prompts(encode, 50), 64)


def test_a_chat_answer_is_right(gguf: str, model: TorchModel, encode: Callable[[str], list[int]]) -> None:
    """End to end in words: template by hand, one word expected."""
    tokenizer: Any = gguf_tokenizer(gguf)
    start, end = 1, 2  # <|im_start|>, <|im_end|>
    prompt = [start, *encode("user\nWhat is the capital of France?"), end, *encode("\n"), start, *encode("assistant\n")]
    engine = Engine(model, EngineConfig(dtype="float32", num_blocks=32))
    [tokens] = run_to_end(engine, EngineRequest("r", tuple(prompt), SamplingParams(temperature=0, max_tokens=24)))["r"]

    assert "Paris" in tokenizer.decode(tokens)
    assert tokens[-1] == end
