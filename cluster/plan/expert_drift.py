"""Replicas under a skewed expert load whose hot experts change, and the planner beside them.

Plain computation on the planner that a deployment runs; no model, no router, no clock. A replica's
load is the pairs that it gets in a second, an expert's pairs split evenly over its copies.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from cluster.expert_moves import moves_of
from cluster.expert_placement import (
    BalanceSettings,
    Replica,
    balance,
    balance_bound,
    plan_placement,
    replica_loads,
)
from cluster.load_average import LoadAverage
from cluster.plan.expert_mover import ExpertMover
from cluster.topology import split_experts

# One expert of all 43 layers of V4-Flash: 3 matrices in FP4, and a byte of scale for 32 weights.
EXPERT_BYTES = 43 * (3 * 4096 * 2048 // 2 + 3 * 4096 * 2048 // 32)
TARGET = 0.9
STEADY_SECONDS = 10  # a balance that is kept for as long is no accident of one second


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    num_experts: int = 256
    num_replicas: int = 32
    zipf_exponent: float = 1.2
    topk: int = 6  # experts of a row, all different; 1 makes the load itself Zipf's
    rows_per_second: int = 100_000  # of all layers together
    num_drifts: int = 5  # the first is the start, with experts placed in ranges
    drift_every_seconds: int = 120
    most_hot: int = 32  # so many of the hottest experts change places with others in a drift
    plan_every_seconds: int = 5
    half_life_seconds: float = 3.0  # of the measured load
    expert_bytes: int = EXPERT_BYTES
    bytes_per_second: int = 10**9  # that one replica loads
    loads_at_once: int = 8
    settings: BalanceSettings = field(default_factory=BalanceSettings)

    @property
    def num_hot(self) -> int:
        return min(self.most_hot, self.num_experts // 2)

    @property
    def load_seconds(self) -> float:
        return self.expert_bytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class Drift:
    """What followed one change of the hot experts, until the next."""

    at_seconds: int
    balance_at_once: float  # in the first second
    seconds_to_target: int | None  # until it was reached and kept; None: not before the next drift
    settled_balance: float  # in the last STEADY_SECONDS
    num_loads: int
    best_found: float  # by the planner for the true load, were moves free
    bound: float  # that no placement with as many copies exceeds


@dataclass(frozen=True, slots=True)
class Simulation:
    scenario: Scenario
    balances: tuple[float, ...]  # of each second
    drifts: tuple[Drift, ...]


def simulate_drift(scenario: Scenario, *, seed: int) -> Simulation:
    rng = np.random.default_rng(seed)
    world = _World(scenario, rng)
    at_any_price = replace(scenario.settings, act_below=1.0, aim=1.0, min_gain=0.0)
    max_copies = scenario.settings.max_copies(scenario.num_experts)
    balances: list[float] = []
    drifts: list[Drift] = []
    for number in range(scenario.num_drifts):
        if number:
            world.change_hot_experts()
        true_load = world.true_load
        best = plan_placement(true_load, world.mover.replicas(), at_any_price)
        loads_before = world.mover.num_loads
        since = [world.one_second() for _ in range(scenario.drift_every_seconds)]
        drifts.append(
            Drift(
                at_seconds=len(balances),
                balance_at_once=since[0],
                seconds_to_target=_seconds_to_target(since),
                settled_balance=fmean(since[-STEADY_SECONDS:]),
                num_loads=world.mover.num_loads - loads_before,
                best_found=best.balance_after,
                bound=balance_bound(true_load, scenario.num_replicas, max_copies),
            )
        )
        balances += since
    return Simulation(scenario, tuple(balances), tuple(drifts))


class _World:
    """The true load, what is measured of it, and the replicas. The planner sees the latter two."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        self._scenario = scenario
        self._rng = rng
        self._second = 0
        self._chosen_by = _share_of_rows_by_rank(scenario, rng)  # [E], the most popular first
        self._expert_of_rank = rng.permutation(scenario.num_experts)
        self._measured = LoadAverage(
            scenario.num_experts, half_life_seconds=scenario.half_life_seconds
        )
        extra = ceil(scenario.settings.redundancy * scenario.num_experts / scenario.num_replicas)
        self.mover = ExpertMover(
            [
                Replica(f"expert-{index}", len(owned) + extra, frozenset(owned))
                for index, owned in enumerate(
                    split_experts(scenario.num_experts, scenario.num_replicas)
                )
            ],
            load_seconds=scenario.load_seconds,
            loads_at_once=scenario.loads_at_once,
        )

    @property
    def true_load(self) -> NDArray[np.float64]:
        """Pairs a second of each expert."""
        load = np.empty(self._scenario.num_experts)
        load[self._expert_of_rank] = self._chosen_by * self._scenario.rows_per_second
        return load

    def change_hot_experts(self) -> None:
        """The hottest ranks go to other experts, drawn at random, which give theirs for it."""
        hot = self._scenario.num_hot
        others = hot + self._rng.permutation(self._scenario.num_experts - hot)[:hot]
        ranks = self._expert_of_rank
        ranks[:hot], ranks[others] = ranks[others], ranks[:hot].copy()

    def one_second(self) -> float:
        """Its balance: draws the rows' choices, counts them, and plans when it is time to."""
        scenario = self._scenario
        self.mover.advance(self._second)
        pairs = np.empty(scenario.num_experts)
        pairs[self._expert_of_rank] = self._rng.binomial(scenario.rows_per_second, self._chosen_by)
        self._measured.add(pairs, 1.0)
        self._second += 1
        replicas = self.mover.replicas()
        if self._second % scenario.plan_every_seconds == 0 and self.mover.is_idle:
            measured = self._measured.per_second
            plan = plan_placement(
                measured, replicas, scenario.settings, num_pairs=self._measured.total
            )
            self.mover.start(moves_of(plan, measured), self._second)
        return balance(replica_loads(pairs, replicas))


def _share_of_rows_by_rank(scenario: Scenario, rng: np.random.Generator) -> NDArray[np.float64]:
    """How many of the rows choose the expert of each rank [E]; adds up to topk.

    A row draws its experts one after the other by Zipf's law among those that it does not have yet
    (as the largest of logarithms with Gumbel noise). No expert then gets more than one pair a row,
    which for topk above 1 is less skewed than the law itself.
    """
    ranks = np.arange(1, scenario.num_experts + 1, dtype=np.float64)
    weights: NDArray[np.float64] = ranks**-scenario.zipf_exponent
    weights /= weights.sum()
    if scenario.topk == 1:
        return weights
    num_rows = 20_000
    noisy = np.log(weights) + rng.gumbel(size=(num_rows, scenario.num_experts))
    chosen = np.argpartition(-noisy, scenario.topk - 1, axis=1)[:, : scenario.topk]
    return np.bincount(chosen.ravel(), minlength=scenario.num_experts) / num_rows


def _seconds_to_target(balances: list[float]) -> int | None:
    kept = 0
    for second, value in enumerate(balances):
        kept = kept + 1 if value >= TARGET else 0
        if kept == STEADY_SECONDS:
            return second + 1 - STEADY_SECONDS
    return None
