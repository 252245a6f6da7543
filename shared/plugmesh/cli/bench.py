"""`plugmesh bench`: the engine alone, any server, what the mesh costs, and other systems beside ours."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from plugmesh.bench.rounds import Progress
    from plugmesh.bench.systems import Setting, System

bench_app = typer.Typer(help="Measure speed: the engine, a server, the mesh's overhead, other systems.", no_args_is_help=True)

Model = Annotated[str, typer.Option("--model", "-m", help="Known name, or path of a GGUF file.")]
Rounds = Annotated[int, typer.Option("--rounds", "-r", min=1, help="Interleaved rounds; medians are over these.")]
Seed = Annotated[int, typer.Option(help="Of prompts and arrivals.")]
JsonFile = Annotated[pathlib.Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON; '-' is standard output.")]
HtmlFile = Annotated[pathlib.Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots.")]
Threads = Annotated[int, typer.Option(min=0, help="Threads of every system; 0 takes all cores.")]
Executor = Annotated[str, typer.Option(help="Of our engine: auto, native or torch.")]
KvDtype = Annotated[str, typer.Option(help="Of our native engine's KV: bfloat16 or int8.")]
Only = Annotated[list[str] | None, typer.Option("--measure", help="Only this measure; repeat for several.")]
Quick = Annotated[bool, typer.Option("--quick", help="Tiny workloads, to see that everything runs; figures mean nothing.")]


@bench_app.command("engine")
def engine(
    model: Model = "smollm2", rounds: Rounds = 5, measure: Only = None, threads: Threads = 0, executor: Executor = "auto", kv_dtype: KvDtype = "bfloat16",
    seed: Seed = 0, json: JsonFile = None, html: HtmlFile = None, quick: Quick = False,
) -> None:  # fmt: skip
    """The engine alone, in one process: prefill, single stream, batches, long context."""
    from plugmesh.bench.systems import EngineSystem

    with setting(model, threads, executor, kv_dtype) as s:
        _compare("engine", [EngineSystem(s)], measure, rounds, seed, json, html, quick)


@bench_app.command("overhead")
def overhead(
    model: Model = "smollm2", rounds: Rounds = 7, threads: Threads = 0, executor: Executor = "auto", kv_dtype: KvDtype = "bfloat16",
    seed: Seed = 0, json: JsonFile = None, html: HtmlFile = None, quick: Quick = False,
) -> None:  # fmt: skip
    """What the mesh costs: the same requests through it and in one process, in turns."""
    from plugmesh.bench.systems import EngineSystem, MeshSystem

    with setting(model, threads, executor, kv_dtype) as s:
        _compare("overhead", [EngineSystem(s), MeshSystem(s)], None, rounds, seed, json, html, quick)


@bench_app.command("peers")
def peers(
    model: Model = "smollm2",
    rounds: Rounds = 5,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this system (engine, mesh, llama.cpp, vllm, transformers); repeat for several.")] = None,
    measure: Only = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Install the peers, each in its own environment, and measure nothing.")] = False,
    threads: Threads = 0, executor: Executor = "auto", kv_dtype: KvDtype = "bfloat16", seed: Seed = 0, json: JsonFile = None, html: HtmlFile = None,
    quick: Quick = False,
) -> None:  # fmt: skip
    """The same work on llama.cpp's server, vLLM on CPU and transformers, in turns with ours."""
    from plugmesh.bench.measures import PEER_NAMES
    from plugmesh.bench.peers import PEERS
    from plugmesh.bench.systems import EngineSystem, MeshSystem, PeerSystem
    from plugmesh.errors import InvalidRequest

    names = tuple(only or ("engine", "mesh", *PEER_NAMES))
    for name in names:
        if name not in ("engine", "mesh", *PEERS):
            raise InvalidRequest(f"unknown system {name!r}; there are engine, mesh, {', '.join(PEERS)}", param="only")
    if prepare:
        raise typer.Exit(_prepare([n for n in names if n in PEERS]))
    with setting(model, threads, executor, kv_dtype) as s:
        systems: list[System] = []
        for name in names:
            systems.append(EngineSystem(s) if name == "engine" else MeshSystem(s) if name == "mesh" else PeerSystem(PEERS[name], s))
        _compare("peers", systems, measure, rounds, seed, json, html, quick)


