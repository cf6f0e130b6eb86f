"""What a worker counts while it runs, and the plain values it reports.

Knows neither engine nor wire.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

# Enough for the last few hundred steps of a deep model; older crossings are forgotten.
MAX_REMEMBERED_CROSSINGS = 8192


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a set of durations in seconds; 0 while there are none."""

    p50: float
    p99: float

    @classmethod
    def of(cls, durations: Iterable[float]) -> "Percentiles":
        ordered = sorted(durations)
        if not ordered:
            return cls(0.0, 0.0)
        last = len(ordered) - 1
        return cls(ordered[round(0.5 * last)], ordered[round(0.99 * last)])


@dataclass(slots=True)
class Counters:
    """Since the engine was built. Every accepted request ends in exactly one of the three."""

    accepted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    largest_batch_tokens: int = 0
    layer_crossings: int = 0
    _durations_s: deque[float] = field(
        default_factory=lambda: deque(maxlen=MAX_REMEMBERED_CROSSINGS)
    )
    _waits_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_REMEMBERED_CROSSINGS))

    def crossed(self, duration_s: float, wait_s: float) -> None:
        """One layer's rows went out and their sum came back."""
        self.layer_crossings += 1
        self._durations_s.append(duration_s)
        self._waits_s.append(wait_s)

    def crossing_times(self) -> tuple[Percentiles, Percentiles]:
        """(whole crossings, the part of them with nothing to compute), in seconds."""
        return Percentiles.of(self._durations_s), Percentiles.of(self._waits_s)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A reading of the counters and of who is live."""

    counters: Counters  # a copy
    waiting_sequences: int
    running_sequences: int
    draining: bool
