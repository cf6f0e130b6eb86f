"""Decides when rows that are out for long go to a second replica as well, and how slow a replica is
beside the others.

Plain numbers in, plain numbers out: knows no clock, link or crossing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

# Rows are sent to a second replica when their answer takes this many times what nine in ten take.
HEDGE_MULTIPLE = 3.0
# Hiccups of a loaded machine are shorter than this; a frozen replica costs little more.
HEDGE_FLOOR_SECONDS = 0.02
# Before anything was measured.
UNMEASURED_SECONDS = 0.3
# At most this share of all parts is hedged, plus a burst, so that replicas that are slow because
# they have too much to do do not get more of it.
HEDGE_SHARE = 0.1
HEDGE_BURST = 8
# A replica that said nothing at all for so many times its patience is taken for lost: what it has
# goes elsewhere whatever the budget says.
LOST_MULTIPLE = 8.0
# Slower than the fastest by less than this is noise, and load is not moved for it.
SLOW_FACTOR = 3.0
# Slower than this is no different: a replica that was frozen must be able to recover.
MAX_SLOWNESS = 16.0
# How often a slow replica gets a copy of somebody else's rows, to see whether it still is slow.
PROBE_INTERVAL_SECONDS = 0.1


class Quantile:
    """Follows a quantile of positive numbers as it drifts: each one above it raises it a little,
    each one below lowers it, and a single outlier, however large, moves it by one step."""

    def __init__(self, fraction: float, step: float, start: float) -> None:
        self.value = start
        self._up = math.exp(step * fraction)
        self._down = math.exp(-step * (1 - fraction))

    def observe(self, number: float) -> None:
        if number > self.value:
            self.value = min(number, self.value * self._up)
        else:
            self.value = max(number, self.value * self._down)


class AnswerTimes:
    """What answers take, all replicas together, by the work that a replica had until then: the
    pairs of the call and of those before it. Sizes are told apart by powers of two."""

    def __init__(self) -> None:
        self._typical: dict[int, Quantile] = {}
        self._tail: dict[int, Quantile] = {}

    def observe(self, work_pairs: int, seconds: float) -> None:
        size = work_pairs.bit_length()
        if size in self._typical:
            self._typical[size].observe(seconds)
            self._tail[size].observe(seconds)
        else:
            self._typical[size] = Quantile(0.5, step=0.2, start=seconds)
            self._tail[size] = Quantile(0.9, step=0.2, start=seconds)

    def typical_seconds(self, work_pairs: int) -> float | None:
        return _estimate(self._typical, work_pairs.bit_length())

    def patience_seconds(self, work_pairs: int) -> float:
        """For how long an answer is waited for before the rows go elsewhere as well."""
        tail = _estimate(self._tail, work_pairs.bit_length())
        if tail is None:
            return UNMEASURED_SECONDS
        return max(HEDGE_FLOOR_SECONDS, HEDGE_MULTIPLE * tail)


def _estimate(by_size: Mapping[int, Quantile], size: int) -> float | None:
    """Of a size that was never seen: rather too much, as if all time went into pairs; or what more
    pairs took."""
    if not by_size:
        return None
    nearest = max((each for each in by_size if each <= size), default=min(by_size))
    return by_size[nearest].value * float(2 ** max(0, size - nearest))


class Slowness:
    """How long one replica takes, 1 being typical of all.
    The median: a hiccup says little."""

    def __init__(self) -> None:
        self._ratio = Quantile(0.5, step=0.3, start=1.0)

    @property
    def value(self) -> float:
        return self._ratio.value

    def observe(self, seconds: float, typical_seconds: float) -> None:
        if typical_seconds > 0:
            self._ratio.observe(min(seconds / typical_seconds, MAX_SLOWNESS))


def slow_factor(slowness: float, fastest: float) -> float:
    """How many pairs of the fastest replica one of this one counts; 1 where that is noise."""
    return slowness / fastest if slowness >= SLOW_FACTOR * fastest else 1.0


class HedgeBudget:
    def __init__(self, share: float = HEDGE_SHARE, burst: float = HEDGE_BURST) -> None:
        self._share = share
        self._burst = burst
        self._saved = burst

    def earn(self) -> None:
        """A part was sent for the first time."""
        self._saved = min(self._burst, self._saved + self._share)

    def spend(self) -> bool:
        """Whether one more copy may be sent."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
