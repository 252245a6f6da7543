"""The systems that a comparison runs: the engine in a process, the mesh over HTTP, peers over HTTP. All answer `run` with a Run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from plugmesh.bench import peers, processes
from plugmesh.bench.hf_folder import tokenizer_of, write_hf_folder
from plugmesh.bench.http_client import DIALECTS, Client
from plugmesh.bench.load import closed_loop
from plugmesh.bench.metrics import Record, Run
from plugmesh.bench.peers import BATCH, SINGLE, Peer, Profile
from plugmesh.bench.processes import Child, Memory
from plugmesh.bench.workloads import Conversation
from plugmesh.errors import FailedPrecondition, PlugmeshError, Unavailable

# Not a chat: there "The" and "L'" are so close that bfloat16 decides, and either can be the better start of a right answer.
_QUESTION = "The capital of Italy is Rome. The capital of Spain is Madrid. The capital of France is"
_START_S = 600.0  # vLLM compiles at its first start
_READY_S = 300.0  # of a mesh, on a machine that does other things as well


@dataclass(frozen=True, slots=True)
class Setting:
    """What all systems of a comparison have in common."""

    model: pathlib.Path
    folder: pathlib.Path  # private to this comparison: logs, the mesh's data, the engine's packed weights
    cache_dir: pathlib.Path | None = None
    threads: int = 0
    executor: str = "auto"
    kv_dtype: str = "bfloat16"

    @property
    def num_threads(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


class System(Protocol):
    """One competitor. `start` may take minutes; everything else is ready at once. Between runs it is paused where it can be."""

    name: str
    title: str

    async def start(self) -> dict[str, Any]:
        """Starts it, checks that it answers a question rightly, and returns facts for the report. Raises PlugmeshError."""
        ...

    async def run(self, conversations: Sequence[Conversation], streams: int, profile: Profile, *, use_cache: bool) -> Run: ...
    def memory(self) -> dict[str, Memory]:
        """By part, as far as it has parts."""
        ...

    async def stop(self) -> None: ...


class EngineSystem:
    """`python -m plugmesh_engine.bench` as a child."""

    name, title = "engine", "plugmesh's engine in one process"

    def __init__(self, setting: Setting, *, num_blocks: int = 2048) -> None:
        self._setting, self._num_blocks = setting, num_blocks
        self._child: Child | None = None
        self.facts: dict[str, Any] = {}

    async def start(self) -> dict[str, Any]:
        s = self._setting
        command = [
            sys.executable, "-m", "plugmesh_engine.bench", "--model", str(s.model), "--store", str(s.folder / "weights"), "--executor", s.executor,
            "--kv-dtype", s.kv_dtype, "--threads", str(s.threads), "--num-blocks", str(self._num_blocks),
        ]  # fmt: skip
        self._child = Child(self.name, command, s.folder / "engine.log", {"OMP_NUM_THREADS": str(s.num_threads)}, pipes=True)
        self.facts = (await self._read())["ready"]
        tokenizer = await asyncio.to_thread(tokenizer_of, s.model)
        if tokenizer is not None:
            answer = await self._ask({"conversations": [[{"prompt": tokenizer.encode(_QUESTION).ids, "max_tokens": 4}]], "streams": 1, "want_tokens": True})
            check_text(tokenizer.decode(answer["tokens"][0]))
        self._child.pause()
        return {**self.facts, "verified": True if tokenizer is not None else None}

    async def _ask(self, ask: dict[str, Any]) -> dict[str, Any]:
        assert self._child is not None and self._child.process.stdin is not None
        self._child.process.stdin.write(json.dumps(ask).encode() + b"\n")
        self._child.process.stdin.flush()
        return await self._read()

    async def _read(self) -> dict[str, Any]:
        child = self._child
        assert child is not None and child.process.stdout is not None
        line = await asyncio.to_thread(child.process.stdout.readline)
        if not line:
            raise Unavailable(f"the engine's process ended:\n{child.log_tail()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise FailedPrecondition(f"the engine refuses: {answer['error']}")
        return answer

    async def run(self, conversations: Sequence[Conversation], streams: int, profile: Profile, *, use_cache: bool) -> Run:
        child = self._child
        assert child is not None
        ask = {
            "conversations": [[{"prompt": c.prompt, "max_tokens": c.max_tokens, "pause_s": c.pause_s} for c in conversation] for conversation in conversations],
            "streams": streams, "use_cache": use_cache, "driven": profile.is_driven,
        }  # fmt: skip
        child.resume()
        try:
            answer = await self._ask(ask)
        finally:
            child.pause()
        records = tuple(Record(**{**r, "times_s": tuple(r["times_s"])}) for r in answer["records"])
        return Run(records, answer["wall_s"], 0.0, streams, {"server_cpu_s": answer["cpu_s"]})

    def memory(self) -> dict[str, Memory]:
        return {"engine": processes.memory_of(self._child.pids())} if self._child else {}

    async def stop(self) -> None:
        if self._child is not None:
            await asyncio.to_thread(self._child.stop)


class HttpSystem:
    """A server that was started by somebody else, or by a subclass."""

    def __init__(self, name: str, title: str, dialect: str) -> None:
        self.name, self.title = name, title
        self._dialect = DIALECTS[dialect]
        self._clients: dict[str, Client] = {}
        self._children: dict[str, Child] = {}

    def _key(self, profile: Profile) -> str:
        return ""

    async def run(self, conversations: Sequence[Conversation], streams: int, profile: Profile, *, use_cache: bool) -> Run:
        key = self._key(profile)
        child = self._children.get(key)
        if child is not None:
            child.resume()
        pids = self._pids(key)
        cpu = processes.cpu_s_of(pids)
        try:
            run = await closed_loop(self._clients[key], conversations, streams, use_cache=use_cache)
        finally:
            used = processes.cpu_s_of(pids) - cpu
            self._clients[key].close()  # a paused server's keep-alive runs out unseen
            if child is not None:
                child.pause()
        return Run(run.records, run.wall_s, run.client_cpu_s, run.streams, {"server_cpu_s": used, **run.facts})

    def _pids(self, key: str) -> list[int]:
        return self._children[key].pids() if key in self._children else []

    def memory(self) -> dict[str, Memory]:
        return {key or self.name: processes.memory_of(child.pids()) for key, child in self._children.items()}

    async def stop(self) -> None:
        for client in self._clients.values():
            client.close()
        for child in self._children.values():
            await asyncio.to_thread(child.stop)
        self._children.clear()


class PeerSystem(HttpSystem):
    """A peer's server, one per profile where it wants that."""

    def __init__(self, peer: Peer, setting: Setting) -> None:
        super().__init__(peer.name, peer.title, peer.name)
        self.peer, self._setting = peer, setting

    def _key(self, profile: Profile) -> str:
        return profile.name if self.peer.has_profiles else ""

    async def start(self) -> dict[str, Any]:
        setting, cache = self._setting, self._setting.cache_dir
        missing = peers.why_missing(self.peer, cache)
        if missing:
            raise FailedPrecondition(missing)
        model = setting.model
        if self.peer.reads == "hf":
            model = await asyncio.to_thread(write_hf_folder, setting.model, peers.peers_dir(cache) / "models" / f"{setting.model.stem}-bf16")
        commands = {}
        for profile in (SINGLE, BATCH) if self.peer.has_profiles else (BATCH,):
            key, port = self._key(profile), processes.free_port()
            env = peers.environment(self.peer, cache)
            command = self.peer.command(env, model, port, setting.num_threads, profile)
            # Its own programs first: compilers and tools that came with its packages.
            variables = {**self.peer.env(setting.num_threads), "PATH": f"{env / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONPATH": ""}
            child = Child(self.name, command, setting.folder / f"{self.name}-{profile.name}.log", variables)
            self._children[key] = child
            url = f"http://127.0.0.1:{port}"
            await processes.wait_until_served(f"{url}/health", child, _START_S)
            await check_answer(url, peers.SERVED_NAME)
            self._clients[key] = Client(url, peers.SERVED_NAME, self._dialect)
            child.pause()
            commands[profile.name] = [pathlib.Path(part).name if part.startswith("/") else part for part in command]
        return {"version": peers.installed_version(self.peer, cache), "commands": commands, "verified": True}


