"""Durations counted in buckets: what is said of them is true of the durations themselves."""

import itertools
import random

import pytest

from services.histogram import BOUNDS, Histogram, added


def observed(durations: list[float]) -> Histogram:
    histogram = Histogram()
    for seconds in durations:
        histogram.observe(seconds)
    return histogram


def some_durations(number: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.lognormvariate(-5, 1.5) for _ in range(number)]


def test_the_bounds_ascend_and_are_close_together() -> None:
    assert BOUNDS[0] == 1e-5
    assert BOUNDS[-1] == 70
    assert all(1.3 < b / a < 1.7 for a, b in itertools.pairwise(BOUNDS))


@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_a_percentile_is_within_a_bucket_of_the_true_one(fraction: float) -> None:
    durations = some_durations(5000)
    true = sorted(durations)[round(fraction * (len(durations) - 1))]
    told = observed(durations).percentile(fraction)
    assert told is not None
    assert true / 1.7 < told < true * 1.7


def test_the_mean_is_exact_and_of_nothing_nothing_is_said() -> None:
    durations = some_durations(100)
    assert observed(durations).mean == pytest.approx(sum(durations) / 100)
    assert Histogram().mean is None
    assert Histogram().percentile(0.5) is None


def test_what_is_out_of_range_counts_too() -> None:
    histogram = observed([0.0, 1e-9, 500.0])
    assert histogram.count == 3
    assert histogram.percentile(0.01) == pytest.approx(0, abs=1e-5)
    assert histogram.percentile(1.0) == 70  # the largest that can be told


def test_two_readings_give_what_happened_in_between() -> None:
    before, after = some_durations(50), some_durations(80, seed=1)
    both = observed(before + after)
    between = both.since(observed(before))
    assert between.counts == observed(after).counts
    assert between.sum_seconds == pytest.approx(sum(after))
    assert added([observed(before), observed(after)]).counts == both.counts


def test_it_comes_back_from_the_wire_as_it_went() -> None:
    for histogram in (Histogram(), observed(some_durations(20)), observed([500.0])):
        message = histogram.to_wire()
        assert not message.counts or message.counts[-1]
        assert Histogram.from_wire(message) == histogram
