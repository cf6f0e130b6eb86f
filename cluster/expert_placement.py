"""Which experts each replica should hold, so that all replicas have the same work.

Plain values in, plain values out: knows no clock, no stream, and nobody who would carry it out. An
expert is an index into the measured loads. The routing table has one row for all layers, so that
is an expert id with its load summed over the layers; with a table for each layer a number for each
(layer, expert) would do as well.

Loads are predicted as if an expert's pairs were split evenly over its copies. The router divides
those of a crossing where there are many, and gives few to the copy whose replica was given least of
late, which over many crossings comes to about the same.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class Replica:
    """What one replica holds, and how many experts it has room for."""

    name: str
    slots: int
    experts: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceSettings:
    """Balance is the mean over the largest load of the replicas: 1 when all have the same."""

    redundancy: float = 0.125  # copies beyond those that there must be, as a share of these
    act_below: float = 0.97  # a better balance than this is left alone
    aim: float = 0.98  # a plan goes no further than this
    min_gain: float = 0.02  # moving weights for less does not pay
    # A copy with more than this share of a replica's mean load is hard to place beside others.
    max_copy_share: float = 0.8

    def max_copies(self, min_copies: int) -> int:
        """Of all experts together, of which there must be so many."""
        # 0.29 * 100 is a little less than 29.
        return min_copies + math.floor(self.redundancy * min_copies + 1e-9)


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    """`before` and `after` list the same replicas in the same order; they are equal where nothing
    is gained."""

    before: tuple[Replica, ...]
    after: tuple[Replica, ...]
    balance_before: float  # as if an expert that nobody holds had no load
    balance_after: float

    @property
    def num_loads(self) -> int:
        pairs = zip(self.before, self.after, strict=True)
        return sum(len(new.experts - old.experts) for old, new in pairs)


def plan_placement(
    load: ArrayLike,
    replicas: Sequence[Replica],
    settings: BalanceSettings,
    *,
    num_pairs: float = math.inf,
    min_copies: ArrayLike = 1,
) -> PlacementPlan:
    """A placement that evens out `load` [num_experts], with few changes to the present one.

    `num_pairs` is how many the load was measured from: of few, much of an imbalance is chance, and
    moving experts after that would never end. `min_copies` is how many replicas must hold each
    expert [num_experts], or every expert.

    First every expert that too few hold is placed. Then, if the balance is poor, the hottest
    experts are copied, and the fullest replica gives experts away or exchanges them, whatever
    evens out most for each expert that must be loaded. What need not change stays where it is.
    Ties go to the lowest expert and the first replica. Raises ValueError if there are too few
    slots or replicas, or a replica holds more than it has slots.
    """
    before = tuple(replicas)
    loads = np.asarray(load, dtype=np.float64)
    wanted_copies = np.broadcast_to(np.asarray(min_copies, dtype=np.intp), loads.shape)
    search = _Search(loads, before, settings, wanted_copies)
    balance_before = search.balance
    search.place_missing()
    covered, balance_covered = search.placement(), search.balance
    if balance_covered < settings.act_below * balance_by_chance(num_pairs, len(before)):
        while search.balance < settings.aim and search.copy_hottest():
            pass
        while search.balance < settings.aim and search.relieve_fullest():
            pass
    if search.balance < balance_covered + settings.min_gain:
        return PlacementPlan(before, covered, balance_before, balance_covered)
    return PlacementPlan(before, search.placement(), balance_before, search.balance)


def replica_loads(load: ArrayLike, replicas: Sequence[Replica]) -> NDArray[np.float64]:
    """What each replica has to do [num_replicas]."""
    loads = np.asarray(load, dtype=np.float64)
    holds = holds_of(replicas, len(loads))
    share: NDArray[np.float64] = loads / np.maximum(1, holds.sum(axis=0))
    return holds @ share


def balance(replica_loads: NDArray[np.float64]) -> float:
    """Mean over largest; 1 without any load."""
    return float(replica_loads.mean() / replica_loads.max()) if replica_loads.any() else 1.0


def balance_by_chance(num_pairs: float, num_replicas: int) -> float:
    """What pairs that go to each replica with the same probability hardly fall below: the largest
    of n normal variables is seldom more than sqrt(2 ln n) + 1 deviations above their mean."""
    if not num_pairs:
        return 0.0
    deviation = math.sqrt((num_replicas - 1) / num_pairs)  # of one replica's load, of the mean
    return 1 / (1 + (math.sqrt(2 * math.log(num_replicas)) + 1) * deviation)


def balance_bound(load: ArrayLike, num_replicas: int, max_copies: int) -> float:
    """What no placement exceeds: some replica has the fullest copy, and copies given to whichever
    expert has most load a copy make that as small as it can be."""
    loads = np.asarray(load, dtype=np.float64)
    copies = np.ones(len(loads))
    for _ in range(max_copies - len(loads)):
        copies[np.argmax(np.where(copies < num_replicas, loads / copies, -1))] += 1
    mean = loads.sum() / num_replicas
    return float(mean / max(mean, (loads / copies).max())) if mean else 1.0


def holds_of(replicas: Sequence[Replica], num_experts: int) -> NDArray[np.bool_]:
    holds = np.zeros((len(replicas), num_experts), dtype=bool)
    for row, replica in zip(holds, replicas, strict=True):
        row[list(replica.experts)] = True
    return holds


class _Search:
    """A placement on its way from the present one: R replicas, E experts."""

    def __init__(
        self,
        load: NDArray[np.float64],
        replicas: tuple[Replica, ...],
        settings: BalanceSettings,
        min_copies: NDArray[np.intp],
    ) -> None:
        num_slots = sum(replica.slots for replica in replicas)
        num_wanted = int(min_copies.sum())
        if num_slots < num_wanted:
            copies = "experts" if num_wanted == len(load) else "copies of experts"
            raise ValueError(f"{num_slots} expert slots cannot hold {num_wanted} {copies}")
        for replica in replicas:
            if len(replica.experts) > replica.slots:
                raise ValueError(
                    f"{replica.name} holds {len(replica.experts)} experts in {replica.slots} slots"
                )
        self._replicas = replicas
        self._load = load  # [E]
        self._slots = np.array([replica.slots for replica in replicas])  # [R]
        self._holds = holds_of(replicas, len(load))  # [R, E]
        self._min_copies = min_copies  # [E]
        self._max_copies = settings.max_copies(num_wanted)
        self._max_share = settings.max_copy_share * load.sum() / len(replicas)

    @property
    def balance(self) -> float:
        return balance(self._replica_loads())

    def placement(self) -> tuple[Replica, ...]:
        return tuple(
            replace(replica, experts=frozenset(np.flatnonzero(row).tolist()))
            for replica, row in zip(self._replicas, self._holds, strict=True)
        )

    def place_missing(self) -> None:
        """Those with most load first."""
        missing = np.flatnonzero(self._holds.sum(axis=0) < self._min_copies)
        for expert in missing[np.argsort(-self._load[missing], kind="stable")].tolist():
            while self._holds[:, expert].sum() < self._min_copies[expert]:
                if not (self._add_copy(expert, max_share=np.inf) or self._make_room(expert)):
                    raise ValueError(f"there is no room for another copy of expert {expert}")

    def copy_hottest(self) -> bool:
        """One more copy of the expert with most load a copy that can have one. False if none is
        above what a copy should have."""
        share = self._share()
        hottest = np.argsort(-share, kind="stable")
        hot = hottest[share[hottest] > self._max_share].tolist()
        return any(self._add_copy(expert, max_share=share[expert]) for expert in hot)

    def relieve_fullest(self) -> bool:
        """The fullest replica moves an expert into a free slot, or exchanges one for another.

        What is lowered is the sum of squares of the replicas' loads, most for each expert loaded:
        where `d` goes from load a to load b that is 2 d (a - b - d). False if nothing lowers it.
        """
        loads, share = self._replica_loads(), self._share()
        fullest = int(np.argmax(loads))
        given = np.flatnonzero(self._holds[fullest])  # [G]
        free = np.flatnonzero(self._holds.sum(axis=1) < self._slots)
        holders, held = np.nonzero(self._holds & ~self._holds[fullest])
        takers = np.concatenate([free, holders])  # [T], of which those with a free slot come first
        taken_share = np.concatenate([np.zeros(len(free)), share[held]])
        num_loads = np.concatenate([np.ones(len(free)), np.full(len(held), 2)])
        moved = share[given][:, None] - taken_share  # [G, T]
        gain = 2 * moved * (loads[fullest] - loads[takers] - moved) / num_loads
        gain[self._holds[takers][:, given].T] = 0  # it has a copy already
        if gain.max(initial=0) <= 1e-9 * (loads @ loads):
            return False
        expert_at, taker_at = np.unravel_index(np.argmax(gain), gain.shape)
        expert, taker = given[expert_at], takers[taker_at]
        self._holds[fullest, expert], self._holds[taker, expert] = False, True
        if taker_at >= len(free):
            other = held[taker_at - len(free)]
            self._holds[taker, other], self._holds[fullest, other] = False, True
        return True

    def _add_copy(self, expert: int, *, max_share: float) -> bool:
        """On the replica that has least load then: in a free slot, or over a copy of an expert
        whose other copies can do its work with less than `max_share` each."""
        loads, share, copies = self._replica_loads(), self._share(), self._holds.sum(axis=0)
        may_add = copies.sum() < self._max_copies
        is_spare = copies > self._min_copies
        left_share = np.where(is_spare, self._load / np.maximum(1, copies - 1), np.inf)
        options: list[tuple[float, int, int]] = []  # (load that stays, replica, expert to drop)
        for replica in np.flatnonzero(~self._holds[:, expert]).tolist():
            if may_add and self._holds[replica].sum() < self._slots[replica]:
                options.append((loads[replica], replica, -1))
            for other in np.flatnonzero(self._holds[replica] & (left_share < max_share)).tolist():
                options.append((loads[replica] - share[other], replica, other))
        if not options:
            return False
        _, replica, other = min(options)
        if other >= 0:
            self._holds[replica, other] = False
        self._holds[replica, expert] = True
        return True

    def _make_room(self, expert: int) -> bool:
        """Another copy, for which one replica after the other gives an expert to the next, until
        one has a free slot or drops a copy that need not be. Finds a way if there is one: of the
        fewest moves, and of these the one of least load."""
        copies = self._holds.sum(axis=0)
        is_full = self._holds.sum(axis=1) >= self._slots
        is_spare = copies > self._min_copies
        # Beyond the most copies only where nothing can be dropped.
        for may_add in (True,) if copies.sum() < self._max_copies else (False, True):
            is_end = (self._holds & is_spare).any(axis=1) | (may_add & ~is_full)
            if (way := self._cheapest_way(expert, is_end)) is not None:
                end, givers = way
                if not may_add or is_full[end]:
                    spare = np.flatnonzero(self._holds[end] & is_spare)
                    self._holds[end, spare[np.argmin(self._share()[spare])]] = False
                while end in givers:
                    giver, given = givers[end]
                    self._holds[giver, given], self._holds[end, given] = False, True
                    end = giver
                self._holds[end, expert] = True
                return True
        return False

    def _cheapest_way(
        self, expert: int, is_end: NDArray[np.bool_]
    ) -> tuple[int, dict[int, tuple[int, int]]] | None:
        """From a replica that lacks the expert to one where room can be made: the end, and who
        gives what to each replica on the way. Dijkstra's, over replicas."""
        share = self._share()
        givers: dict[int, tuple[int, int]] = {}
        cost = {replica: (0, 0.0) for replica in np.flatnonzero(~self._holds[:, expert]).tolist()}
        waiting = [(*least, replica) for replica, least in cost.items()]  # a heap: all alike
        while waiting:
            moves, moved_load, giver = heapq.heappop(waiting)
            if (moves, moved_load) > cost[giver]:
                continue
            if is_end[giver]:
                return giver, givers
            # What each other replica could take of it with least load; inf: nothing.
            could_take = np.where(self._holds[giver] & ~self._holds, share, np.inf)  # [R, E]
            given = could_take.argmin(axis=1)
            for taker in np.flatnonzero(np.isfinite(could_take.min(axis=1))).tolist():
                so_far = (moves + 1, moved_load + share[given[taker]])
                if so_far < cost.get(taker, (math.inf, 0.0)):
                    cost[taker], givers[taker] = so_far, (giver, int(given[taker]))
                    heapq.heappush(waiting, (*so_far, taker))
        return None

    def _share(self) -> NDArray[np.float64]:
        """The load of one copy of each expert [E]."""
        share: NDArray[np.float64] = self._load / np.maximum(1, self._holds.sum(axis=0))
        return share

    def _replica_loads(self) -> NDArray[np.float64]:
        return self._holds @ self._share()  # [R]
