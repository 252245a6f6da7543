"""A mesh of its own for a part of the measurement: its HTTP address, and its grammar service beside it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import pathlib
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from plugmesh import wire
from plugmesh.bench.systems import Setting, served_model
from plugmesh.config import MeshConfig
from plugmesh.errors import GrammarTimeout, LimitExceeded, PlugmeshError, Unavailable, UnsupportedGrammar
from plugmesh.grammar.spec import GrammarSpec
from plugmesh.mesh.real import RealMesh
from plugmesh_proto.v1 import grammar_pb2, grammar_pb2_grpc

_START_S = 60.0
_CALL_S = 60.0
_ANSWER_S = 900.0


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the grammar service said to a schema. `wall_ms` is the call's own time, `compile_ms` the service's."""

    engine: str = ""
    compile_ms: float = 0.0
    wall_ms: float = 0.0
    num_bytes: int = 0
    was_cached: bool = False
    error: PlugmeshError | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One chat completion. `status` is 0 when there was none."""

    status: int
    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    error: str = ""


class StructuredMesh:
    """`plugmesh up` with the engines asked for; a context manager.

    Args:
        engines: Slugs of grammar engines in their order; empty: the service's own default.
        services: Further keys of services.
    """

    def __init__(self, setting: Setting, name: str, engines: Sequence[str] = (), services: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._setting, self._name, self._engines, self._services = setting, name, tuple(engines), services or {}
        self._cluster: Any = None
        self._mesh: RealMesh | None = None
        self.url = self.model = ""

    async def __aenter__(self) -> StructuredMesh:
        from plugmesh.testing.cluster import Cluster

        s = self._setting
        folder = s.folder / self._name
        folder.mkdir(parents=True, exist_ok=True)
        services = {role: {"executor": s.executor, "kv_dtype": s.kv_dtype, "num_threads": s.threads} for role in ("decode", "prefill")}
        for role, keys in {**({"grammar": {"plugins": list(self._engines)}} if self._engines else {}), **self._services}.items():
            services[role] = {**services.get(role, {}), **keys}
        self._cluster = Cluster(folder, {"mesh": {"model": str(s.model), "log_level": "warning"}, "services": services})
        try:
            await asyncio.to_thread(self._cluster.start, 300.0)
            record = self._cluster.run_record()
            self.url = self._cluster.base_url.removesuffix("/v1")
            self.model = await served_model(self.url)
            nats = {"url": record["nats_url"], "user": record["nats_user"], "password_file": record["nats_password_file"], "tls_ca_file": record["nats_tls_ca_file"]}
            config = MeshConfig.model_validate({"mesh": {"name": record["name"], "nats": {k: v for k, v in nats.items() if v}}})
            self._mesh = await RealMesh.connect(config)
            await self._wait_for_grammars()
        except AssertionError as e:
            await self.__aexit__()
            raise Unavailable(str(e)[:2000]) from e
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._mesh is not None:
            await self._mesh.close()
        if self._cluster is not None:
            with contextlib.suppress(AssertionError):  # it was killed then
                await asyncio.to_thread(self._cluster.stop)

    async def _wait_for_grammars(self) -> None:
        assert self._mesh is not None
        until = time.monotonic() + _START_S
        while not self._mesh.instances("grammar"):
            if time.monotonic() > until:
                raise Unavailable(f"no grammar service announced itself within {_START_S:g} s:\n{self._cluster.log()[-1500:]}")
            await asyncio.sleep(0.1)

    @property
    def _stub(self) -> grammar_pb2_grpc.GrammarStub:
        assert self._mesh is not None
        return grammar_pb2_grpc.GrammarStub(self._mesh.channel("grammar"))  # type: ignore[arg-type] # has a channel's methods

    def _request(self, spec: GrammarSpec) -> grammar_pb2.CompileGrammarRequest:
        return grammar_pb2.CompileGrammarRequest(spec=wire.spec_to_pb(spec), model=self.model)

    async def compile(self, spec: GrammarSpec) -> Compiled:
        """A refusal, or a compilation that takes too long, is told in the result. Raises PlugmeshError for anything else."""
        began = time.perf_counter()
        try:
            info = await self._stub.Compile(self._request(spec), timeout=_CALL_S)
        except grpc.RpcError as e:
            error = wire.error_from_rpc(e)
            if not isinstance(error, UnsupportedGrammar | LimitExceeded | GrammarTimeout):
                raise error from e
            return Compiled(wall_ms=(time.perf_counter() - began) * 1e3, error=error)
        return Compiled(info.engine, info.compile_ms, (time.perf_counter() - began) * 1e3, info.num_bytes, info.was_cached)

    async def validate(self, spec: GrammarSpec, text: str) -> tuple[bool, bool]:
        """Whether the text is in the language, and whether it can be gone on from. Raises PlugmeshError."""
        try:
            reply = await self._stub.Validate(grammar_pb2.ValidateGrammarRequest(grammar=self._request(spec), text=text), timeout=_CALL_S)
        except grpc.RpcError as e:
            raise wire.error_from_rpc(e) from e
        return reply.is_valid, reply.is_prefix

    async def chat(self, bodies: Sequence[Mapping[str, Any]], streams: int, *, on_answer: Any = lambda answer: None) -> list[Answer]:
        """Chat completions, so many at once, in the order of the bodies; a failed one is an answer with its error."""
        loop = asyncio.get_running_loop()
        url, found = f"{self.url}/v1/chat/completions", []
        with concurrent.futures.ThreadPoolExecutor(streams) as pool:
            waiting = [loop.run_in_executor(pool, _post, url, {"model": self.model, **body}) for body in bodies]
            for task in waiting:
                found.append(await task)
                on_answer(found[-1])
        return found

    def metric(self, role: str, name: str) -> float:
        """The sum over the instances of a role; 0 where nobody has it."""
        return float(sum(self._cluster.metric(row, name) for row in self._cluster.instances(role)))


def _post(url: str, body: Mapping[str, Any]) -> Answer:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})  # noqa: S310 - an address of our own making
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as reply:  # noqa: S310 - the same
            value = json.load(reply)
        choice = value["choices"][0]
        return Answer(200, choice["message"]["content"] or "", choice["finish_reason"], value["usage"]["completion_tokens"])
    except urllib.error.HTTPError as e:
        return Answer(e.code, error=_message(e.read()))
    except (OSError, ValueError, LookupError, TypeError) as e:
        return Answer(0, error=f"{type(e).__name__}: {e}")


def _message(raw: bytes) -> str:
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return str(json.loads(raw)["error"]["message"])[:300]
    return raw[:200].decode("utf-8", "replace")


def repository() -> pathlib.Path | None:
    """The checkout that this package is imported from; None for an installed one."""
    root = pathlib.Path(__file__).resolve().parents[4]
    return root if (root / "plugins").is_dir() and (root / "docs").is_dir() else None
