"""The check of what cards declare."""

from __future__ import annotations

import pytest

from plugmesh.quality.fidelity import combined, judge

BASE = {"greedy": [[1, 2, 3], [4, 5]], "seeded": [[6, 7], [8]]}


def changed(kind: str) -> dict[str, list[list[int]]]:
    return {**BASE, kind: [BASE[kind][0], [9, 9]]}


@pytest.mark.parametrize(
    ("declared", "kind", "holds"),
    [
        ("exact", "", True), ("exact", "greedy", False), ("exact", "seeded", False), ("dist", "greedy", False), ("dist", "seeded", True),
        ("lossy", "greedy", True), ("n/a", "greedy", True),
    ],
)  # fmt: skip
def test_output_may_differ_only_as_far_as_declared(declared, kind: str, holds: bool) -> None:
    assert judge(declared, BASE, changed(kind) if kind else BASE).holds == holds


def test_a_difference_is_told_by_its_place_and_not_by_its_tokens() -> None:
    verdict = judge("exact", BASE, {**BASE, "greedy": [[1, 2, 777], [4, 5]]})

    assert "greedy output 1 of 2 differs from position 2 on" in verdict.difference
    assert "777" not in verdict.difference
    assert verdict.shares == {"greedy": 0.5, "seeded": 1.0}


def test_an_output_that_ends_earlier_differs_where_it_ends() -> None:
    assert "from position 1 on" in judge("exact", {"greedy": ["ab"]}, {"greedy": ["a"]}).difference


@pytest.mark.parametrize("other", [{}, {"greedy": [[1, 2, 3]], "seeded": [[6, 7], [8]]}, {"greedy": BASE["greedy"]}, {"greedy": [], "seeded": []}])
def test_sides_without_the_same_prompts_cannot_be_compared(other) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        judge("exact", BASE, other)


def test_nothing_at_all_is_no_agreement() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        judge("exact", {}, {})


def test_a_combination_may_claim_what_its_weakest_member_does() -> None:
    assert [combined(c) for c in (["exact", "n/a"], ["exact", "dist"], ["dist", "lossy", "exact"], ["n/a"], [])] == ["exact", "dist", "lossy", "exact", "exact"]
