"""Reports as one page that needs nothing else: styles, tables and SVG plots inside."""

from __future__ import annotations

from html import escape
from typing import Any

from plugmesh.bench import svg
from plugmesh.bench.table import main_figure, medians, number

_STYLE = """
:root{color-scheme:light dark;--ink:#1f2937;--soft:#6b7280;--line:#e5e7eb;--back:#fff;--card:#f9fafb;--good:#15803d;--fair:#a16207;--bad:#b91c1c}
@media(prefers-color-scheme:dark){:root{--ink:#e5e7eb;--soft:#9ca3af;--line:#374151;--back:#111827;--card:#1f2937;--good:#4ade80;--fair:#facc15;--bad:#f87171}}
*{box-sizing:border-box}body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:1060px;margin:2.5rem auto;padding:0 1.25rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .7rem}p{margin:.3rem 0}.soft,.empty{color:var(--soft)}code{font-size:.85em}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}th,td{padding:.38rem .6rem;border-bottom:1px solid var(--line);text-align:right;vertical-align:top}
th{font-weight:600;color:var(--soft);font-size:.85em}th:first-child,td:first-child{text-align:left}td.left,th.left{text-align:left}td small{color:var(--soft);display:block}
.aim{color:var(--good);font-weight:600}.must{color:var(--fair);font-weight:600}.missed,.missing{color:var(--bad);font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1rem}.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;min-width:0}
.card h3{font-size:.95rem;margin:0}.card p{font-size:.82rem}svg{width:100%;height:auto;display:block;margin-top:.3rem}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .tick,svg .label{fill:var(--soft);font-size:11px}svg .rule{stroke:var(--line);fill:none}
svg .spread{stroke:var(--ink);fill:none;stroke-width:1.3}svg .curve{fill:none;stroke-width:1.8}.scroll{overflow-x:auto}.warn{border-left:3px solid var(--fair);padding-left:.8rem}
@media(max-width:520px){.grid{grid-template-columns:1fr}}
"""
_UNITS = {"ratio": "×", "inverse": "×", "increase": " %", "added": " ms"}


def page(report: dict[str, Any]) -> str:
    """The whole page of a report of `run_rounds` or `run_serve`."""
    is_serve = report["kind"] == "serve"
    title = "plugmesh bench serve" if is_serve else f"plugmesh bench {report['kind']}"
    return document(title, report, _serve(report) if is_serve else _comparison(report))


