"""Compares eviction policies on made-up traffic: what share of the bytes asked for was there.

Plain computation over the store's own policies; no store, no arena, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from services.kvstore.hit_rate_plot import Curve, Panel, svg
from services.kvstore.lru import Lru
from services.kvstore.ram import EvictionPolicy
from services.kvstore.s3_fifo import S3Fifo
from services.kvstore.tiny_lfu import TinyLfu
from services.kvstore.traces import Blob, Trace, all_traces

POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType(
    {"s3-fifo": S3Fifo, "w-tinylfu": TinyLfu, "lru": Lru}
)
CACHE_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True, slots=True)
class HitRates:
    """Shares of the bytes that were asked for."""

    hit: float
    resumable: float  # only those before the first that was missing: what a request can resume from


@dataclass(frozen=True, slots=True)
class Row:
    trace: str
    policy: str
    cache_share: float  # of the trace's distinct bytes
    rates: HitRates


@dataclass(frozen=True, slots=True)
class Simulation:
    """What `simulate` found, in the order of traces, policies and cache sizes."""

    rows: tuple[Row, ...]

    def write_plot(self, path: Path) -> None:
        """Resumable share by cache size, one panel a trace, as SVG."""
        panels = []
        for trace in dict.fromkeys(row.trace for row in self.rows):
            of_trace = [row for row in self.rows if row.trace == trace]
            curves = [
                Curve(
                    policy,
                    [(r.cache_share, r.rates.resumable) for r in of_trace if r.policy == policy],
                )
                for policy in dict.fromkeys(row.policy for row in of_trace)
            ]
            panels.append(Panel(trace, curves))
        title = "share of the bytes asked for that a request could resume from, by cache size"
        path.write_text(svg(title, panels), encoding="utf-8")


def simulate(
    num_requests: int = 5000,
    *,
    seed: int = 0,
    policies: Sequence[str] = tuple(POLICIES),
    cache_shares: Sequence[float] = CACHE_SHARES,
) -> Simulation:
    """Every policy on every trace at every cache size. KeyError for a policy that there is not."""
    rows = [
        Row(trace.name, name, share, hit_rates(POLICIES[name](), trace, share))
        for trace in all_traces(num_requests, seed)
        for name in policies
        for share in cache_shares
    ]
    return Simulation(tuple(rows))


def hit_rates(policy: EvictionPolicy, trace: Trace, cache_share: float) -> HitRates:
    """Of a cache that holds that share of the trace's distinct bytes and starts empty."""
    cache = _Cache(policy, int(cache_share * trace.distinct_bytes))
    asked = hit = resumable = 0
    for now, request in enumerate(trace.requests):
        is_unbroken = True
        for blob in request:
            is_there = blob.key in cache
            is_unbroken = is_unbroken and is_there
            asked += blob.nbytes
            hit += is_there * blob.nbytes
            resumable += is_unbroken * blob.nbytes
        cache.use(request, float(now))
    return HitRates(hit / max(1, asked), resumable / max(1, asked))


class _Cache:
    """What a store's RAM does with a policy: a request's own blobs do not leave for each other."""

    def __init__(self, policy: EvictionPolicy, capacity_bytes: int) -> None:
        self._policy = policy
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        self._sizes: dict[bytes, int] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def use(self, request: Sequence[Blob], now: float) -> None:
        in_use = {blob.key for blob in request}
        for key, nbytes in request:
            if key in self._sizes:
                self._policy.touch(key, now)
            elif self._make_room(nbytes, now, in_use):
                self._policy.insert(key, nbytes, now)
                self._sizes[key] = nbytes
                self._used_bytes += nbytes

    def _make_room(self, nbytes: int, now: float, in_use: set[bytes]) -> bool:
        while self._used_bytes + nbytes > self._capacity_bytes:
            leaving = self._policy.evict(now, lambda key: key not in in_use)
            if leaving is None:
                return False
            self._used_bytes -= self._sizes.pop(leaving)
        return True
