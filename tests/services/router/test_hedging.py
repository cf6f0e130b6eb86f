import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.hedging import (
    HEDGE_FLOOR_SECONDS,
    HEDGE_MULTIPLE,
    MAX_SLOWNESS,
    SLOW_FACTOR,
    UNMEASURED_SECONDS,
    AnswerTimes,
    HedgeBudget,
    Quantile,
    Slowness,
    slow_factor,
)

SECONDS = st.floats(1e-5, 10.0)


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_a_quantile_follows_what_it_is_a_quantile_of(fraction: float) -> None:
    draw = random.Random(7)
    quantile = Quantile(fraction, step=0.1, start=1.0)
    for scale in (1.0, 20.0, 0.5):  # it drifts
        numbers = [scale * draw.lognormvariate(0.0, 0.5) for _ in range(4000)]
        below = 0
        for i, number in enumerate(numbers):
            quantile.observe(number)
            below += i >= 2000 and number <= quantile.value
        assert below / 2000 == pytest.approx(fraction, abs=0.05)


@given(st.lists(SECONDS, min_size=1, max_size=50), st.floats(0.1, 0.9), st.floats(0.05, 0.5))
def test_an_outlier_moves_a_quantile_by_one_step_and_never_past_itself(
    numbers: list[float], fraction: float, step: float
) -> None:
    quantile = Quantile(fraction, step, start=numbers[0])
    for number in numbers:
        before = quantile.value
        quantile.observe(number)
        assert min(before, number) <= quantile.value <= max(before, number)
        assert 2.71829**-step * before <= quantile.value <= 2.71829**step * before


@given(st.dictionaries(st.integers(1, 100_000), SECONDS), st.integers(1, 100_000))
def test_patience_is_never_below_the_floor_nor_below_what_was_seen_of_that_size(
    seen: dict[int, float], work_pairs: int
) -> None:
    times = AnswerTimes()
    for pairs, seconds in seen.items():
        for _ in range(200):
            times.observe(pairs, seconds)
    patience = times.patience_seconds(work_pairs)
    if not seen:
        assert patience == UNMEASURED_SECONDS
        return
    assert patience >= HEDGE_FLOOR_SECONDS
    same_size = [s for p, s in seen.items() if p.bit_length() == work_pairs.bit_length()]
    if len(same_size) == 1:
        expected = max(HEDGE_FLOOR_SECONDS, HEDGE_MULTIPLE * same_size[0])
        assert patience == pytest.approx(expected)
        assert times.typical_seconds(work_pairs) == pytest.approx(same_size[0])


def test_more_work_is_waited_for_longer_where_that_much_was_never_seen() -> None:
    times = AnswerTimes()
    times.observe(8, 0.05)
    patience = [times.patience_seconds(2**size) for size in range(3, 14)]
    assert all(later == 2 * sooner for sooner, later in pairwise(patience))
    assert times.patience_seconds(1) == patience[0]


@given(st.lists(st.booleans(), max_size=400))
def test_copies_are_at_most_a_burst_and_a_share_of_what_was_sent(sent: list[bool]) -> None:
    budget = HedgeBudget(share=0.1, burst=4)
    num_sent = num_copies = 0
    for earns in sent:
        if earns:
            budget.earn()
            num_sent += 1
        else:
            num_copies += budget.spend()
        assert num_copies <= 4 + 0.1 * num_sent + 1e-9
    # It is not saved beyond the burst, and not refused while it lasts.
    for _ in range(1000):
        budget.earn()
    assert [budget.spend() for _ in range(6)] == [True] * 4 + [False] * 2


def test_a_replica_counts_as_slow_after_several_answers_and_recovers_after_several() -> None:
    slowness = Slowness()
    slowness.observe(5.0, typical_seconds=0.001)  # one hiccup
    assert slow_factor(slowness.value, fastest=1.0) == 1.0
    for _ in range(100):
        slowness.observe(5.0, typical_seconds=0.001)
    assert slowness.value == MAX_SLOWNESS
    num_answers = 0
    while slow_factor(slowness.value, fastest=1.0) > 1.0:
        slowness.observe(0.001, typical_seconds=0.001)
        num_answers += 1
    assert num_answers <= 12


@given(st.floats(0.01, MAX_SLOWNESS), st.floats(0.01, MAX_SLOWNESS))
def test_load_moves_in_proportion_and_not_for_noise(slowness: float, fastest: float) -> None:
    ratio = slowness / fastest
    if ratio < 0.999 * SLOW_FACTOR:
        assert slow_factor(slowness, fastest) == 1.0
    elif ratio > 1.001 * SLOW_FACTOR:
        assert slow_factor(slowness, fastest) == pytest.approx(ratio)
