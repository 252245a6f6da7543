"""A run in pictures: figures summed up, curves as PNG, one HTML page that needs nothing else.

    python -m plugmesh_rollout.loop.curves FOLDER [FOLDER ...]
"""

from __future__ import annotations

import base64
import collections
import html
import io
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from plugmesh_rollout.loop.folder import RunFolder

Figures = Mapping[str, Sequence[Mapping[str, Any]]]


def by_step(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The trainer's lines, the last of each step: a step that was done again after a restart counts once."""
    return list({line["step"]: line for line in lines if "step" in line}.values())


def idle_share(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Of a worker, from its first piece of work to its last line, over all lives of its process; None before it began."""
    busy = alive = 0.0
    last: Mapping[str, Any] = {"busy_s": 0.0, "alive_s": 0.0}
    for line in [*lines, {"busy_s": 0.0, "alive_s": -1.0}]:
        if line["alive_s"] < last["alive_s"]:  # a new life
            busy, alive = busy + last["busy_s"], alive + last["alive_s"]
        last = line
    return 1.0 - busy / alive if alive else None


def lag_histogram(lines: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Versions behind to trained tokens."""
    total: collections.Counter[int] = collections.Counter()
    for line in by_step(lines):
        total.update({int(k): v for k, v in line["lags"].items()})
    return dict(sorted(total.items()))


def summary(figures: Figures) -> dict[str, Any]:
    """Of a whole run, as far as it has come."""
    steps = by_step(figures.get("trainer-0", ()))
    measured = [line for line in steps if "accuracy" in line]
    spent = steps[-1]["time_s"] - steps[0]["time_s"] if len(steps) > 1 else 0.0
    tokens = sum(line["tokens"] for line in steps[1:])
    return {
        "steps": len(steps),
        "last_step": steps[-1]["step"] if steps else 0,
        "reward": _mean([line["reward"] for line in steps[-10:]]),
        "accuracy": measured[-1]["accuracy"] if measured else None,
        "lags": lag_histogram(steps),
        "trained_tokens_per_s": tokens / spent if spent else None,
        "steps_per_s": (len(steps) - 1) / spent if spent else None,
        "idle": {worker: idle_share(lines) for worker, lines in figures.items()},
        "evicted_rows": steps[-1].get("evicted", 0) if steps else 0,
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def draw(runs: Mapping[str, Figures]) -> bytes:
    """PNG of reward, held-out accuracy, staleness and idle shares, a line or a bar for each run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    (reward, accuracy), (lags, idle) = axes
    width = 0.8 / max(1, len(runs))
    for i, (name, figures) in enumerate(runs.items()):
        steps = by_step(figures.get("trainer-0", ()))
        if not steps:
            continue
        numbers = [line["step"] for line in steps]
        reward.plot(numbers, _smooth([line["reward"] for line in steps]), label=name)
        measured = [line for line in steps if "accuracy" in line]
        accuracy.plot([line["step"] for line in measured], [line["accuracy"] for line in measured], marker=".", label=name)
        histogram = lag_histogram(steps)
        tokens = sum(histogram.values())
        lags.bar([lag + i * width for lag in histogram], [n / tokens for n in histogram.values()], width, label=name)
        shares = {worker: share for worker, lines in figures.items() if (share := idle_share(lines)) is not None}
        idle.bar([k + i * width for k in range(len(shares))], list(shares.values()), width, label=name)
        idle.set_xticks([k + (len(runs) - 1) * width / 2 for k in range(len(shares))], list(shares), rotation=15)
    for axis, title in ((reward, "reward (mean of 5 steps)"), (accuracy, "held-out accuracy"), (lags, "tokens by versions behind"), (idle, "idle share")):
        axis.set_title(title)
        axis.grid(alpha=0.3)
    for axis in (reward, accuracy):
        axis.set_xlabel("step")
    if len(runs) > 1:
        reward.legend()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    pyplot.close(figure)
    return out.getvalue()


def _smooth(values: Sequence[float], window: int = 5) -> list[float]:
    return [sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def page(runs: Mapping[str, Figures], png: bytes) -> str:
    """HTML with the picture inside."""
    rows = []
    for name, figures in runs.items():
        s = summary(figures)
        idle = ", ".join(f"{w} {share:.0%}" for w, share in s["idle"].items() if share is not None)
        lags = ", ".join(f"{lag}: {n}" for lag, n in s["lags"].items())
        cells = (name, s["last_step"], _number(s["reward"]), _number(s["accuracy"]), lags, _number(s["trained_tokens_per_s"], 0), idle)
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("run", "step", "reward", "held-out accuracy", "tokens by versions behind", "trained tokens/s", "idle"))
    return (
        "<!doctype html><meta charset=utf-8><title>plugmesh rl</title><style>body{font:15px sans-serif;max-width:1150px;margin:2em auto}"
        "td,th{padding:.3em .8em;text-align:left;border-bottom:1px solid #ccc}img{max-width:100%}</style><h1>plugmesh rl</h1>"
        f"<table><tr>{head}</tr>{''.join(rows)}</table><img alt=curves src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write(folders: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """curves.png (where matplotlib is installed) and curves.html into the first folder; returns what was written."""
    runs = {f.name: RunFolder(f).read_figures() for f in folders}
    written = [folders[0] / "summary.json"]
    written[0].write_text(json.dumps({name: summary(figures) for name, figures in runs.items()}, indent=1))
    try:
        png = draw(runs)
    except ImportError:
        return written
    for path, data in ((folders[0] / "curves.png", png), (folders[0] / "curves.html", page(runs, png).encode())):
        path.write_bytes(data)
        written.append(path)
    return written


if __name__ == "__main__":
    for made in write([pathlib.Path(a) for a in sys.argv[1:]]):
        print(made)
