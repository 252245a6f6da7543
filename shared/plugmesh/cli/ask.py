"""`plugmesh run` and `plugmesh chat`: questions to the mesh that runs here, or to one started for the purpose."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import pathlib
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from rich.markup import escape

from plugmesh import errors
from plugmesh.cli import output
from plugmesh.cli import up as up_command
from plugmesh.supervisor import http, runs
from plugmesh.supervisor.launch import Launcher
from plugmesh.tasks import end

EXIT_INTERRUPTED = 130
START_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where questions go."""

    url: str
    model: str
    api_key: str | None


def run_once(
    prompt: str,
    *,
    model: str | None,
    max_tokens: int,
    temperature: float,
    system: str | None,
    seed: int | None,
    config: pathlib.Path | None,
    mesh: str | None,
    api_key: str | None,
) -> int:
    """Streams one answer to standard output. Raises PlugmeshError; the mesh it started is stopped in every case."""
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise errors.InvalidRequest("the prompt is empty", param="prompt")
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    options = {"max_tokens": max_tokens, "temperature": temperature, **({} if seed is None else {"seed": seed})}

    async def ask(target: Target, stop: asyncio.Event) -> int:
        finish = await _interruptible(_print_answer(target, messages, options), stop)
        if finish is None:
            return EXIT_INTERRUPTED
        if finish[1] == "length":
            output.err.print(f"[dim]cut off after {max_tokens} tokens; --max-tokens allows more[/]")
        return 0

    return asyncio.run(_with_mesh(config, mesh, model, api_key, ask))


def run_chat(
    *,
    model: str | None,
    max_tokens: int,
    temperature: float,
    system: str | None,
    seed: int | None,
    config: pathlib.Path | None,
    mesh: str | None,
    api_key: str | None,
) -> int:
    """Questions and answers until /quit or end of input. Ctrl-C ends an answer, at the prompt the chat."""
    options = {"max_tokens": max_tokens, "temperature": temperature, **({} if seed is None else {"seed": seed})}

    async def talk(target: Target, stop: asyncio.Event) -> int:
        opening = [{"role": "system", "content": system}] if system else []
        messages = list(opening)
        lines = _Lines(sys.stdin.fileno())
        output.err.print(f"[dim]chat with {escape(target.model)}; /reset starts anew, /quit ends[/]")
        while True:
            if sys.stdin.isatty():
                sys.stderr.write("you> ")
                sys.stderr.flush()
            line = await lines.next(stop)
            if line is None or line.strip() == "/quit":
                return 0
            if line.strip() == "/reset":
                messages = list(opening)
                output.err.print("[dim]forgotten[/]")
                continue
            if not line.strip():
                continue
            messages.append({"role": "user", "content": line})
            try:
                answer = await _interruptible(_print_answer(target, messages, options), stop)
            except errors.InvalidRequest as e:  # such as a conversation longer than the context
                messages.pop()
                output.print_error(e.message)
                continue
            stop.clear()  # Ctrl-C during an answer ends that answer only
            messages = messages[:-1] if answer is None else [*messages, {"role": "assistant", "content": answer[0]}]

    return asyncio.run(_with_mesh(config, mesh, model, api_key, talk))


async def _with_mesh(config_path: pathlib.Path | None, mesh: str | None, model: str | None, api_key: str | None, use: Any) -> int:
    """Calls `use(target, stop)` with the mesh that runs here, or with one that exists as long as the call."""
    output.quiet_logs()
    stop = asyncio.Event()
    found = await _running_mesh(mesh)
    if found is not None and config_path is None:
        with up_command.signals(stop.set, lambda: os._exit(EXIT_INTERRUPTED)):
            served = await served_model(found.gateway_url, api_key)
            if model not in (None, served, found.model):
                raise errors.FailedPrecondition(f"the mesh that runs here serves {served!r}, not {model!r}; stop it, or start another with --config")
            return await use(Target(found.gateway_url, served, api_key), stop)
    settings = up_command.load(config_path, port=0, model=model, **_ephemeral())
    up_command.fetch_model(settings)
    launcher = Launcher(settings, ephemeral=True)
    with up_command.signals(stop.set, launcher.kill):
        try:
            if not await up_command.bring_up(launcher, stop, plain=False, timeout_s=START_TIMEOUT_S):
                return EXIT_INTERRUPTED
            return await use(Target(launcher.run.gateway_url, launcher.served_model, api_key), stop)
        except errors.Unavailable:
            up_command.show_failure(launcher)
            raise
        finally:
            await launcher.stop()


