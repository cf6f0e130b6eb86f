"""The planner under a load that drifts: it follows in time, and where it cannot it says so."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.expert_placement import BalanceSettings
from cluster.plan.expert_drift import EXPERT_BYTES, TARGET, Scenario, simulate_drift

SCENARIO = Scenario(num_drifts=3, drift_every_seconds=90)


@pytest.mark.parametrize("topk", [1, 6])
@pytest.mark.parametrize("seed", [0, 1])
def test_zipf_load_is_even_again_within_a_minute_of_each_drift(topk: int, seed: int) -> None:
    assert SCENARIO.settings.redundancy == 0.125
    assert (SCENARIO.num_experts, SCENARIO.num_replicas, SCENARIO.zipf_exponent) == (256, 32, 1.2)
    simulation = simulate_drift(replace(SCENARIO, topk=topk), seed=seed)
    assert len(simulation.balances) == 3 * 90
    for drift in simulation.drifts:
        assert drift.balance_at_once < 0.3  # it was a drift
        assert drift.seconds_to_target is not None
        assert drift.seconds_to_target <= 60
        assert drift.settled_balance >= TARGET
        assert drift.best_found <= drift.bound


def test_experts_stay_when_few_rows_say_little_about_them() -> None:
    scenario = replace(SCENARIO, num_drifts=1, drift_every_seconds=200, rows_per_second=300)
    simulation = simulate_drift(scenario, seed=0)
    assert simulation.drifts[0].num_loads <= 100  # a balanced placement is about 50 away


def test_what_is_measured_follows_from_the_seed() -> None:
    short = Scenario(num_experts=32, num_replicas=4, num_drifts=2, drift_every_seconds=15)
    assert simulate_drift(short, seed=3) == simulate_drift(short, seed=3)
    assert simulate_drift(short, seed=3).balances != simulate_drift(short, seed=4).balances


def test_slow_loads_delay_the_balance() -> None:
    usual = replace(SCENARIO, topk=1, num_drifts=1)
    fast = simulate_drift(usual, seed=0)
    slow = simulate_drift(replace(usual, bytes_per_second=10**8), seed=0)
    assert slow.scenario.load_seconds == pytest.approx(EXPERT_BYTES / 1e8)
    assert (slow.drifts[0].seconds_to_target or 999) > (fast.drifts[0].seconds_to_target or 999)


def test_too_few_copies_are_told_by_the_bound() -> None:
    settings = BalanceSettings(redundancy=0.02)
    scenario = replace(SCENARIO, topk=1, num_drifts=1, drift_every_seconds=30, settings=settings)
    (drift,) = simulate_drift(scenario, seed=0).drifts
    assert drift.seconds_to_target is None
    ranks = np.arange(1, 257) ** -1.2
    hottest_copy = ranks[0] / ranks.sum() / 4  # five more copies: 4, 2 and 2 of the hottest three
    assert drift.bound == pytest.approx(1 / 32 / hottest_copy)
    assert drift.settled_balance <= drift.bound + 0.02  # one second's noise
