"""Which instances serve a request: the core's router, and the one door to routers of plugins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from plugmesh.errors import PluginError
from plugmesh.hookspecs import hookimpl
from plugmesh.host import PluginHost
from plugmesh.records import KvEvent, Route, Router, RouteRequest, RouterRecord
from plugmesh.types import InstanceInfo

log = structlog.get_logger()


class LeastPending:
    """Sends a request to the decode instance with the fewest tokens still to compute or to generate.

    The lease's number is up to a second old and holds the work of all gateways; our own count is current and holds only
    ours. The larger of the two is the better guess. Equal ones take turns.
    """

    def __init__(self) -> None:
        self._pending: dict[str, int] = {}                # decode instance to our own tokens
        self._requests: dict[str, tuple[str, int]] = {}   # request to instance and tokens left
        self._turn = 0

    def route(self, request: RouteRequest, decode: Sequence[InstanceInfo], prefill: Sequence[InstanceInfo]) -> Route:
        self.on_finished(request.request_id)
        self._turn += 1
        shift = self._turn % len(decode)
        in_turn = [*decode[shift:], *decode[:shift]]
        chosen = min(in_turn, key=lambda i: max(self._pending.get(i.instance_id, 0), i.load.get("num_pending_tokens", 0)))
        num_tokens = request.num_prompt_tokens + request.max_tokens
        self._requests[request.request_id] = (chosen.instance_id, num_tokens)
        self._pending[chosen.instance_id] = self._pending.get(chosen.instance_id, 0) + num_tokens
        return Route(chosen.instance_id)

    def on_progress(self, request_id: str, num_tokens: int) -> None:
        entry = self._requests.get(request_id)
        if entry is not None:
            done = min(num_tokens, entry[1])
            self._requests[request_id] = (entry[0], entry[1] - done)
            self._pending[entry[0]] -= done

    def on_finished(self, request_id: str) -> None:
        entry = self._requests.pop(request_id, None)
        if entry is not None:
            self._pending[entry[0]] -= entry[1]
            if self._pending[entry[0]] <= 0:
                del self._pending[entry[0]]


class CoreRouters:
    """Registers the core's router through the same hook as any plugin."""

    @hookimpl
    def register_routers(self) -> list[RouterRecord]:
        return [RouterRecord("least_pending", LeastPending)]


@dataclass(frozen=True, slots=True)
class SafeRouter:
    """The selected router; one that raises costs the request it was asked for a PluginError, and nothing else."""

    name: str
    router: Router
    host: PluginHost
    needs_block_ids: bool = False

    @classmethod
    def choose(cls, host: PluginHost) -> SafeRouter:
        """Asks the plugins once per process. Raises ConfigError."""
        host.register_builtin(CoreRouters())
        records = {record.name: record for record in host.records("routers")}
        name = host.select("router", list(records))
        return cls(name, records[name].build(), host, records[name].needs_block_ids)

    def route(self, request: RouteRequest, decode: Sequence[InstanceInfo], prefill: Sequence[InstanceInfo]) -> Route:
        """Raises PluginError also when the answer names an instance that was not offered."""
        answer = self.host.guard(self.name, self.router.route, request, decode, prefill)
        if not isinstance(answer, Route) or answer.decode_instance not in {i.instance_id for i in decode}:
            self.finished(request.request_id)
            raise PluginError(f"router {self.name!r} chose a decode instance that was not offered", plugin=self.name)
        if answer.prefill_instance and answer.prefill_instance not in {i.instance_id for i in prefill}:
            self.finished(request.request_id)
            raise PluginError(f"router {self.name!r} chose a prefill instance that was not offered", plugin=self.name)
        return answer

    @property
    def wants_kv_events(self) -> bool:
        return hasattr(self.router, "on_kv_event")

    def kv_event(self, event: KvEvent) -> None:
        """Never raises: an event that the router cannot take is lost to it, and to nobody else."""
        try:
            self.router.on_kv_event(event)  # type: ignore[attr-defined] # optional, see `Router`; `wants_kv_events` was asked
        except Exception as e:
            self.host.num_observer_errors += 1
            log.warning("plugin.failed", plugin=self.name, error=type(e).__name__, kind=event.kind)

    def progress(self, request_id: str, num_tokens: int) -> None:
        """Raises PluginError."""
        try:
            self.router.on_progress(request_id, num_tokens)
        except Exception as e:
            log.warning("plugin.failed", plugin=self.name, error=type(e).__name__)
            raise PluginError(f"plugin {self.name!r} failed on this request", plugin=self.name) from e

    def finished(self, request_id: str) -> None:
        """Never raises: the request is over."""
        try:
            self.router.on_finished(request_id)
        except Exception as e:
            log.warning("plugin.failed", plugin=self.name, error=type(e).__name__)
