"""The loop without a table, processes or overlap: what staleness 0 must equal bit for bit, and the shortest way to read what a run does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from plugmesh.records import Loss, Reward
from plugmesh.types import ModelConfig
from plugmesh_rollout.loop import model as models
from plugmesh_rollout.loop import tasks
from plugmesh_rollout.loop.base import keep_tokenizer, kept_text, read_base
from plugmesh_rollout.loop.losses import group_advantages
from plugmesh_rollout.loop.policy import Policy, Sample, seed_of
from plugmesh_rollout.loop.reference import Reference, is_wanted
from plugmesh_rollout.loop.settings import Settings
from plugmesh_rollout.loop.text import Text
from plugmesh_rollout.loop.trainer import StepFacts, Trainer, TrainRow, warm_up


def first_weights(settings: Settings) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Version 0: from the named file, from the base model, or from scratch; the latter two warmed up. The same settings give the same ones.

    Leaves the base model's tokenizer in the run's folder. Raises ConfigError for a base that cannot be had.
    """
    w = settings.warmup
    tensors: Mapping[str, np.ndarray]
    if settings.model.base:
        base = read_base(settings.model.base, max_position=settings.model.max_position)
        keep_tokenizer(base, settings.run.folder)
        config, tensors = base.config, base.tensors
    if settings.model.weights is not None:
        return models.load_weights(settings.model.weights)
    if not settings.model.base:
        config = settings.model.config()
        tensors = models.fresh_weights(config, settings.run.seed)
    if w.steps:
        tensors = warm_up(config, tensors, examples_of(settings), steps=w.steps, rows=w.rows, lr=w.lr)
    return config, dict(tensors)


def text_of(settings: Settings) -> Text:
    """Of a base model it is read from the run's folder, once there are first weights."""
    return kept_text(settings.run.folder, settings.model.system) if settings.model.base else tasks.Characters()


def examples_of(settings: Settings) -> tasks.Examples:
    return tasks.Examples(settings.task.name, settings.task.options, settings.run.seed, text_of(settings))


def policy_of(settings: Settings, config: ModelConfig) -> Policy:
    r = settings.rollout
    return Policy(config, executor=r.executor, max_sequences=r.group_size * r.groups_at_once, max_len=config.max_position, swap=r.swap)


def train_rows(group: int, prompt_ids: list[int], samples: list[Sample], rewards: list[float], settings: Settings, reference: Reference | None = None) -> list[TrainRow]:
    """Rows of one complete group."""
    likely = reference.logprobs(prompt_ids, [s.token_ids for s in samples]) if reference else [None] * len(samples)
    advantages = group_advantages(rewards, scale=settings.trainer.scale_advantages)
    return [
        TrainRow(group * len(samples) + i, np.array(prompt_ids, np.int32), s.token_ids, s.logprobs, s.versions, float(np.float32(a)), r, x)
        for i, (s, r, a, x) in enumerate(zip(samples, rewards, advantages, likely, strict=True))
    ]


def greedy_figures(policy: Policy, examples: tasks.Examples, reward: Reward, num: int, max_tokens: int) -> dict[str, float]:
    """Of the policy's likeliest responses to held-out examples: the share that says the answer and nothing else, and their mean reward."""
    held_out = [examples.held_out(i) for i in range(num)]
    said = [examples.text.decode(ids) for ids in policy.greedy([examples.prompt_ids(e) for e in held_out], max_tokens)]
    pairs = list(zip(said, held_out, strict=True))
    return {
        "accuracy": sum(x.strip() == e.answer for x, e in pairs) / num,
        "greedy_reward": sum(reward.score(e.prompt, e.answer, x) for x, e in pairs) / num,
    }


def held_out_reward(policy: Policy, examples: tasks.Examples, reward: Reward, num: int, max_tokens: int, seed: int) -> float:
    """Mean reward of one response to each held-out example, drawn as in training; always with the same random numbers."""
    held_out = {f"held-out-{i}": examples.held_out(i) for i in range(num)}
    for i, (name, e) in enumerate(held_out.items()):
        policy.add(name, examples.prompt_ids(e), 1, seed_of(seed + 1, i), max_tokens=max_tokens)
    total = 0.0
    while policy.num_groups:
        for name, _, samples in policy.step():
            total += reward.score(held_out[name].prompt, held_out[name].answer, examples.text.decode(samples[0].token_ids))
    return total / num


def measured(policy: Policy, settings: Settings, reward: Reward) -> dict[str, float]:
    """What a run tells of its progress on held-out examples, under the policy's newest weights."""
    examples, num, max_tokens = examples_of(settings), settings.run.eval_examples, settings.rollout.max_tokens
    return {
        **greedy_figures(policy, examples, reward, num, max_tokens),
        "held_out_reward": held_out_reward(policy, examples, reward, num, max_tokens, settings.run.seed),
    }


def run_synchronous(
    settings: Settings, loss: Loss, reward: Reward, on_step: Callable[[StepFacts, dict[str, float]], None] = lambda facts, measured: None
) -> Trainer:
    """Generates, scores and trains by turns, `settings.run.steps` times."""
    config, tensors = first_weights(settings)
    examples, r = examples_of(settings), settings.rollout
    trainer = Trainer(config, tensors, settings.trainer, loss)
    policy = policy_of(settings, config)
    policy.load(0, tensors)
    reference = Reference(config, tensors, share_prompts=settings.trainer.share_prompts) if is_wanted(loss) else None
    for step in range(settings.run.steps):
        batch: list[TrainRow] = []
        chosen = {f"g{g}": (g, examples.train(g)) for g in range(step * r.groups_per_step, (step + 1) * r.groups_per_step)}
        for name, (g, example) in chosen.items():
            policy.add(name, examples.prompt_ids(example), r.group_size, seed_of(settings.run.seed, g), max_tokens=r.max_tokens)
        while policy.num_groups:
            for name, _, samples in policy.step():
                g, example = chosen[name]
                rewards = [reward.score(example.prompt, example.answer, examples.text.decode(s.token_ids)) for s in samples]
                batch += train_rows(g, examples.prompt_ids(example), samples, rewards, settings, reference)
        facts = trainer.step(batch)
        policy.load(trainer.step_number, trainer.model.arrays())
        wanted = settings.run.eval_every and facts.step % settings.run.eval_every == 0
        on_step(facts, measured(policy, settings, reward) if wanted else {})
    policy.close()
    return trainer