def _ephemeral() -> dict[str, Any]:
    """Overrides for a mesh of one command: a name of its own, so that it disturbs no other, and no KV blocks on disk."""
    return {"mesh.name": f"run-{os.getpid()}", "services.kvstore.disk_bytes": 0, "mesh.drain_s": 5.0}


async def _running_mesh(name: str | None) -> runs.MeshRun | None:
    """The mesh to use; waits for one that is starting. Raises NotFound when `name` was given and does not run."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            if name is not None:
                run = runs.find_run(name)
            else:
                lasting = [r for r in runs.live_runs() if not r.ephemeral]
                if len(lasting) > 1:
                    raise errors.NotFound(f"several meshes are running; choose one with --mesh: {', '.join(r.name for r in lasting)}")
                if not lasting:
                    return None
                run = lasting[0]
            if run.state != "starting":
                return run if run.state == "ready" else None
            await asyncio.sleep(0.1)


async def served_model(url: str, api_key: str | None, timeout_s: float = 30.0) -> str:
    """The first model that a gateway lists. Raises Unavailable when it lists none, and what `http.request` raises."""
    async with http.request("GET", f"{url}/v1/models", api_key=api_key, timeout_s=timeout_s) as answer:
        listed = await answer.json()
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise errors.Unavailable("the gateway lists no model yet") from None


async def answer_pieces(target: Target, messages: list[dict[str, str]], options: dict[str, Any]) -> AsyncIterator[tuple[str, str | None]]:
    """(text, finish reason) as they arrive. Raises PlugmeshError."""
    body = {"model": target.model, "messages": messages, "stream": True, **options}
    async with http.request("POST", f"{target.url}/v1/chat/completions", body, api_key=target.api_key, timeout_s=ANSWER_TIMEOUT_S) as answer:
        async for event in answer.events():
            for choice in event.get("choices", ()):
                yield choice.get("delta", {}).get("content") or "", choice.get("finish_reason")


async def _print_answer(target: Target, messages: list[dict[str, str]], options: dict[str, Any]) -> tuple[str, str | None]:
    text, reason = "", None
    try:
        async with contextlib.aclosing(answer_pieces(target, messages, options)) as pieces:  # type: ignore[type-var]
            async for piece, finish in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
                text += piece
                reason = finish or reason
    finally:
        if text and not text.endswith("\n"):
            sys.stdout.write("\n")
            sys.stdout.flush()
    return text, reason


async def _interruptible(work: Any, stop: asyncio.Event) -> Any:
    """The result of `work`, or None when `stop` came first; leaving the request cancels it in the mesh."""
    task = asyncio.ensure_future(work)
    stopping = asyncio.create_task(stop.wait(), name="stop-asked")
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        await end(task, stopping, timeout_s=math.inf, patience_s=0.5)


class _Lines:
    """Lines of standard input without a thread: one blocked in readline would hang the end of the process.

    Buffers itself, because what sys.stdin has read ahead would be invisible to the event loop.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pending = b""
        self._ended = False

    async def next(self, stop: asyncio.Event) -> str | None:
        """The next line without its end, or None at the end of input or when `stop` came first."""
        while b"\n" not in self._pending and not self._ended:
            if not await self._readable(stop):
                return None
            piece = os.read(self._fd, 65536)
            self._pending += piece
            self._ended = not piece
        line, _, self._pending = self._pending.partition(b"\n")
        return None if self._ended and not line else line.decode(errors="replace")

    async def _readable(self, stop: asyncio.Event) -> bool:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        try:
            loop.add_reader(self._fd, ready.set)
        except PermissionError:  # a regular file is always readable and cannot be watched
            return not stop.is_set()
        try:
            return bool(await _interruptible(ready.wait(), stop))
        finally:
            loop.remove_reader(self._fd)
