"""Other weights under running sequences: when they are exchanged, and what becomes of the KV that the old ones made.

Whatever takes long happens before, on another thread: mapping and packing (`load_model`) and `Engine.prepare_swap`. What is left for the pause between two
steps is an exchange of pointers, and a pass over the sequences that are alive. Until the old weights are closed both are in memory, so a swap needs room for
the new ones on top of everything else.

KV is named by the weights that made it (`KvLayout.model`), so prompts never find what other weights computed. Blocks of the old version stay in the prefix
cache until memory is wanted, older than all new ones; a swap back finds them again.
"""

from __future__ import annotations

import abc
import concurrent.futures
import dataclasses
import enum
import time
from dataclasses import dataclass

import structlog

from plugmesh.errors import FailedPrecondition
from plugmesh.types import KvLayout, ModelConfig
from plugmesh_engine.memory import Memory
from plugmesh_engine.seams import Executor, Model, PreparedWeights
from plugmesh_engine.sequence import Group, State
from plugmesh_engine.sequence import Sequence as Seq

log = structlog.get_logger()


class SwapMode(enum.StrEnum):
    """What becomes of requests that have begun: FINISH lets them end under the old weights while new ones queue, CONTINUE goes on over the KV they have,
    ABORT drops that KV and computes prompt and output so far again, so that all tokens to come are those of the new weights alone."""

    FINISH = "finish"
    CONTINUE = "continue"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SwapReport:
    """How a swap went.

    Attributes:
        pause_ms: That no step could run because of it.
        num_running: Sequences that ran at that moment.
        num_restarted: Of them, those whose KV was dropped.
        retired: The old weights; `close` gives their threads back, on any thread. None where the version was in force already.
    """

    old_version: str
    new_version: str
    pause_ms: float
    num_running: int
    num_restarted: int
    retired: PreparedWeights | None = None


@dataclass(slots=True, eq=False)
class Swap:
    """A swap that was asked for. `done` holds the report once it has happened, on the engine's thread, and is cancelled when it was withdrawn."""

    model: Model
    mode: SwapMode
    weights: PreparedWeights
    done: concurrent.futures.Future[SwapReport] = dataclasses.field(default_factory=concurrent.futures.Future)


class Swapping(Memory):
    """The part of `Engine` that exchanges weights. Not of use alone."""

    model: Model
    layout: KvLayout
    _executor: Executor
    _groups: dict[str, Group]
    _swap: Swap | None
    _num_swaps: int

    def prepare_swap(self, model: Model) -> PreparedWeights:
        """All of a swap that needs no pause. May run on any thread; `PreparedWeights.close` when it is not to be used.

        Raises:
            FailedPrecondition: The model has another architecture or other shapes, was loaded for another executor, or the executor cannot exchange weights.
        """
        problem = difference(self.model.config, model.config)
        if problem:
            raise FailedPrecondition(f"weights can be swapped for those of the same model only: {problem}", param="version")
        prepare = getattr(self._executor, "prepare_weights", None)
        if prepare is None:
            raise FailedPrecondition(f"{type(self._executor).__name__} cannot exchange its weights", param="version")
        prepared: PreparedWeights = prepare(model)
        return prepared

    def swap(self, model: Model, mode: SwapMode | str = SwapMode.CONTINUE, prepared: PreparedWeights | None = None) -> Swap:
        """Serves with other weights from now on; with FINISH, as soon as what has begun has ended, which `Swap.done` tells. Call between two steps.

        Held sequences keep their tokens but not their KV, and a fork from a sequence that spans two versions computes it anew.

        Args:
            prepared: From `prepare_swap`, so that it does not count as pause.

        Raises:
            FailedPrecondition: As `prepare_swap`, or another swap waits. Nothing changes.
            ValueError: No such mode.
        """
        mode = SwapMode(mode)
        if self._swap is not None:
            raise FailedPrecondition(f"a swap to {self._swap.model.version} is waiting for running requests to end", param="version")
        swap = Swap(model, mode, prepared or self.prepare_swap(model))
        swap.done.set_running_or_notify_cancel()
        self._swap = swap
        self._swap_when_due()
        return swap

    def withdraw_swap(self) -> Swap | None:
        """Gives up a swap that waits; the queue moves again. The swap that it was."""
        swap, self._swap = self._swap, None
        return swap

    def _offered(self) -> tuple[Seq, ...]:
        """While a swap waits nothing new begins; what was preempted goes on."""
        if self._swap is None:
            return super()._offered()
        return tuple(s for s in self._waiting if has_begun(s.group))

    def _swap_when_due(self) -> None:
        swap = self._swap
        if swap is None or (swap.mode is SwapMode.FINISH and (self._running or any(has_begun(s.group) for s in self._waiting))):
            return
        self._swap = None
        try:
            report = self._exchange(swap)
        except BaseException as e:
            swap.done.set_exception(e)
            raise
        swap.done.set_result(report)

    def _exchange(self, swap: Swap) -> SwapReport:
        began = time.perf_counter()
        old, new, num_running = self.model.version, swap.model.version, self.num_running
        if swap.weights.layout.key() == self._layout_key and new == old:
            return SwapReport(old, new, 0.0, num_running, 0, swap.weights)
        self._executor.set_weights(swap.weights)  # type: ignore[attr-defined] # those that prepare have it
        self.model, self.layout = swap.model, self._executor.layout
        self._layout_key = self._view.rename(self.layout)
        num_restarted = 0
        for g in self._groups.values():
            num_restarted += self._move_over(g, swap.mode)
        while self._holds.shed():
            pass
        if self._filtering is not None:
            self._filtering.give_way()
        self._num_swaps += 1
        pause_ms = (time.perf_counter() - began) * 1e3
        log.info(
            "engine.swapped", old_version=old, new_version=new, mode=swap.mode.value, pause_ms=round(pause_ms, 3), num_running=num_running,
            num_restarted=num_restarted,
        )  # fmt: skip
        return SwapReport(old, new, pause_ms, num_running, num_restarted, swap.weights)

    def _move_over(self, g: Group, mode: SwapMode) -> int:
        """What a request knows of KV, under the new weights. Sequences that were restarted."""
        alive = g.alive
        for s in alive:
            s.block_ids.clear()  # named for the old weights
        self._drop_imports(g)
        self._drop_inherited(g)
        running = [s for s in alive if s.state is State.RUNNING]
        if mode is SwapMode.ABORT or g.request.prefill_only:  # whose blocks are told by name: they must be of one kind
            for s in running:
                self._running.remove(s)
                self._drop_blocks(s)
                self._wait(s)
            g.num_blocks_announced = 0
            if g.spans_versions:
                g.spans_versions, g.cache = False, g.request.use_prefix_cache and self.config.prefix_cache
            return len(running)
        if any(s.num_computed for s in running):
            g.cache, g.spans_versions = False, True  # leaves nothing for others to find
        return 0

    @property
    @abc.abstractmethod
    def num_running(self) -> int:
        """See `Engine`."""


def has_begun(g: Group) -> bool:
    """It was admitted before, so some of it was computed."""
    return g.num_cached_tokens >= 0


def difference(a: ModelConfig, b: ModelConfig) -> str:
    """The first field in which two configurations differ, their names aside; empty when weights of one fit the other."""
    for f in dataclasses.fields(ModelConfig):
        if f.name != "name" and getattr(a, f.name) != getattr(b, f.name):
            return f"{f.name} is {getattr(b, f.name)!r} instead of {getattr(a, f.name)!r}"
    return ""
