"""Losses over responses, as records: `grpo` and `decoupled_ppo`.

Both weigh the gradient of a token by its row's advantage and by how much likelier the token has become than when it was generated; they differ in how they bound
that. Behaviour log-probabilities are those recorded at generation, so they are right at any staleness.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from plugmesh.errors import InvalidRequest
from plugmesh.hookspecs import hookimpl
from plugmesh.records import LossRecord


class Grpo:
    """Clipped policy gradient with one advantage per row; no value function.

    Args:
        options: "clip_low" and "clip_high" (0.2) bound the ratio to the behaviour from 1 - low to 1 + high; "kl" (0) weighs the distance from the reference
            model, the run's version 0, which above 0 is asked about every response; "normalise" is "token" (every token of a batch counts alike; Yu et al., DAPO,
            arXiv:2503.14476) or "row" (every row does).

    Source: Shao et al., DeepSeekMath, arXiv:2402.03300.
    """

    needs_proximal = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        _only(options, ("clip_low", "clip_high", "kl", "normalise"))
        self._low = 1.0 - float(options.get("clip_low", 0.2))
        self._high = 1.0 + float(options.get("clip_high", 0.2))
        self._kl = float(options.get("kl", 0.0))
        self._normalise = _normalise(options)
        if self._kl < 0:
            raise InvalidRequest(f"kl is not negative, as {self._kl} is", param="loss")
        self.needs_reference = self._kl > 0

    def __call__(self, logprobs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask, advantages = batch["mask"], batch["advantage"][:, None]
        ratio = torch.exp(logprobs - batch["behaviour"])
        terms = -torch.minimum(ratio * advantages, ratio.clamp(self._low, self._high) * advantages)
        clipped = ((ratio < self._low) & (advantages < 0)) | ((ratio > self._high) & (advantages > 0))
        facts = _facts(mask, ratio, clipped, logprobs - batch["behaviour"])
        if self._kl:
            away = batch["reference"] - logprobs
            distance = torch.exp(away) - away - 1  # Schulman's estimator: never negative
            terms = terms + self._kl * distance
            facts["kl"] = _sum(distance.detach(), mask)
        return _total(terms, mask, batch, self._normalise), facts


class DecoupledPpo:
    """The ratio to the proximal policy (the trainer's at the start of the step) is clipped, and each token weighted by how much likelier the proximal policy
    finds it than the behaviour did; tokens whose weight exceeds the cap are left out.

    Args:
        options: "clip_low", "clip_high" (0.2) and "normalise" as for Grpo; "cap" (5).

    Source: Fu et al., AReaL, arXiv:2505.24298; Hilton et al., Batch size-invariance for policy optimization, arXiv:2110.00641.
    """

    needs_proximal = True

    def __init__(self, options: Mapping[str, Any]) -> None:
        _only(options, ("clip_low", "clip_high", "cap", "normalise"))
        self._low = 1.0 - float(options.get("clip_low", 0.2))
        self._high = 1.0 + float(options.get("clip_high", 0.2))
        self._cap = float(options.get("cap", 5.0))
        self._normalise = _normalise(options)

    def __call__(self, logprobs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask, advantages = batch["mask"], batch["advantage"][:, None]
        weight = torch.exp(batch["proximal"] - batch["behaviour"])
        kept = mask & (weight <= self._cap)
        ratio = torch.exp(logprobs - batch["proximal"])
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(self._low, self._high) * advantages)
        terms = torch.where(kept, -weight * surrogate, torch.zeros_like(surrogate))
        clipped = ((ratio < self._low) & (advantages < 0)) | ((ratio > self._high) & (advantages > 0))
        return _total(terms, mask, batch, self._normalise), {**_facts(mask, weight, clipped, logprobs - batch["behaviour"]), "num_capped": (mask & ~kept).sum()}


def _total(terms: torch.Tensor, mask: torch.Tensor, batch: Mapping[str, torch.Tensor], normalise: str) -> torch.Tensor:
    """This part's share of the whole batch's loss, so that gradients of parts add up to the batch's."""
    terms = torch.where(mask, terms, torch.zeros_like(terms))
    if normalise == "token":
        return terms.sum() / batch["num_tokens"]
    return (terms.sum(1) / mask.sum(1).clamp(min=1)).sum() / batch["num_rows"]


def _facts(mask: torch.Tensor, ratio: torch.Tensor, clipped: torch.Tensor, moved: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over tokens; `moved` is how much likelier the trainer finds a token than the behaviour did, in nats."""
    return {"ratio": _sum(ratio.detach(), mask), "num_clipped": (clipped & mask).sum(), "moved": _sum(moved.detach().abs(), mask)}


def _sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def _normalise(options: Mapping[str, Any]) -> str:
    value = str(options.get("normalise", "token"))
    if value not in ("token", "row"):
        raise InvalidRequest(f"normalise is 'token' or 'row', not {value!r}", param="loss")
    return value


def _only(options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            raise InvalidRequest(f"unknown option {name!r} of the loss; it has {', '.join(known)}", param="loss")


def group_advantages(rewards: list[float], *, scale: bool = True) -> list[float]:
    """Of one complete group: reward less the group's mean, over its deviation where `scale`; zeros where all are equal.

    Without scaling: Liu et al., Understanding R1-Zero-like training, arXiv:2503.20783.
    """
    mean = sum(rewards) / len(rewards)
    deviation = (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5
    if deviation < 1e-8:
        return [0.0] * len(rewards)
    return [(r - mean) / (deviation + 1e-4 if scale else 1.0) for r in rewards]


class CoreLosses:
    """The core's own, through the plugins' door."""

    @hookimpl
    def register_losses(self) -> list[LossRecord]:
        return [LossRecord("grpo", Grpo), LossRecord("decoupled_ppo", DecoupledPpo)]
