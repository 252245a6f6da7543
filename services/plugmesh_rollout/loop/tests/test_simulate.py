"""The simulator against what can be said without it."""

from __future__ import annotations

import pytest

from plugmesh_rollout.loop.simulate import Shape, colocated, streamed, train_time


def test_with_equal_times_a_step_takes_generation_plus_training_or_the_longer_of_both():
    """The bubble formula: by turns the sum, as streams the maximum (here training)."""
    shape = Shape(groups_per_worker=3, slots=4, sigma=0.0, train_cost=2.0, publish_cost=0.0, shift_cost=0.0)
    workers, steps = 8, 40
    batch, num_train = workers * 3, 2
    training = train_time(batch, num_train, shape)
    by_turns, streams = streamed(workers, steps, shape, 0, 0), streamed(workers, steps, shape, 1, 0)

    assert batch / (1.0 + training) / workers == pytest.approx(by_turns.throughput, rel=0.01)
    assert batch / training / workers == pytest.approx(streams.throughput, rel=0.05)
    assert batch / (1.0 + train_time(batch, workers, shape)) / workers == pytest.approx(colocated(workers, steps, shape, 0).throughput, rel=0.01)


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_and_is_used_and_everything_is_trained(staleness, seed):
    """`streamed` raises by itself where the loop stops or a group becomes too old."""
    found = streamed(16, 12, Shape(sigma=1.2), staleness, seed)

    assert 12 * 64 == sum(found.lags.values())
    assert staleness >= max(found.lags)
    assert staleness == 0 or max(found.lags) >= 1


def test_the_advantage_over_turns_grows_with_the_cluster():
    """The paper's trend; here by weak scaling, where a step waits for the slowest of ever more responses."""
    ratios = [streamed(n, 10, Shape(), 1, 0).throughput / colocated(n, 10, Shape(), 0).throughput for n in (8, 32, 128)]

    assert ratios == sorted(ratios) and ratios[0] > 1
