"""How much there was of something of late: what is counted fades with a half-life.

Knows no clock: whoever counts says when, in seconds that never go back.
"""

from __future__ import annotations

import math


class FadingCount:
    def __init__(self, half_life_seconds: float) -> None:
        self._half_life_seconds = half_life_seconds
        self._count = 0.0
        self._as_of = 0.0

    def add(self, number: float, now: float) -> None:
        self._count = self.value(now) + number
        self._as_of = now

    def value(self, now: float) -> float:
        return self._count * math.exp2((self._as_of - now) / self._half_life_seconds)
