"""The engine alone in a process, driven over its standard input: `python -m plugmesh_engine.bench --model FILE --store FOLDER`.

What `plugmesh bench` compares the mesh and the peers with. One JSON object a line: first what was loaded, then an answer for every run asked
for. Runs are closed loops with the clock and the definitions of `plugmesh.bench.metrics`; the clock is the machine's, shared with the caller.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import uvloop

from plugmesh import cards, logs
from plugmesh.config import MeshConfig
from plugmesh.errors import FailedPrecondition, PlugmeshError
from plugmesh.host import PluginHost
from plugmesh.types import SamplingParams
from plugmesh_engine import Engine, EngineConfig, EnginePlugins, EngineRequest, build_engine
from plugmesh_engine.config import resolve_executor, weight_format
from plugmesh_engine.driven import run_driven


@dataclass(slots=True)
class _Live:
    """A request in the engine, the conversation it belongs to and what it has given."""

    turns: Iterator[Mapping[str, Any]]
    num_prompt: int
    asked: int
    sent_s: float
    times: list[float]
    tokens: list[int]


def load_manifest(
    model: pathlib.Path, format: str, store: pathlib.Path, plugins: Sequence[str] = (), settings: Mapping[str, Mapping[str, Any]] | None = None
) -> Any:
    """The model's manifest, imported and packed by the weightstore's own code in a process of its own. Raises FailedPrecondition.

    Args:
        plugins: Slugs of those whose weight formats may be named; others of the same engine do no harm.
        settings: Slug to its `[plugins.<slug>]`.
    """
    command = [sys.executable, "-m", "plugmesh_weightstore.offline", "--model", str(model), "--format", format, "--store", str(store)]
    loaded = [slug for slug in plugins if "weightstore" in cards.read(slug).services]
    if loaded:
        given = {slug: dict(values) for slug, values in (settings or {}).items() if slug in loaded}
        command += ["--plugins", ",".join(loaded), "--plugin-settings", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FailedPrecondition(f"{model.name} cannot be packed as {format}: {done.stderr.strip()[-300:]}")
    fields = json.loads(done.stdout.strip().splitlines()[-1])
    tensors = tuple(SimpleNamespace(**{**t, "shape": tuple(t["shape"])}) for t in fields["tensors"])
    return SimpleNamespace(**{**fields, "tensors": tensors, "assets": (), "host": ""})


def run_closed_loop(
    engine: Engine, conversations: Sequence[Sequence[Mapping[str, Any]]], streams: int, *, use_cache: bool = True, want_tokens: bool = False
) -> dict[str, Any]:
    """`streams` callers at once, each with its next request as soon as its last one ended; greedy, exactly `max_tokens` tokens each.

    Returns the fields of `plugmesh.bench.metrics.Record` per request, the wall time and this process's CPU time; with `want_tokens` also each
    request's tokens, in the order in which the requests ended.
    """
    waiting = iter([iter(c) for c in conversations])
    live: dict[str, _Live] = {}
    records: list[dict[str, Any]] = []
    tokens: list[list[int]] = []
    names = itertools.count()

    def send(turns: Iterator[Mapping[str, Any]]) -> bool:
        call = next(turns, None)
        if call is None:
            return False
        prompt = tuple(call["prompt"])
        sampling = SamplingParams(temperature=0.0, max_tokens=call["max_tokens"], ignore_eos=True)
        name = f"bench-{next(names)}"
        sent = time.perf_counter()
        engine.add(EngineRequest(name, prompt, sampling, use_prefix_cache=use_cache))
        live[name] = _Live(turns, len(prompt), call["max_tokens"], sent, [], [])
        return True

    def send_next() -> None:
        for turns in waiting:
            if send(turns):
                return

    wall, cpu = time.perf_counter(), time.process_time()
    try:
        for _ in range(streams):
            send_next()
        _drain(engine, live, records, tokens, send, send_next)
    finally:
        for name in list(live):  # only after an error
            engine.cancel(name)
    done = {"records": records, "wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return {**done, "tokens": tokens} if want_tokens else done


def _drain(
    engine: Engine, live: dict[str, _Live], records: list[dict[str, Any]], tokens: list[list[int]],
    send: Callable[[Iterator[Mapping[str, Any]]], bool], send_next: Callable[[], None],
) -> None:  # fmt: skip
    """Steps until nothing lives."""
    while live:
        out = engine.step()
        now = time.perf_counter()
        for event in out.tokens:
            request = live[event.request_id]
            if event.tokens:
                request.times.append(now)
                request.tokens.extend(t.token_id for t in event.tokens)
            if not event.request_done:
                continue
            del live[event.request_id]
            tokens.append(request.tokens)
            usage = event.usage
            records.append({
                "sent_s": request.sent_s, "times_s": request.times, "num_prompt": usage.prompt_tokens if usage else 0,
                "num_out": usage.completion_tokens if usage else 0, "asked_prompt": request.num_prompt, "asked_out": request.asked,
                "num_cached": usage.cached_tokens if usage else -1, "error": event.error.message if event.error else "",
            })  # fmt: skip
            if event.error is not None or not send(request.turns):
                send_next()


def build(args: argparse.Namespace) -> tuple[Engine, dict[str, Any]]:
    """The engine, and facts about it for the report."""
    config = EngineConfig(
        executor=args.executor, dtype=args.dtype, kv_dtype=args.kv_dtype, num_threads=args.threads, num_blocks=args.num_blocks,
        max_tokens_per_step=args.max_tokens_per_step, commit_kv=True,
    )  # fmt: skip
    slugs = [s for s in args.plugins.split(",") if s]
    host = PluginHost.load([s for s in slugs if "decode" in cards.read(s).services], MeshConfig(plugins=args.plugin_settings), service="decode")
    plugins = EnginePlugins.from_host(host, args.weight_format)
    manifest = load_manifest(args.model, args.weight_format or weight_format(config), args.store, slugs, args.plugin_settings)
    engine = build_engine(manifest, config, plugins)
    model = engine.model
    return engine, {
        "executor": resolve_executor(config, model.config.architecture), "format": manifest.format, "kv_codec": engine.layout.codec,
        "kv_dtype": engine.layout.dtype, "weight_bytes": sum(t.num_bytes for t in manifest.tensors), "threads": args.threads or len(os.sched_getaffinity(0)),
        "block_bytes": engine.layout.block_bytes, "vocab_size": model.config.vocab_size, "max_position": model.config.max_position,
        "uses_torch": "torch" in sys.modules,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the engine over standard input; see the module's text.")
    parser.add_argument("--model", type=pathlib.Path, required=True)
    parser.add_argument("--store", type=pathlib.Path, required=True)
    parser.add_argument("--executor", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--num-blocks", type=int, default=2048)
    parser.add_argument("--max-tokens-per-step", type=int, default=512)
    parser.add_argument("--plugins", default="", metavar="SLUG,...", help="plugins of the engine, as decode would load them")
    parser.add_argument("--plugin-settings", type=json.loads, default={}, metavar="JSON", help='their settings: {"slug": {"key": value}}')
    parser.add_argument("--weight-format", default="", help="of one of the plugins; empty: the executor's own")
    args = parser.parse_args()
    # The protocol has standard output for itself: whatever a library prints there goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logs.configure("error")
    try:
        engine, facts = build(args)
    except PlugmeshError as e:
        answers.write(json.dumps({"error": e.message}) + "\n")
        return 1
    gc.collect()  # as the services do: what was made until now need not be walked again in the middle of a step
    gc.freeze()
    answers.write(json.dumps({"ready": facts}) + "\n")
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            how = {"use_cache": ask.get("use_cache", True), "want_tokens": ask.get("want_tokens", False)}
            if ask.get("driven", False):
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # the services' loop
                    answer = runner.run(run_driven(engine, ask["conversations"], ask["streams"], **how))
            else:
                answer = run_closed_loop(engine, ask["conversations"], ask["streams"], **how)
        except PlugmeshError as e:  # a request that the engine refuses, such as one beyond the model's context
            answer = {"error": e.message}
        answers.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
