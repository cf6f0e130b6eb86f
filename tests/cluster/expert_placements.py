"""Loads and placements for the tests of the planner and of its moves."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from cluster.expert_placement import Replica

ZIPF = np.arange(1, 257) ** -1.2


class Case(NamedTuple):
    load: list[float]
    replicas: tuple[Replica, ...]


def replicas_of(experts: Sequence[Sequence[int]], slots: int) -> tuple[Replica, ...]:
    return tuple(Replica(f"r{i}", slots, frozenset(held)) for i, held in enumerate(experts))


def missing(case: Case) -> set[int]:
    held = {expert for replica in case.replicas for expert in replica.experts}
    return set(range(len(case.load))) - held


@st.composite
def cases(draw: st.DrawFn, *, may_miss: bool = True) -> Case:
    """Any placement that fits: some experts have many copies, some may have none."""
    num_experts, num_replicas = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    fewest = -(-num_experts // num_replicas)
    held: list[set[int]] = [set() for _ in range(num_replicas)]
    if not may_miss:
        order = draw(st.permutations(range(num_experts)))
        for place, expert in enumerate(order):
            held[place % num_replicas].add(expert)
    slots = [draw(st.integers(fewest, num_experts + 1)) for _ in held]
    for experts, num_slots in zip(held, slots, strict=True):
        more = draw(st.lists(st.integers(0, num_experts - 1), max_size=num_slots - len(experts)))
        experts |= set(more)
    loads = st.one_of(st.integers(0, 5), st.floats(0, 1000), st.just(0.0))
    load = [float(draw(loads)) for _ in range(num_experts)]
    replicas = tuple(
        Replica(f"r{i}", num_slots, frozenset(experts))
        for i, (num_slots, experts) in enumerate(zip(slots, held, strict=True))
    )
    return Case(load, replicas)
