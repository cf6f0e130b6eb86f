"""How fast blobs move in and out of each tier, verified, against the plainest code that does.

Both sides do the same sizes in the same run and take turns, because the machine's speed changes
under them; what counts is the ratio.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import xxhash

from services.kvstore.arena import Arena
from services.kvstore.blob import HEADER_BYTES, BlobHeader, BlobKind, open_blob, seal_into
from services.kvstore.cold import PART_BYTES, ColdTier
from services.kvstore.disk import DiskConfig, DiskTier, FsyncPolicy
from services.kvstore.redis_link import RedisConfig, RedisLink, plain_client
from services.kvstore.valkey import EmbeddedValkey

_DIGEST = bytes(16)
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class BenchSize:
    blob_bytes: int = 1 << 20
    num_blobs: int = 128
    rounds: int = 5


class Speed(NamedTuple):
    """Medians over the rounds, in bytes a second; the ratio is that of the rounds' ratios."""

    name: str
    ours: float
    plain: float
    ratio: float


class Contest(NamedTuple):
    """Two ways to move the same bytes; `before` prepares either."""

    name: str
    ours: Callable[[], None]
    plain: Callable[[], None]
    before: Callable[[], None] = lambda: None


def measure(directory: Path, size: BenchSize) -> list[Speed]:
    """RAM, disk (in `directory`) and a Valkey of its own, in that order."""
    with ExitStack() as stack:
        payload = memoryview(os.urandom(size.blob_bytes))
        blobs = _Blobs(payload, size.num_blobs)
        contests = [
            *stack.enter_context(_arena(blobs)),
            *stack.enter_context(_disk(blobs, directory)),
            *stack.enter_context(_redis(blobs, directory)),
        ]
        num_bytes = size.blob_bytes * size.num_blobs
        return [_contest(each, num_bytes, size.rounds) for each in contests]


def checksum_speed(payload_bytes: int = 1 << 20, seconds: float = 0.5) -> float:
    """Bytes a second of one core, over a payload that is in its cache or not as it comes."""
    payload = os.urandom(payload_bytes)
    deadline = (started := time.perf_counter()) + seconds
    num_bytes = 0
    while (now := time.perf_counter()) < deadline:
        xxhash.xxh3_64_intdigest(payload)
        num_bytes += payload_bytes
    return num_bytes / (now - started)


class _Blobs:
    """So many sealed blobs with one payload; and buffers of their size."""

    def __init__(self, payload: memoryview, num_blobs: int) -> None:
        self.headers = [
            BlobHeader(
                kind=BlobKind.BODY,
                key=number.to_bytes(32, "big"),
                model_digest=_DIGEST,
                layout_digest=_DIGEST,
                start=128 * number,
                end=128 * (number + 1),
                payload_nbytes=len(payload),
            )
            for number in range(num_blobs)
        ]
        self.nbytes = HEADER_BYTES + len(payload)
        self.sealed = [memoryview(bytearray(self.nbytes)) for _ in self.headers]
        for header, blob in zip(self.headers, self.sealed, strict=True):
            seal_into(blob, header, partial(_fill, payload))
        self.out = [memoryview(bytearray(self.nbytes)) for _ in self.headers]

    def pairs(self) -> Iterator[tuple[BlobHeader, memoryview]]:
        return zip(self.headers, self.sealed, strict=True)


@contextmanager
def _arena(blobs: _Blobs) -> Iterator[Sequence[Contest]]:
    """From a worker's buffers into the arena, and back: sealed and verified against copied."""
    num_bytes = (blobs.nbytes + 64) * len(blobs.headers) + 4096
    with (
        tempfile.TemporaryDirectory(dir=_SHARED_MEMORY) as folder,
        closing(Arena.create(Path(folder) / "bench.arena", num_bytes)) as arena,
    ):
        spans = [span for _ in blobs.headers if (span := arena.allocate(blobs.nbytes))]

        def save() -> None:
            for header, span, source in zip(blobs.headers, spans, blobs.sealed, strict=True):
                seal_into(arena.view(span), header, partial(_fill, source[HEADER_BYTES:]))

        def load() -> None:
            for header, span, out in zip(blobs.headers, spans, blobs.out, strict=True):
                payload = open_blob(
                    arena.view(span),
                    key=header.key,
                    model_digest=_DIGEST,
                    layout_digest=_DIGEST,
                )
                out[HEADER_BYTES:] = payload

        def copy() -> None:
            for source, out in zip(blobs.sealed, blobs.out, strict=True):
                out[:] = source

        def copy_in() -> None:
            for span, source in zip(spans, blobs.sealed, strict=True):
                arena.view(span)[:] = source

        save()
        yield [
            Contest("RAM copied in", copy_in, copy),
            Contest("RAM save (copy, checksum)", save, copy),
            Contest("RAM load (checksum, copy)", load, copy),
        ]


