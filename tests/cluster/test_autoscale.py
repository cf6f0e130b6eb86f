"""What the scaling policy decides: quickly up, slowly down, and not at all on noise."""

import math
import random
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscale import Autoscaler, RoleSample, ScalingSettings, replicas_wanted

SETTINGS = ScalingSettings()
INTERVAL = 5.0


class Role:
    """Replicas that are ready as soon as they are wanted, unless a test says otherwise."""

    def __init__(self, replicas: int, settings: ScalingSettings = SETTINGS) -> None:
        self.now = 1000.0
        self.replicas = replicas
        self._scaler = Autoscaler(settings, lambda: self.now)

    def measure(
        self, busy: float | None, queue: float | None = 0.0, ready: int | None = None
    ) -> int:
        self.now += INTERVAL
        num_ready = self.replicas if ready is None else ready
        self.replicas = self._scaler.decide(self.replicas, RoleSample(num_ready, busy, queue))
        return self.replicas

    def until_change(self, busy: float, queue: float = 0.0) -> float:
        """Seconds of the same samples until the decision is another."""
        since, before = self.now, self.replicas
        while self.measure(busy, queue) == before:
            assert self.now - since < 10_000
        return self.now - since


def settings_of(min_replicas: int, more: int, max_factor: float) -> ScalingSettings:
    return ScalingSettings(
        min_replicas=min_replicas,
        max_replicas=min_replicas + more,
        max_factor=max_factor,
        down_after_seconds=20,
    )


SAMPLES = st.tuples(st.integers(0, 12), st.none() | st.floats(0, 1), st.none() | st.floats(0, 1000))


@given(
    st.builds(settings_of, st.integers(1, 4), st.integers(0, 20), st.floats(1.01, 8)),
    st.integers(0, 40),
    st.lists(SAMPLES, max_size=60),
)
def test_no_decision_leaves_the_bounds_or_goes_too_far_at_once(
    settings: ScalingSettings,
    replicas: int,
    samples: Iterable[tuple[int, float | None, float | None]],
) -> None:
    role = Role(replicas, settings)
    role.measure(None)
    for ready, busy, queue in samples:
        before = role.replicas
        after = role.measure(busy, queue, ready)
        assert 1 <= settings.min_replicas <= after <= settings.max_replicas
        assert after <= math.ceil(before * settings.max_factor)
        assert after >= min(before - 1, math.ceil(before / settings.max_factor))
        if busy is None and queue is None:
            assert after == before


@pytest.mark.parametrize(
    ("sample", "wanted"),
    [
        (RoleSample(10, 0.7), 10),
        (RoleSample(10, 0.76), 10),  # within the tolerance
        (RoleSample(10, 0.64), 10),
        (RoleSample(10, 0.84), 12),
        (RoleSample(10, 0.35), 5),
        (RoleSample(10, 0.0), 0),  # the bounds make that 1
        (RoleSample(10, 1.0, 0.1), 15),
        (RoleSample(10, 1.0, 0.9), 18),  # how far above 1 only the queue tells
        (RoleSample(10, 1.0, 60.0), 20),  # not more than twice those that were measured
        (RoleSample(10, None, 0.1), 10),
        (RoleSample(10, None, 0.6), 12),
        (RoleSample(10, None, None), None),
        (RoleSample(0, 1.0, 60.0), None),
    ],
)
def test_what_a_sample_asks_for(sample: RoleSample, wanted: int | None) -> None:
    assert replicas_wanted(sample, SETTINGS) == wanted


def test_a_step_up_is_followed_within_seconds_and_a_step_down_after_minutes() -> None:
    role = Role(4)
    assert role.until_change(busy=1.0, queue=5.0) <= SETTINGS.up_after_seconds + INTERVAL
    assert role.replicas == 8
    assert role.until_change(busy=0.9) <= SETTINGS.up_after_seconds + INTERVAL
    assert role.replicas == 11
    for _ in range(200):
        assert role.measure(0.7) == 11
    assert role.until_change(busy=0.1) >= SETTINGS.down_after_seconds
    assert role.replicas == 6
    assert role.until_change(busy=0.1) >= SETTINGS.down_after_seconds
    assert role.replicas == 3


def test_one_busy_sample_in_between_and_the_wait_starts_again() -> None:
    role = Role(10)
    for _ in range(50):
        role.measure(0.2)
    role.measure(0.75)
    assert role.until_change(busy=0.2) >= SETTINGS.down_after_seconds


def test_going_down_leaves_what_the_busiest_sample_of_the_wait_needed() -> None:
    role = Role(10)
    role.measure(0.56)
    role.until_change(busy=0.35)
    assert role.replicas == 8


def test_a_short_spike_changes_nothing() -> None:
    role = Role(10)
    for _ in range(20):
        assert role.measure(1.0, 0.3) == 10
        assert role.measure(0.7) == 10


def test_noise_within_the_tolerance_never_changes_anything() -> None:
    role = Role(10)
    for number in range(1000):
        assert role.measure(0.7 * (1 + 0.099 * math.sin(number * 1.7))) == 10


def test_replicas_that_are_still_starting_are_not_asked_for_again() -> None:
    role = Role(4)
    for _ in range(20):
        role.measure(1.0, 10.0 + role.now, ready=4)
    assert role.replicas == 8


def test_a_queue_that_becomes_shorter_asks_for_nothing_more() -> None:
    role = Role(8)
    for queue in range(60, 1, -1):
        assert role.measure(1.0, float(queue)) == 8
    assert role.until_change(busy=1.0, queue=3.0) <= SETTINGS.up_after_seconds + 2 * INTERVAL


def test_a_queue_that_is_measured_with_noise_is_taken_for_what_it_is_on_the_whole() -> None:
    rng = random.Random(0)
    role = Role(8)
    for queue in range(60, 1, -1):
        assert role.measure(1.0, queue + rng.uniform(-1, 1)) == 8
    for _ in range(20):
        role.measure(0.7, 3 + rng.uniform(-1, 1))
    assert role.replicas > 8


def test_time_without_samples_counts_for_neither_direction() -> None:
    role = Role(10)
    for _ in range(1000):
        assert role.measure(None, None) == 10
    role.measure(0.1)
    for _ in range(1000):
        assert role.measure(None, None) == 10
    assert role.until_change(busy=0.1) >= SETTINGS.down_after_seconds


def test_a_small_factor_still_goes_one_at_a_time() -> None:
    role = Role(3, ScalingSettings(max_factor=1.2))
    assert [(role.until_change(busy=0.1), role.replicas)[1] for _ in range(2)] == [2, 1]
    assert (role.until_change(busy=1.0), role.replicas)[1] == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_replicas": 0}, "replicas from 0 to 64"),
        ({"min_replicas": 5, "max_replicas": 4}, "replicas from 5 to 4"),
        ({"busy_share": 0.0}, "busy_share 0.0 must be above 0"),
        ({"busy_share": 1.1}, "busy_share 1.1"),
        ({"max_factor": 1.0}, "max_factor 1.0 must be above 1"),
        ({"queue_seconds": 0.0}, "queue_seconds 0.0 must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScalingSettings(**wrong)  # type: ignore[arg-type]
