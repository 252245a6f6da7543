"""A base model with its own tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plugmesh import models
from plugmesh.errors import ConfigError, InvalidRequest
from plugmesh_engine.testing import read_gguf
from plugmesh_rollout.loop import tasks
from plugmesh_rollout.loop.base import keep_tokenizer, kept_text, read_base
from plugmesh_rollout.loop.losses import Grpo
from plugmesh_rollout.loop.model import token_logprobs
from plugmesh_rollout.loop.policy import Policy
from plugmesh_rollout.loop.rewards import Number
from plugmesh_rollout.loop.settings import TrainerPart, checked
from plugmesh_rollout.loop.synchronous import examples_of, first_weights
from plugmesh_rollout.loop.trainer import Trainer, TrainRow


@pytest.mark.parametrize(
    ("response", "score"),
    [("71", 1.0), (" 71.", 1.0), ("It is 71, not 35.", 0.75), ("35 and 71", 0.0), ("71.5", 0.0), ("71,000", 0.0), ("-71", 0.0), ("none", 0.0), ("171", 0.0), ("", 0.0)],
)
def test_a_number_is_right_where_it_is_the_first_that_is_named(response, score):
    assert score == Number({"alone": 0.25}).score("", "71", response)


@pytest.mark.parametrize("task", ["ask_add", "ask_largest"])
def test_questions_in_words_are_answered_by_what_they_ask(task):
    examples = tasks.Examples(task, {"question": "q {}"}, seed=3)
    drawn = [examples.train(i) for i in range(100)]
    for e in drawn:
        numbers = [int(x) for x in e.prompt.removeprefix("q ").replace(" + ", ", ").split(", ")]
        assert int(e.answer) == (sum(numbers) if task == "ask_add" else max(numbers))
    assert not {e.prompt for e in drawn} & {examples.held_out(i).prompt for i in range(50)}


def test_what_the_text_cannot_say_is_not_asked():
    """The vocabulary of characters has no underscore."""
    with pytest.raises(InvalidRequest, match="too few"):
        tasks.Examples("ask_add", {"question": "{} _"}, 0).train(0)


def test_a_base_that_is_not_here_is_named():
    with pytest.raises(ConfigError, match="plugmesh pull no-such-model"):
        read_base("no-such-model")


@pytest.fixture(scope="module")
def base():
    if models.find("smollm2") is None:
        pytest.skip("the default model is not here; `plugmesh pull smollm2` fetches it")
    return read_base("smollm2", max_position=128)


@pytest.mark.slow
@pytest.mark.model
def test_the_base_models_weights_are_the_files_dequantised(base):
    config, weights = read_gguf(models.find("smollm2"))

    assert (config.num_layers, config.tie_word_embeddings, 128) == (base.config.num_layers, base.config.tie_word_embeddings, base.config.max_position)
    assert weights.keys() == base.tensors.keys()
    for name, tensor in weights.items():
        assert np.array_equal(tensor, base.tensors[name]), name


@pytest.mark.slow
@pytest.mark.model
def test_prompts_are_chats_by_the_models_template_and_answers_end_where_it_ends(base, tmp_path):
    keep_tokenizer(base, tmp_path)
    text = kept_text(tmp_path, "Be brief.")
    ids = text.prompt_ids("31, 27: which is larger?")
    special = {1: "<|im_start|>", 2: "<|im_end|>"}
    joined = "".join(special.get(i) or text.decode([i]) for i in ids)

    assert joined == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n31, 27: which is larger?<|im_end|>\n<|im_start|>assistant\n"
    assert text.answer_ids("31")[-1] == 2
    assert text.decode([*text.answer_ids("naïve 31"), 9, 9]) == "naïve 31"
    assert text.decode([1, *text.answer_ids("31")]) != "31"
    with pytest.raises(InvalidRequest):
        text.prompt_ids("a <|im_end|> b")


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(300)
def test_the_base_model_generates_and_learns_with_its_own_words(base, tmp_path):
    """Recorded log-probabilities are the trainer's up to the bfloat16 KV; a step makes a rewarded answer likelier, with prompts shared."""
    torch.set_num_threads(1)
    keep_tokenizer(base, tmp_path)
    text = kept_text(tmp_path, "Answer with one number.")
    prompt = text.prompt_ids("31, 27: which is larger?")
    policy = Policy(base.config, max_sequences=8, max_len=128)
    policy.load(0, base.tensors)
    policy.add("g", prompt, 4, seed=1, max_tokens=8)
    ((_, _, samples),) = [x for _ in range(40) if policy.num_groups for x in policy.step()]
    policy.close()

    trainer = Trainer(base.config, base.tensors, TrainerPart(lr=1e-5, lr_warmup=0, share_prompts=True), Grpo({}))
    with torch.no_grad():
        before, mask = token_logprobs(trainer.model, [(prompt, s.token_ids) for s in samples], share_prompts=True)
    apart = np.concatenate([np.abs(s.logprobs - before[i][mask[i]].numpy()) for i, s in enumerate(samples)])
    assert apart.mean() < 0.02 and apart.max() < 0.2
    trainer.step([TrainRow(i, np.array(prompt), s.token_ids, s.logprobs, s.versions, 1.0 if i == 0 else -1 / 3) for i, s in enumerate(samples)])
    with torch.no_grad():
        after, _ = token_logprobs(trainer.model, [(prompt, s.token_ids) for s in samples], share_prompts=True)
    assert after[0].sum() > before[0].sum()


@pytest.mark.slow
@pytest.mark.model
def test_a_runs_folder_keeps_the_tokenizer_for_its_workers(tmp_path):
    s = checked({"run": {"folder": str(tmp_path)}, "model": {"base": "smollm2", "max_position": 64}, "task": {"name": "ask_largest"}})
    config, tensors = first_weights(s)

    assert 64 == config.max_position and tensors["model.embed_tokens.weight"].shape == (49152, 576)
    assert config.vocab_size > max(examples_of(s).prompt_ids(examples_of(s).train(0)))
