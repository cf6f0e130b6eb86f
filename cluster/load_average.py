"""How often each of many things happens, of late: counts fade with a half-life.

Knows no clock; whoever counts says how long it took.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


class LoadAverage:
    """Decayed counts over decayed time, so that intervals may differ in length and the first one
    counts for all there is."""

    def __init__(self, num_counters: int, *, half_life_seconds: float) -> None:
        if half_life_seconds <= 0:
            raise ValueError(f"half_life_seconds {half_life_seconds} must be above 0")
        self._half_life_seconds = half_life_seconds
        self._counts: NDArray[np.float64] = np.zeros(num_counters)
        self._seconds = 0.0

    def add(self, counts: ArrayLike, seconds: float) -> None:
        """What was counted in the `seconds` since the last call."""
        if seconds <= 0:
            raise ValueError(f"seconds {seconds} must be above 0")
        kept = 0.5 ** (seconds / self._half_life_seconds)
        self._counts = kept * self._counts + np.asarray(counts)
        self._seconds = kept * self._seconds + seconds

    @property
    def total(self) -> float:
        """What all counts that have not faded come to: how much the average rests on."""
        return float(self._counts.sum())

    @property
    def per_second(self) -> NDArray[np.float64]:
        """0 for all until something was added."""
        return self._counts / (self._seconds or 1.0)
