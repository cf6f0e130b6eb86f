import pytest

from cluster.chaos.faults import Injected
from cluster.chaos.plan import Fault
from cluster.chaos.stalls import normal_gap, percentile, stalls
from cluster.chaos.traffic import Exchange


def exchange(*arrivals: float) -> Exchange:
    return Exchange(stream=0, started=arrivals[0], arrivals=list(arrivals))


def injected(at: float, recovered: float, fault: Fault = Fault.KILL_EXPERT) -> Injected:
    return Injected(fault, "expert-0-0", at, at, recovered)


def test_the_gap_around_a_fault_is_its_stall():
    steady = exchange(*range(20))
    stalled = exchange(0, 1, 2, 3, 8, 9, 10)
    found = stalls([steady, stalled], [injected(3.5, 5.0)])
    assert [stall.seconds for stall in found] == [0.0, 4.0]


def test_a_gap_belongs_to_the_last_fault_before_its_end():
    stalled = exchange(0, 1, 2, 3, 8, 9, 10, 14, 15)
    kill, stop = injected(3.5, 5.0), injected(10.5, 12.0, Fault.STOP_EXPERT)
    found = stalls([stalled], [kill, stop])
    assert found == [(Fault.KILL_EXPERT, 4.0), (Fault.STOP_EXPERT, 3.0)]


def test_who_had_ended_before_has_no_stall():
    assert stalls([exchange(0, 1, 2), exchange(8)], [injected(5.0, 6.0)]) == []
    assert stalls([exchange(0, 1, 2)], []) == []


def test_the_normal_gap_is_the_median_of_all():
    assert normal_gap([exchange(0, 1, 2, 3, 9), exchange(5)]) == 1.0
    assert normal_gap([]) == 0.0


@pytest.mark.parametrize(("share", "expected"), [(0.5, 51), (0.99, 100), (1.0, 100)])
def test_percentiles(share: float, expected: int):
    assert percentile(range(100, 0, -1), share) == expected
