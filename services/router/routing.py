"""Decides which replica computes which (row, expert) pairs. Plain values in, plain values out.

Knows no stream, clock or model. A table never changes; the next one has a higher epoch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from services.router.hedging import slow_factor

# What makes it worth to read an expert's weights on one more replica: on a CPU core 4 pairs of an
# expert of *mini* take 98 us, 8 take 111, 16 take 144 and 32 take 223.
MIN_PAIRS_AN_EXPERT = 8


class Load(NamedTuple):
    """What is compared to choose a replica."""

    outstanding_pairs: int  # what it still owes
    total_pairs: int  # what it was ever given
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

        `loads` names the replicas that may be used. Every group with pairs takes the replica that
        is through with them first, or several of them if there are enough pairs for each; groups
        that take the same one share a message. Groups that have no choice come first, then those
        with most pairs, so that the others even them out.
        """
        group_of_pair = self.group_of_expert[expert_ids]  # [P]
        pairs_of_group = np.bincount(group_of_pair, minlength=len(self.groups))
        slow: set[str] = set()
        chosen: dict[str, int] = {}  # replica -> share
        given: Counter[str] = Counter()  # pairs, of this split
        stranded: list[tuple[ExpertGroup, NDArray[np.intp]]] = []
        share_of_group = np.zeros(len(self.groups), dtype=np.intp)
        divided: list[tuple[int, list[tuple[str, int]]]] = []  # groups, and who takes how many
        usable_of = {
            group_id: [each for each in self.groups[group_id].replicas if each in loads]
            for group_id in np.flatnonzero(pairs_of_group).tolist()
        }
        has_choice = {group_id: len(usable) > 1 for group_id, usable in usable_of.items()}
        for group_id in sorted(usable_of, key=lambda g: (has_choice[g], -pairs_of_group[g])):
            group, usable = self.groups[group_id], usable_of[group_id]
            if not usable:
                share_of_group[group_id] = -1
                stranded.append((group, np.flatnonzero(group_of_pair == group_id)))
                continue
            factors = _slow_factors(usable, loads)
            slow.update(address for address, factor in factors.items() if factor > 1)
            num_pairs = int(pairs_of_group[group_id])
            takers: list[tuple[str, int]] = []
            if len(usable) > 1 and num_pairs >= 2 * MIN_PAIRS_AN_EXPERT:
                num_experts = len(np.unique(expert_ids[group_of_pair == group_id]))
                min_pairs = MIN_PAIRS_AN_EXPERT * num_experts
                takers = _divided(usable, loads, factors, given, num_pairs, min_pairs)
            if len(takers) > 1:
                divided.append((group_id, takers))
            else:
                cost = partial(_cost, loads, factors, given, num_pairs)
                takers = [(min(usable, key=cost), num_pairs)]
            for replica, taken in takers:
                given[replica] += taken
                chosen.setdefault(replica, len(chosen))
            share_of_group[group_id] = chosen[takers[0][0]]
        if len(chosen) == 1 and not stranded:
            (replica,) = chosen
            return Split([Share(replica, np.arange(len(expert_ids)))], [], frozenset(slow))
        share_of_pair = share_of_group[group_of_pair]  # [P]
        for group_id, takers in divided:
            # Neighbours stay together: so few rows travel to more than one replica.
            positions = np.flatnonzero(group_of_pair == group_id)
            share_of_pair[positions] = np.repeat(
                [chosen[replica] for replica, _ in takers], [taken for _, taken in takers]
            )
        shares = [
            Share(replica, np.flatnonzero(share_of_pair == share))
            for replica, share in chosen.items()
        ]
        return Split(shares, stranded, frozenset(slow))


def _divided(
    replicas: Sequence[str],
    loads: Mapping[str, Load],
    factors: Mapping[str, float],
    given: Mapping[str, int],
    num_pairs: int,
    min_pairs: int,
) -> list[tuple[str, int]]:
    """Who takes how many of `num_pairs` so that all of them are through at the same time: as many
    replicas as get `min_pairs` each. Empty if that is less than two."""
    trusted = [each for each in replicas if not loads[each].is_suspect]
    owed = {each: loads[each].outstanding_pairs + given[each] for each in trusted}
    first_free = sorted(
        trusted, key=lambda r: ((owed[r] + min_pairs) * factors[r], loads[r].total_pairs)
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


def _slow_factors(replicas: Sequence[str], loads: Mapping[str, Load]) -> dict[str, float]:
    fastest = min(loads[address].slowness for address in replicas)
    return {address: slow_factor(loads[address].slowness, fastest) for address in replicas}


def _cost(
    loads: Mapping[str, Load],
    factors: Mapping[str, float],
    given: Mapping[str, int],
    num_pairs: int,
    replica: str,
) -> tuple[bool, float, int]:
    load = loads[replica]
    owed_then = (load.outstanding_pairs + given[replica] + num_pairs) * factors[replica]
    return load.is_suspect, owed_then, load.total_pairs


def _ranges(ids: Sequence[int]) -> str:
    """0-3,7 rather than 0,1,2,3,7: groups have hundreds of experts."""
    spans: list[list[int]] = []
    for expert_id in sorted(ids):
        if spans and expert_id == spans[-1][1] + 1:
            spans[-1][1] = expert_id
        else:
            spans.append([expert_id, expert_id])
    return ",".join(f"{a}-{b}" if a != b else f"{a}" for a, b in spans)
