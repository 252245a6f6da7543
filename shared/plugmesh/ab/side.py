"""One side as a process: `python -m plugmesh.ab.side FILE`, driven over its standard input like `plugmesh_engine.bench`, whose runs it knows, too.

FILE is JSON: `model`, `store`, `tables` (of this side), `tools` (slugs), `tools_tables`, `is_reference`. After a line with facts it answers one line per ask:
`{"conversations": ...}` a run, `{"observe": metric, ...}` a quality metric, `{"outputs": ...}` tokens for the check of fidelity, `{"samples": ...}` many short ones.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from plugmesh import logs
from plugmesh.ab.sides import tools_host
from plugmesh.ab.subject import EngineSubject, ReferenceSubject, Text
from plugmesh.config import MeshConfig
from plugmesh.errors import PlugmeshError
from plugmesh.host import PluginHost
from plugmesh.records import QualityMetricRecord
from plugmesh_engine import Engine, EngineConfig, build_engine, weight_format
from plugmesh_engine.bench import load_manifest, run_closed_loop
from plugmesh_engine.config import resolve_executor
from plugmesh_engine.plugins import EnginePlugins

FIDELITY_PROMPTS, FIDELITY_TOKENS, SEED = 8, 48, 11
SAMPLE_TOKENS = 4


def engine_config(table: Mapping[str, Any]) -> EngineConfig:
    """The keys of `[services.decode]` that an engine has, by its own names."""
    names = {f.name for f in dataclasses.fields(EngineConfig)}
    renamed = {"num_kv_blocks": "num_blocks"}
    return EngineConfig(**{"num_blocks": 2048, **{renamed.get(k, k): v for k, v in table.items() if renamed.get(k, k) in names}})


def build(ask: Mapping[str, Any]) -> tuple[Engine, dict[str, Any]]:
    """The engine as a decode instance of this side's mesh builds it, and facts for the report."""
    config = MeshConfig.model_validate(ask["tables"])
    table = config.services.get("decode", {})
    settings = engine_config(table)
    host = PluginHost.load(config.plugin_slugs("decode"), config, service="decode")
    named = str(table.get("weight_format", ""))
    plugins = EnginePlugins.from_host(host, named)
    manifest = load_manifest(pathlib.Path(ask["model"]), named or weight_format(settings), pathlib.Path(ask["store"]), config.plugin_slugs("decode"), config.plugins)
    engine = build_engine(manifest, settings, plugins)
    stored = sum(t.num_bytes for t in manifest.tensors)
    layout = engine.layout
    return engine, {
        "executor": resolve_executor(settings, engine.model.config.architecture), "format": manifest.format, "kv_codec": layout.codec,
        "weight_bytes": engine.model.num_mapped_bytes + engine.model.num_copied_bytes, "stored_weight_bytes": stored,
        "kv_bytes_per_token": layout.block_bytes / layout.block_tokens, "vocab_size": engine.model.config.vocab_size, "plugins": host.versions,
    }  # fmt: skip


class Side:
    """Answers asks."""

    def __init__(self, ask: Mapping[str, Any]) -> None:
        self._ask = ask
        self._model = pathlib.Path(ask["model"])
        self._engine: Engine | None = None
        self._text: Text | None = None
        self._reference: ReferenceSubject | None = None
        self.facts: dict[str, Any] = {}
        if not ask.get("is_reference"):
            self._engine, self.facts = build(ask)
        host = tools_host(ask["tools"], ask["tools_tables"])
        self._metrics: dict[str, QualityMetricRecord] = {m.name: m for m in host.records("quality_metrics")}

    def answer(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        if "observe" in ask:
            return self._observe(ask)
        assert self._engine is not None, "the reference only observes"
        if "outputs" in ask:
            return self._outputs(is_quick=ask["is_quick"])
        if "samples" in ask:
            return self._samples(ask["samples"], seed=ask["seed"])
        return run_closed_loop(self._engine, ask["conversations"], ask["streams"], use_cache=ask.get("use_cache", True), want_tokens=ask.get("want_tokens", False))

    def _subject(self, *, seed: int, is_quick: bool) -> EngineSubject | ReferenceSubject:
        self._text = self._text or Text(self._model)
        if self._engine is not None:
            return EngineSubject(self._engine, self._text, seed=seed, is_quick=is_quick)
        self._reference = self._reference or ReferenceSubject(self._model, self._text)
        self._reference.seed, self._reference.is_quick = seed, is_quick
        return self._reference

    def _observe(self, ask: Mapping[str, Any]) -> dict[str, Any]:
        """Arrays go to files, because they may be larger than a line should be."""
        found = self._metrics[ask["observe"]].observe(self._subject(seed=ask["seed"], is_quick=ask["is_quick"]))
        folder = pathlib.Path(ask["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in found.arrays.items():
            np.save(folder / f"{name}.npy", np.asarray(array), allow_pickle=False)
        return {"figures": {k: float(v) for k, v in found.figures.items()}, "arrays": list(found.arrays)}

    def _outputs(self, *, is_quick: bool) -> dict[str, Any]:
        """Greedy and seeded tokens of English prompts of different lengths: one alone, and all at once."""
        subject = self._subject(seed=SEED, is_quick=is_quick)
        num, length = (2, 8) if is_quick else (FIDELITY_PROMPTS, FIDELITY_TOKENS)
        prompts = fidelity_prompts(subject, num)
        greedy = [*subject.generate(prompts[:1], length), *subject.generate(prompts, length)]
        return {"outputs": {"greedy": greedy, "seeded": subject.generate(prompts, length, temperature=0.8, seed=SEED)}}

    def _samples(self, num: int, *, seed: int) -> dict[str, Any]:
        """The first tokens after one prompt at temperature 1; sample i draws with `seed + i`."""
        subject = self._subject(seed=SEED, is_quick=False)
        prompt = fidelity_prompts(subject, 2)[0]
        return {"samples": subject.generate([prompt] * num, SAMPLE_TOKENS, temperature=1.0, seed=seed)}


def fidelity_prompts(subject: Any, num: int) -> list[list[int]]:
    """Beginnings of paragraphs, from 20 tokens up."""
    text = subject.english()
    stride = len(text) // num
    return [subject.encode(text[i * stride : i * stride + 4000])[: 20 + 37 * i] for i in range(num)]


def main() -> int:
    ask = json.loads(pathlib.Path(sys.argv[1]).read_text())
    # The protocol has standard output for itself: whatever a library prints there goes to standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    logs.configure("error")
    try:
        side = Side(ask)
    except PlugmeshError as e:
        answers.write(json.dumps({"error": e.message}) + "\n")
        return 1
    except Exception as e:  # of a plugin, perhaps; the log has the rest
        answers.write(json.dumps({"error": f"{type(e).__name__}: {e}"}) + "\n")
        raise
    answers.write(json.dumps({"ready": side.facts}) + "\n")
    for line in sys.stdin:
        try:
            answer = side.answer(json.loads(line))
        except PlugmeshError as e:
            answer = {"error": e.message}
        except Exception as e:  # a metric of a plugin: the others go on
            answer = {"error": f"{type(e).__name__}: {e}"}
        answers.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
