"""How likely the reference model finds responses: the run's version 0, which never changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from plugmesh.types import ModelConfig
from plugmesh_rollout.loop.model import LlamaForTraining, TokenIds, token_logprobs


def is_wanted(loss: Any) -> bool:
    """Whether a loss asks for `reference`; most do not, and then nobody computes it."""
    return bool(getattr(loss, "needs_reference", False))


class Reference:
    """The trainer's own forward pass under frozen weights. One group at a time, so that what a row gets does not depend on the company that it came in."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, np.ndarray], *, share_prompts: bool = False) -> None:
        self._model = LlamaForTraining(config, tensors)
        self._share_prompts = share_prompts

    def logprobs(self, prompt_ids: TokenIds, responses: Sequence[TokenIds]) -> list[np.ndarray]:
        """float32 per token, for each response to one prompt."""
        with torch.no_grad():
            found, _ = token_logprobs(self._model, [(prompt_ids, r) for r in responses], share_prompts=self._share_prompts)
        return [found[i, : len(r)].numpy().copy() for i, r in enumerate(responses)]
