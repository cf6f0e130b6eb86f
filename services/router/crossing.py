"""One layer crossing under way: which of its pairs are out with which replicas, which wait for one,
and where their rows land.

Knows no routing table, and decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from services.router.pairs import land
from services.router.replica_link import ReplicaLink, SentCall
from services.router.routing import ExpertGroup
from services.wire import LayerRows, Words


class Purpose(Enum):
    ANSWER = auto()
    HEDGE = auto()  # another replica has had the same pairs for too long
    PROBE = auto()  # to measure a replica that was slow


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Pairs of a crossing that are under way on one link."""

    link: ReplicaLink
    positions: NDArray[np.intp]
    tried: frozenset[object]  # the streams that had these pairs, this one included
    purpose: Purpose
    epoch: int  # of the table that says that the link's replica holds their experts


@dataclass(frozen=True, slots=True, eq=False)
class Stranded:
    """Pairs that no replica of their group takes now."""

    group: ExpertGroup
    positions: NDArray[np.intp]
    tried: frozenset[object]
    reason: str  # what the last replica said that had them, if any

    def __str__(self) -> str:
        return f"no usable replica for the {self.group}" + (
            f" ({self.reason})" if self.reason else ""
        )


class Crossing:
    """`done` is called once, with the sums [T, D] or with the reason why there are none; never
    after Router.cancel."""

    def __init__(
        self,
        call: LayerRows,
        timeout_seconds: float | None,
        done: Callable[[NDArray[np.float32] | Exception], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self.call = call
        self.done = done
        self.deadline = None if timeout_seconds is None else loop.time() + timeout_seconds
        self._timers: list[asyncio.TimerHandle] = []
        num_pairs = call.expert_ids.size
        self.missing_pairs = num_pairs
        self.pair_rows: Words = np.empty((num_pairs, call.rows.shape[1]), dtype=call.rows.dtype)
        self.parts: dict[Part, SentCall] = {}
        self._is_answered = np.zeros(num_pairs, dtype=np.bool_)
        self.stranded: list[Stranded] = []
        self.give_up_at: float | None = None  # set when pairs of it strand for the first time

    def uncovered(self, positions: NDArray[np.intp], now: float) -> NDArray[np.intp]:
        """Those of which no answer is here nor expected: whoever has them is overdue."""
        is_covered = self._is_answered.copy()
        for part, sent in self.parts.items():
            if sent.due > now:
                is_covered[part.positions] = True
        return positions[~is_covered[positions]]

    def store(self, positions: NDArray[np.intp], rows: Words) -> bool:
        """Whether any of them was missing. Two replicas give bitwise the same rows."""
        num_new = land(rows, positions, self.pair_rows, self._is_answered)
        self.missing_pairs -= num_new
        return num_new > 0

    def call_at(self, when: float, callback: Callable[..., None], *arguments: object) -> None:
        """`callback(crossing, *arguments)`, unless the crossing has ended by then."""
        loop = asyncio.get_running_loop()
        self._timers.append(loop.call_at(when, callback, self, *arguments))

    def cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    def waits_for(self) -> str:
        return ", ".join(
            [
                *sorted(part.link.address for part in self.parts),
                *(str(stranded) for stranded in self.stranded),
            ]
        )
