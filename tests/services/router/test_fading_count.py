import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.router.fading_count import FadingCount


def test_what_was_counted_fades_with_the_half_life() -> None:
    count = FadingCount(half_life_seconds=2.0)
    assert count.value(5.0) == 0
    count.add(8, 10.0)
    assert [count.value(10.0 + later) for later in (0, 2, 6)] == [8, 4, 1]
    count.add(1, 14.0)
    assert count.value(16.0) == 1.5


@given(st.lists(st.tuples(st.integers(0, 100), st.floats(0, 9)), max_size=20))
def test_it_is_the_sum_of_what_is_left_of_each(added: list[tuple[int, float]]) -> None:
    count, now, expected = FadingCount(half_life_seconds=1.0), 1e5, 0.0
    for number, pause in added:
        count.add(number, now)
        now += pause
        expected = (expected + number) * 0.5**pause
    assert count.value(now) == pytest.approx(expected)
