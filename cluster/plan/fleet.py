"""A role's replicas under a load curve, scaled by the policy that a deployment runs.

Plain computation: requests are a fluid that the ready replicas drain at a fixed rate each, one
queue before them; arrivals are Poisson's. Knows no model, no network and no clock but its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from cluster.autoscale import Autoscaler, RoleSample, ScalingSettings
from cluster.plan.load_curves import LoadCurve


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetScenario:
    settings: ScalingSettings
    replica_rate: float = 10.0  # requests a second that one replica computes
    start_seconds: int = 30  # from the decision to the first request
    sample_seconds: int = 5
    missing_share: float = 0.02  # of the samples, that do not arrive
    noise: float = 0.05  # relative standard deviation of a measured busy share

    def replicas_for(self, rate: float) -> int:
        """So many are as busy at this rate as they should be."""
        return max(1, math.ceil(rate / (self.replica_rate * self.settings.busy_share) - 1e-9))


@dataclass(frozen=True, slots=True, eq=False)
class FleetRun:
    replicas: NDArray[np.int64]  # of each second, those that are starting too
    queue_seconds: NDArray[np.float64]  # that a request arriving in each second waits

    @property
    def replica_hours(self) -> float:
        return float(self.replicas.sum()) / 3600

    @property
    def num_changes(self) -> int:
        return int(np.count_nonzero(np.diff(self.replicas)))

    def share_over(self, queue_seconds: float) -> float:
        return float(np.mean(self.queue_seconds > queue_seconds))


def arrivals(curve: LoadCurve, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).poisson(curve.rates)


def run_fixed(arriving: NDArray[np.int64], scenario: FleetScenario, replicas: int) -> FleetRun:
    return _run(arriving, _Fleet(scenario, replicas), lambda: None)


def run_scaled(arriving: NDArray[np.int64], scenario: FleetScenario, seed: int) -> FleetRun:
    """Begins with as many as the first minute needs."""
    fleet = _Fleet(scenario, scenario.replicas_for(float(arriving[:60].mean())))
    return _run(arriving, fleet, _Scaling(scenario, fleet, np.random.default_rng(seed)).look)


def _run(arriving: NDArray[np.int64], fleet: _Fleet, every_second: Callable[[], None]) -> FleetRun:
    replicas, queues = [], []
    for num_requests in arriving.tolist():
        fleet.one_second(num_requests)
        every_second()
        replicas.append(fleet.num_replicas)
        queues.append(fleet.queue_seconds)
    return FleetRun(np.array(replicas), np.array(queues))


class _Fleet:
    def __init__(self, scenario: FleetScenario, replicas: int) -> None:
        self._scenario = scenario
        self._waiting = 0.0  # requests
        self._ready_at: list[float] = []  # of those that are starting, ascending
        self.now = 0.0
        self.num_ready = replicas
        self.busy_share = 0.0  # in the last second
        self.queue_seconds = 0.0

    @property
    def num_replicas(self) -> int:
        return self.num_ready + len(self._ready_at)

    def one_second(self, num_requests: int) -> None:
        self.now += 1
        while self._ready_at and self._ready_at[0] <= self.now:
            self._ready_at.pop(0)
            self.num_ready += 1
        capacity = self.num_ready * self._scenario.replica_rate
        due = self._waiting + num_requests
        self._waiting = max(0.0, due - capacity)
        self.busy_share = min(1.0, due / capacity)
        self.queue_seconds = self._waiting / capacity

    def resize(self, replicas: int) -> None:
        """Who goes is gone at once; those still starting go first, the last one first."""
        while self.num_replicas < replicas:
            self._ready_at.append(self.now + self._scenario.start_seconds)
        while self.num_replicas > replicas and self._ready_at:
            self._ready_at.pop()
        self.num_ready = min(self.num_ready, replicas)


class _Scaling:
    """Measures a fleet as well as one can, and does what the policy says."""

    def __init__(self, scenario: FleetScenario, fleet: _Fleet, rng: np.random.Generator) -> None:
        self._scenario = scenario
        self._fleet = fleet
        self._rng = rng
        self._scaler = Autoscaler(scenario.settings, lambda: fleet.now)
        self._busy_shares: list[float] = []  # since the last sample

    def look(self) -> None:
        self._busy_shares.append(self._fleet.busy_share)
        if len(self._busy_shares) < self._scenario.sample_seconds:
            return
        measured = fmean(self._busy_shares) * (1 + self._scenario.noise * self._rng.normal())
        self._busy_shares.clear()
        fleet = self._fleet
        if self._rng.random() < self._scenario.missing_share:
            sample = RoleSample(fleet.num_ready)
        else:
            busy_share = min(1.0, max(0.0, measured))
            sample = RoleSample(fleet.num_ready, busy_share, fleet.queue_seconds)
        fleet.resize(self._scaler.decide(fleet.num_replicas, sample))