def _fill(payload: memoryview, view: memoryview) -> None:
    view[:] = payload


def _room(out: memoryview, num_bytes: int) -> memoryview:
    return out


@contextmanager
def _disk(blobs: _Blobs, directory: Path) -> Iterator[Sequence[Contest]]:
    with tempfile.TemporaryDirectory(dir=directory) as folder, ExitStack() as stack:
        total = 4 * blobs.nbytes * len(blobs.headers)
        config = DiskConfig(Path(folder) / "kv", total, fsync=FsyncPolicy.NEVER)
        tier = stack.enter_context(closing(DiskTier(config)))
        path = Path(folder) / "plain"

        def clear() -> None:
            tier.evict(total)
            path.unlink(missing_ok=True)

        def put() -> None:
            for header, blob in blobs.pairs():
                assert tier.put(header.key, blob)
            tier.flush()

        def write() -> None:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            for number, blob in enumerate(blobs.sealed):
                os.pwrite(file, blob, number * blobs.nbytes)
            os.fdatasync(file)
            os.close(file)

        def get() -> None:
            for header, out in zip(blobs.headers, blobs.out, strict=True):
                assert tier.get_into(header.key, out) is not None

        def read() -> None:
            file = os.open(path, os.O_RDONLY)
            for number, out in enumerate(blobs.out):
                os.preadv(file, [out], number * blobs.nbytes)
            os.close(file)

        def fill() -> None:
            if not tier.num_blobs:
                put()
            if not path.exists():
                write()

        yield [
            Contest("disk write (checksum, fdatasync)", put, write, clear),
            Contest("disk read (page cache, checksum)", get, read, fill),
        ]


@contextmanager
def _redis(blobs: _Blobs, directory: Path) -> Iterator[Sequence[Contest]]:
    total = 2 * blobs.nbytes * len(blobs.headers)
    with tempfile.TemporaryDirectory(dir=directory) as folder, ExitStack() as stack:
        server = EmbeddedValkey(Path(folder), max_bytes=2 * total)
        stack.callback(server.stop)
        config = RedisConfig(server.url, server.password, timeout_seconds=30.0, slow_seconds=30.0)
        link = stack.enter_context(closing(RedisLink(config)))
        plain = stack.enter_context(closing(plain_client(config)))
        tier = ColdTier(link, max_bytes=total, ttl_seconds=1000.0)
        parts = [
            [bytes(blob[at : at + PART_BYTES]) for at in range(0, len(blob), PART_BYTES)]
            for blob in blobs.sealed
        ]

        def clear() -> None:
            link.call("FLUSHALL", writes=True)

        def put() -> None:
            for header, blob in blobs.pairs():
                assert tier.put(header.key, blob)

        def set_all() -> None:
            for number, values in enumerate(parts):
                for part, value in enumerate(values):
                    plain.set(f"{number}:{part}", value)

        def get() -> None:
            for header, out in zip(blobs.headers, blobs.out, strict=True):
                assert tier.get_into(header.key, partial(_room, out)) is not None

        def get_all() -> None:
            for number, values in enumerate(parts):
                for part in range(len(values)):
                    assert plain.get(f"{number}:{part}") is not None

        def fill() -> None:
            if not tier.keys():
                put()
                set_all()

        yield [
            Contest("Redis put (checksum)", put, set_all, clear),
            Contest("Redis get (checksum, copy)", get, get_all, fill),
        ]


def _contest(contest: Contest, num_bytes: int, rounds: int) -> Speed:
    ours: list[float] = []
    plain: list[float] = []
    for number in range(rounds + 1):
        contest.before()
        sides = [(contest.ours, ours), (contest.plain, plain)]
        for run, speeds in sides if number % 2 else sides[::-1]:
            started = time.perf_counter()
            run()
            speeds.append(num_bytes / (time.perf_counter() - started))
    # The first round touches memory and files for the first time.
    ratios = [a / b for a, b in zip(ours[1:], plain[1:], strict=True)]
    return Speed(
        contest.name,
        statistics.median(ours[1:]),
        statistics.median(plain[1:]),
        statistics.median(ratios),
    )
