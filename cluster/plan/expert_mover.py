"""Replicas that carry out the moves of a plan in simulated time: loading weights takes a while."""

import heapq
from collections.abc import Sequence

from cluster.expert_moves import Move, MoveKind
from cluster.expert_placement import Replica


class ExpertMover:
    """What each replica serves at a time. A replica loads one expert at a time, and at most
    `loads_at_once` do so; dropping takes no time."""

    def __init__(
        self, replicas: Sequence[Replica], *, load_seconds: float, loads_at_once: int
    ) -> None:
        self._slots = {replica.name: replica.slots for replica in replicas}
        self._experts = {replica.name: set(replica.experts) for replica in replicas}
        self._load_seconds = load_seconds
        self._loads_at_once = loads_at_once
        self._waiting: list[Move] = []  # in the plan's order
        self._loading: list[tuple[float, int, Move]] = []  # heap of (when done, tie, move)
        self.num_loads = 0

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._loading

    def replicas(self) -> tuple[Replica, ...]:
        return tuple(
            Replica(name, self._slots[name], frozenset(experts))
            for name, experts in self._experts.items()
        )

    def start(self, moves: Sequence[Move], now: float) -> None:
        assert self.is_idle  # a plan begins where the last one ended
        self._waiting = list(moves)
        self._start_what_may(now)

    def advance(self, now: float) -> None:
        """Everything that is done by then."""
        while self._loading and self._loading[0][0] <= now:
            done_at, _, move = heapq.heappop(self._loading)
            self._experts[move.replica].add(move.expert)
            self._start_what_may(done_at)

    def _start_what_may(self, now: float) -> None:
        """Moves of one replica in their order; a drop after all earlier moves of its expert."""
        busy = {move.replica for _, _, move in self._loading}
        unsettled = {move.expert for _, _, move in self._loading}
        still: list[Move] = []
        for move in self._waiting:
            has_lane = len(self._loading) < self._loads_at_once
            if move.replica in busy or (
                not has_lane if move.kind is MoveKind.LOAD else move.expert in unsettled
            ):
                still.append(move)
                unsettled.add(move.expert)
            elif move.kind is MoveKind.DROP:
                self._experts[move.replica].remove(move.expert)
                continue
            else:
                self.num_loads += 1
                heapq.heappush(self._loading, (now + self._load_seconds, self.num_loads, move))
                unsettled.add(move.expert)
            busy.add(move.replica)
        self._waiting = still