class MeshSystem(HttpSystem):
    """`plugmesh up` as a child, with every service it starts by default.

    Args:
        config: Tables as in mesh.toml; they win over what `setting` says.
    """

    def __init__(self, setting: Setting, config: dict[str, Any] | None = None, *, name: str = "mesh", title: str = "plugmesh as a mesh, over HTTP") -> None:
        super().__init__(name, title, "plugmesh")
        self._setting, self._config = setting, config or {}
        self._cluster: Any = None

    async def start(self) -> dict[str, Any]:
        from plugmesh.testing.cluster import Cluster  # the kit that starts a whole mesh in a folder of its own

        s = self._setting
        folder = s.folder / self.name
        folder.mkdir(parents=True, exist_ok=True)
        engine = {"executor": s.executor, "kv_dtype": s.kv_dtype, "num_threads": s.threads}
        config = {
            "mesh": {"model": str(s.model), "log_level": "warning", **self._config.get("mesh", {})},
            "services": {"decode": dict(engine), "prefill": dict(engine), **self._config.get("services", {})},
            "plugins": self._config.get("plugins", {}),
        }
        self._cluster = Cluster(folder, config, arguments=("--ready-timeout", str(_READY_S)))
        try:
            await asyncio.to_thread(self._cluster.start, _READY_S + 10.0)
        except AssertionError as e:
            raise Unavailable(str(e)[:2000]) from e
        url = self._cluster.base_url
        model = await served_model(url)
        await self.verify(url, model)
        self._clients[""] = Client(url, model, self._dialect)
        return {"verified": True, "services": sorted({row["role"] for row in self._cluster.instances()}), "model": model}

    async def verify(self, url: str, model: str) -> None:
        """Whether it answers as it should, once it is up. Raises PlugmeshError."""
        await check_answer(url, model)

    def _pids(self, key: str) -> list[int]:
        return [p.pid for p in self._cluster.descendants()] if self._cluster is not None else []

    def memory(self) -> dict[str, Memory]:
        if self._cluster is None:
            return {}
        found: dict[str, Memory] = {}
        for row in self._cluster.instances():
            found[row["role"]] = found.get(row["role"], Memory()) + processes.memory_of([row["pid"]])
        return found

    async def stop(self) -> None:
        await super().stop()
        if self._cluster is not None:
            with contextlib.suppress(AssertionError):  # it was killed then
                await asyncio.to_thread(self._cluster.stop)