@bench_app.command("serve")
def serve(
    url: Annotated[str, typer.Option("--url", help="An OpenAI endpoint, with or without /v1.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Name to ask for; empty asks the server.")] = "",
    workload: Annotated[str, typer.Option(help="random, prefix-tree, multi-turn, long-context or json-schema.")] = "random",
    streams: Annotated[int, typer.Option("--streams", "-n", min=1, help="Closed loop: callers at once.")] = 16,
    rate: Annotated[float, typer.Option(min=0, help="Open loop: conversations per second; 0 is a closed loop.")] = 0.0,
    cv: Annotated[float, typer.Option(min=0.01, help="Open loop: coefficient of variation of the gaps; 1 is Poisson, more is burstier.")] = 1.0,
    requests: Annotated[int, typer.Option(min=1, help="Conversations to send.")] = 64,
    num_in: Annotated[int, typer.Option("--in", min=1, help="Prompt tokens (multi-turn: that a turn adds).")] = 128,
    num_out: Annotated[int, typer.Option("--out", min=1, help="Answer tokens.")] = 64,
    spread: Annotated[float, typer.Option(min=0, max=0.99, help="Lengths vary by this share.")] = 0.0,
    turns: Annotated[int, typer.Option(min=1, help="multi-turn: turns of a conversation.")] = 4,
    prefix: Annotated[int, typer.Option(min=1, help="prefix-tree: tokens of the prompt that are shared.")] = 96,
    depth: Annotated[int, typer.Option(min=1, help="prefix-tree: levels.")] = 2,
    branching: Annotated[int, typer.Option(min=1, help="prefix-tree: children per node.")] = 4,
    dialect: Annotated[str, typer.Option(help="plugmesh, vllm, llama.cpp or openai (which cannot fix the length of answers).")] = "plugmesh",
    slo_ttft_ms: Annotated[float, typer.Option(min=0, help="Objective for goodput; 0 is none.")] = 0.0,
    slo_tpot_ms: Annotated[float, typer.Option(min=0, help="Objective for goodput; 0 is none.")] = 0.0,
    slo_e2e_ms: Annotated[float, typer.Option(min=0, help="Objective for goodput; 0 is none.")] = 0.0,
    api_key: Annotated[str, typer.Option("--api-key", envvar="PLUGMESH_API_KEY", help="When the server wants one.")] = "",
    seed: Seed = 0, json: JsonFile = None, html: HtmlFile = None,
) -> None:  # fmt: skip
    """Any OpenAI endpoint: closed loop (--streams) or open loop (--rate); TTFT, TPOT, ITL, goodput, percentiles."""
    from plugmesh.bench.metrics import Objectives
    from plugmesh.bench.serve import ServePlan, run_serve
    from plugmesh.bench.workloads import Shape

    shape = Shape(
        num_conversations=requests, num_in=num_in, num_out=num_out, spread=spread, num_turns=turns, prefix_tokens=prefix, depth=depth, branching=branching
    )
    plan = ServePlan(
        url=url, model=model, workload=workload, shape=shape, streams=streams, rate=rate, cv=cv, dialect=dialect, api_key=api_key, seed=seed,
        objectives=Objectives(slo_ttft_ms, slo_tpot_ms, slo_e2e_ms),
    )  # fmt: skip
    raise typer.Exit(_serve(plan, run_serve, json, html))


