"""`docs/leaderboard.md`: every plugin that was measured, from the `ab.json` beside its card, and which plugins go together."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from plugmesh.ab.report import main_gain, quality_delta
from plugmesh.bench.table import number

FILE = "ab.json"
PAIRS_FILE = "pairs.json"
_HEAD = """# What the plugins bring and cost

Made by `plugmesh ab --all --write` from the `ab.json` beside each plugin's card; not edited by hand. How it is measured and what the columns mean is in
[benchmarking](benchmarking.md#with-and-without-a-plugin). Gains above 1 are better, with their 95 % intervals; memory below 1 is less. Every row is a run on
one machine with one model, so it speaks of that; claims of papers stand on the cards. Good or bad, what was measured is here.
"""
_COLUMNS = (
    "plugin", "output", "prefill 512", "single stream", "32 streams", "served, 16 streams", "own workloads", "weights", "KV per token", "resident",
    "perplexity", "KL, nats", "same greedy text", "needle", "tasks", "machine", "date",
)  # fmt: skip
_CORE = ("prefill_512", "decode_1", "batch_32", "served_1", "served_16")


def read(folder: pathlib.Path) -> dict[str, Any] | None:
    """The report beside a card; None where there is none or it is of another schema."""
    try:
        report: dict[str, Any] = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    return report if report.get("schema") == 1 else None


def page(reports: Sequence[Mapping[str, Any]], pairs: Mapping[str, Any] | None = None) -> str:
    """The whole document."""
    rows = [row(r) for r in sorted(reports, key=lambda r: str(r["plugins"][0]["slug"]))]
    table = "\n".join(["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS), *rows])
    failures = [f"- {r['plugins'][0]['slug']}: {f['where']} ({f['side']}): {_plain(f['reason'])}" for r in reports for f in r["failures"]]
    parts = [_HEAD, table, ""]
    if failures:
        parts += ["What failed:", *failures, ""]
    if pairs:
        parts += [matrix(pairs), ""]
    return "\n".join(parts)


def row(report: Mapping[str, Any]) -> str:
    """One line of the table."""
    plugin = report["plugins"][0]
    ratios = report["memory"]["ratios"]
    own = [r for r in report["speed"] if r["is_main"] and r["workload"] not in _CORE]
    output = report["declared"] if report["holds"] else f"**not {report['declared']}**"
    cells = [
        f"[{plugin['slug']}](../plugins/plugmesh_{plugin['slug']}/README.md) {plugin['version']}", output if report["fidelity"] else f"{output}, not checked",
        *(_gain(main_gain(report, name)) for name in ("prefill_512", "decode_1", "batch_32", "served_16")),
        "<br>".join(f"{r['workload']} ({r['tier']}): {_gain(r)}" for r in own) or "-",
        *(f"{number(ratios[k])}×" if k in ratios else "-" for k in ("weight_bytes", "kv_bytes_per_token", "pss")),
        _delta(report, "perplexity_ratio", "×"), _delta(report, "kl_nats"), _delta(report, "identical_continuations", percent=True),
        _delta(report, "needle_points", " points"), _delta(report, "tasks_points", " points"),
        f"{report['machine']['cpu']}, {report['machine']['cores']} cores", report["finished"][:10],
    ]  # fmt: skip
    return "| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |"


def _gain(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    g = found["gain"]
    return f"{g['value']:.2f}× ({g['low']:.2f}-{g['high']:.2f})"


def _delta(report: Mapping[str, Any], name: str, unit: str = "", *, percent: bool = False) -> str:
    delta = quality_delta(report, name)
    if delta is None:
        return "-"
    return f"{delta['value']:.0%}" if percent else f"{number(delta['value'], 4)}{unit}"


def _plain(text: str) -> str:
    return " ".join(text.split())[:200]


MARKS = {"same": "same output", "runs": "runs", "conflict": "conflict", "differs": "**differs**", "fails": "**fails**", "self": "·"}


def matrix(pairs: Mapping[str, Any]) -> str:
    """Which plugins go together; the reasons of conflicts and failures below."""
    slugs = pairs["plugins"]
    found = {frozenset((p["a"], p["b"])): p for p in pairs["pairs"]}
    lines = [
        "## Which plugins go together", "",
        f"Made by `plugmesh ab --pairs --write` on {pairs['finished'][:10]}: both are loaded and generate. *same output*: the tokens are those of a run without plugins, which",
        "is required where both are exact; *runs*: it generates, and output may differ because one is approximate; *conflict*: the cards forbid it. What decode loads",
        "alone is tried two by two in an engine; the others in whole meshes, as many at once as go together and keep the same promise about output.", "",
        "| | " + " | ".join(slugs) + " |", "|" + "---|" * (len(slugs) + 1),
    ]  # fmt: skip
    for a in slugs:
        cells = [MARKS["self"] if a == b else MARKS[found[frozenset((a, b))]["state"]] if frozenset((a, b)) in found else "-" for b in slugs]
        lines.append(f"| {a} | " + " | ".join(cells) + " |")
    reasons = [f"- {p['a']} and {p['b']}: {_plain(p['reason'])}" for p in pairs["pairs"] if p["reason"]]
    return "\n".join([*lines, "", *reasons]) if reasons else "\n".join(lines)


def write_report(report: Mapping[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Beside the card; only what a full run found is kept there. Returns the file."""
    path = folder / FILE
    path.write_text(dumps(report), encoding="utf-8")
    return path


def dumps(report: Mapping[str, Any]) -> str:
    """JSON without NaN, which JSON has none of, and without paths of this machine in the command."""
    return json.dumps(plain({**report, "command": _without_paths(str(report.get("command", "")))}), indent=1) + "\n"


def plain(value: Any) -> Any:
    """The same with None for numbers that are not finite."""
    import math

    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_paths(command: str) -> str:
    return " ".join(pathlib.PurePath(word).name if word.startswith("/") else word for word in command.split())
