"""From one placement of experts to another, so that no expert is ever without a replica.

A list of single steps; knows nothing of who makes them. Moves of one replica must be made in the
listed order, and a drop must wait for every earlier move of its expert; all others may run side by
side. Then every expert is held by some replica at any moment, and a replica that holds one expert
more than it has slots does so because it loads before it drops: it needs room for that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cluster.expert_placement import PlacementPlan, holds_of


class MoveKind(StrEnum):
    LOAD = "load"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Move:
    kind: MoveKind
    replica: str
    expert: int


def moves_of(plan: PlacementPlan, load: ArrayLike) -> tuple[Move, ...]:
    """First what nobody holds, then always what leaves the replicas' loads most even: the moves
    take their time."""
    loads = np.asarray(load, dtype=np.float64)  # [E]
    slots = np.array([replica.slots for replica in plan.after])  # [R]
    held, wanted = holds_of(plan.before, len(loads)), holds_of(plan.after, len(loads))  # [R, E]
    moves: list[Move] = []
    while (held != wanted).any():
        # There is always something. Were all replicas that lack an expert over their slots, each
        # would have more experts to drop than to load; were each of those the last copy, it would
        # wait to be loaded on one of them: there would be as many to load.
        has_room = held.sum(axis=1) <= slots
        may_load = wanted & ~held & has_room[:, None]
        may_drop = held & ~wanted & (held.sum(axis=0) > 1)
        change = np.full(held.shape, np.inf)
        np.copyto(change, _change_by_drop(loads, held), where=may_drop)
        np.copyto(change, _change_by_load(loads, held), where=may_load)
        change[may_load & ~held.any(axis=0)] = -np.inf  # nobody can compute it yet
        replica, expert = np.unravel_index(np.argmin(change), change.shape)
        assert may_load[replica, expert] or may_drop[replica, expert]
        held[replica, expert] ^= True
        kind = MoveKind.LOAD if held[replica, expert] else MoveKind.DROP
        moves.append(Move(kind, plan.after[replica].name, int(expert)))
    return tuple(moves)


def _change_by_load(loads: NDArray[np.float64], held: NDArray[np.bool_]) -> NDArray[np.float64]:
    """By how much the sum of squares of the replicas' loads changes when an expert gets one more
    copy, for each place [R, E]: where a load x changes by d that is 2 x d + d d."""
    copies = held.sum(axis=0)
    share, later = loads / np.maximum(1, copies), loads / (copies + 1)
    replica_loads = held @ share
    relief = share - later  # of each copy that is there; a first copy relieves none
    others = copies * relief**2 - 2 * relief * (replica_loads @ held)
    change: NDArray[np.float64] = others + later**2 + 2 * later * replica_loads[:, None]
    return change


def _change_by_drop(loads: NDArray[np.float64], held: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The same when a copy is dropped that is not the last one."""
    copies = held.sum(axis=0)
    share, later = loads / np.maximum(1, copies), loads / np.maximum(1, copies - 1)
    replica_loads = held @ share
    burden = later - share  # of each copy that stays
    here = replica_loads[:, None]
    others = (copies - 1) * burden**2 + 2 * burden * (replica_loads @ held - here)
    change: NDArray[np.float64] = others + share**2 - 2 * share * here
    return change
