"""What every reward must do: a plain finite number for any text, the same from the same, whatever was scored before, by this worker or another one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plugmesh import cards
from plugmesh.errors import InvalidRequest
from plugmesh.records import Reward, RewardRecord
from plugmesh.testing.conformance.base import RecordConformance

LONG = 200_000  # characters of an extreme text

Texts = tuple[str, str, str]  # prompt, answer, response


class RewardConformance(RecordConformance):
    """A suite's subclass says with which options its rewards are built, and what a good response is.

    Attributes:
        better: (prompt, answer, response, worse response); empty where no such pair makes sense.
    """

    kind = "rewards"
    options: ClassVar[Mapping[str, Any]] = {}
    better: ClassVar[tuple[tuple[str, str, str, str], ...]] = (("27+58=", "85", "85", "cat"),)
    max_examples: ClassVar[int] = 60

    @staticmethod
    def score(reward: Reward, texts: Texts) -> float:
        """Refuses what the table's field, a float, would not hold."""
        value = reward.score(*texts)
        assert isinstance(value, int | float), f"a reward is a plain number, not {type(value).__name__}"
        assert math.isfinite(value), f"a reward is finite, not {value}"
        return float(value)

    def rows(self) -> list[Texts]:
        """Ordinary and extreme ones."""
        found: list[Texts] = [(prompt, answer, response) for prompt, answer, *responses in self.better for response in responses]
        texts = ("", " ", "\0", "85", "-1e999", "9" * 400, "\ud800", "e\u0301\U0001f600\u202e", "٣", "1" * LONG, "(" * LONG, "a\n" * (LONG // 2), "%s{0}\\")
        return [*found, *(("27+58=", "85", t) for t in texts), *((t, t, "85") for t in texts)]

    def test_it_is_finite_for_any_text(self, record: RewardRecord) -> None:
        reward = record.build(self.options)
        for row in self.rows():
            self.score(reward, row)

        @settings(max_examples=self.max_examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.text(), st.text(), st.text())
        def check(prompt: str, answer: str, response: str) -> None:
            self.score(reward, (prompt, answer, response))
            self.score(reward, (prompt, answer, answer))

        check()

    def test_the_same_row_is_worth_the_same_again(self, record: RewardRecord) -> None:
        reward = record.build(self.options)
        for row in self.rows():
            assert self.score(reward, row) == self.score(reward, row)

    def test_a_row_is_worth_the_same_whatever_was_scored_before(self, record: RewardRecord) -> None:
        """A row is scored by any worker, and again by another one when a worker died."""
        rows = self.rows()
        one, other = record.build(self.options), record.build(self.options)
        forwards = [self.score(one, row) for row in rows]
        backwards = [self.score(other, row) for row in reversed(rows)][::-1]
        alone = [self.score(record.build(self.options), row) for row in rows]

        assert forwards == backwards == alone

    def test_another_process_gives_the_same_numbers(self, record: RewardRecord, card: cards.Card) -> None:
        """What orders sets or hashes text differs from process to process."""
        rows = [row for row in self.rows() if sum(map(len, row)) < LONG]
        given = [dict(self.settings), self.service_of(card), record.name, dict(self.options), rows]
        code = f"""
import json, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
from plugmesh.config import MeshConfig
from plugmesh.host import PluginHost
settings, service, name, options, rows = json.load(sys.stdin)
host = PluginHost.load([{self.slug!r}], MeshConfig(plugins={{{self.slug!r}: settings}} if settings else {{}}), service=service)
reward = next(r for r in host.records("rewards") if r.name == name).build(options)
print(json.dumps([reward.score(*row) for row in rows]), file=sys.stderr)
"""
        reward = record.build(self.options)
        expected = [self.score(reward, row) for row in rows]
        done = subprocess.run(
            [sys.executable, "-c", code], input=json.dumps(given), env={**os.environ, "PYTHONHASHSEED": "12345"}, capture_output=True, text=True, timeout=60, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stderr.splitlines()[-1]) == expected

    def test_a_good_response_is_worth_more_than_a_bad_one(self, record: RewardRecord) -> None:
        reward = record.build(self.options)
        for prompt, answer, good, bad in self.better:
            assert self.score(reward, (prompt, answer, good)) > self.score(reward, (prompt, answer, bad))

    def test_an_option_that_does_not_exist_is_refused(self, record: RewardRecord) -> None:
        with pytest.raises(InvalidRequest):
            record.build({**self.options, "no_such_option": 1})
