"""How long a process that ended waits for the next one."""

from cluster.backoff import Backoff, RestartPolicy

POLICY = RestartPolicy(first_delay_seconds=1.0, max_delay_seconds=6.0, stable_seconds=10.0)


def test_the_first_restart_is_at_once_and_later_ones_wait_twice_as_long_each_time() -> None:
    backoff = Backoff(POLICY)
    assert [backoff.delay_seconds(5.0) for _ in range(6)] == [0.0, 1.0, 2.0, 4.0, 6.0, 6.0]


def test_a_process_that_lived_long_starts_anew() -> None:
    backoff = Backoff(POLICY)
    lived = [100.0, 0.0, 0.0, 10.0, 9.9]
    assert [backoff.delay_seconds(seconds) for seconds in lived] == [0.0, 1.0, 2.0, 0.0, 1.0]


def test_the_thousandth_restart_waits_no_longer_than_the_most() -> None:
    backoff = Backoff(POLICY)
    assert [backoff.delay_seconds(0.0) for _ in range(1000)][-1] == 6.0