@bench_app.command("structured")
def structured(
    model: Model = "smollm2", rounds: Rounds = 5,
    only: Annotated[list[str] | None, typer.Option("--only", help="Only this part (suite, extraction, overhead, mesh-overhead, times, jump); repeat for several.")] = None,
    engines: Annotated[list[str] | None, typer.Option("--engine", help="Only this grammar engine; repeat for several, in the order in which a mesh tries them.")] = None,
    seeds: Annotated[int, typer.Option("--outputs", min=1, help="Outputs of every schema of the suite, each with a seed of its own.")] = 3,
    write: Annotated[bool, typer.Option("--write", help="Write docs/measurements/DATE-structured.md, in a source tree.")] = False,
    threads: Threads = 0, executor: Executor = "auto", kv_dtype: KvDtype = "bfloat16", seed: Seed = 0, json: JsonFile = None, quick: Quick = False,
) -> None:  # fmt: skip
    """Constrained output: whether it validates, what a schema costs per token and to compile, and what jump-forward saves."""
    from plugmesh.bench.structured import report as r
    from plugmesh.bench.structured.meshes import repository
    from plugmesh.bench.structured.table import page, print_report
    from plugmesh.cli import output
    from plugmesh.errors import InvalidRequest

    plan = r.Plan(tuple(only or r.PARTS), tuple(engines or r.ENGINES), seed, rounds, seeds, quick)
    for names, known, option in ((plan.parts, r.PARTS, "only"), (plan.engines, r.ENGINES, "engine")):
        if name := r.unknown(names, known):
            raise InvalidRequest(f"--{option} {name}: there are {', '.join(known)}", param=option)
    if write and quick:
        raise InvalidRequest("--write keeps full runs; leave --quick away", param="write")
    with setting(model, threads, executor, kv_dtype) as s, progress() as told:
        report = r.measure(s, plan, told)
    print_report(output.err if str(json) == "-" else output.out, report)
    _write(report, json, None)
    root = repository()
    if write and root is not None:
        path = root / "docs" / "measurements" / f"{report['finished'][:10]}-structured.md"
        path.write_text(page(report), encoding="utf-8")
        output.err.print(f"written: {path}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if not report["failures"] and (quick or all(g["holds"] for g in report["goals"])) else 1)


@contextlib.contextmanager
def setting(model: str, threads: int, executor: str, kv_dtype: str) -> Iterator[Setting]:
    """The common setting, with a folder that is deleted at the end. Raises NotFound when the model is not on this machine."""
    import tempfile

    from plugmesh import models
    from plugmesh.bench.systems import Setting
    from plugmesh.cli import output
    from plugmesh.errors import NotFound

    output.quiet_logs()
    path = models.find(model)
    if path is None:
        raise NotFound(f"the model {model!r} is not on this machine; `plugmesh pull {model}` fetches it")
    with tempfile.TemporaryDirectory(prefix="plugmesh-bench-") as folder:
        yield Setting(path, pathlib.Path(folder), threads=threads, executor=executor, kv_dtype=kv_dtype)


def _compare(
    kind: str, systems: list[System], only: list[str] | None, rounds: int, seed: int, json: pathlib.Path | None, html: pathlib.Path | None, quick: bool
) -> None:
    import asyncio

    from plugmesh.bench import measures
    from plugmesh.bench.rounds import run_rounds
    from plugmesh.bench.table import print_report
    from plugmesh.cli import output
    from plugmesh.errors import InvalidRequest

    names = tuple(only or measures.MEASURE_SETS[kind])
    unknown = [n for n in names if n not in measures.MEASURES]
    if unknown:
        raise InvalidRequest(f"unknown measure {unknown[0]!r}; there are {', '.join(measures.MEASURES)}", param="measure")
    chosen = [measures.MEASURES[n] for n in names]
    if quick:
        chosen = [measures.scaled(x, max_tokens=8) for x in chosen]
    with progress() as told:
        report = asyncio.run(run_rounds(systems, chosen, num_rounds=rounds, seed=seed, kind=kind, progress=told, warm_up=not quick))
    report["is_quick"] = quick
    print_report(output.err if str(json) == "-" else output.out, report)
    _write(report, json, html)
    raise typer.Exit(0 if all(s["state"] == "measured" for s in report["systems"].values()) and not report["failures"] else 1)


def _serve(plan: Any, run_serve: Any, json: pathlib.Path | None, html: pathlib.Path | None) -> int:
    import asyncio

    from plugmesh.bench.table import print_run
    from plugmesh.cli import output

    output.quiet_logs()
    with progress() as told:
        report = asyncio.run(run_serve(plan, told))
    print_run(output.err if str(json) == "-" else output.out, report["title"], report["figures"])
    _write(report, json, html)
    return 0 if not report["figures"]["num_failed"] else 1


def _write(report: dict[str, Any], json: pathlib.Path | None, html: pathlib.Path | None) -> None:
    import json as codec
    import math

    from plugmesh.cli import output

    def plain(value: Any) -> Any:  # JSON has no NaN
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    if json is not None and str(json) == "-":
        output.print_json(plain(report))
    elif json is not None:
        json.write_text(codec.dumps(plain(report), indent=1) + "\n", encoding="utf-8")
    if html is not None:
        from plugmesh.bench.html import page

        html.write_text(page(report), encoding="utf-8")


def _prepare(names: list[str]) -> int:
    from plugmesh.bench import peers as p
    from plugmesh.cli import output
    from plugmesh.errors import FailedPrecondition

    status = 0
    for name in names:
        with output.err.status(f"preparing {name}"):
            try:
                p.prepare(p.PEERS[name], None, lambda text: output.err.print(text, markup=False, soft_wrap=True))
            except FailedPrecondition as e:
                output.print_error(e.message)
                status = 1
    return status


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A bar on a terminal, lines elsewhere; both on standard error."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    from plugmesh.bench.rounds import Progress
    from plugmesh.cli import output

    if not output.err.is_terminal:
        yield Progress(say=lambda text: output.err.print(text, markup=False, soft_wrap=True))
        return
    # Four refreshes a second: the bar runs beside the load generator.
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=output.err, transient=True, refresh_per_second=4) as bar:
        task = bar.add_task("", total=None)
        yield Progress(
            say=lambda text: bar.update(task, description=text), begin=lambda num: bar.update(task, total=num), done=lambda _: bar.advance(task)
        )
