"""A trainer of one's own over the experience table and a decode service, through gRPC alone: neither the loop nor its files.

    python -m plugmesh_rollout.alone --folder table --port 9100 &
    plugmesh rl run docs/examples/rl/streaming.toml ...          # or any worker that puts response_ids, logprobs and reward
    python docs/examples/rl/plain_torch.py 127.0.0.1:9100 --topic mine --steps 20

Rows here are made by a policy of a single matrix, so that the example runs by itself; a decode service would be asked instead with
`plugmesh.client.decode.DecodeClient.generate(prompt, num_sequences=8, logprobs=True, temperature=1.0)`.
"""

from __future__ import annotations

import argparse
import asyncio

import numpy as np
import torch

from plugmesh.client.rollout import RolloutClient, Row

VOCAB, GROUP, GROUPS = 16, 8, 8


async def generate(table: RolloutClient, topic: str, weights: dict[int, torch.Tensor], seed: int) -> None:
    """Answers each prompt (a token) with one token, drawn from the newest weights; the reward is 1 for the next token in the alphabet."""
    random = torch.Generator().manual_seed(seed)
    while True:
        version = max(weights)
        batch = await table.get(topic, "rollout", ["prompt"], GROUP, sampler="grpo_groups", stamp_version=version, any_version=True, wait_s=1)
        if not batch:
            continue
        if batch.latest_version != version:  # newer weights came meanwhile: let somebody begin with those
            await table.release(batch)
            await asyncio.sleep(0)
            continue
        prompts = torch.tensor(batch.column("prompt"))
        logprobs = torch.log_softmax(weights[version][prompts], -1)
        tokens = torch.multinomial(logprobs.exp(), 1, generator=random)
        chosen = logprobs.gather(1, tokens)
        rewards = (tokens[:, 0] == (prompts + 1) % VOCAB).float()
        columns = {
            "response_ids": [t.numpy().astype(np.int32) for t in tokens], "logprobs": [x.numpy() for x in chosen], "reward": rewards.tolist(),
        }  # fmt: skip
        await table.ack(batch, columns)


async def train(table: RolloutClient, topic: str, weights: dict[int, torch.Tensor], steps: int) -> list[float]:
    """GRPO by hand; returns the mean reward of every step."""
    logits = weights[0].clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    means = []
    for version in range(1, steps + 1):
        batch = await table.get(topic, "train", ["prompt", "response_ids", "logprobs", "reward"], GROUP * GROUPS, sampler="version_window", wait_s=60)
        rewards = torch.tensor(batch.column("reward")).view(GROUPS, GROUP)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
        tokens = torch.tensor(np.stack(batch.column("response_ids")), dtype=torch.long)
        behaviour = torch.tensor(np.stack(batch.column("logprobs")))
        new = torch.log_softmax(logits[torch.tensor(batch.column("prompt"))], -1).gather(1, tokens)
        ratio = torch.exp(new - behaviour)
        loss = -torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        weights[version] = logits.detach().clone()
        await table.publish_version(topic, version)
        await table.ack(batch)
        means.append(float(rewards.mean()))
        print(f"step {version} reward {means[-1]:.3f}")
    return means


async def feed(table: RolloutClient, topic: str, steps: int) -> None:
    for group in range(steps * GROUPS):
        await table.put(topic, [Row(f"{group}/{i}", {"prompt": group % VOCAB}, group=str(group)) for i in range(GROUP)], wait_s=60)


async def main(address: str, topic: str, steps: int) -> list[float]:
    async with RolloutClient(address) as table:
        await table.create_topic(
            topic, ["prompt", "response_ids", "logprobs", "reward"], ["rollout", "train"], group_size=GROUP, staleness=1, batch_rows=GROUP * GROUPS,
            admission_task="train",
        )  # fmt: skip
        await table.publish_version(topic, 0)
        weights = {0: torch.zeros(VOCAB, VOCAB)}
        others = [asyncio.create_task(feed(table, topic, steps)), asyncio.create_task(generate(table, topic, weights, seed=0))]
        try:
            return await train(table, topic, weights, steps)
        finally:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A plain torch loop over the experience table.")
    parser.add_argument("address")
    parser.add_argument("--topic", default="plain")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    asyncio.run(main(given.address, given.topic, given.steps))
