"""The cluster-level scheduler: which instance computes the prompt and which one the tokens.

Both are chosen together, so that the target of the KV is known before the prompt starts. Queues are compared by pending
tokens, not by requests.

    prompt pool   prefill instances; pending = prompt tokens sent there and not yet answered by a first token
    token pool    decode instances; pending = tokens they still have to generate, plus prompt tokens they compute themselves
    mixed pool    decode instances lent to prompts while the shortest prompt queue is above its threshold; one goes home
                  when the last prompt it computed itself has its first token

Source: Splitwise, arXiv 2311.18677, section 4.3. Departure: instances are lent from the token pool to prompts only; a
prefill instance does not decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plugmesh.errors import Unavailable
from plugmesh.records import Route, RouteRequest
from plugmesh.types import InstanceInfo


@dataclass(slots=True)
class _Placed:
    decode: str
    prefill: str            # empty: the decode instance computes the prompt itself
    prompt_tokens: int      # still pending; 0 after the first token
    tokens_left: int


@dataclass(slots=True)
class _Foreign:
    """The part of an instance's reported load that other gateways put there, as of its last report."""

    reported: float = 0.0
    tokens: float = 0.0


class SplitwiseRouter:
    """Joined shortest queue over pending tokens. See `plugmesh.records.Router`."""

    def __init__(self, mixed_threshold_tokens: int, decode_threshold_tokens: int) -> None:
        self._mixed_threshold = mixed_threshold_tokens
        self._decode_threshold = decode_threshold_tokens
        self._placed: dict[str, _Placed] = {}
        self._foreign: dict[str, _Foreign] = {}

    @property
    def mixed(self) -> set[str]:
        """Decode instances that compute prompts at the moment."""
        return {p.decode for p in self._placed.values() if not p.prefill and p.prompt_tokens}

    def pending_tokens(self, instance_id: str) -> int:
        """Tokens that this router's own requests still have to wait for on an instance."""
        total = 0
        for placed in self._placed.values():
            if placed.prefill == instance_id:
                total += placed.prompt_tokens
            if placed.decode == instance_id:
                total += placed.tokens_left + (0 if placed.prefill else placed.prompt_tokens)
        return total

    def route(self, request: RouteRequest, decode: Sequence[InstanceInfo], prefill: Sequence[InstanceInfo]) -> Route:
        """See `plugmesh.records.Router.route`."""
        if not decode:
            raise Unavailable("no decode instance lives", retry_after_s=1)
        self.on_finished(request.request_id)  # a second routing of the same request replaces the first
        queues = {i.instance_id: self._queue(i) for i in (*decode, *prefill)}
        token_instance = min(decode, key=lambda i: queues[i.instance_id]).instance_id
        prompt_instance = min(prefill, key=lambda i: queues[i.instance_id]).instance_id if prefill else ""
        if not prompt_instance or queues[prompt_instance] + request.num_prompt_tokens > self._mixed_threshold:
            lent = self._mixed_instance(decode, queues, forced=not prompt_instance)
            if lent:
                token_instance, prompt_instance = lent, ""
        self._placed[request.request_id] = _Placed(token_instance, prompt_instance, request.num_prompt_tokens, request.max_tokens)
        if prompt_instance:
            return Route(token_instance, prompt_instance, "remote")
        return Route(token_instance, "", "local")

    def on_progress(self, request_id: str, num_tokens: int) -> None:
        """See `plugmesh.records.Router.on_progress`."""
        placed = self._placed.get(request_id)
        if placed is not None:
            placed.prompt_tokens = 0
            placed.tokens_left = max(0, placed.tokens_left - num_tokens)

    def on_finished(self, request_id: str) -> None:
        """See `plugmesh.records.Router.on_finished`."""
        self._placed.pop(request_id, None)

    def _mixed_instance(self, decode: Sequence[InstanceInfo], queues: dict[str, float], *, forced: bool) -> str:
        """An instance of the mixed pool, else one pulled from the token pool; empty when all are too busy to be lent."""
        members = self.mixed
        for pool in ([i for i in decode if i.instance_id in members], [i for i in decode if i.instance_id not in members]):
            if pool:
                best = min(pool, key=lambda i: queues[i.instance_id]).instance_id
                if queues[best] <= self._decode_threshold:
                    return best
        return min(decode, key=lambda i: queues[i.instance_id]).instance_id if forced else ""

    def _queue(self, info: InstanceInfo) -> float:
        own = self.pending_tokens(info.instance_id)
        foreign = self._foreign.setdefault(info.instance_id, _Foreign())
        reported = float(info.load.get("num_pending_tokens", 0.0))
        if reported != foreign.reported:  # a new report: what it holds beyond our own is others' work
            foreign.reported, foreign.tokens = reported, max(0.0, reported - own)
        return own + foreign.tokens
