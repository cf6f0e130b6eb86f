"""The simulated fleet, and what the policy makes of it."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.autoscale import ScalingSettings
from cluster.plan.fleet import FleetScenario, arrivals, run_fixed, run_scaled
from cluster.plan.load_curves import synthetic_curves

SETTINGS = ScalingSettings()
SCENARIO = FleetScenario(settings=SETTINGS)
CURVES = {curve.name: curve for curve in synthetic_curves(200, seed=0)}
EXACT = replace(SCENARIO, missing_share=0.0, noise=0.0)


def test_what_a_fixed_fleet_cannot_compute_waits() -> None:
    run = run_fixed(np.array([30, 30, 0, 0, 0]), SCENARIO, replicas=2)
    assert run.queue_seconds.tolist() == [0.5, 1.0, 0.0, 0.0, 0.0]
    assert run.share_over(0.5) == 0.2
    assert run.replica_hours == pytest.approx(2 * 5 / 3600)


def test_a_step_is_followed_up_and_down() -> None:
    step = np.concatenate([np.full(60, 40), np.full(900, 160), np.full(1200, 40)])
    run = run_scaled(step, EXACT, seed=0)
    needed = EXACT.replicas_for(160)
    assert run.replicas[0] == EXACT.replicas_for(40)
    # Two decisions, the second once the first has started, and the queue is worked off.
    settled = 60 + 2 * int(SETTINGS.up_after_seconds + EXACT.start_seconds) + 100
    assert (run.replicas[settled:960] >= needed).all()
    assert run.replicas.max() <= 1.35 * needed
    assert (run.queue_seconds[settled:] <= SETTINGS.queue_seconds).all()
    assert (run.replicas[960 : 960 + 290] >= needed).all()  # down only after five minutes
    assert run.replicas[-1] <= EXACT.replicas_for(40) + 1


def test_replicas_take_their_time_to_start() -> None:
    load = np.full(600, 80)
    quick = run_scaled(load, replace(EXACT, start_seconds=1), seed=0)
    slow = run_scaled(load, replace(EXACT, start_seconds=120), seed=0)
    assert (quick.replicas == slow.replicas).all()  # enough from the start on
    step = np.concatenate([np.full(60, 40), np.full(600, 160)])
    quick = run_scaled(step, replace(EXACT, start_seconds=1), seed=0)
    slow = run_scaled(step, replace(EXACT, start_seconds=120), seed=0)
    assert quick.queue_seconds.max() < slow.queue_seconds.max()


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_not_followed(seed: int) -> None:
    curve = next(each for each in synthetic_curves(200, seed) if each.name == "noise")
    run = run_scaled(arrivals(curve, seed), SCENARIO, seed)
    assert run.num_changes <= 4
    assert (np.diff(run.replicas) >= 0).all()  # nothing goes that would have to come back
    assert run.share_over(SETTINGS.queue_seconds) <= 0.01


@pytest.mark.parametrize("name", ["ramp", "diurnal"])
def test_what_changes_slowly_costs_less_than_a_fixed_fleet_and_makes_nobody_wait(name: str) -> None:
    curve = CURVES[name]
    arriving = arrivals(curve, seed=0)
    run = run_scaled(arriving, SCENARIO, seed=0)
    fixed = run_fixed(arriving, SCENARIO, SCENARIO.replicas_for(float(curve.rates.max())))
    assert run.replica_hours <= 0.75 * fixed.replica_hours
    assert run.share_over(SETTINGS.queue_seconds) <= 0.01
    assert run.num_changes <= 40


def test_the_largest_fleet_is_never_exceeded() -> None:
    scenario = replace(SCENARIO, settings=ScalingSettings(max_replicas=7))
    run = run_scaled(arrivals(CURVES["step"], seed=0), scenario, seed=0)
    assert run.replicas.max() == 7
