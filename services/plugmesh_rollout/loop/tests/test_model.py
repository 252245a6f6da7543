"""The model that is trained is the one that generates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plugmesh.errors import DataLoss
from plugmesh_engine.reference import ReferenceLlama
from plugmesh_engine.testing import random_weights, tiny_config
from plugmesh_rollout.loop.model import LlamaForTraining, fresh_weights, load_weights, save_weights, token_logprobs
from plugmesh_rollout.loop.policy import Policy


@pytest.mark.parametrize("changes", [{}, {"rope_style": "half", "tie_word_embeddings": False, "attention_bias": True, "num_kv_heads": 2}])
def test_logits_are_those_of_the_engines_reference(changes):
    config = tiny_config(**changes)
    weights = random_weights(config, seed=3)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 40)

    found = LlamaForTraining(config, weights)(torch.from_numpy(ids)[None])[0].detach().numpy()

    np.testing.assert_allclose(found, ReferenceLlama(config, weights).logits(ids.tolist()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("executor", ["torch", "native"])
def test_log_probabilities_recorded_at_generation_are_the_models_own(executor):
    """float32 throughout under torch; the native executor keeps its KV in bfloat16."""
    config = tiny_config(eos_token_ids=(2,))
    weights = random_weights(config, seed=1)
    model, policy = LlamaForTraining(config, weights), Policy(config, executor=executor, max_sequences=8, max_len=64)
    policy.load(4, weights)
    policy.add("g", [5, 6, 7], 4, seed=9, max_tokens=12)
    done = []
    while policy.num_groups:
        done += policy.step()
    policy.close()

    ((_, version, samples),) = done
    logprobs, mask = token_logprobs(model, [([5, 6, 7], s.token_ids) for s in samples])
    assert version == 4 and {4} == {int(v) for s in samples for v in s.versions}
    for i, s in enumerate(samples):
        np.testing.assert_allclose(s.logprobs, logprobs[i][mask[i]].detach().numpy(), atol=1e-4 if executor == "torch" else 0.1)


def test_a_filled_up_row_has_the_log_probabilities_of_the_row_alone():
    config = tiny_config()
    model = LlamaForTraining(config, random_weights(config))
    rows = [([3, 4], [5, 6, 7, 8]), ([9], [2]), ([1, 2, 3], [])]
    together, mask = token_logprobs(model, rows)

    assert [[True] * 4, [True] + [False] * 3, [False] * 4] == mask.tolist()
    for i, row in enumerate(rows[:2]):
        alone, _ = token_logprobs(model, [row])
        np.testing.assert_allclose(together[i][mask[i]].detach(), alone[0].detach(), atol=1e-5)


def test_gradients_are_those_of_finite_differences():
    config = tiny_config(num_layers=1)
    weights = random_weights(config)
    rows = [([3, 4], [5, 6]), ([9, 1, 7], [2])]

    def loss(w):
        logprobs, mask = token_logprobs(LlamaForTraining(config, w), rows)
        return -(logprobs * mask).sum()

    model = LlamaForTraining(config, weights)
    logprobs, mask = token_logprobs(model, rows)
    (-(logprobs * mask).sum()).backward()
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight"):
        at = (3, 4) if "embed" not in name else (5, 4)
        step = 1e-2
        up, down = ({**weights, name: weights[name].copy()} for _ in range(2))
        up[name][at] += step
        down[name][at] -= step
        expected = float((loss(up) - loss(down)).detach()) / (2 * step)
        assert expected == pytest.approx(float(getattr(model, name.replace(".", "__")).grad[at]), rel=0.02, abs=2e-3)


def test_weights_come_back_from_a_file_and_damage_is_noticed(tmp_path):
    config = tiny_config()
    weights = fresh_weights(config, 0)
    save_weights(tmp_path / "w.safetensors", config, weights)
    found, tensors = load_weights(tmp_path / "w.safetensors")

    assert config == found and weights.keys() == tensors.keys()
    assert all(np.array_equal(weights[n], tensors[n]) for n in weights)
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:1000])
    with pytest.raises(DataLoss):
        load_weights(tmp_path / "w.safetensors")
