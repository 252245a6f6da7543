"""Whether output is what a card declares: *exact* (the same tokens, greedy and seeded), *dist* (the same tokens greedily), *lossy* (anything)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Fidelity = Literal["exact", "dist", "lossy", "n/a"]
Outputs = Mapping[str, Sequence[Sequence[int] | str]]
"""Kind of output ("greedy", "seeded") to the tokens, or the text, after each prompt."""
CHECKED: Mapping[str, tuple[str, ...]] = {"exact": ("greedy", "seeded"), "dist": ("greedy",), "lossy": (), "n/a": ()}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out of the check.

    Attributes:
        holds: False where output differs that must not.
        shares: Kind to the share of prompts with the same output; told for every kind, also where it need not be 1.
        difference: Where the first difference is that must not be, without the output itself.
    """

    declared: Fidelity
    holds: bool
    shares: Mapping[str, float]
    difference: str = ""


def judge(declared: Fidelity, without: Outputs, with_: Outputs) -> Verdict:
    """Compares the outputs of two sides for the same prompts. Raises ValueError when the sides have not the same kinds and numbers of prompts, or none."""
    if without.keys() != with_.keys() or not without:
        raise ValueError(f"outputs of kinds {sorted(without)} and {sorted(with_)} cannot be compared")
    shares: dict[str, float] = {}
    difference = ""
    for kind, ours in without.items():
        theirs = with_[kind]
        if len(ours) != len(theirs) or not ours:
            raise ValueError(f"{len(ours)} and {len(theirs)} outputs of kind {kind} cannot be compared")
        differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if _plain(a) != _plain(b)]
        shares[kind] = 1 - len(differing) / len(ours)
        if differing and kind in CHECKED[declared] and not difference:
            i = differing[0]
            difference = f"{kind} output {i + 1} of {len(ours)} differs from position {_first_difference(ours[i], theirs[i])} on"
    return Verdict(declared, not difference, shares, difference)


def combined(declared: Sequence[Fidelity]) -> Fidelity:
    """What a combination of plugins may claim: the weakest of its members; "n/a" counts as exact, because it does not touch output."""
    order: tuple[Fidelity, ...] = ("exact", "dist", "lossy")
    known = [d for d in declared if d != "n/a"]
    return max(known, key=order.index) if known else "exact"


def _plain(output: Sequence[int] | str) -> list[int] | str:
    return output if isinstance(output, str) else list(output)


def _first_difference(a: Sequence[int] | str, b: Sequence[int] | str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
