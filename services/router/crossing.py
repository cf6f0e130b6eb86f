"""One layer crossing under way: which of its pairs are out with which replica, which wait for one,
and where their rows land.

Knows no routing table, and decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.router.replica_link import ReplicaLink
from services.router.routing import ExpertGroup
from services.wire import LayerRows, Words


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Pairs of a crossing that are under way on one link."""

    link: ReplicaLink
    positions: NDArray[np.intp]
    tried: frozenset[object]  # the streams that had these pairs, this one included


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
        self.missing_pairs = call.expert_ids.size
        self.pair_rows: Words = np.empty(
            (call.expert_ids.size, call.rows.shape[1]), dtype=call.rows.dtype
        )
        self.parts: dict[Part, int] = {}  # -> call id on its link
        self.stranded: list[Stranded] = []
        self.give_up_at: float | None = None  # set when pairs of it strand for the first time

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
