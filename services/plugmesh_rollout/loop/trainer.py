"""A training step, and what must be kept to go on from it: no table, no processes."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.torch
import torch

from plugmesh.errors import DataLoss, InternalError
from plugmesh.records import Loss
from plugmesh.types import ModelConfig
from plugmesh_rollout.loop.model import LlamaForTraining, token_logprobs
from plugmesh_rollout.loop.parts import cut
from plugmesh_rollout.loop.settings import TrainerPart
from plugmesh_rollout.loop.tasks import Examples


@dataclass(frozen=True, slots=True)
class TrainRow:
    """A scored response. `number` orders rows within a batch, so that a batch is the same whatever came first."""

    number: int
    prompt_ids: np.ndarray
    response_ids: np.ndarray
    behaviour: np.ndarray
    versions: np.ndarray
    advantage: float
    reward: float = 0.0
    reference: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What one step did. `lags` is the histogram of versions behind over all trained tokens."""

    step: int
    loss: float
    reward: float
    grad_norm: float
    num_rows: int
    num_tokens: int
    lags: Mapping[int, int] = field(default_factory=dict)
    means: Mapping[str, float] = field(default_factory=dict)


class Trainer:
    """AdamW over a loss.

    `step_number` is the version of the weights: how many steps made them.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray], settings: TrainerPart, loss: Loss) -> None:
        self.model = LlamaForTraining(config, tensors)
        self.step_number = 0
        self._settings = settings
        self._loss = loss
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.lr, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay, foreach=False
        )

    def step(self, rows: Sequence[TrainRow]) -> StepFacts:
        """One optimizer step per epoch over all rows. Changes the weights and counts the version.

        Raises:
            InternalError: The loss or its gradient is not finite; the weights are then as before the optimizer's step.
        """
        s = self._settings
        num_tokens = sum(len(r.response_ids) for r in rows)
        parts = self._parts(rows)
        proximal = [self._proximal(part) for part in parts] if self._loss.needs_proximal else [None] * len(parts)
        facts: dict[str, float] = {}
        loss_sum = norm = 0.0
        for group in self._optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (self.step_number + 1) / (s.lr_warmup + 1))
        for _ in range(s.epochs):
            self._optimizer.zero_grad(set_to_none=True)
            loss_sum, facts = 0.0, {}
            for part, old in zip(parts, proximal, strict=True):
                logprobs, mask = self._logprobs(part)
                loss, told = self._loss(logprobs, _batch(part, mask, old, max(1, num_tokens), len(rows)))
                loss.backward()
                loss_sum += float(loss.detach())
                for name, value in told.items():
                    facts[name] = facts.get(name, 0.0) + float(value)
            norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.max_norm, foreach=False))
            if not np.isfinite(loss_sum) or not np.isfinite(norm):
                raise InternalError(f"step {self.step_number}: loss {loss_sum}, gradient {norm}")
            self._optimizer.step()
        lags: dict[int, int] = {}
        for r in rows:
            for version, count in zip(*np.unique(r.versions, return_counts=True), strict=True):
                lag = self.step_number - int(version)
                lags[lag] = lags.get(lag, 0) + int(count)
        self.step_number += 1
        return StepFacts(
            self.step_number, loss_sum, sum(r.reward for r in rows) / len(rows), norm, len(rows), num_tokens, dict(sorted(lags.items())),
            {name: value / max(1, num_tokens) for name, value in facts.items()},
        )

    def _parts(self, rows: Sequence[TrainRow]) -> list[list[TrainRow]]:
        size = self._settings.part_rows
        if self._settings.share_prompts:  # a group's rows stay together
            rows = sorted(rows, key=lambda r: r.number)
            return [list(rows[i : i + size]) for i in range(0, len(rows), size)]
        rows = sorted(rows, key=lambda r: (len(r.prompt_ids) + len(r.response_ids), r.number))
        return [list(rows[begin:end]) for begin, end in cut([len(r.prompt_ids) + len(r.response_ids) for r in rows], size)]

    def _proximal(self, rows: Sequence[TrainRow]) -> torch.Tensor:
        with torch.no_grad():
            return self._logprobs(rows)[0]

    def _logprobs(self, rows: Sequence[TrainRow]) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(self.model, [(r.prompt_ids, r.response_ids) for r in rows], share_prompts=self._settings.share_prompts)

    # -- to go on later -------------------------------------------------------------------------------------------------

    def save(self, path: pathlib.Path, **facts: str) -> None:
        """Weights, optimizer and step in one file, there whole or not at all."""
        tensors = {f"model.{n}": torch.from_numpy(a) for n, a in self.model.arrays().items()}
        state = self._optimizer.state_dict()["state"]
        for i, entry in state.items():
            tensors |= {f"optimizer.{i}.{key}": value.clone() for key, value in entry.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        safetensors.torch.save_file(tensors, part, {"step": str(self.step_number), **facts})
        part.replace(path)

    def load(self, path: pathlib.Path) -> dict[str, str]:
        """Inverse of `save`, bit for bit; returns its facts. Raises DataLoss for a file that does not fit."""
        try:
            with safetensors.safe_open(path, "pt") as f:
                facts = dict(f.metadata())
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 # not a mapping
            self.model.load_arrays({n.removeprefix("model."): t.numpy() for n, t in tensors.items() if n.startswith("model.")})
            state: dict[int, dict[str, Any]] = {}
            for name, tensor in tensors.items():
                if name.startswith("optimizer."):
                    _, i, key = name.split(".")
                    state.setdefault(int(i), {})[key] = tensor
            whole = self._optimizer.state_dict()
            self._optimizer.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
            self.step_number = int(facts.pop("step"))
            return facts
        except (KeyError, ValueError, safetensors.SafetensorError) as e:
            raise DataLoss(f"{path.name} holds no checkpoint of this run: {type(e).__name__}: {e}") from e


def _batch(rows: Sequence[TrainRow], mask: torch.Tensor, proximal: torch.Tensor | None, num_tokens: int, num_rows: int) -> dict[str, torch.Tensor]:
    def filled(values: Sequence[np.ndarray]) -> torch.Tensor:
        out = torch.zeros(mask.shape)
        for i, v in enumerate(values):
            out[i, : len(v)] = torch.from_numpy(np.array(v, np.float32))  # decoded values are read only
        return out

    batch = {
        "mask": mask, "behaviour": filled([r.behaviour for r in rows]), "advantage": torch.tensor([r.advantage for r in rows], dtype=torch.float32),
        "num_tokens": torch.tensor(float(num_tokens)), "num_rows": torch.tensor(float(num_rows)),
    }  # fmt: skip
    if proximal is not None:
        batch["proximal"] = proximal
    if rows[0].reference is not None:
        batch["reference"] = filled([r.reference for r in rows if r.reference is not None])
    return batch


def warm_up(config: ModelConfig, tensors: Mapping[str, np.ndarray], examples: Examples, *, steps: int, rows: int, lr: float) -> dict[str, np.ndarray]:
    """The weights after supervised steps on training examples: a model that answers at all, so that rewards differ."""
    model = LlamaForTraining(config, tensors)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20)
        batch = [examples.train(-1 - (step * rows + i) & 0x7FFFFFFF) for i in range(rows)]
        logprobs, mask = token_logprobs(model, [(examples.prompt_ids(e), examples.text.answer_ids(e.answer)) for e in batch])
        optimizer.zero_grad(set_to_none=True)
        loss = -torch.where(mask, logprobs, torch.zeros_like(logprobs)).sum() / mask.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
    return model.arrays()