async def served_model(base_url: str, api_key: str = "") -> str:
    """The first model that a server lists. Raises Unavailable."""
    try:
        listed = await asyncio.to_thread(_ask, base_url, "/v1/models", None, api_key)
        return str(listed["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise Unavailable(f"{base_url} lists no models: {type(e).__name__}: {e}") from e


async def check_answer(base_url: str, model: str, api_key: str = "") -> None:
    """Asks for the capital of France; a server that answers from broken weights is no competitor.

    Raises:
        FailedPrecondition: The answer does not name Paris.
        Unavailable: No answer.
    """
    body = {"model": model, "prompt": _QUESTION, "temperature": 0, "max_tokens": 4}
    try:
        answer = await asyncio.to_thread(_ask, base_url, "/v1/completions", body, api_key)
        text = answer["choices"][0]["text"]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise Unavailable(f"{base_url} does not answer a prompt: {type(e).__name__}: {e}") from e
    check_text(text)


def check_text(text: str) -> None:
    """Raises FailedPrecondition when this is no right answer to `_QUESTION`."""
    if "Paris" not in text:
        raise FailedPrecondition("asked for the capital of France, it does not name Paris: weights, kernels or tokenizer are wrong")


def _ask(base_url: str, path: str, body: dict[str, Any] | None, api_key: str) -> Any:
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {api_key}"} if api_key else {})}
    data = None if body is None else json.dumps(body).encode()
    url = base_url.rstrip("/").removesuffix("/v1") + path
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=300) as reply:  # noqa: S310 - the address asked for
        return json.load(reply)


@contextlib.asynccontextmanager
async def started(systems: Sequence[System], say: Any) -> Any:
    """Starts all, one after another; yields name to facts of those that run and name to reason of those that do not. Stops all at the end."""
    facts: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    try:
        for system in systems:
            say(f"starting {system.title}")
            began = time.monotonic()
            try:
                facts[system.name] = {**await system.start(), "start_s": round(time.monotonic() - began, 2)}
            except PlugmeshError as e:
                missing[system.name] = e.message
                await system.stop()
        yield facts, missing
    finally:
        for system in systems:
            say(f"stopping {system.title}")
            await system.stop()
