"""Decides which replica computes which (row, expert) pairs. Plain values in, plain values out.

Knows no stream, clock or model. A table never changes; the next one has a higher epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model1.compiled import compiled_as_written
from services.router.hedging import slow_factor

# What makes it worth to read an expert's weights on one more replica: on a CPU core 4 pairs of an
# expert of *mini* take 98 us, 8 take 111, 16 take 144 and 32 take 223.
MIN_PAIRS_AN_EXPERT = 8
# Who is through with a group no later than the first would be with twice as many of its pairs, is
# through about as soon: groups are as uneven as that anyway. Up to so many pairs, about 60 us.
ABOUT_AS_SOON_PAIRS = 16


class Load(NamedTuple):
    """What is compared to choose a replica."""

    outstanding_pairs: int  # what it still owes
    recent_pairs: float  # what it was sent of late, for whatever reason
    slowness: float = 1.0  # how long it takes, 1 being typical
    is_suspect: bool = False  # it should have answered by now: only if there is no other


@dataclass(frozen=True, slots=True)
class ExpertGroup:
    """Experts that live on the same replicas, whatever else those hold."""

    expert_ids: tuple[int, ...]
    replicas: tuple[str, ...]  # addresses

    def __str__(self) -> str:
        return f"group of experts {_ranges(self.expert_ids)} on {', '.join(self.replicas) or '-'}"


class Share(NamedTuple):
    """The pairs that go to one replica in one message."""

    replica: str
    positions: NDArray[np.intp]  # into the pairs that were split, ascending


class Split(NamedTuple):
    """Every pair that was split is in exactly one share, or stranded."""

    shares: list[Share]
    # The pairs of groups of which no replica may be used now.
    stranded: list[tuple[ExpertGroup, NDArray[np.intp]]]
    # Replicas that are slow beside others of their group, whether or not they were chosen.
    slow: frozenset[str]


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTable:
    """expert -> replicas, the same for every layer. Every expert is in exactly one group."""

    epoch: int
    groups: tuple[ExpertGroup, ...]
    group_of_expert: NDArray[np.intp]  # [num_experts]

    @classmethod
    def of(cls, epoch: int, replicas_of_expert: Sequence[Sequence[str]]) -> RoutingTable:
        """`replicas_of_expert[e]` are the addresses that hold expert e; experts with the same
        addresses form a group."""
        members: dict[tuple[str, ...], list[int]] = {}
        for expert_id, replicas in enumerate(replicas_of_expert):
            members.setdefault(tuple(sorted(set(replicas))), []).append(expert_id)
        groups = tuple(ExpertGroup(tuple(ids), replicas) for replicas, ids in members.items())
        group_of_expert = np.empty(len(replicas_of_expert), dtype=np.intp)
        for group_id, group in enumerate(groups):
            group_of_expert[list(group.expert_ids)] = group_id
        group_of_expert.flags.writeable = False
        return cls(epoch=epoch, groups=groups, group_of_expert=group_of_expert)

    @property
    def num_experts(self) -> int:
        return len(self.group_of_expert)

    @property
    def replicas(self) -> frozenset[str]:
        return frozenset(replica for group in self.groups for replica in group.replicas)

    def split(self, expert_ids: NDArray[np.int32], loads: Mapping[str, Load]) -> Split:
        """Which replica gets which of the pairs `expert_ids` [P].

        `loads` names the replicas that may be used. Every group with pairs takes one that is
        through with them about as soon as any, or several if there are enough pairs for each;
        groups that take the same one share a message. Groups that have no choice come first, then
        those with most pairs, so that the others even them out.
        """
        pairs_of_group, experts_of_group = _counted(
            expert_ids, self.group_of_expert, len(self.groups)
        ).tolist()
        usable_of = {
            group_id: [each for each in self.groups[group_id].replicas if each in loads]
            for group_id, num_pairs in enumerate(pairs_of_group)
            if num_pairs
        }
        choice = _Choice(loads)
        takers_of: dict[int, Sequence[tuple[str | int, int]]] = {}
        for group_id in sorted(
            usable_of, key=lambda each: (len(usable_of[each]) > 1, -pairs_of_group[each])
        ):
            num_pairs, num_experts = pairs_of_group[group_id], experts_of_group[group_id]
            usable = usable_of[group_id]
            takers_of[group_id] = (
                choice.takers(usable, num_pairs, num_experts) if usable else [(group_id, num_pairs)]
            )
        shares: list[Share] = []
        stranded: list[tuple[ExpertGroup, NDArray[np.intp]]] = []
        for taker, positions in self._deal(expert_ids, takers_of):
            if isinstance(taker, str):
                shares.append(Share(taker, positions))
            else:
                stranded.append((self.groups[taker], positions))
        return Split(shares, stranded, frozenset(choice.slow))

    def _deal(
        self,
        expert_ids: NDArray[np.int32],
        takers_of: Mapping[int, Sequence[tuple[str | int, int]]],
    ) -> Iterator[tuple[str | int, NDArray[np.intp]]]:
        """Each taker's pairs. Of every group with pairs `takers_of` says who takes how many. Those
        that go to one taker are neighbours: so few rows travel to more than one replica."""
        first_taker = np.zeros(len(self.groups), dtype=np.intp)
        number_of: dict[str | int, int] = {}
        numbers: list[int] = []
        quotas: list[int] = []
        for group_id, takers in takers_of.items():
            first_taker[group_id] = len(numbers)
            for taker, quota in takers:
                numbers.append(number_of.setdefault(taker, len(number_of)))
                quotas.append(quota)
        # What is compiled looks at no bounds.
        assert all(quota > 0 for quota in quotas) and sum(quotas) == len(expert_ids)
        positions, ends = _dealt(
            expert_ids,
            self.group_of_expert,
            first_taker,
            np.array(numbers, dtype=np.intp),
            np.array(quotas, dtype=np.intp),
            len(number_of),
        )
        start = 0
        for taker, end in zip(number_of, ends.tolist(), strict=True):
            yield taker, positions[start:end]
            start = end


@compiled_as_written
def _counted(
    expert_ids: NDArray[np.int32], group_of_expert: NDArray[np.intp], num_groups: int
) -> NDArray[np.intp]:
    """Of each group the pairs, and how many experts have any [2, num_groups]."""
    counts = np.zeros((2, num_groups), dtype=np.intp)
    has_pairs = np.zeros(len(group_of_expert), dtype=np.bool_)
    for expert in expert_ids:
        group = group_of_expert[expert]
        counts[0, group] += 1
        if not has_pairs[expert]:
            has_pairs[expert] = True
            counts[1, group] += 1
    return counts


@compiled_as_written
def _dealt(
    expert_ids: NDArray[np.int32],
    group_of_expert: NDArray[np.intp],
    next_taker: NDArray[np.intp],
    takers: NDArray[np.intp],
    quotas: NDArray[np.intp],
    num_takers: int,
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The positions of the pairs by taker, ascending for each, and where each taker's end. A
    group's pairs go to `takers[next_taker[group]]` until its quota is used up, and so on."""
    ends = np.zeros(num_takers, dtype=np.intp)
    for index in range(len(takers)):
        ends[takers[index]] += quotas[index]
    ends = np.cumsum(ends)
    free = np.zeros(num_takers, dtype=np.intp)
    free[1:] = ends[:-1]
    positions = np.empty(len(expert_ids), dtype=np.intp)
    for position in range(len(expert_ids)):
        group = group_of_expert[expert_ids[position]]
        index = next_taker[group]
        quotas[index] -= 1
        if not quotas[index]:
            next_taker[group] += 1
        taker = takers[index]
        positions[free[taker]] = position
        free[taker] += 1
    return positions, ends


