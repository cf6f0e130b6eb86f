"""The cold tier: blobs in a Redis that nodes share, that outlives them, and that may be lost.

    {model1:<key in hex>}:<n>   part n of a blob: PART_BYTES of it, but for the last
    model1:{blobs}              sorted set: the key of each blob, by its last use
    model1:{blobs}:lengths      hash: the length of each
    model1:{blobs}:bytes        their sum

The parts of a blob have one hash tag, so that a cluster keeps them together. Part 0 is written last
and has the header: where it is, the others were. The last three are how our byte budget holds in a
server that knows nothing of it, for all nodes together and across restarts. Everything read is
verified; a Redis that fails is a tier without hits. Thread-safe; calls block on the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from services.kvstore.blob import (
    BlobHeader,
    Damaged,
    DamageReason,
    VerifyReport,
    check_blob,
    read_header,
)
from services.kvstore.redis_link import Command, RedisDown, RedisLink

# Values of 128 to 512 KB cost the client 0.3 s a GB; smaller ones twice that (measured).
PART_BYTES = 256 << 10
MAX_BLOB_BYTES = 64 << 20

_INDEX = b"model1:{blobs}"
_LENGTHS = b"model1:{blobs}:lengths"
_SUM = b"model1:{blobs}:bytes"
_KEYS_A_BATCH = 512
_MAX_TOUCHED = 8192
# A store that dies between two commands leaves the sum a little off.
_RECOUNT_SECONDS = 600.0
# What of ours makes way when a server that is full of us takes no more.
_SHRINK_BYTES = 64 << 20


Item = TypeVar("Item")


@dataclass(slots=True)
class ColdCounts:
    evicted_blobs: int = 0
    evicted_bytes: int = 0
    refused_blobs: int = 0  # put while degraded, or too large
    incomplete_blobs: int = 0  # the server had dropped a part: a miss
    failures: Counter[str] = field(default_factory=Counter)  # "TimeoutError" -> times


class ColdTier:
    """Blobs in the Redis of a link, which stays the caller's. `clock` is the time since 1970."""

    def __init__(
        self,
        link: RedisLink,
        *,
        max_bytes: int,
        ttl_seconds: float,
        is_pinned: Callable[[bytes], bool] = lambda key: False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if max_bytes <= 0 or ttl_seconds <= 0:
            raise ValueError("a cold tier needs max_bytes and ttl_seconds above 0")
        self._link = link
        self._max_bytes = max_bytes
        self._ttl_seconds = ttl_seconds
        self._is_pinned = is_pinned
        self._clock = clock
        self._recount_at = -math.inf
        self._lock = threading.Lock()  # guards what follows; never held while Redis is asked
        self._counts = ColdCounts()
        self._touched: dict[bytes, int] = {}  # key -> blob length, since the last tick
        self._used_bytes = 0
        self._num_blobs = 0

    @property
    def degraded(self) -> str | None:
        """Why blobs are refused now, or None."""
        return self._link.degraded

    @property
    def used_bytes(self) -> int:
        """Of all nodes' blobs, as it was last seen."""
        return self._used_bytes

    @property
    def num_blobs(self) -> int:
        """Of all nodes, as it was last seen."""
        return self._num_blobs

    @property
    def counts(self) -> ColdCounts:
        """A copy."""
        with self._lock:
            return dataclasses.replace(self._counts, failures=Counter(self._link.failures))

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        found: list[bool] = []
        try:
            for some in _batches(keys):
                asked: list[Command] = [("EXISTS", _part_key(key, 0)) for key in some]
                found += map(bool, self._link.batch(asked, writes=False))
        except RedisDown:
            return [False] * len(keys)
        return found

    def keys(self) -> list[bytes]:
        """Of every blob of all nodes, from the longest unused to the last used."""
        try:
            keys: list[bytes] = self._link.call("ZRANGE", _INDEX, 0, -1, writes=False)
        except RedisDown:
            return []
        return keys

    def put(self, key: bytes, blob: memoryview) -> bool:
        """Store the blob at the start of `blob`; whether the tier holds it now.

        Raises Damaged, storing nothing, unless it verifies as the blob of `key`.
        """
        if not self._link.is_writable:
            return self._refuse()
        blob = blob[: check_blob(blob, key).nbytes]
        if len(blob) > min(MAX_BLOB_BYTES, self._max_bytes):
            return self._refuse()
        names = _part_keys(key, len(blob))
        try:
            # Of a blob of one part, asking would take as long as writing it again.
            if len(names) > 1 and self._link.call("EXISTS", *names, writes=False) == len(names):
                self._touch(key, len(blob))
            else:
                self._write(key, blob, names)
        except RedisDown:
            self._shrink_if_full()
            return self._refuse()
        return True

    def get_into(self, key: bytes, room: Callable[[int], memoryview]) -> BlobHeader | None:
        """Read the blob of `key`, verified, into the start of `room(length)`; None is a miss.

        `room` is called once the length is known; what it raises comes out here. Raises Damaged,
        and has dropped the blob, when it does not verify.
        """
        try:
            header = self._read(key, room)
        except RedisDown:
            return None
        except Damaged:
            self.delete([key])
            raise
        if header is not None:
            self._touch(key, header.nbytes)
        return header

    def delete(self, keys: Sequence[bytes]) -> int:
        """Drop blobs; how many of them were indexed."""
        num_deleted = 0
        with contextlib.suppress(RedisDown):
            for some in _batches(keys):
                num_deleted += self._forget(some, self._lengths(some))
        return num_deleted

    def evict(self, num_bytes: int) -> int:
        """Drop the blobs that were used longest ago, pinned or not; returns their bytes."""
        try:
            return self._evict(num_bytes, lambda key: False)
        except RedisDown:
            return 0

    def verify(self, *, repair: bool) -> VerifyReport:
        """Read and check every blob of all nodes; drop the damaged ones when told to repair."""
        damaged: Counter[DamageReason] = Counter()
        num_blobs = 0
        with contextlib.suppress(RedisDown):
            for key in self.keys():
                try:
                    num_blobs += self._read(key, _scratch) is not None
                except Damaged as error:
                    num_blobs += 1
                    damaged[error.reason] += 1
                    if repair:
                        self.delete([key])
        return VerifyReport(num_blobs, damaged)

    def tick(self) -> None:
        """To be called about once a second: probes a server that failed, notes what was used,
        forgets what expired."""
        self._link.tick()
        with self._lock:
            touched, self._touched = self._touched, {}
        with contextlib.suppress(RedisDown):
            for some in _batches(list(touched.items())):
                self._link.batch(self._refresh(dict(some)), writes=True)
            if (now := self._clock()) >= self._recount_at:
                self._recount()
                self._recount_at = now + _RECOUNT_SECONDS
            expired = ("ZRANGEBYSCORE", _INDEX, "-inf", now - self._ttl_seconds)
            keys = self._link.call(*expired, "LIMIT", 0, _KEYS_A_BATCH, writes=False)
            self._forget(keys, self._lengths(keys))
            self._num_blobs = self._link.call("ZCARD", _INDEX, writes=False)

    def _read(self, key: bytes, room: Callable[[int], memoryview]) -> BlobHeader | None:
        # One part after the other: replies that wait in line are copied once more by the parser,
        # which costs more than the round trips save (0.7 s a GB against 0.3, measured).
        first = self._get_part(key, 0)
        if first is None:
            return None
        header = read_header(memoryview(first))
        if header.key != key:
            raise Damaged(DamageReason.KEY)
        if header.nbytes > MAX_BLOB_BYTES:
            raise Damaged(DamageReason.HEADER_FIELD)
        out = room(header.nbytes)[: header.nbytes]
        part: bytes | None = first
        for number, start in enumerate(range(0, header.nbytes, PART_BYTES)):
            if number:
                part = self._get_part(key, number)
            if part is None:
                with self._lock:
                    self._counts.incomplete_blobs += 1
                self._forget([key], self._lengths([key]))
                return None
            if len(part) != len(out[start : start + PART_BYTES]):
                raise Damaged(DamageReason.TRUNCATED)
            out[start : start + PART_BYTES] = part
        return check_blob(out, key)

    def _get_part(self, key: bytes, number: int) -> bytes | None:
        part: bytes | None = self._link.call("GET", _part_key(key, number), writes=False)
        return part

    def _write(self, key: bytes, blob: memoryview, names: Sequence[bytes]) -> None:
        commands: list[Command] = [
            ("SET", name, blob[number * PART_BYTES : (number + 1) * PART_BYTES], "PX", self._ttl_ms)
            for number, name in enumerate(names)
        ]
        commands.reverse()
        commands += [
            ("ZADD", _INDEX, self._clock(), key),
            ("HSET", _LENGTHS, key, len(blob)),
            ("INCRBY", _SUM, len(blob)),
        ]
        *_, is_new, self._used_bytes = self._link.batch(commands, writes=True)
        if not is_new:  # another node, or the server had dropped a part of it
            self._used_bytes = self._link.call("DECRBY", _SUM, len(blob), writes=True)
        else:
            excess = self._used_bytes - self._max_bytes
            if excess > 0 and self._evict(excess, self._is_pinned) < excess:
                self._evict(self._used_bytes - self._max_bytes, lambda key: False)

    def _evict(self, num_bytes: int, is_pinned: Callable[[bytes], bool]) -> int:
        freed = num_spared = 0
        while freed < num_bytes:
            last = num_spared + _KEYS_A_BATCH - 1
            oldest = self._link.call("ZRANGE", _INDEX, num_spared, last, writes=False)
            if not oldest:
                break
            leaving: dict[bytes, int] = {}
            for key, length in zip(oldest, self._lengths(oldest), strict=True):
                if is_pinned(key):
                    num_spared += 1
                elif freed < num_bytes:
                    leaving[key] = length
                    freed += length
            num_evicted = self._forget(list(leaving), list(leaving.values()))
            with self._lock:
                self._counts.evicted_blobs += num_evicted
                self._counts.evicted_bytes += sum(leaving.values())
        return freed

    def _lengths(self, keys: Sequence[bytes]) -> list[int]:
        """Of indexed blobs; 0 for others."""
        if not keys:
            return []
        return [
            int(length or 0) for length in self._link.call("HMGET", _LENGTHS, *keys, writes=False)
        ]

    def _forget(self, keys: Sequence[bytes], lengths: Sequence[int]) -> int:
        """Drop blobs and what the index says of them; how many were indexed."""
        commands: list[Command] = []
        for key, length in zip(keys, lengths, strict=True):
            # A blob that is not indexed has a first part at most: anything else expires.
            commands.append(("UNLINK", *_part_keys(key, max(length, 1))))
            commands.append(("ZREM", _INDEX, key))
            commands.append(("HDEL", _LENGTHS, key))
        were_indexed = self._link.batch(commands, writes=False)[2::3]
        freed = sum(length for length, was in zip(lengths, were_indexed, strict=True) if was)
        if freed and self._link.is_writable:
            self._used_bytes = self._link.call("DECRBY", _SUM, freed, writes=True)
        elif freed:  # a server without memory lets us drop blobs, but not count
            self._used_bytes -= freed
            self._recount_at = -math.inf
        return sum(map(bool, were_indexed))

    def _shrink_if_full(self) -> None:
        """A server that is full of our blobs stays so until some make way for others."""
        if self._link.is_readable and not self._link.is_writable:
            with contextlib.suppress(RedisDown):
                self._evict(min(_SHRINK_BYTES, self._used_bytes // 4), self._is_pinned)

    def _recount(self) -> None:
        lengths = self._link.call("HVALS", _LENGTHS, writes=False)
        self._used_bytes = sum(map(int, lengths))
        self._link.call("SET", _SUM, self._used_bytes, writes=True)

    def _touch(self, key: bytes, nbytes: int) -> None:
        with self._lock:
            if len(self._touched) < _MAX_TOUCHED:
                self._touched[key] = nbytes

    def _refresh(self, touched: dict[bytes, int]) -> list[Command]:
        now = self._clock()
        commands: list[Command] = []
        for key, nbytes in touched.items():
            commands.append(("ZADD", _INDEX, "XX", now, key))
            commands += [("PEXPIRE", name, self._ttl_ms) for name in _part_keys(key, nbytes)]
        return commands

    @property
    def _ttl_ms(self) -> int:
        return max(1, round(1000 * self._ttl_seconds))

    def _refuse(self) -> bool:
        with self._lock:
            self._counts.refused_blobs += 1
        return False


def _part_key(key: bytes, number: int) -> bytes:
    return b"{model1:%s}:%d" % (key.hex().encode(), number)


def _part_keys(key: bytes, nbytes: int) -> list[bytes]:
    return [_part_key(key, number) for number in range(-(-nbytes // PART_BYTES))]


def _scratch(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), _KEYS_A_BATCH):
        yield items[start : start + _KEYS_A_BATCH]
