"""The idea, without the host: a greeting for every so many requests."""

from __future__ import annotations


class Greeter:
    """Counts requests and their tokens. One per process."""

    def __init__(self) -> None:
        self.begin("world", 100)

    def begin(self, name: str, every: int) -> None:
        """Starts anew."""
        self.text = f"hello, {name}"
        self.every = every
        self.num_requests = self.num_tokens = 0

    def count(self, num_tokens: int) -> bool:
        """One more request; whether it is time to greet again."""
        self.num_requests += 1
        self.num_tokens += num_tokens
        return self.num_requests % self.every == 0
