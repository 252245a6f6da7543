"""What a run keeps on disk: weights by version, the trainer's checkpoint, figures line by line."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import numpy as np

from plugmesh.types import ModelConfig
from plugmesh_rollout.loop.model import load_weights, save_weights


class RunFolder:
    """Paths below `root`, which is made where it is missing."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.checkpoint = root / "checkpoint.safetensors"
        self.settings = root / "run.json"
        self.topic = root / "topic.json"
        self.table = root / "table"
        self.figures = root / "figures"
        self._weights = root / "weights"
        self.figures.mkdir(parents=True, exist_ok=True)
        self._weights.mkdir(exist_ok=True)

    def weights(self, version: int) -> pathlib.Path:
        return self._weights / f"{version:08d}.safetensors"

    def save_weights(self, version: int, config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> None:
        save_weights(self.weights(version), config, tensors, version=str(version))

    def load_weights(self, version: int) -> tuple[ModelConfig, dict[str, np.ndarray]]:
        return load_weights(self.weights(version))

    def versions(self) -> list[int]:
        """Those that are kept, oldest first."""
        return sorted(int(path.stem) for path in self._weights.glob("*.safetensors"))

    def drop_weights(self, below: int) -> None:
        """Version 0 stays: it is the reference, and the beginning."""
        for path in self._weights.glob("*.safetensors"):
            if 0 < int(path.stem) < below:
                path.unlink(missing_ok=True)

    def read_figures(self) -> dict[str, list[dict[str, Any]]]:
        """Lines by worker ("trainer-0"); a last line that is being written is left out."""
        return {path.stem: list(_lines(path)) for path in sorted(self.figures.glob("*.jsonl"))}


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


class Figures:
    """One worker's lines, and how long it worked and waited.

    Lines carry `time_s` (wall clock), `busy_s` and `alive_s` since the first piece of work, so that waiting for others to start is nobody's idleness.
    """

    def __init__(self, path: pathlib.Path | None) -> None:
        self._file: TextIO | None = path.open("a", buffering=1) if path else None
        self._first: float | None = None
        self._busy = 0.0
        self._last_line = 0.0

    def worked(self, seconds: float) -> None:
        """That have just ended."""
        now = time.perf_counter()
        if self._first is None:
            self._first = now - seconds
        self._busy += seconds

    def add(self, **line: Any) -> dict[str, Any]:
        now = time.perf_counter()
        self._last_line = now
        alive = 0.0 if self._first is None else now - self._first
        line = {"time_s": round(time.time(), 3), "busy_s": round(self._busy, 4), "alive_s": round(alive, 4), **line}
        if self._file:
            self._file.write(json.dumps(line) + "\n")
        return line

    def now_and_then(self, every_s: float = 0.5, **line: Any) -> None:
        """`add`, unless there was a line just now."""
        if time.perf_counter() - self._last_line >= every_s:
            self.add(**line)

    def close(self) -> None:
        if self._file:
            self._file.close()
