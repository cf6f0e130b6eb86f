"""Durations in fixed buckets: what each role keeps of its latencies, and what can be said of them.

Counting one takes about 0.3 us. Two readings of the same process give what happened in between, and
those of several processes add up, which percentiles do not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from protos import histogram_pb2

# Upper bounds in seconds, about 1.4 apart: a percentile is told that exactly. As floats that print
# as they are written here; model1.v1.Histogram has the same ones in words.
BOUNDS = tuple(
    float(f"{mantissa}e{exponent}")
    for exponent in range(-5, 2)
    for mantissa in (1, 1.5, 2, 3, 5, 7)
)


@dataclass(slots=True)
class Histogram:
    """`counts` has one bucket more than there are bounds, for what is longer than all of them."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    sum_seconds: float = 0.0

    @classmethod
    def from_wire(cls, message: histogram_pb2.Histogram) -> Histogram:
        empty = [0] * (len(BOUNDS) + 1 - len(message.counts))
        return cls([*message.counts, *empty], message.sum_seconds)

    def to_wire(self) -> histogram_pb2.Histogram:
        last = max((i for i, count in enumerate(self.counts) if count), default=-1)
        return histogram_pb2.Histogram(counts=self.counts[: last + 1], sum_seconds=self.sum_seconds)

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum_seconds += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def mean(self) -> float | None:
        """In seconds; None while there is nothing."""
        count = self.count
        return self.sum_seconds / count if count else None

    def percentile(self, fraction: float) -> float | None:
        """In seconds, evenly within its bucket; None while there is nothing."""
        rank = fraction * self.count
        before = 0
        for i, count in enumerate(self.counts):
            if count and before + count >= rank:
                lower = BOUNDS[i - 1] if i else 0.0
                upper = BOUNDS[min(i, len(BOUNDS) - 1)]
                return lower + (upper - lower) * max(0.0, rank - before) / count
            before += count
        return None

    def since(self, earlier: Histogram) -> Histogram:
        """What came after that reading of the same histogram."""
        counts = [now - then for now, then in zip(self.counts, earlier.counts, strict=True)]
        return Histogram(counts, self.sum_seconds - earlier.sum_seconds)


def added(histograms: Iterable[Histogram]) -> Histogram:
    total = Histogram()
    for each in histograms:
        total.counts = [a + b for a, b in zip(total.counts, each.counts, strict=True)]
        total.sum_seconds += each.sum_seconds
    return total
