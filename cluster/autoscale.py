"""How many replicas a role should have, from how busy they are and how long work waits.

Plain values in, a number out: knows no replicas, no metrics, and nobody who starts or stops any.
Going up is quick and going down is slow, since too few make clients wait and too many cost money.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingSettings:
    min_replicas: int = 1
    max_replicas: int = 64
    busy_share: float = 0.7  # of a replica's time; what to aim at
    tolerance: float = 0.1  # a busy share this close to it, as a share of it, asks for no change
    queue_seconds: float = 0.5  # work that waits longer asks for more replicas
    max_factor: float = 2.0  # of one decision, up or down; one replica is always possible
    up_after_seconds: float = 10.0  # of samples that all ask for more
    down_after_seconds: float = 300.0  # of samples that all ask for fewer

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(
                f"replicas from {self.min_replicas} to {self.max_replicas}: not from 1 or more up"
            )
        if not 0 < self.busy_share <= 1:
            raise ValueError(f"busy_share {self.busy_share} must be above 0 and at most 1")
        if not self.max_factor > 1:
            raise ValueError(f"max_factor {self.max_factor} must be above 1")
        if not self.queue_seconds > 0:
            raise ValueError(f"queue_seconds {self.queue_seconds} must be above 0")


@dataclass(frozen=True, slots=True)
class RoleSample:
    """What was measured lately of the replicas that were ready; None is what could not be."""

    num_ready: int
    busy_share: float | None = None  # of their time, from 0 to 1
    queue_seconds: float | None = None


def replicas_wanted(sample: RoleSample, settings: ScalingSettings) -> int | None:
    """What one sample asks for, whatever there is. None if it says nothing.

    Shares of time end at 1, so in a shortage it is the queue that tells how large that is.
    """
    ready = sample.num_ready
    if ready < 1 or (sample.busy_share is None and sample.queue_seconds is None):
        return None
    relative = 1.0 if sample.busy_share is None else sample.busy_share / settings.busy_share
    if abs(relative - 1) <= settings.tolerance:
        relative = 1.0
    if sample.queue_seconds is not None and sample.queue_seconds > settings.queue_seconds:
        relative = max(relative, sample.queue_seconds / settings.queue_seconds)
    # Those that were asked for and are not ready yet must not be asked for again.
    return math.ceil(ready * min(relative, settings.max_factor) - 1e-9)


class Autoscaler:
    """The decisions for one role, each from the samples that agree on a direction."""

    def __init__(self, settings: ScalingSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._asked_at = clock()
        self._last_queue_seconds: float | None = None
        # The run of samples that all ask for more (1), for fewer (-1) or for no change (0).
        self._direction, self._seconds = 0, 0.0
        self._smallest_change = 0  # that any of them asked for: to so many replicas

    def decide(self, current: int, sample: RoleSample) -> int:
        """How many there should be, where `current` are there or on their way. For every sample,
        also one in which nothing was measured: its time counts for neither direction."""
        settings, now = self._settings, self._clock()
        elapsed, self._asked_at = now - self._asked_at, now
        current = self._within_bounds(current)
        wanted = replicas_wanted(sample, settings)
        last, self._last_queue_seconds = self._last_queue_seconds, sample.queue_seconds
        if wanted is None:
            return current
        if sample.queue_seconds is not None and sample.queue_seconds > settings.queue_seconds:
            if last is not None and sample.queue_seconds < last:
                # It may become short by itself. Or it is noise, and the next ones are longer again.
                self._seconds = max(0.0, self._seconds - elapsed) if self._direction > 0 else 0.0
                self._direction = max(0, self._direction)
                return current
            wanted = max(current, wanted)  # too long a queue asks for no fewer
        direction = (wanted > current) - (wanted < current)
        if direction != self._direction:
            self._direction, self._seconds, self._smallest_change = direction, 0.0, wanted
        else:
            self._seconds += elapsed
            nearer = min if direction > 0 else max
            self._smallest_change = nearer(self._smallest_change, wanted)
        if direction > 0 and self._seconds >= settings.up_after_seconds:
            decided = min(self._smallest_change, math.ceil(current * settings.max_factor))
        elif direction < 0 and self._seconds >= settings.down_after_seconds:
            fewest = min(current - 1, math.ceil(current / settings.max_factor))
            decided = max(self._smallest_change, fewest)
        else:
            return current
        self._direction = 0
        return self._within_bounds(decided)

    def _within_bounds(self, replicas: int) -> int:
        return min(max(replicas, self._settings.min_replicas), self._settings.max_replicas)
