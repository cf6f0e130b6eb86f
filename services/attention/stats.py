"""What a worker counts while it runs, and the plain values it reports.

Knows neither engine nor wire.
"""

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from services.attention.cost_model import Source
from services.attention.overlap import Choice, StepSize
from services.histogram import Histogram

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


class Crossing(NamedTuple):
    """One layer's rows went out and their sum came back."""

    num_rows: int
    duration_s: float
    wait_s: float  # the part of it with nothing to compute


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
    overlapped_steps: int = 0  # as two micro-batches
    layer_crossings: int = 0
    filled_seconds: float = 0.0  # of steps, each as far as it was full
    queue_seconds: Histogram = field(default_factory=Histogram)  # from acceptance to the first step
    first_token_seconds: Histogram = field(default_factory=Histogram)  # from acceptance
    step_seconds: Histogram = field(default_factory=Histogram)
    crossing_seconds: Histogram = field(default_factory=Histogram)
    crossing_wait_seconds: Histogram = field(default_factory=Histogram)
    _crossings: deque[Crossing] = field(
        default_factory=lambda: deque(maxlen=MAX_REMEMBERED_CROSSINGS)
    )

    def stepped(self, *, prompt_tokens: int, completion_tokens: int, batch_tokens: int) -> None:
        self.steps += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.largest_batch_tokens = max(self.largest_batch_tokens, batch_tokens)

    def crossed(self, crossing: Crossing) -> None:
        self.layer_crossings += 1
        self.crossing_seconds.observe(crossing.duration_s)
        self.crossing_wait_seconds.observe(crossing.wait_s)
        self._crossings.append(crossing)

    def crossing_times(self, num_rows: int | None = None) -> tuple[Percentiles, Percentiles]:
        """(durations, waits) of all crossings, or of those with `num_rows` rows, in seconds."""
        chosen = [each for each in self._crossings if num_rows in (None, each.num_rows)]
        return (
            Percentiles.of(each.duration_s for each in chosen),
            Percentiles.of(each.wait_s for each in chosen),
        )


@dataclass(slots=True)
class KvCounters:
    """KV reuse in tokens of prompts, and what was written back, since the engine was built."""

    asked_tokens: int = 0  # of requests that began to compute
    hit_tokens: Counter[Source] = field(default_factory=Counter)  # of those, what a tier offered
    restored_tokens: Counter[Source] = field(default_factory=Counter)  # and what it delivered
    computed_tokens: int = 0
    # Hit, yet to be computed: computing is faster; what came was damaged or nothing; too late.
    skipped_tokens: int = 0
    failed_tokens: int = 0
    late_tokens: int = 0
    saved_blobs: int = 0
    dropped_blobs: int = 0


@dataclass(frozen=True, slots=True)
class KvStats:
    """A reading of the counters and of the device's blocks."""

    counters: KvCounters  # a copy
    held_blocks: int  # by requests, or while they are written back
    cached_blocks: int  # by none; they give way when room is needed
    max_blocks: int
    pool_bytes: int
    waiting_blobs: int  # to be written back


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A reading of the counters and of who is live."""

    counters: Counters  # a copy
    kv: KvStats
    overlap: Mapping[StepSize, Choice]
    waiting_sequences: int
    running_sequences: int
    oldest_waiting_seconds: float  # 0: nobody waits
    draining: bool
