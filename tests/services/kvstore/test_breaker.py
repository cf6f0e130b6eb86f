import pytest

from services.kvstore.breaker import SLOW_ANSWERS, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(slow_seconds=0.1, probe_seconds=1.0, clock=clock)


def test_a_failure_stops_everything_until_a_probe_is_due(breaker: Breaker, clock: Clock) -> None:
    assert (breaker.allows_reads, breaker.allows_writes, breaker.wants_probe) == (True, True, False)
    assert breaker.failed("down")
    assert (breaker.allows_reads, breaker.allows_writes, breaker.wants_probe) == (
        False,
        False,
        False,
    )
    clock.now += 1.0
    assert breaker.wants_probe
    assert not breaker.failed("still down")  # the probe failed
    assert not breaker.wants_probe
    assert breaker.reason == "still down"
    clock.now += 1.0
    breaker.recovered()
    assert (breaker.reason, breaker.allows_reads, breaker.allows_writes) == (None, True, True)
    assert not breaker.wants_probe


def test_what_refuses_only_writes_is_still_read(breaker: Breaker) -> None:
    breaker.failed("full", reads_work=True)
    assert (breaker.allows_reads, breaker.allows_writes) == (True, False)
    breaker.failed("down")
    breaker.failed("full", reads_work=True)  # a late answer does not open what is shut
    assert not breaker.allows_reads


def test_slow_answers_in_a_row_are_a_failure(breaker: Breaker) -> None:
    for _ in range(SLOW_ANSWERS - 1):
        assert not breaker.answered(0.2)
    assert not breaker.answered(0.01)
    for _ in range(SLOW_ANSWERS - 1):
        assert not breaker.answered(0.2)
    assert breaker.answered(0.2)
    assert breaker.reason == "slow: 200 ms for an answer"
