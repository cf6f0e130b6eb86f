"""What the store counts of each tier, and what a load from it costs. Plain values, no I/O."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from services.kvstore.blob import BlobHeader, BlobKind
from services.kvstore.tier import TierCost

MAX_REMEMBERED_LOADS = 2048
# Of a new measurement in a running mean: the last ten or so count.
NEW_SHARE = 0.1
MIN_WINDOW_SECONDS = 0.1


def tokens_of(header: BlobHeader) -> int:
    """The tokens whose KV the blob holds; a tail only helps to go on from a boundary."""
    return header.end - header.start if header.kind is BlobKind.BODY else 0


@dataclass(slots=True)
class TierStats:
    """Since the store started. A lookup goes down the tiers and hits at most one.

    Every load of some blobs is one `begin` and one `end`; times are seconds on any one clock.
    """

    hits: int = 0
    misses: int = 0
    hit_tokens: int = 0
    loaded_bytes: int = 0
    damaged: Counter[str] = field(default_factory=Counter)
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_REMEMBERED_LOADS))
    _loading: int = 0
    _window_start: float = 0.0
    _window_bytes: int = 0
    _latency_seconds: float | None = None
    _bytes_per_second: float | None = None

    def begin(self, now: float) -> None:
        """A load of some blobs begins."""
        if not self._loading:
            self._window_start, self._window_bytes = now, 0
        self._loading += 1

    def loaded(self, now: float, started: float, header: BlobHeader) -> None:
        """One blob came, of a load that began at `started`."""
        self.hit(header)
        self._seconds.append(now - started)
        self._latency_seconds = _mean(self._latency_seconds, now - started)
        # Loads overlap, so the rate is that of a window in which something was always under way.
        self._window_bytes += header.nbytes
        window_seconds = now - self._window_start
        if window_seconds >= MIN_WINDOW_SECONDS or self._bytes_per_second is None:
            self._end_window(now)

    def end(self, now: float, *, num_missed: int) -> None:
        self._loading -= 1
        self.misses += num_missed
        if not self._loading:
            self._end_window(now)

    def estimate(self, cost: TierCost) -> None:
        """What loads cost, as long as none has been measured."""
        if self._latency_seconds is None:
            self._latency_seconds = cost.latency_seconds
        if self._bytes_per_second is None:
            self._bytes_per_second = cost.bytes_per_second

    def hit(self, header: BlobHeader) -> None:
        self.hits += 1
        self.hit_tokens += tokens_of(header)
        self.loaded_bytes += header.nbytes

    def latency_seconds(self, quantile: float) -> float:
        """Of the last loads; 0 while there are none."""
        ordered = sorted(self._seconds)
        return ordered[round(quantile * (len(ordered) - 1))] if ordered else 0.0

    @property
    def cost(self) -> TierCost | None:
        """Running means over the last ten or so; None before the first load."""
        if self._latency_seconds is None or self._bytes_per_second is None:
            return None
        return TierCost(self._latency_seconds, self._bytes_per_second)

    def _end_window(self, now: float) -> None:
        seconds = now - self._window_start
        if self._window_bytes and seconds > 0:
            self._bytes_per_second = _mean(self._bytes_per_second, self._window_bytes / seconds)
        self._window_start, self._window_bytes = now, 0


def _mean(mean: float | None, new: float) -> float:
    return new if mean is None else mean + NEW_SHARE * (new - mean)
