"""What a run is judged by."""

from collections.abc import Sequence

import pytest

from cluster.chaos.faults import Injected
from cluster.chaos.plan import Fault
from cluster.chaos.traffic import Exchange, Log
from cluster.chaos.verdicts import (
    Counts,
    Report,
    kept_blocks,
    longest_gap,
    recomputed,
    recovery,
    slowed_tail,
    stall,
    throughput,
)

NO_COUNTS = Counts()


def report(
    arrivals: Sequence[float] = (), faults: Sequence[Injected] = (), counts: Counts = NO_COUNTS
) -> Report:
    exchanges = [Exchange(stream=0, started=0.0, arrivals=list(arrivals))]
    return Report(
        machine="",
        preset="",
        seed=0,
        streams=1,
        seconds=1.0,
        log=Log(exchanges=exchanges),
        faults=faults,
        not_recovered="",
        rss_mib_per_minute={},
        counts=counts,
    )


def injected(fault: Fault, at: float, ended: float, recovered: float) -> Injected:
    return Injected(fault, "expert-0-0", at, ended, recovered)


@pytest.mark.parametrize(("target", "is_met"), [(2.0, True), (1.9, False), (None, None)])
def test_a_stall_is_held_against_its_target(target: float | None, is_met: bool | None) -> None:
    kill = injected(Fault.KILL_EXPERT, 3.5, 3.5, 5.0)
    found = stall(Fault.KILL_EXPERT, 0.5, target)(report([0, 1, 2, 3, 6, 7, 8], [kill]))
    assert (found.measured, found.is_met) == ("2000 ms", is_met)


def test_no_gap_may_be_longer_than_two_usual_ones_or_the_floor() -> None:
    steady = [0.0, 1.0, 2.0, 3.0]
    assert longest_gap(0.25, steps=2)(report([*steady, 5.0])).is_met
    assert not longest_gap(0.25, steps=2)(report([*steady, 5.1])).is_met
    assert longest_gap(2.2, steps=2)(report([*steady, 5.1])).is_met


def test_the_slowest_recovery_counts() -> None:
    kills = [injected(Fault.KILL_EXPERT, at, at, at + 1 + at / 10) for at in (0.0, 10.0)]
    assert recovery(Fault.KILL_EXPERT, None)(report(faults=kills)).measured == "2000 ms"


def test_a_slow_replica_may_double_the_tail_once_it_was_noticed() -> None:
    slow = injected(Fault.SLOW_EXPERT, 10.0, 20.0, 20.0)
    steady = [float(at) for at in range(10)]
    noticed = slowed_tail(5.0, factor=2.0)
    assert noticed(report([*steady, 13.0, 15.0, 17.0, 19.0], [slow])).is_met
    assert not noticed(report([*steady, 15.0, 17.5], [slow])).is_met
    assert not noticed(report([*steady, 13.0], [slow])).is_met  # nothing came while it was slow


def test_blocks_that_were_never_there_prove_nothing() -> None:
    assert kept_blocks(report(counts=Counts(blocks_before=5))).is_met
    assert not kept_blocks(report(counts=Counts(blocks_before=5, blocks_lost=1))).is_met
    assert not kept_blocks(report()).is_met


def test_tokens_while_a_replica_is_dead_count_beside_those_of_the_time_before() -> None:
    dead = injected(Fault.HOLD_EXPERT_DEAD, 10.0, 20.0, 21.0)
    before = [0.0, *(float(at) for at in range(1, 11))]
    assert throughput(0.9)(report([*before, *range(11, 20)], [dead])).measured == "0.900x"
    assert not throughput(0.98)(report([*before, *range(11, 20)], [dead])).is_met
    assert not throughput(0.98)(report(before)).is_met  # nothing was shown


def test_what_is_computed_again_is_told_by_continuation() -> None:
    counts = Counts(continuations=4, recomputed_tokens=300)
    assert recomputed(report(counts=counts)).measured == "75"
