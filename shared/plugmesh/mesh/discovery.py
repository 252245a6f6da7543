"""Leases in a JetStream KV bucket, and the table of instances that follows from them.

Each instance re-puts its lease several times within its time to live. Every process listens to the bucket's subjects
directly (a put is an ordinary message on `$KV.<bucket>.<key>`), so it needs no consumer state at the broker, and judges
age by its own clock. An overdue lease makes an instance suspect and probes it: when the broker says that nobody listens
there it is removed at once, when it keeps silent it is removed at twice the time to live.

While the broker is away, and for one time to live after it is back, nobody is judged: the last table stays.

The bucket is in memory: leases are rewritten within a second and mean nothing after a restart of the broker.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

import nats.errors
import nats.js.errors
import structlog
from nats.js import api

from plugmesh.mesh import subjects
from plugmesh.mesh.rpc.carrier import is_no_responders
from plugmesh.mesh.rpc.nats_carrier import NatsCarrier
from plugmesh.mesh.rpc.peers import PING_TOKEN
from plugmesh.mesh.table import Entry, InstanceTable
from plugmesh.tasks import check_cancelled, end
from plugmesh.types import InstanceInfo

log = structlog.get_logger()

_JS_TIMEOUT_S = 2.0
_ERRORS = (nats.errors.Error, nats.js.errors.Error, OSError, TimeoutError, asyncio.TimeoutError, ValueError)


def new_incarnation() -> str:
    return secrets.token_hex(8)


class Discovery:
    """One process's part in discovery. `start` first; `announce` only by services."""

    def __init__(self, carrier: NatsCarrier, mesh: str, ttl_s: float) -> None:
        self.carrier = carrier
        self.mesh = mesh
        self.ttl_s = ttl_s
        self.table = InstanceTable(ttl_s)
        self.info: InstanceInfo | None = None           # what we announce
        self.on_new_incarnation: Callable[[InstanceInfo], None] | None = None
        self._announced = False
        self._js = carrier.client.jetstream(timeout=_JS_TIMEOUT_S)
        self._bucket = subjects.lease_bucket(mesh)
        self._prefix = subjects.lease_subject(mesh, "")
        self._tasks: list[asyncio.Task[None]] = []
        self._undo: list[Callable[[], None]] = []
        self._renew_now = asyncio.Event()
        self._renewed = asyncio.Event()
        self._numbers = itertools.count()
        self._connected_at = 0.0
        self._last_renewal = 0.0
        self._server_id = ""
        self._refresh_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Subscribes, makes the bucket when it is missing, reads what is there."""
        self._connected_at = asyncio.get_running_loop().time()
        self._undo.append(await self.carrier.subscribe(subjects.lease_subject(self.mesh), self._on_lease))
        self._undo.append(self.carrier.on_state(self._on_state))
        await self._refresh()
        self._tasks.append(asyncio.get_running_loop().create_task(self._judge(), name="plugmesh-discovery"))

    async def announce(self, info: InstanceInfo) -> None:
        """Takes the lease and keeps it until `withdraw`."""
        self.info = info
        self._announced = True
        self._last_renewal = asyncio.get_running_loop().time()
        self._server_id = self.carrier.server_id
        try:
            await self._put()
        except _ERRORS as e:
            log.warning("discovery.announce_delayed", error=type(e).__name__)
        self._tasks.append(asyncio.get_running_loop().create_task(self._renew(), name="plugmesh-lease"))

    async def update(self, info: InstanceInfo, *, now: bool = False) -> None:
        """Changes what the lease says; it goes out with the next renewal, with `now` at once."""
        self.info = info
        if now and self._announced:
            self._renewed.clear()
            self._renew_now.set()
            try:
                async with asyncio.timeout(_JS_TIMEOUT_S):
                    await self._renewed.wait()
            except TimeoutError:
                pass  # the broker is away; the next renewal carries it

    async def withdraw(self) -> None:
        """Takes the lease back: peers see "left" at once, without a probe."""
        self._announced = False
        await self._cancel("plugmesh-lease")
        if self.info is not None and self.carrier.connected:
            subject = subjects.lease_subject(self.mesh, subjects.lease_key(self.info.role, self.info.instance_id))
            try:
                await self._js.publish(subject, b"", headers={"KV-Operation": "PURGE", "Nats-Rollup": "sub"})
            except _ERRORS as e:
                log.warning("discovery.withdraw_failed", error=type(e).__name__)

    async def stop(self) -> None:
        if self._announced:
            await self.withdraw()
        for undo in self._undo:
            undo()
        self._undo.clear()
        await self._cancel("")

    def hint(self, instance_id: str, incarnation: str) -> None:
        """Somebody noticed that an instance does not answer: probe it now rather than when its lease is over."""
        for entry in self.table.entries.values():
            if entry.info.instance_id == instance_id and entry.info.incarnation == incarnation:
                self._probe(entry)

    # --- our own lease --------------------------------------------------------------------------------------------

    async def _put(self) -> None:
        info = self.info
        assert info is not None
        data = dataclasses.asdict(info)
        data["inbox"] = self.carrier.inbox
        subject = subjects.lease_subject(self.mesh, subjects.lease_key(info.role, info.instance_id))
        await self._js.publish(subject, json.dumps(data, separators=(",", ":")).encode())
        self._last_renewal = asyncio.get_running_loop().time()
        self._server_id = self.carrier.server_id

    async def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        interval_s = min(1.0, self.ttl_s / 4)
        while True:
            try:
                async with asyncio.timeout(interval_s):
                    await self._renew_now.wait()
            except TimeoutError:
                pass
            check_cancelled()
            self._renew_now.clear()
            if self._refresh_task is not None and not self._refresh_task.done():
                continue  # it asks for a renewal when the bucket is there
            if not self.carrier.connected:
                continue
            if loop.time() - self._last_renewal > self.ttl_s and self.carrier.server_id == self._server_id:
                # The broker lived while our lease ran out: we were stopped, stuck or cut off, and others may have
                # declared us dead. Whatever we hold belongs to an incarnation that is over.
                self._reincarnate()
            try:
                await self._put()
                self._renewed.set()
            except _ERRORS as e:
                # Without the bucket nobody refuses the put, as every process listens to its subjects: it just stays
                # unanswered. So whatever went wrong, see that the bucket is there.
                log.warning("discovery.renewal_failed", error=type(e).__name__)
                await self._refresh()

    def _reincarnate(self) -> None:
        assert self.info is not None
        old = self.info.incarnation
        self.info = dataclasses.replace(self.info, incarnation=new_incarnation(), started_unix_s=time.time())
        log.warning("discovery.new_incarnation", instance=self.info.instance_id, old=old, new=self.info.incarnation)
        if self.on_new_incarnation is not None:
            self.on_new_incarnation(self.info)

    # --- others' leases -------------------------------------------------------------------------------------------

    def _on_lease(self, message: Any) -> None:
        key = message.subject[len(self._prefix) :]
        headers = message.headers or {}
        if headers.get("KV-Operation") in ("DEL", "PURGE"):
            role, _, instance_id = key.partition(".")
            self.table.remove(role, instance_id)
        elif message.data:
            self._take_in(message.data)

    def _take_in(self, data: bytes) -> None:
        try:
            fields = json.loads(data)
            inbox = str(fields.pop("inbox", ""))
            known = {k: v for k, v in fields.items() if k in InstanceInfo.__dataclass_fields__}  # newer peers may say more
            known["roles"] = tuple(known.get("roles", ()))
            info = InstanceInfo(**known)
        except (ValueError, TypeError) as e:
            log.warning("discovery.bad_lease", error=type(e).__name__, num_bytes=len(data))
            return
        self.table.put(info, inbox, asyncio.get_running_loop().time())

    async def _refresh(self) -> None:
        """Makes the bucket when it is missing and reads every lease in it."""
        try:
            await self._ensure_bucket()
            info = await self._js.stream_info(f"KV_{self._bucket}", subjects_filter=f"{self._prefix}>")
            for subject in info.state.subjects or {}:
                try:
                    message = await self._js.get_msg(f"KV_{self._bucket}", subject=subject, direct=True)
                except nats.js.errors.NotFoundError:
                    continue
                if message.data and not (message.headers or {}).get("KV-Operation"):
                    self._take_in(message.data)
        except _ERRORS as e:
            log.warning("discovery.refresh_failed", error=str(e) or type(e).__name__)

    async def _ensure_bucket(self) -> None:
        try:
            await self._js.stream_info(f"KV_{self._bucket}")
        except nats.js.errors.NotFoundError:
            try:
                await self._js.create_key_value(
                    bucket=self._bucket, history=1, ttl=self.ttl_s * 2, storage=api.StorageType.MEMORY, max_value_size=65536, max_bytes=16 << 20, direct=True
                )
            except nats.js.errors.BadRequestError:
                pass  # another process made it first, perhaps with another time to live

    def _on_state(self, connected: bool) -> None:
        if not connected:
            return
        loop = asyncio.get_running_loop()
        self._connected_at = loop.time()
        self.table.forgive(self._connected_at)
        self._refresh_task = loop.create_task(self._come_back())

    async def _come_back(self) -> None:
        await self._refresh()
        self._renew_now.set()

    async def _judge(self) -> None:
        loop = asyncio.get_running_loop()
        interval_s = min(0.5, self.ttl_s / 8)
        last = loop.time()
        while True:
            await asyncio.sleep(interval_s)
            now = loop.time()
            if now - last > interval_s + 1.0:
                self.table.forgive(now)  # we were stopped ourselves: renewals wait to be read
            last = now
            if not self.carrier.connected or now - self._connected_at < self.ttl_s:
                continue
            for entry in self.table.overdue(now):
                if self.info is not None and entry.info.instance_id == self.info.instance_id:
                    continue
                self.table.suspect(entry)
                self._probe(entry)

    def _probe(self, entry: Entry) -> None:
        if entry.probing or not entry.inbox:
            return
        entry.probing = True
        token = f"d{next(self._numbers)}"
        loop = asyncio.get_running_loop()
        incarnation = entry.info.incarnation

        def answer(message: Any) -> None:
            self.carrier.routes.pop(token, None)
            entry.probing = False
            if is_no_responders(message) and entry.info.incarnation == incarnation:
                log.info("discovery.gone", role=entry.info.role, instance=entry.info.instance_id)
                self.table.declare_dead(entry)

        def silence() -> None:
            if self.carrier.routes.pop(token, None) is None:
                return
            entry.probing = False
            if self.carrier.connected and loop.time() - entry.seen > self.ttl_s * 2 and entry.info.incarnation == incarnation:
                log.info("discovery.silent", role=entry.info.role, instance=entry.info.instance_id)
                self.table.declare_dead(entry)

        self.carrier.routes[token] = answer
        loop.call_later(max(0.5, self.ttl_s / 4), silence)
        self.carrier.publish(f"{entry.inbox}.{PING_TOKEN}", b"", f"{self.carrier.inbox}.{token}")

    async def _cancel(self, name: str) -> None:
        chosen = [t for t in self._tasks if not name or t.get_name() == name]
        if not name and self._refresh_task is not None:
            chosen.append(self._refresh_task)
        await end(*chosen)
        self._tasks = [t for t in self._tasks if t not in chosen]
