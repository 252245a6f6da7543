"""The two sides as the bench drives systems: an engine in a process of its own, and a whole mesh."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from plugmesh.ab.sides import Subject
from plugmesh.bench.processes import Child
from plugmesh.bench.systems import EngineSystem, MeshSystem, Setting
from plugmesh.records import Observation

SIDES = ("without", "with")


class SideEngine(EngineSystem):
    """`python -m plugmesh.ab.side` as a child. All sides of a comparison share a store of packed weights, so they start one after another.

    Args:
        side: "without", "with" or "reference".
    """

    def __init__(self, setting: Setting, subject: Subject, side: str) -> None:
        super().__init__(setting)
        self.name = side
        self.title = {"without": "the engine alone", "with": f"the engine with {subject.name}", "reference": "the float32 reference"}[side]
        self._subject = subject

    async def start(self) -> dict[str, Any]:
        s, subject = self._setting, self._subject
        ask = {
            "model": str(s.model), "store": str(s.folder / "weights"), "tables": subject.tables(s, loaded=self.name == "with"), "tools": subject.slugs,
            "tools_tables": subject.tables(s, loaded=True), "is_reference": self.name == "reference",
        }  # fmt: skip
        file = s.folder / f"{self.name}.json"
        file.write_text(json.dumps(ask))
        # The kernels have threads of their own; numpy's do the reference's work, and none of an engine's.
        threads = s.num_threads
        self._child = Child(self.name, [sys.executable, "-m", "plugmesh.ab.side", str(file)], s.folder / f"{self.name}.log", {"OMP_NUM_THREADS": str(threads)}, pipes=True)
        self.facts = (await self._read())["ready"]
        self._child.pause()
        return dict(self.facts)

    async def ask(self, **ask: Any) -> dict[str, Any]:
        """One ask of `plugmesh.ab.side`. Raises FailedPrecondition with the side's own words, Unavailable when its process ended."""
        assert self._child is not None
        self._child.resume()
        try:
            return await self._ask(ask)
        finally:
            self._child.pause()

    async def observe(self, metric: str, *, seed: int, is_quick: bool) -> Observation:
        folder = self._setting.folder / "observed" / self.name / metric
        answer = await self.ask(observe=metric, seed=seed, is_quick=is_quick, folder=str(folder))
        return Observation(answer["figures"], {n: np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in answer["arrays"]})


class SideMesh(MeshSystem):
    """A mesh with or without the plugins.

    Args:
        examine: Called with the base URL and the model's name once it serves; may take long, and may raise PlugmeshError.
    """

    def __init__(self, setting: Setting, subject: Subject, side: str, examine: Callable[[str, str], None] | None = None) -> None:
        apart = dataclasses.replace(setting, folder=pathlib.Path(setting.folder) / "mesh")
        super().__init__(
            apart, subject.tables(setting, loaded=side == "with"), name=side, title=f"a mesh with {subject.name}" if side == "with" else "a mesh without it"
        )
        self._examine = examine

    async def verify(self, url: str, model: str) -> None:
        """Quality is measured and not assumed here, so a wrong answer is no reason to stop."""
        if self._examine is not None:
            await asyncio.to_thread(self._examine, url, model)
