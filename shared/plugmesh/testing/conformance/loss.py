"""What every loss must do: finite, nothing but the tokens that are there, shares that add up to the batch's, and gradients that are those of its value.

Needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from plugmesh.errors import InvalidRequest
from plugmesh.records import Loss, LossRecord
from plugmesh.testing.conformance.base import RecordConformance

LENGTHS = (4, 1, 0, 6, 3)  # of responses; one has no token
ADVANTAGES = (1.0, -0.5, 0.7, -1.3, 0.0)
PER_TOKEN = ("behaviour", "proximal", "reference", "mask")
FAR = 30.0  # nats between the trainer and the behaviour: more than any run survives, and float32 does


class LossConformance(RecordConformance):
    """A suite's subclass says with which options its losses are built, and which of the usual properties it does without.

    Attributes:
        has_reference: The batch has `reference`; a loss must not need it otherwise.
        is_regularised: It has a gradient without advantages: an entropy bonus, a distance from the reference.
        has_fixed_parts: It holds a part of its value fixed on purpose (a detached weight), so that finite differences are no judge of its gradient.
    """

    kind = "losses"
    options: ClassVar[Mapping[str, Any]] = {}
    has_reference: ClassVar[bool] = False
    is_regularised: ClassVar[bool] = False
    has_fixed_parts: ClassVar[bool] = False

    def part(
        self, loss: Loss, *, lengths: Sequence[int] = LENGTHS, advantages: Sequence[float] = ADVANTAGES, far: float = 0.5, seed: int = 0, dtype: str = "float32"
    ) -> tuple[Any, dict[str, Any]]:
        """(logprobs, batch) as the trainer makes them: zeros where there is no token."""
        import torch

        rng = np.random.default_rng(seed)
        shape = len(lengths), max(lengths)
        mask = np.arange(shape[1])[None] < np.array(lengths)[:, None]
        behaviour = -rng.gamma(2.0, 0.6, shape)
        columns = {"behaviour": behaviour}
        if loss.needs_proximal:
            columns["proximal"] = np.minimum(behaviour + far * rng.normal(0, 0.6, shape), 0.0)
        if self.has_reference:
            columns["reference"] = np.minimum(behaviour + rng.normal(0, 0.5, shape), 0.0)
        logprobs = np.minimum(behaviour + far * rng.normal(0, 1, shape), 0.0)
        kind = getattr(torch, dtype)
        batch = {name: torch.tensor(values * mask, dtype=kind) for name, values in columns.items()}
        batch |= {
            "mask": torch.tensor(mask), "advantage": torch.tensor(advantages, dtype=kind), "num_tokens": torch.tensor(float(mask.sum()), dtype=kind),
            "num_rows": torch.tensor(float(len(lengths)), dtype=kind),
        }  # fmt: skip
        return torch.tensor(logprobs * mask, dtype=kind), batch

    @staticmethod
    def run(loss: Loss, logprobs: Any, batch: Mapping[str, Any]) -> tuple[float, np.ndarray, dict[str, float]]:
        """Value, gradient and facts, all of which must be finite; what it was given must stay as it was."""
        import torch

        before = {name: tensor.clone() for name, tensor in batch.items()}
        leaf = logprobs.detach().clone().requires_grad_()
        value, facts = loss(leaf * 1.0, batch)  # no leaf, as in the trainer
        assert value.shape == (), f"a loss is a scalar, not of shape {tuple(value.shape)}"
        value.backward()
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert bool(torch.isfinite(value)) and bool(torch.isfinite(gradient).all()), f"loss {value}, gradient {gradient}"
        assert set(batch) == set(before) and all(torch.equal(batch[n], t) for n, t in before.items()), "`batch` is not the loss's to change"
        told = {name: float(fact) for name, fact in facts.items()}
        assert all(np.isfinite(list(told.values()))), told
        return float(value.detach()), gradient.numpy(), told

    @staticmethod
    def rows_of(logprobs: Any, batch: Mapping[str, Any], rows: Sequence[int]) -> tuple[Any, dict[str, Any]]:
        """A part with these rows of a batch, whose counts stay the batch's."""
        chosen = list(rows)
        return logprobs[chosen], {n: t[chosen] if t.ndim else t for n, t in batch.items()}

    @staticmethod
    def assert_same(found: tuple[float, np.ndarray, dict[str, float]], expected: tuple[float, np.ndarray, dict[str, float]], why: str) -> None:
        assert np.isclose(found[0], expected[0], rtol=1e-5, atol=1e-6), f"{why}: the loss is {found[0]} instead of {expected[0]}"
        assert np.allclose(found[1], expected[1], rtol=1e-4, atol=1e-6), f"{why}: another gradient"
        assert found[2].keys() == expected[2].keys(), why
        assert all(np.isclose(found[2][n], x, rtol=1e-4, atol=1e-5) for n, x in expected[2].items()), f"{why}: {found[2]} instead of {expected[2]}"

    # -- the tests --------------------------------------------------------------------------------------------------------

    def test_it_is_finite_however_far_the_weights_have_moved(self, record: LossRecord) -> None:
        """Tokens that have become 1e13 times as likely as when they were generated, and as unlikely."""
        loss = record.build(self.options)
        for sign in (1, -1):
            logprobs, batch = self.part(loss)
            moved = batch["mask"] * FAR * sign
            self.run(loss, logprobs - moved.clamp(min=0), {**batch, "behaviour": batch["behaviour"] + moved.clamp(max=0)})

    def test_rows_without_tokens_are_no_trouble(self, record: LossRecord) -> None:
        loss = record.build(self.options)
        logprobs, batch = self.part(loss)
        _, gradient, _ = self.run(loss, *self.rows_of(logprobs, batch, [2]))
        assert not gradient.any()
        logprobs, batch = self.part(loss, lengths=(1,), advantages=(1.0,))
        self.run(loss, logprobs, batch)

    def test_the_same_batch_gives_the_same_bits(self, record: LossRecord) -> None:
        one, other = record.build(self.options), record.build(self.options)
        first, again, new = (self.run(x, *self.part(x)) for x in (one, one, other))
        assert first[0] == again[0] == new[0]
        assert np.array_equal(first[1], again[1]) and np.array_equal(first[1], new[1])
        assert first[2] == again[2] == new[2]

    def test_no_advantage_is_no_gradient(self, record: LossRecord) -> None:
        if self.is_regularised:
            pytest.skip("the loss has a term that does not depend on advantages")
        loss = record.build(self.options)
        _, gradient, _ = self.run(loss, *self.part(loss, advantages=(0.0,) * len(LENGTHS)))
        assert not gradient.any()
        _, gradient, _ = self.run(loss, *self.part(loss))
        assert not gradient[-1].any(), "a row without an advantage has a gradient"

    def test_a_better_response_becomes_likelier_and_a_worse_one_less(self, record: LossRecord) -> None:
        """On tokens as they were generated, where nothing is clipped."""
        if self.is_regularised:
            pytest.skip("the loss has a term that does not depend on advantages")
        loss = record.build(self.options)
        logprobs, batch = self.part(loss, far=0.0)
        _, gradient, _ = self.run(loss, logprobs, batch)
        for row, (length, advantage) in enumerate(zip(LENGTHS, ADVANTAGES, strict=True)):
            assert (gradient[row, :length] * advantage <= 0).all()
            assert length == 0 or advantage == 0 or (gradient[row, :length] * advantage < 0).any()

    def test_only_tokens_that_are_there_count(self, record: LossRecord) -> None:
        import torch

        loss = record.build(self.options)
        logprobs, batch = self.part(loss)
        expected = self.run(loss, logprobs, batch)
        mask = batch["mask"]
        other = {n: torch.where(mask, t, torch.full_like(t, -1.5 - i)) if n in PER_TOKEN[:3] else t for i, (n, t) in enumerate(batch.items())}
        found = self.run(loss, torch.where(mask, logprobs, torch.full_like(logprobs, -0.25)), other)

        self.assert_same(found, expected, "something else where there is no token")
        assert not found[1][~mask.numpy()].any(), "a gradient where there is no token"

    def test_padding_changes_nothing(self, record: LossRecord) -> None:
        import torch

        loss = record.build(self.options)
        logprobs, batch = self.part(loss)
        value, gradient, facts = self.run(loss, logprobs, batch)
        wider = {n: torch.nn.functional.pad(t, (0, 5)) if t.ndim == 2 else t for n, t in batch.items()}
        found = self.run(loss, torch.nn.functional.pad(logprobs, (0, 5)), wider)

        self.assert_same(found, (value, np.pad(gradient, ((0, 0), (0, 5))), facts), "rows filled up")

    @pytest.mark.parametrize("parts", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3, 4]], [[4], [3], [2], [1], [0]], [[3, 0], [4, 2, 1]]], ids=str)
    def test_the_shares_of_parts_add_up_to_the_batchs(self, record: LossRecord, parts: list[list[int]]) -> None:
        loss = record.build(self.options)
        logprobs, batch = self.part(loss)
        whole = self.run(loss, logprobs, batch)
        value, gradient, facts = 0.0, np.zeros_like(whole[1]), dict.fromkeys(whole[2], 0.0)
        for rows in parts:
            share, of_rows, told = self.run(loss, *self.rows_of(logprobs, batch, rows))
            value += share
            gradient[rows] = of_rows
            facts = {n: facts[n] + told[n] for n in facts}

        self.assert_same((value, gradient, facts), whole, f"parts {parts}")

    def test_the_gradient_is_that_of_the_value(self, record: LossRecord) -> None:
        """Against central differences, in double precision."""
        if self.has_fixed_parts:
            pytest.skip("the loss holds a part of its value fixed")
        loss = record.build(self.options)
        logprobs, batch = self.part(loss, lengths=(3, 2), advantages=(0.8, -1.1), far=0.3, seed=5, dtype="float64")
        _, gradient, _ = self.run(loss, logprobs, batch)
        step = 1e-6
        for row, column in np.argwhere(batch["mask"].numpy()):
            values = []
            for sign in (1, -1):
                moved = logprobs.clone()
                moved[row, column] += sign * step
                values.append(self.run(loss, moved, batch)[0])
            assert np.isclose(gradient[row, column], (values[0] - values[1]) / (2 * step), rtol=1e-5, atol=1e-7), f"token {column} of row {row}"

    def test_an_option_that_does_not_exist_is_refused(self, record: LossRecord) -> None:
        with pytest.raises(InvalidRequest):
            record.build({**self.options, "no_such_option": 1})
