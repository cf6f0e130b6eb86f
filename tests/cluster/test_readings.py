"""What happened between two readings of a process's report."""

import pytest

from cluster.readings import Reading, Window, Windows
from protos.control_pb2 import RoleStats
from protos.expert_pb2 import ExpertStatsResponse
from protos.histogram_pb2 import Histogram


def report(seconds: float, busy: float, answers: int = 0) -> RoleStats:
    compute = Histogram(counts=[0, answers], sum_seconds=answers * 1.2e-5)
    expert = ExpertStatsResponse(busy_seconds=busy, compute_seconds=compute)
    return RoleStats(seconds=seconds, expert=expert)


def busy(stats: RoleStats) -> float:
    return stats.expert.busy_seconds


def test_the_first_window_is_since_the_process_serves() -> None:
    window = Windows().until({"a": Reading(1, report(10, 4))})["a"]
    assert (window.seconds, window.rate(busy)) == (10, 0.4)


def test_the_next_one_is_since_the_last_reading() -> None:
    windows = Windows()
    windows.until({"a": Reading(1, report(10, 4, answers=3))})
    window = windows.until({"a": Reading(1, report(12, 5, answers=8))})["a"]
    assert (window.seconds, window.count(busy), window.rate(busy)) == (2, 1, 0.5)
    answers = window.histogram(lambda stats: stats.expert.compute_seconds)
    assert answers.count == 5
    assert answers.mean == pytest.approx(1.2e-5)


def test_another_process_of_the_same_name_begins_anew() -> None:
    windows = Windows()
    windows.until({"a": Reading(1, report(10, 9))})
    assert windows.until({"a": Reading(2, report(20, 5))})["a"].rate(busy) == 0.25
    assert windows.until({"a": Reading(2, report(1, 1))})["a"].rate(busy) == 1


def test_of_a_process_that_says_nothing_nothing_is_said() -> None:
    windows = Windows()
    windows.until({"a": Reading(1, report(10, 9))})
    for _ in range(2):
        assert windows.until({"a": Reading(1, report(10, 9))})["a"].rate(busy) is None
    assert windows.until({"a": Reading(1, report(20, 10))})["a"].rate(busy) == 0.1
    assert windows.until({}) == {}
    assert Window(RoleStats()).rate(busy) is None
