"""A report as one page with plots that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from plugmesh.ab.table import MEMORY, NEUTRAL, against_reference, bytes_of, gain_verdict, spread, verdict
from plugmesh.bench import svg
from plugmesh.bench.html import document
from plugmesh.bench.table import number

_CLASS = {"good": "aim", "bad": "missed", "same": ""}


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    names = " + ".join(p["slug"] for p in report["plugins"])
    parts = [_plugins(report), _output(report)]
    if report["speed"]:
        parts.append(_speed(report))
    if report["memory"]["sides"]:
        parts.append(_memory(report))
    if report["quality"]:
        parts.append(_quality(report))
    if report["failures"]:
        rows = "".join(f"<tr><td>{escape(f['where'])}</td><td class=left>{escape(f['side'])}</td><td class=left>{escape(f['reason'])}</td></tr>" for f in report["failures"])
        parts.append(f"<h2>Failures</h2><table><tr><th>where<th class=left>side<th class=left>reason</tr>{rows}</table>")
    return document(f"plugmesh ab {names}", dict(report), "".join(parts))


def _plugins(report: Mapping[str, Any]) -> str:
    return "".join(f"<p><b>{escape(p['slug'])} {escape(p['version'])}</b>, {escape(p['fidelity'])}: {escape(p['summary'])}</p>" for p in report["plugins"])


def _output(report: Mapping[str, Any]) -> str:
    found = ""
    for tier, v in report["fidelity"].items():
        shares = ", ".join(f"{share:.0%} of {kind} outputs the same" for kind, share in v["shares"].items())
        text = f"Output ({tier}): {shares}; declared {v['declared']}." if v["holds"] else f"The card says {v['declared']}, but {v['difference']} ({tier})."
        found += f"<p class={'aim' if v['holds'] else 'missed'}>{escape(text)}</p>"
    for p in report["promises"]:
        text = f"{p['metric']} {number(p['value'], 4)}, the card promises {number(p['bound'], 4)}."
        found += f"<p class={'aim' if p['holds'] else 'missed'}>{escape(text)}</p>"
    return found


def _speed(report: Mapping[str, Any]) -> str:
    rows, cards = "", []
    for row in report["speed"]:
        g = row["gain"]
        kind = _CLASS[gain_verdict(row)]
        rows += (
            f"<tr><td>{escape(row['title'])}<small>{escape(row['unit'])}</small></td><td>{number(row['without'])}</td><td>{number(row['with'])}</td>"
            f"<td class='{kind}'>{number(g['value'])}×<small>{number(g['low'])} to {number(g['high'])}</small></td></tr>"
        )
        each = row["rounds"]
        bars = svg.bars({side: (row[side], min(each[side]), max(each[side])) for side in ("without", "with")}, row["unit"])
        plot = svg.lines({side: list(enumerate(each[side], 1)) for side in ("without", "with")}, "round", row["unit"], width=460, height=170) if len(each["with"]) > 2 else ""
        cards.append(f"<div class=card><h3>{escape(row['title'])}</h3><p class=soft>{escape(row['unit'])}, median and range of the rounds</p>{bars}{plot}</div>")
    head = "<tr><th>workload<th>without<th>with<th>gain</tr>"
    note = f"<p class=soft>Medians of {report['num_rounds']} rounds; a gain above 1 is better with the plugin; 95 % bootstrap interval over the ratios of paired rounds.</p>"
    return f"<h2>Speed</h2>{note}<table>{head}{rows}</table><h2>Round by round</h2><div class=grid>{''.join(cards)}</div>"


def _memory(report: Mapping[str, Any]) -> str:
    sides, rows, cards = report["memory"]["sides"], "", []
    for key, title in MEMORY.items():
        values = {s: sides[s][key] for s in ("without", "with") if key in sides.get(s, {})}
        if not values:
            continue
        ratio = report["memory"]["ratios"].get(key)
        cells = "".join(f"<td>{bytes_of(values[s]) if s in values else '-'}</td>" for s in ("without", "with"))
        rows += f"<tr><td>{escape(title)}</td>{cells}<td>{number(ratio) if ratio else '-'}×</td></tr>"
        unit, scale = ("kB", 1e3) if key == "kv_bytes_per_token" else ("MB", 1e6)
        if key in ("weight_bytes", "kv_bytes_per_token", "pss"):
            plot = svg.bars({s: (v / scale,) * 3 for s, v in values.items()}, unit)
            cards.append(f"<div class=card><h3>{escape(title)}, {unit}</h3>{plot}</div>")
    return f"<h2>Memory</h2><table><tr><th>of<th>without<th>with<th>with / without</tr>{rows}</table><div class=grid style='margin-top:1rem'>{''.join(cards)}</div>"


def _quality(report: Mapping[str, Any]) -> str:
    rows, cards = "", []
    for q in report["quality"]:
        figures = q["figures"]
        names = [n for n in dict.fromkeys(k for f in figures.values() for k in f) if not n.startswith("num_")]
        for i, name in enumerate(names):
            cells = "".join(f"<td>{number(figures.get(s, {}).get(name), 4)}</td>" for s in ("without", "with", "reference"))
            rows += f"<tr><td>{escape(q['title']) if i == 0 else ''}<small>{escape(name)}</small></td>{cells}<td></td></tr>"
        for i, delta in enumerate(q["deltas"]):
            kind = _CLASS[verdict(delta["value"], delta["low"], delta["high"], neutral=NEUTRAL.get(delta["name"], 0.0), better=delta["better"])]
            cells = "".join(f"<td class=soft>{against_reference(q, s, delta['name'])}</td>" for s in ("without", "with"))
            title = escape(q["title"]) if i == 0 and not names else ""
            rows += f"<tr><td>{title}<small>{escape(delta['name'])}</small></td>{cells}<td></td><td class='{kind}'>{escape(spread(delta, 4))}</td></tr>"
        if len(names) > 1:
            groups = "".join(
                f"<p class=soft>{escape(n)}</p>" + svg.bars({s: (figures[s][n],) * 3 for s in figures if n in figures[s]}, n) for n in names if n != "all"
            )
            cards.append(f"<div class=card><h3>{escape(q['title'])}</h3>{groups}</div>")
    head = "<tr><th>metric<th>without<th>with<th>float32 reference<th>difference</tr>"
    note = "<p class=soft>In rows with a difference, the columns of the sides hold the same against the float32 reference, where it was asked.</p>"
    return f"<h2>Quality</h2>{note}<table>{head}{rows}</table><div class=grid style='margin-top:1rem'>{''.join(cards)}</div>"