class _Choice:
    """Who takes the pairs of one group after the other, of one split."""

    def __init__(self, loads: Mapping[str, Load]) -> None:
        self.slow: set[str] = set()
        self._loads = loads
        self._given: Counter[str] = Counter()  # pairs, of this split

    def takers(
        self, replicas: Sequence[str], num_pairs: int, num_experts: int
    ) -> list[tuple[str, int]]:
        """Of `replicas`, who takes how many of the pairs; all of them are given to somebody."""
        takers = [(replicas[0], num_pairs)]
        if len(replicas) > 1:
            takers = self._chosen(replicas, num_pairs, num_experts)
        for replica, quota in takers:
            self._given[replica] += quota
        return takers

    def _chosen(
        self, replicas: Sequence[str], num_pairs: int, num_experts: int
    ) -> list[tuple[str, int]]:
        factors = self._slow_factors(replicas)
        self.slow.update(replica for replica, factor in factors.items() if factor > 1)
        takers: list[tuple[str, int]] = []
        if num_pairs >= 2 * MIN_PAIRS_AN_EXPERT:
            takers = self._divided(factors, num_pairs, MIN_PAIRS_AN_EXPERT * num_experts)
        return takers or [(self._first_through(factors, num_pairs), num_pairs)]

    def _first_through(self, factors: Mapping[str, float], num_pairs: int) -> str:
        """Among those that are through about as soon as any the one that was given least of late:
        else small differences, the same in every crossing, would add up."""
        cost = {
            replica: (self._loads[replica].is_suspect, (self._owes(replica) + num_pairs) * factor)
            for replica, factor in factors.items()
        }
        first = min(cost, key=cost.__getitem__)
        is_suspect, through_at = cost[first]
        latest = through_at + min(num_pairs, ABOUT_AS_SOON_PAIRS)
        about_as_soon = (
            replica
            for replica in factors
            if factors[replica] == factors[first] and (is_suspect, latest) >= cost[replica]
        )
        return min(about_as_soon, key=lambda each: (self._given_of_late(each), cost[each]))

    def _divided(
        self, factors: Mapping[str, float], num_pairs: int, min_pairs: int
    ) -> list[tuple[str, int]]:
        """Who takes how many so that all of them are through at the same time: as many replicas as
        get `min_pairs` each. Empty if that is less than two."""
        trusted = [each for each in factors if not self._loads[each].is_suspect]
        owed = {each: self._owes(each) for each in trusted}
        first_free = sorted(
            trusted,
            key=lambda each: ((owed[each] + min_pairs) * factors[each], self._given_of_late(each)),
        )
        for count in range(min(len(first_free), num_pairs // min_pairs), 1, -1):
            takers = first_free[:count]
            speed = {each: 1 / factors[each] for each in takers}
            level = (num_pairs + sum(owed[each] for each in takers)) / sum(speed.values())
            shares = [int(level * speed[each]) - owed[each] for each in takers]
            shares[0] += num_pairs - sum(shares)  # what rounding left
            if min(shares) >= min_pairs:
                return list(zip(takers, shares, strict=True))
        return []

    def _owes(self, replica: str) -> int:
        return self._loads[replica].outstanding_pairs + self._given[replica]

    def _given_of_late(self, replica: str) -> float:
        return self._loads[replica].recent_pairs + self._given[replica]

    def _slow_factors(self, replicas: Sequence[str]) -> dict[str, float]:
        slowness = {each: self._loads[each].slowness for each in replicas}
        fastest = min(slowness.values())
        return {each: slow_factor(value, fastest) for each, value in slowness.items()}


def _ranges(ids: Sequence[int]) -> str:
    """0-3,7 rather than 0,1,2,3,7: groups have hundreds of experts."""
    spans: list[list[int]] = []
    for expert_id in sorted(ids):
        if spans and expert_id == spans[-1][1] + 1:
            spans[-1][1] = expert_id
        else:
            spans.append([expert_id, expert_id])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in spans)