def document(title: str, report: dict[str, Any], body: str) -> str:
    """A page around a body: style, title, and from the report the machine, the time and the command."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{_machine(report)}{body}</body></html>\n"
    )


def _machine(report: dict[str, Any]) -> str:
    m = report["machine"]
    facts = [m["cpu"], f"{m['cores']} cores", " ".join(m["features"]), f"{m['memory_bytes'] / 1e9:.0f} GB"]
    if m.get("memory_read_gb_s"):
        facts.append(f"reads {m['memory_read_gb_s']:.0f} GB/s")
    facts += [f"Python {m['python']}", f"load before {m['load_before']:.1f}", report["finished"].replace("T", " ")]
    command = f"<p class=soft><code>{escape(report['command'])}</code></p>" if report.get("command") else ""
    quick = "<p class=warn>A quick run: tiny workloads, to see that everything works. The figures mean nothing.</p>" if report.get("is_quick") else ""
    return f"<p class=soft>{escape(' · '.join(f for f in facts if f))}</p>{command}{quick}"


def _comparison(report: dict[str, Any]) -> str:
    parts = []
    if report["lines"] and not report.get("is_quick"):
        parts.append(_goals(report))
    parts.append(_systems(report))
    cards = []
    for measure, content in report["measures"].items():
        shown = [main_figure(measure)] + ([("tpot_ms.p50", "ms per token")] if measure == "overhead_16" else [])
        for path, unit in shown:
            found = medians(report, measure, path)
            if found:
                plot = svg.bars({n: (s.median, s.low, s.high) for n, s in found.items()}, unit)
                cards.append(f"<div class=card><h3>{escape(content['title'])}</h3><p class=soft>{escape(unit)}, median and spread of the rounds</p>{plot}</div>")
    parts.append(f"<h2>Figures</h2><div class=grid>{''.join(cards)}</div>")
    parts.append(_rounds(report) + _memory(report) + _details(report))
    if report["failures"]:
        rows = "".join(f"<tr><td>{escape(f['system'])}</td><td class=left>{escape(f['measure'])}</td><td class=left>{escape(f['reason'])}</td></tr>" for f in report["failures"])
        parts.append(f"<h2>Failures</h2><table><tr><th>system<th class=left>measure<th class=left>reason</tr>{rows}</table>")
    return "".join(parts)


def _goals(report: dict[str, Any]) -> str:
    rows = ""
    for line in report["lines"]:
        unit, v = _UNITS[line["kind"]], line["value"]
        rows += (
            f"<tr><td>{escape(line['title'])}</td><td>{escape(line['ours'])} {number(line['ours_value']['median'])}</td>"
            f"<td>{escape(line['against'])} {number(line['against_value']['median'])}</td>"
            f"<td class={line['verdict']}>{v['median']:.2f}{unit}<small>{v['low']:.2f} to {v['high']:.2f}</small></td>"
            f"<td>{line['must']:g}{unit}</td><td>{line['aim']:g}{unit}</td><td class={line['verdict']}>{line['verdict']}</td></tr>"
        )
    memory = report.get("memory_line")
    if memory:
        rows += (
            f"<tr><td>memory of prefill + decode</td><td>RSS {memory['rss'] / 1e6:.0f} MB</td><td></td><td class={memory['verdict']}>PSS {memory['pss'] / 1e6:.0f} MB</td>"
            f"<td>{memory['must'] / 1e6:.0f} MB</td><td>{memory['aim'] / 1e6:.0f} MB</td><td class={memory['verdict']}>{memory['verdict']}</td></tr>"
        )
    share = report.get("bandwidth_share")
    note = f"<p class=soft>Single-stream decode reads its weights at {share:.0%} of the measured memory bandwidth.</p>" if share else ""
    head = "<tr><th>line<th>ours<th>against<th>value<th>must<th>aim<th></tr>"
    return f"<h2>Against the goals</h2><div class=scroll><table>{head}{rows}</table></div>{note}"


def _systems(report: dict[str, Any]) -> str:
    rows = ""
    for name, s in report["systems"].items():
        if s["state"] == "measured":
            facts = ", ".join(str(s[k]) for k in ("version", "executor", "format", "kv_codec") if s.get(k))
            checked = {True: "answers rightly", None: "no text to check"}.get(s.get("verified"), "")
            rows += f"<tr><td>{escape(name)}</td><td class=left>{escape(s['title'])}<small>{escape(facts)}</small></td><td class=left>measured<small>{checked}</small></td></tr>"
        else:
            rows += f"<tr><td>{escape(name)}</td><td class=left>{escape(s['title'])}</td><td class='left missing'>not measured<small>{escape(s['reason'])}</small></td></tr>"
    return f"<h2>Systems</h2><table><tr><th>name<th class=left>what<th class=left>state</tr>{rows}</table>"


def _rounds(report: dict[str, Any]) -> str:
    """Every round of the figure that a measure is about: drift and disturbances show here."""
    cards = []
    for measure, content in report["measures"].items():
        path, unit = main_figure(measure)
        series = {name: [(r["round"] + 1, v) for r in runs if (v := _figure(r, path)) is not None] for name, runs in content["runs"].items()}
        if max((len(p) for p in series.values()), default=0) > 2:
            cards.append(f"<div class=card><h3>{escape(content['title'])}</h3>{svg.lines(series, 'round', unit, width=460, height=210)}</div>")
    return f"<h2>Round by round</h2><div class=grid>{''.join(cards)}</div>" if cards else ""


def _memory(report: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(system)}</td><td class=left>{escape(part)}</td><td>{used['rss'] / 1e6:.0f}</td><td>{used['pss'] / 1e6:.0f}</td></tr>"
        for system, parts in report["memory"].items() for part, used in parts.items()
    )
    return f"<h2>Memory after the last round</h2><table><tr><th>system<th class=left>part<th>RSS, MB<th>PSS, MB</tr>{rows}</table>" if rows else ""


def _details(report: dict[str, Any]) -> str:
    rows = ""
    for content in report["measures"].values():
        for system, runs in content["runs"].items():
            middle = runs[len(runs) // 2]
            cells = "".join(
                f"<td>{number(_figure(middle, p))}</td>" for p in ("output_tok_s", "ttft_ms.p50", "ttft_ms.p99", "tpot_ms.p50", "itl_ms.p99", "server_cpu_s", "client_cpu_s")
            )
            rows += f"<tr><td>{escape(content['title'])}</td><td class=left>{escape(system)}</td>{cells}</tr>"
    head = "<tr><th>measure<th class=left>system<th>output tok/s<th>TTFT p50<th>TTFT p99<th>TPOT p50<th>ITL p99<th>server CPU s<th>client CPU s</tr>"
    return f"<h2>One round in detail</h2><p class=soft>The round in the middle; times in milliseconds.</p><div class=scroll><table>{head}{rows}</table></div>"


def _serve(report: dict[str, Any]) -> str:
    f = report["figures"]
    head = "".join(f"<th>{c}" for c in ("mean", "p50", "p90", "p95", "p99", "max"))
    rows = ""
    for key, label in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("itl_ms", "ITL"), ("e2e_ms", "E2E")):
        if f.get(key):
            rows += f"<tr><td>{label}</td>" + "".join(f"<td>{number(f[key][c])}</td>" for c in ("mean", "p50", "p90", "p95", "p99", "max")) + "</tr>"
    facts = [f"{f['num_requests']} requests, {f['num_failed']} failed", f"{number(f['output_tok_s'])} output tok/s", f"{number(f['requests_s'])} requests/s"]
    if "goodput" in f:
        facts.append(f"goodput {number(f['goodput']['requests_s'])} requests/s ({f['goodput']['share']:.0%})")
    facts.append(f"load generator {f['client_cpu_s']:.2f} s of CPU")
    warnings = "".join(f"<p class=warn>{escape(w)}</p>" for w in report["warnings"])
    if f["num_inexact"]:
        warnings += f"<p class=warn>{f['num_inexact']} prompts or answers had other lengths than asked for.</p>"
    requests = report["requests"]
    plots = [
        ("Time to the first token", "share of requests at most so slow", svg.lines({"ttft": svg.cumulative([r["ttft_ms"] for r in requests])}, "ms", "%", step=True)),
        ("Time per output token", "share of requests at most so slow", svg.lines({"tpot": svg.cumulative([r["tpot_ms"] for r in requests if r["tpot_ms"] is not None])}, "ms", "%", step=True)),
        ("First token over the run", "each request by the time it was sent", svg.lines({"ttft": [(r["sent_s"], r["ttft_ms"]) for r in requests]}, "s", "TTFT, ms", dots=True)),
        ("Requests in flight", "sent and not yet ended", svg.lines({"in flight": in_flight(requests)}, "s", "requests", step=True)),
    ]  # fmt: skip
    cards = "".join(f"<div class=card><h3>{t}</h3><p class=soft>{sub}</p>{plot}</div>" for t, sub, plot in plots)
    return (
        f"<p>{escape(report['title'])}</p><p><b>{escape(' · '.join(facts))}</b></p>{warnings}<h2>Milliseconds</h2>"
        f"<table><tr><th>{head}</tr>{rows}</table><h2>Plots</h2><div class=grid>{cards}</div>"
    )


def in_flight(requests: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """How many requests were open, at every moment at which that changed."""
    changes = sorted([(r["sent_s"], 1) for r in requests] + [(r["sent_s"] + r["e2e_ms"] / 1e3, -1) for r in requests])
    found, now = [], 0
    for at, change in changes:
        now += change
        found.append((at, float(now)))
    return found


def _figure(run: dict[str, Any], path: str) -> float | None:
    value: Any = run
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None
