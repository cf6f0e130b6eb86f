"""Decides whether a peer that failed is asked again: plain values and a clock.

While it is open nobody is asked, so that a request loses no time to what does not answer; whoever
owns it probes now and then. Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

# One slow answer may be ours: a busy machine, a long garbage collection.
SLOW_ANSWERS = 3


class Breaker:
    """Opens on a failure, and on `SLOW_ANSWERS` answers in a row that each took `slow_seconds`."""

    def __init__(
        self, *, slow_seconds: float, probe_seconds: float, clock: Callable[[], float]
    ) -> None:
        self._slow_seconds = slow_seconds
        self._probe_seconds = probe_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._allows_reads = True
        self._probe_at = 0.0
        self._num_slow = 0

    @property
    def reason(self) -> str | None:
        """Why it is open, or None."""
        return self._reason

    @property
    def allows_reads(self) -> bool:
        return self._allows_reads

    @property
    def allows_writes(self) -> bool:
        return self._reason is None

    @property
    def wants_probe(self) -> bool:
        return self._reason is not None and self._clock() >= self._probe_at

    def failed(self, reason: str, *, reads_work: bool = False) -> bool:
        """Open, or stay so; whether it was closed before."""
        with self._lock:
            was_closed = self._reason is None
            self._reason = reason
            self._allows_reads = reads_work and (was_closed or self._allows_reads)
            self._probe_at = self._clock() + self._probe_seconds
            self._num_slow = 0
            return was_closed

    def answered(self, seconds: float) -> bool:
        """An answer came after so long; whether that opened it."""
        if seconds < self._slow_seconds:
            self._num_slow = 0
            return False
        with self._lock:
            self._num_slow += 1
            is_slow = self._num_slow >= SLOW_ANSWERS
        return is_slow and self.failed(f"slow: {seconds * 1000:.0f} ms for an answer")

    def recovered(self) -> None:
        with self._lock:
            self._reason = None
            self._allows_reads = True
            self._num_slow = 0
