"""What jump-forward saves: the same answers of a schema with fixed keys, on an engine that appends forced tokens without a pass and on one that does not."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from plugmesh.bench.metrics import Spread
from plugmesh.bench.rounds import Progress
from plugmesh.bench.structured.engines import StructuredEngine, lower
from plugmesh.bench.systems import Setting
from plugmesh.errors import FailedPrecondition
from plugmesh.grammar.spec import GrammarSpec

MAX_TOKENS = 320
_KEYS = ("shipment_identifier", "destination_country", "requires_refrigeration", "number_of_packages", "insurance_category", "delivery_priority")


def fixed_keys_schema() -> dict[str, Any]:
    """Long keys, short values: what tools' arguments and records of a database look like. Every answer ends by itself."""
    values: list[dict[str, Any]] = [
        {"type": "integer", "minimum": 100, "maximum": 999}, {"enum": ["Austria", "Portugal", "Norway"]}, {"type": "boolean"}, {"type": "integer", "minimum": 1, "maximum": 9},
        {"enum": ["none", "basic", "extended"]}, {"enum": ["standard", "express"]},
    ]  # fmt: skip
    record = {"type": "object", "properties": dict(zip(_KEYS, values, strict=True)), "required": list(_KEYS), "additionalProperties": False}
    return {"type": "object", "properties": {"first_shipment": record, "second_shipment": record}, "required": ["first_shipment", "second_shipment"], "additionalProperties": False}


def prompts_of(seed: int, num: int) -> list[str]:
    return [f"Shipping note {seed * 100 + i}: two shipments, one urgent. As JSON:\n" for i in range(num)]


async def run_jump(setting: Setting, engines: Sequence[str], *, num_rounds: int, seed: int, progress: Progress, batches: Sequence[int] = (1, 32)) -> dict[str, Any]:
    """Greedy, in turns; two engines in processes of their own, the idle one stopped. Whitespace is compact, as where keys are forced it decides how much is."""
    sides = {"off": StructuredEngine(setting, "jump-off", engines, jump_forward=False), "on": StructuredEngine(setting, "jump-on", engines, jump_forward=True)}
    results: dict[str, dict[str, dict[int, Any]]] = {}
    failures: list[dict[str, str]] = []
    try:
        for side in sides.values():
            progress.say(f"starting {side.title}")
            await side.start()
        styles = ("compact", "flexible")
        lowered = await lower([GrammarSpec("json_schema", json.dumps(fixed_keys_schema()), whitespace="compact"), GrammarSpec("json_schema", json.dumps(fixed_keys_schema()))])
        measures = []
        for style, low in zip(styles, lowered, strict=True):
            for name in engines:
                try:
                    if low.error:
                        raise FailedPrecondition(low.error)
                    for side in sides.values():
                        await side.ask(compile={"name": style, "engine": name, "candidates": low.candidates})
                    measures += [(style, name, batch) for batch in batches]
                except FailedPrecondition as e:
                    failures.append({"where": f"{style}, {name}", "reason": e.message})
        progress.begin(2 * (num_rounds + 1) * len(measures))
        for number in range(-1, num_rounds):
            for style, name, batch in measures:
                label = f"{name}, {style}, batch {batch}"
                for key in ("off", "on") if number % 2 == 0 else ("on", "off"):
                    progress.say(f"{'warming up' if number < 0 else f'round {number + 1}'}: {label}, jump-forward {key}")
                    run, rest = await sides[key].generate(prompts_of(seed, batch), MAX_TOKENS, grammar=[style, name], want_text=True)
                    if number >= 0:
                        results.setdefault(label, {}).setdefault(key, {})[number] = _figures(run, rest)
                    progress.done("")
    finally:
        for side in sides.values():
            await side.stop()
    return {"runs": results, "lines": lines_of(results), "failures": failures}


def _figures(run: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
    """`wall_s` is from the first request's sending to the last token."""
    good = [r for r in run.records if r.is_ok]
    wall = max((r.times_s[-1] for r in good), default=0.0) - min((r.sent_s for r in good), default=0.0)
    values = [_parsed(t) for t in rest["texts"]]
    return {
        "wall_s": wall, "num_tokens": sum(r.num_out for r in good), "num_chars": rest["num_chars"], "num_steps": rest["counters"]["num_steps"],
        "num_jumped": next((v for k, v in rest["counters"].items() if "jump" in k), None), "num_failed": len(run.records) - len(good),
        "num_whole": sum(v is not None for v in values), "texts": sorted(rest["texts"]),
    }  # fmt: skip


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def lines_of(results: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """Per measure: answers per second with / without of the same round, passes, and how many texts are the same."""
    found = []
    for measure, sides in results.items():
        off, on = sides.get("off", {}), sides.get("on", {})
        both = sorted(off.keys() & on.keys())
        gain = Spread.of(off[r]["wall_s"] / on[r]["wall_s"] for r in both if on[r]["wall_s"])
        if gain is None:
            continue
        a, b = off[both[0]], on[both[0]]
        found.append({
            "measure": measure, "gain": asdict(gain), "steps_off": a["num_steps"], "steps_on": b["num_steps"], "tokens_off": a["num_tokens"], "tokens_on": b["num_tokens"],
            "num_jumped": b["num_jumped"], "tok_s_off": _rate(off, both), "tok_s_on": _rate(on, both), "num_answers": len(a["texts"]),
            "num_same": sum((collections.Counter(a["texts"]) & collections.Counter(b["texts"])).values()), "num_whole_off": a["num_whole"], "num_whole_on": b["num_whole"],
        })  # fmt: skip
    return found


def _rate(rounds: Mapping[int, Mapping[str, Any]], numbers: Sequence[int]) -> float | None:
    spread = Spread.of(rounds[r]["num_tokens"] / rounds[r]["wall_s"] for r in numbers if rounds[r]["wall_s"])
    return spread.median if spread else None
