"""Small plots as SVG text: bars with spread, lines over time, cumulative distributions. No dependency, nothing to load."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = {
    "engine": "#0f766e", "mesh": "#2563eb", "llama.cpp": "#b45309", "vllm": "#9333ea", "transformers": "#64748b",
    "without": "#64748b", "with": "#0f766e", "reference": "#b45309",
}  # fmt: skip
_SPARE = ("#0f766e", "#2563eb", "#b45309", "#9333ea", "#64748b", "#be123c")


def colour(name: str, index: int = 0) -> str:
    return COLOURS.get(name, _SPARE[index % len(_SPARE)])


def bars(values: Mapping[str, tuple[float, float, float]], unit: str, *, width: int = 460) -> str:
    """Horizontal bars from 0, one per name, of (middle, low, high); the spread is a line across the bar's end."""
    row, left, right = 26, 104, 96
    height = row * len(values) + 8
    top = max((high for _, _, high in values.values()), default=1.0) or 1.0
    scale = (width - left - right) / top
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(unit)}">']
    for i, (name, (middle, low, high)) in enumerate(values.items()):
        y = 4 + i * row
        end = left + middle * scale
        parts.append(f'<text class="name" x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y + 3}" width="{max(middle * scale, 1):.1f}" height="{row - 9}" rx="2" fill="{colour(name, i)}"/>')
        if high > low:
            parts.append(f'<path class="spread" d="M{left + low * scale:.1f} {y + 11.5}H{left + high * scale:.1f}M{left + low * scale:.1f} {y + 8}v7M{left + high * scale:.1f} {y + 8}v7"/>')
        parts.append(f'<text class="value" x="{max(end, left + high * scale) + 7:.1f}" y="{y + 15}">{escape(short(middle))}</text>')
    return "".join(parts) + "</svg>"


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x_label: str, y_label: str, *, width: int = 620, height: int = 240, step: bool = False, dots: bool = False) -> str:
    """Curves, or points where `dots`, with axes from 0 and a legend. Non-finite points are left out; an empty plot says so."""
    clean = {name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()}
    clean = {name: points for name, points in clean.items() if points}
    if not clean:
        return '<p class="empty">nothing to plot</p>'
    left, right, top, bottom = 58, 16, 14 + 18 * (len(clean) > 1), 40
    x_ticks = ticks(max(x for p in clean.values() for x, _ in p))
    y_ticks = ticks(max(y for p in clean.values() for _, y in p))
    sx, sy = (width - left - right) / x_ticks[-1], (height - top - bottom) / y_ticks[-1]

    def at(x: float, y: float) -> str:
        return f"{left + x * sx:.1f} {height - bottom - y * sy:.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    for y in y_ticks:
        parts.append(f'<path class="rule" d="M{at(0, y)}H{width - right}"/><text class="tick" x="{left - 6}" y="{height - bottom - y * sy + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in x_ticks:
        parts.append(f'<text class="tick" x="{left + x * sx:.1f}" y="{height - bottom + 16}" text-anchor="middle">{short(x)}</text>')
    parts.append(f'<text class="label" x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="12" y="{(height - bottom + top) / 2}" text-anchor="middle" transform="rotate(-90 12 {(height - bottom + top) / 2})">{escape(y_label)}</text>')
    for i, (name, points) in enumerate(clean.items()):
        ink = colour(name, i)
        if dots:
            parts += [f'<circle cx="{at(x, y).split()[0]}" cy="{at(x, y).split()[1]}" r="2.4" fill="{ink}" fill-opacity=".7"/>' for x, y in points]
        else:
            path = "M" + at(*points[0])
            for (_, before), (x, y) in itertools.pairwise(points):
                path += (f"L{at(x, before)}" if step else "") + f"L{at(x, y)}"
            parts.append(f'<path class="curve" stroke="{ink}" d="{path}"/>')
        if len(clean) > 1:
            at_x = left + i * (width - left) // len(clean)
            parts.append(f'<rect x="{at_x}" y="4" width="10" height="10" fill="{ink}"/><text class="tick" x="{at_x + 15}" y="13">{escape(name)}</text>')
    return "".join(parts) + "</svg>"


def cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    """Points of an empirical distribution: (value, share of values at most it in percent)."""
    ordered = sorted(v for v in values if math.isfinite(v))
    return [(v, 100 * (i + 1) / len(ordered)) for i, v in enumerate(ordered)]


def ticks(highest: float) -> list[float]:
    """0 and round steps up to at least `highest`: 4 to 8 of them."""
    if highest <= 0 or not math.isfinite(highest):
        return [0.0, 1.0]
    raw = highest / 5
    base = 10.0 ** math.floor(math.log10(raw))
    step = base * next(f for f in (1, 2, 2.5, 5, 10) if f * base >= raw * 0.999)
    return [i * step for i in range(math.ceil(highest / step - 1e-9) + 1)]


def short(value: float) -> str:
    """For an axis or a bar: 1,370 or 3.42."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
