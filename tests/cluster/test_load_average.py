import numpy as np
import pytest

from cluster.load_average import LoadAverage


def test_a_steady_rate_is_known_from_the_first_interval_on_however_long_they_are() -> None:
    average = LoadAverage(2, half_life_seconds=10)
    assert average.per_second.tolist() == [0, 0]
    for seconds in (1.0, 0.1, 30.0, 5.0):
        average.add([3 * seconds, 0], seconds)
        np.testing.assert_allclose(average.per_second, [3, 0])


def test_what_is_a_half_life_old_counts_half() -> None:
    average = LoadAverage(1, half_life_seconds=10)
    for _ in range(1000):
        average.add([100], 1)
    for _ in range(10):
        average.add([0], 1)
    np.testing.assert_allclose(average.per_second, [50])


def test_the_total_says_how_much_the_average_rests_on() -> None:
    average = LoadAverage(2, half_life_seconds=10)
    assert average.total == 0
    average.add([30, 10], 1)
    assert average.total == 40
    average.add([0, 0], 10)
    assert average.total == 20


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_time_moves_on(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"seconds {seconds} must be above 0"):
        LoadAverage(1, half_life_seconds=1).add([1], seconds)
    with pytest.raises(ValueError, match=f"half_life_seconds {seconds} must be above 0"):
        LoadAverage(1, half_life_seconds=seconds)
