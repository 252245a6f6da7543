"""The engine in one process as a service runs it: on its driver's thread, with callers in an event loop.

What the mesh's overhead is measured against. `bench.run_closed_loop` calls `Engine.step` itself and adds a caller's next request between
two steps. Callers outside of that loop come at any moment, and whoever comes while a step runs waits for its end, in one process as in a
mesh. With the engine's own loop as the baseline that wait would be counted as the mesh's. Calls may have a `pause_s`, so that both sides'
requests come at the same kinds of moments (see `plugmesh.bench.workloads.with_pauses`).
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plugmesh.errors import InternalError
from plugmesh.types import SamplingParams
from plugmesh_engine.driver import EngineDriver, ExportedBlock
from plugmesh_engine.engine import Engine, EngineRequest, StepOutput


class _Caller:
    """One stream: a request, its times, the next request."""

    __slots__ = ("asked", "done", "num_prompt", "sent_s", "times", "tokens")

    def __init__(self, num_prompt: int, asked: int, done: asyncio.Future[dict[str, Any]]) -> None:
        self.num_prompt, self.asked, self.done = num_prompt, asked, done
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.sent_s = time.perf_counter()


async def run_driven(
    engine: Engine, conversations: Sequence[Sequence[Mapping[str, Any]]], streams: int, *, use_cache: bool = True, want_tokens: bool = False
) -> dict[str, Any]:
    """As `bench.run_closed_loop`, with the same results, through an `EngineDriver` that lives as long as this call.

    A call may have `sampling`, fields of SamplingParams, and `request`, fields of EngineRequest.

    Raises what `Engine.add` raises, and InternalError when a step failed.
    """
    live: dict[str, _Caller] = {}
    records: list[dict[str, Any]] = []
    tokens: list[list[int]] = []
    names = itertools.count()
    loop = asyncio.get_running_loop()

    def on_step(out: StepOutput, _: list[ExportedBlock]) -> None:
        now = time.perf_counter()  # when the process that computes could send the token: the mesh's clock ends at the client
        for event in out.tokens:
            caller = live.get(event.request_id)
            if caller is None:
                continue
            if event.tokens:
                caller.times.append(now)
                caller.tokens.extend(t.token_id for t in event.tokens)
            if event.request_done:
                usage = event.usage
                del live[event.request_id]
                caller.done.set_result({
                    "sent_s": caller.sent_s, "times_s": caller.times, "num_prompt": usage.prompt_tokens if usage else 0,
                    "num_out": usage.completion_tokens if usage else 0, "asked_prompt": caller.num_prompt, "asked_out": caller.asked,
                    "num_cached": usage.cached_tokens if usage else -1, "error": event.error.message if event.error else "",
                })  # fmt: skip

    def on_failure(error: BaseException) -> None:
        for caller in live.values():
            if not caller.done.done():
                caller.done.set_exception(error if isinstance(error, Exception) else InternalError("the engine failed"))
        live.clear()

    driver = EngineDriver(engine, on_step, on_failure)

    async def send(call: Mapping[str, Any]) -> str:
        name = f"driven-{next(names)}"
        prompt = tuple(call["prompt"])
        caller = live[name] = _Caller(len(prompt), call["max_tokens"], loop.create_future())
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": call["max_tokens"], "ignore_eos": True, **call.get("sampling", {})})
        try:
            await driver.submit(EngineRequest(name, prompt, sampling, use_prefix_cache=use_cache, **call.get("request", {})))
            record = await caller.done
        finally:
            if live.pop(name, None) is not None:
                driver.cancel(name)
        records.append(record)
        tokens.append(caller.tokens)
        return str(record["error"])

    async def stream(waiting: Iterator[Sequence[Mapping[str, Any]]]) -> None:
        for conversation in waiting:
            for call in conversation:
                if pause_s := call.get("pause_s", 0.0):
                    await asyncio.sleep(pause_s)
                if await send(call):
                    break

    waiting = iter(conversations)
    driver.start()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(streams, len(conversations))):
                group.create_task(stream(waiting))
        done = {"records": records, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    except BaseExceptionGroup as e:
        raise e.exceptions[0] from None
    finally:
        await driver.call(lambda _: None)  # what was cancelled is gone
        await driver.stop()
    return {**done, "tokens": tokens} if want_tokens else done
