"""`engine_side` as a child, and schemas lowered to what grammar engines read, by the grammar service's own code in a process of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plugmesh.bench.metrics import Record, Run
from plugmesh.bench.processes import Child
from plugmesh.bench.systems import EngineSystem, Setting
from plugmesh.errors import FailedPrecondition
from plugmesh.grammar.spec import GrammarSpec

ENGINES = ("xgrammar", "llguidance")


@dataclass(frozen=True, slots=True)
class Lowered:
    """`candidates` are maps of `language` and `source`, in order of preference; empty with an `error`."""

    candidates: tuple[dict[str, str], ...]
    lower_ms: float
    error: str = ""


async def lower(specs: Sequence[GrammarSpec]) -> list[Lowered]:
    """Raises FailedPrecondition when the front end cannot be run."""

    def run() -> list[Lowered]:
        command = [sys.executable, "-m", "plugmesh_grammar.offline"]
        done = subprocess.run(command, input=json.dumps([dataclasses.asdict(s) for s in specs]), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise FailedPrecondition(f"the grammar service's front end failed: {done.stderr.strip()[-300:]}")
        return [Lowered(tuple(e.get("candidates", ())), e["lower_ms"], e.get("error", "")) for e in json.loads(done.stdout)]

    return await asyncio.to_thread(run)


class StructuredEngine(EngineSystem):
    """`engine_side` as a child that is stopped while nobody asks it anything."""

    def __init__(self, setting: Setting, name: str, engines: Sequence[str], *, jump_forward: bool, num_blocks: int = 1024) -> None:
        super().__init__(setting, num_blocks=num_blocks)
        self.name, self.title = name, f"the engine, jump-forward {'on' if jump_forward else 'off'}"
        self._engines, self._jump_forward = tuple(engines), jump_forward

    async def start(self) -> dict[str, Any]:
        s = self._setting
        ask = {
            "model": str(s.model), "store": str(s.folder / "weights"), "executor": s.executor, "kv_dtype": s.kv_dtype, "threads": s.threads,
            "num_blocks": self._num_blocks, "jump_forward": self._jump_forward, "grammar_engines": self._engines,
        }  # fmt: skip
        s.folder.mkdir(parents=True, exist_ok=True)
        file = s.folder / f"{self.name}.json"
        file.write_text(json.dumps(ask))
        command = [sys.executable, "-m", "plugmesh.bench.structured.engine_side", str(file)]
        self._child = Child(self.name, command, s.folder / f"{self.name}.log", {"OMP_NUM_THREADS": str(s.num_threads)}, pipes=True)
        self.facts = (await self._read())["ready"]
        self._child.pause()
        return dict(self.facts)

    async def ask(self, **ask: Any) -> dict[str, Any]:
        """One ask of `engine_side`. Raises FailedPrecondition with its own words, Unavailable when its process ended."""
        assert self._child is not None
        self._child.resume()
        try:
            return await self._ask(ask)
        finally:
            self._child.pause()

    async def generate(self, prompts: Sequence[str], max_tokens: int, **how: Any) -> tuple[Run, dict[str, Any]]:
        """A run of `engine_side`, and the rest of its answer."""
        answer = await self.ask(run={"prompts": list(prompts), "max_tokens": max_tokens, "streams": len(prompts), **how})
        records = tuple(Record(**{**r, "times_s": tuple(r["times_s"])}) for r in answer.pop("records"))
        return Run(records, answer.pop("wall_s"), 0.0, len(prompts), {"server_cpu_s": answer.pop("cpu_s")}), answer
