"""One workload against one OpenAI endpoint: what `plugmesh bench serve` runs."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass, field
from typing import Any

from plugmesh.bench import workloads
from plugmesh.bench.http_client import DIALECTS, Client
from plugmesh.bench.load import closed_loop, open_loop
from plugmesh.bench.metrics import Objectives, Run, summary
from plugmesh.bench.rounds import SCHEMA, Progress, describe_machine
from plugmesh.bench.systems import check_answer, served_model
from plugmesh.bench.workloads import Shape
from plugmesh.errors import FailedPrecondition, InvalidRequest


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What to send where. `rate` above 0 makes an open loop of conversations per second, else `streams` make a closed one."""

    url: str
    model: str = ""
    workload: str = "random"
    shape: Shape = field(default_factory=Shape)
    streams: int = 16
    rate: float = 0.0
    cv: float = 1.0
    dialect: str = "plugmesh"
    api_key: str = ""
    seed: int = 0
    objectives: Objectives = field(default_factory=Objectives)


async def run_serve(plan: ServePlan, progress: Progress | None = None) -> dict[str, Any]:
    """Runs the plan once and returns the report as plain data, with every request's times for plots.

    Raises:
        InvalidRequest, FailedPrecondition: A workload that does not exist, or not yet.
        Unavailable: The server does not answer.
    """
    progress = progress or Progress()
    if plan.dialect not in DIALECTS:
        raise InvalidRequest(f"unknown dialect {plan.dialect!r}; there are {', '.join(DIALECTS)}", param="dialect")
    conversations = workloads.make(plan.workload, plan.shape, plan.seed)
    warnings = []
    model = plan.model or await served_model(plan.url, plan.api_key)
    try:
        await check_answer(plan.url, model, plan.api_key)
    except FailedPrecondition as e:  # a model without general knowledge may be measured all the same
        warnings.append(e.message)
    client = Client(plan.url, model, DIALECTS[plan.dialect], api_key=plan.api_key)
    progress.begin(sum(map(len, conversations)))
    loop = f"open loop, {plan.rate:g}/s, cv {plan.cv:g}" if plan.rate else f"closed loop, {plan.streams} streams"
    title = f"{plan.workload}, {loop}: {plan.url}"
    progress.say(title)
    try:
        if plan.rate:
            times = workloads.arrivals(plan.rate, plan.seed, plan.cv)
            run = await open_loop(client, conversations, times, on_record=lambda r: progress.done(""))
        else:
            run = await closed_loop(client, conversations, plan.streams, on_record=lambda r: progress.done(""))
    finally:
        client.close()
    shape = {k: v for k, v in asdict(plan.shape).items() if k != "token_ids"}
    return {
        "schema": SCHEMA, "kind": "serve", "title": title, "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": describe_machine(),
        "plan": {"url": plan.url, "model": model, "workload": plan.workload, **shape, "streams": plan.streams, "rate": plan.rate, "cv": plan.cv, "seed": plan.seed},
        "warnings": warnings, "figures": summary(run, plan.objectives), "requests": requests_of(run),
    }  # fmt: skip


def requests_of(run: Run) -> list[dict[str, Any]]:
    """Each request's own figures, by the time it was sent."""
    good = sorted((r for r in run.records if r.is_ok), key=lambda r: r.sent_s)
    start = good[0].sent_s if good else 0.0
    return [
        {
            "sent_s": r.sent_s - start, "ttft_ms": r.ttft_s * 1e3, "e2e_ms": r.e2e_s * 1e3, "tpot_ms": r.tpot_s * 1e3 if r.num_out > 1 else None,
            "num_prompt": r.num_prompt, "num_out": r.num_out, "num_cached": r.num_cached,
        }
        for r in good
    ]  # fmt: skip
