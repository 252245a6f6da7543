"""Tokens and calls of a request and of everything that it starts, against a budget that is never exceeded by one token."""

from __future__ import annotations

from collections.abc import Mapping


class Ledger:
    """Reserve before the work, settle after it: what runs at the same time can together never use more than was granted.

    Used by one thread or event loop; nothing here locks or waits.

    Args:
        budget_tokens, budget_calls: Upper limits, from 0.
    """

    def __init__(self, budget_tokens: int, budget_calls: int) -> None:
        if budget_tokens < 0 or budget_calls < 0:
            raise ValueError(f"a budget of {budget_tokens} tokens and {budget_calls} calls is below 0")
        self.budget_tokens = budget_tokens
        self.budget_calls = budget_calls
        self.num_tokens = 0         # settled
        self.num_reserved = 0       # granted and not settled yet
        self.num_calls = 0          # reservations that were granted something

    @property
    def num_left(self) -> int:
        """Tokens that can still be granted."""
        return self.budget_tokens - self.num_tokens - self.num_reserved

    def reserve(self, num_tokens: int) -> int:
        """Tokens that a call may use: as asked, or what is left; 0 when tokens or calls are used up. A grant is one call and must be settled once."""
        if num_tokens < 0:
            raise ValueError(f"{num_tokens} tokens cannot be reserved")
        granted = min(num_tokens, self.num_left)
        if granted <= 0 or self.num_calls >= self.budget_calls:
            return 0
        self.num_calls += 1
        self.num_reserved += granted
        return granted

    def settle(self, reserved: int, used: int) -> None:
        """Gives back what a grant did not use. Raises ValueError when more was used than granted, or more settled than reserved."""
        if not 0 <= used <= reserved <= self.num_reserved:
            raise ValueError(f"{used} tokens used of {reserved} granted, {self.num_reserved} are reserved")
        self.num_reserved -= reserved
        self.num_tokens += used

    def as_row(self) -> Mapping[str, int]:
        """For logs and answers."""
        return {"budget_tokens": self.budget_tokens, "num_tokens": self.num_tokens, "budget_calls": self.budget_calls, "num_calls": self.num_calls}
