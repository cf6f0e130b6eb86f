"""Carries out moves of experts between replicas that serve, so that no row notices.

An expert is loaded and has computed before the routers hear of it, and it leaves a replica's memory
when no router waits for anything that an earlier table sent there. Which moves is the planner's.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cluster.expert_moves import Move, MoveKind
from cluster.members import ChangeFailed, DeploymentError
from cluster.roster import Roster, together

log = logging.getLogger(__name__)

REMEMBERED = 1000


class Shift(NamedTuple):
    """Moves that were made together. Times in seconds on `time.monotonic`."""

    begun: float
    ended: float
    num_moves: int


class ExpertShift:
    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self.made: deque[Shift] = deque(maxlen=REMEMBERED)

    async def carry_out(self, moves: Sequence[Move]) -> None:
        """Raises `ChangeFailed`; what was moved until then stays where it is."""
        if not moves:
            return
        begun = time.monotonic()
        left = list(moves)
        try:
            while left:
                wave = next_wave(left, self._node_of)
                await self._make(wave)
                left = [move for move in left if move not in wave]
        except DeploymentError as error:
            words = f"{error}; {len(moves) - len(left)} of {len(moves)} moves were made"
            raise ChangeFailed(words) from error
        finally:
            self.made.append(Shift(begun, time.monotonic(), len(moves) - len(left)))
        log.info("experts_moved moves=%d seconds=%.2f", len(moves), time.monotonic() - begun)

    async def _make(self, wave: Sequence[Move]) -> None:
        roster = self._roster
        held = {move.replica: roster.experts(move.replica) for move in wave}
        for move in wave:
            if move.kind is MoveKind.LOAD:
                held[move.replica] |= {move.expert}
            else:
                held[move.replica] -= {move.expert}
        loading = [move.replica for move in wave if move.kind is MoveKind.LOAD]
        dropping = [move.replica for move in wave if move.kind is MoveKind.DROP]
        await together(roster.hold(name, held[name]) for name in loading)
        for name, experts in held.items():
            roster.assign(name, experts)
        await roster.tell_epoch()
        if dropping:
            await roster.retire_earlier_epochs()
            await together(roster.hold(name, held[name]) for name in dropping)

    def _node_of(self, replica: str) -> int:
        spec = self._roster.topology.named(replica)
        assert spec is not None
        return spec.node


def next_wave(moves: Sequence[Move], node_of: Callable[[str], int]) -> list[Move]:
    """Which of these can be made side by side now; never none. See expert_moves.py. Of each node
    one replica loads at a time: those who serve there share its cores and its disk with it."""
    wave: list[Move] = []
    busy: set[str] = set()
    loading: set[int] = set()
    unsettled: set[int] = set()
    for move in moves:
        node = node_of(move.replica)
        if move.replica not in busy and (
            node not in loading if move.kind is MoveKind.LOAD else move.expert not in unsettled
        ):
            wave.append(move)
            if move.kind is MoveKind.LOAD:
                loading.add(node)
        busy.add(move.replica)
        unsettled.add(move.expert)
    return wave
