"""Prompts of which only some tokens are read: the early layers see all of them, a plugin chooses, the whole model computes the chosen ones.

Stage one runs between the steps of everybody else, a chunk of one prompt at a time, in blocks that go back to the pool before the chosen tokens become the
request's prompt. From then on it is a prompt like any other. Idea: GemFilter, Shi et al., arXiv:2409.17422.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog

from plugmesh.records import PromptFilterContext
from plugmesh.types import BLOCK_TOKENS
from plugmesh_engine.batch import Rows
from plugmesh_engine.kv.pool import BlockPool
from plugmesh_engine.requests import EngineRequest
from plugmesh_engine.seams import Executor
from plugmesh_engine.sequence import Group

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class Job:
    """Stage one of a prompt.

    Attributes:
        layer: Whose queries and keys are looked at; those before it are computed.
        order: As `Sequence.order` of the sequence that will compute the prompt.
        blocks: For the KV of the early layers; none before it begins and after it had to give way.
        q: (up to num_queries, heads, head_dim), of the last tokens computed. keys: (chunk, kv_heads, head_dim) each.
    """

    group: Group
    layer: int
    order: tuple[int, int, int]
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)
    q: np.ndarray | None = None
    keys: list[np.ndarray] = field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return -(-self.group.num_prompt // BLOCK_TOKENS)


class Filtering:
    """The prompts in stage one. Whatever the filter does wrong, its prompt is read whole, and that is counted.

    One prompt at a time has blocks. It gives them back, and begins again, when a running sequence needs them.

    Args:
        record: A `plugmesh.records.PromptFilterRecord`.
    """

    def __init__(self, record: Any, executor: Executor, pool: BlockPool, context: PromptFilterContext) -> None:
        self._name = record.name
        self._num_queries = max(1, record.num_queries)
        self._chunk = record.chunk_tokens or context.max_tokens_per_step
        self._filter = record.build(context)
        self._num_layers = context.config.num_layers
        self._executor = executor
        self._pool = pool
        self._jobs: list[Job] = []  # by order
        self.num_prompts = self.num_tokens_left_out = self.num_errors = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, group: Group) -> bool:
        return any(job.group is group for job in self._jobs)

    def blocks(self) -> Iterator[int]:
        """Every reference that stage one has."""
        for job in self._jobs:
            yield from job.blocks

    def layers(self, num_prompt_tokens: int) -> int:
        """Layers to compute before choosing; 0 for a prompt that is to be read whole. Changes nothing but the count of errors; other threads may ask."""
        try:
            layer = self._filter.layers(num_prompt_tokens)
            if not isinstance(layer, int | np.integer) or not 0 <= layer < self._num_layers:
                raise ValueError("no such layer")
        except Exception as e:
            self._failed(e)
            return 0
        return int(layer)

    def take(self, group: Group) -> bool:
        """Begins stage one for a new request, if it is one of those that are filtered (see `is_filtered`) and the filter wants its prompt."""
        if not is_filtered(group.request) or not (layer := self.layers(group.num_prompt)):
            return False
        job = Job(group, layer, group.alive[0].order)
        bisect.insort(self._jobs, job, key=lambda j: j.order)
        return True

    def drop(self, group: Group) -> None:
        """Forgets a request that ended."""
        for job in [j for j in self._jobs if j.group is group]:
            self._give_back(job)
            self._jobs.remove(job)

    def give_way(self) -> bool:
        """Gives the blocks of stage one to those who run. False when it has none."""
        victims = [job for job in self._jobs if job.blocks]
        for job in victims:
            self._give_back(job)
        return bool(victims)

    @property
    def wanting(self) -> Job | None:
        """The prompt that would be next, when it has no blocks yet."""
        return None if not self._jobs or any(job.blocks for job in self._jobs) else self._jobs[0]

    def begin(self, job: Job) -> None:
        """Takes the blocks of a prompt, which must be free."""
        for _ in range(job.num_blocks):
            job.blocks.append(self._pool.take())

    def advance(self) -> Group | None:
        """Computes a chunk of the prompt that has blocks. A request whose prompt is settled by that, chosen or, after an error, as it was."""
        job = next((job for job in self._jobs if job.blocks), None)
        if job is None:
            return None
        g, ids = job.group, job.group.request.token_ids
        chosen: tuple[int, ...] | None = None
        try:
            self._compute(job, ids[job.num_computed : job.num_computed + self._chunk])
            if job.num_computed < len(ids):
                return None
            assert job.q is not None
            chosen = tuple(ids[i] for i in checked(self._filter.select(job.q, np.concatenate(job.keys)), len(ids)))
        except Exception as e:
            self._failed(e)
        self.drop(g)
        if chosen is not None:
            self.num_prompts += 1
            self.num_tokens_left_out += len(ids) - len(chosen)
            g.choose_prompt(chosen)
            log.debug("engine.prompt_filtered", request_id=g.request.request_id, num_prompt_tokens=len(ids), num_chosen=len(chosen))
        return g

    def _compute(self, job: Job, ids: Sequence[int]) -> None:
        q, k = self._executor.probe([Rows(ids, job.num_computed, job.blocks)], job.layer)
        job.keys.append(np.array(k, np.float32))  # copies: the executor may use its memory again
        before = [] if job.q is None else [job.q]
        job.q = np.concatenate([*before, q[-self._num_queries :]])[-self._num_queries :]
        job.num_computed += len(ids)

    def _give_back(self, job: Job) -> None:
        self._pool.drop(reversed(job.blocks))
        job.blocks, job.num_computed, job.q, job.keys = [], 0, None, []

    def _failed(self, error: Exception) -> None:
        self.num_errors += 1
        if self.num_errors & (self.num_errors - 1) == 0:  # the 1st, 2nd, 4th, ...
            log.warning("engine.filter_failed", filter=self._name, error=type(error).__name__, count=self.num_errors)


def is_filtered(request: EngineRequest) -> bool:
    """Whether a filter is asked at all: not where the caller wants to know what the model makes of exactly these tokens, or brings their KV."""
    return not (request.score or request.taps or request.prefill_only or request.kv)


def checked(chosen: Any, num_tokens: int) -> list[int]:
    """Indices as integers. Raises ValueError unless they ascend, lie in the prompt, and there is one."""
    indices = np.asarray(chosen)
    if indices.ndim != 1 or not len(indices) or not np.issubdtype(indices.dtype, np.integer):
        raise ValueError("a selection is a list of indices, not an empty one")
    if indices[0] < 0 or indices[-1] >= num_tokens or (np.diff(indices.astype(np.int64)) <= 0).any():
        raise ValueError("the indices do not ascend, or lie outside of the prompt")
    return [int(i) for i in indices]
