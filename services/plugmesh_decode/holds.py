"""Who still needs the sequences that the engine holds: a session that lives, and a use not too long ago."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from plugmesh_decode.session import Session


class Held:
    """Leases of requests that ended with `hold`. Runs in the event loop.

    Args:
        ttl_s: A lease ends so long after the request did or was last forked from.
        let_go: Has the engine release a request.
    """

    def __init__(self, ttl_s: float, let_go: Callable[[str], None]) -> None:
        self._ttl_s = ttl_s
        self._let_go = let_go
        self._leases: dict[str, tuple[Session, asyncio.TimerHandle]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._leases

    def __len__(self) -> int:
        return len(self._leases)

    def keep(self, request_id: str, session: Session) -> None:
        """A request ended and is held from now on; with its session at the latest, when that is one that may come back for it."""
        timer = asyncio.get_running_loop().call_later(self._ttl_s, self._expire, request_id)
        self._leases[request_id] = (session, timer)

    def touch(self, request_id: str) -> None:
        """It was used; its time begins anew."""
        if request_id in self._leases:
            session, timer = self._leases.pop(request_id)
            timer.cancel()
            self.keep(request_id, session)

    def forget(self, request_id: str) -> None:
        """Somebody else has it released."""
        lease = self._leases.pop(request_id, None)
        if lease is not None:
            lease[1].cancel()

    def release_all_of(self, session: Session) -> None:
        """The session is gone."""
        if session.comes_back:
            for request_id in [r for r, (owner, _) in self._leases.items() if owner is session]:
                self._expire(request_id)

    def close(self) -> None:
        for request_id in list(self._leases):
            self._expire(request_id)

    def _expire(self, request_id: str) -> None:
        self.forget(request_id)
        self._let_go(request_id)
