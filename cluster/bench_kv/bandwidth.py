"""How fast blobs move through each tier, against the plainest way to move the same bytes.

    ram    the tier's own reads, verified, into the KV pool    copying the same sizes in memory
    disk   the tier's own reads, verified                      plain reads of a file of those sizes
    cold   the tier's own reads, verified                      a loop of GETs of the same values
    leased the same as ram, asked of the store's process       copying the same sizes in memory

Reads of the disk come from the device: both sides drop the page cache before each turn.
"""

import asyncio
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import redis
import xxhash

from cluster.bench_kv.rig import MAX_STEP_TOKENS, Rig, tell
from model1.kv_capacity import PoolCapacity
from model1.kv_pool import KVPool
from services.attention.kv_cache import KvCacheConfig
from services.kv_keys import DIGEST_BYTES
from services.kvstore.arena import FILE_SUFFIX, Arena
from services.kvstore.blob import (
    HEADER_BYTES,
    BlobHeader,
    BlobKind,
    open_blob,
    read_header,
    seal_into,
)
from services.kvstore.client import KvClient, SaveItem
from services.kvstore.cold import PART_BYTES, ColdTier
from services.kvstore.disk import DiskConfig, DiskTier
from services.kvstore.ram import RamTier
from services.kvstore.redis_link import RedisConfig, RedisLink
from services.kvstore.s3_fifo import S3Fifo
from services.kvstore.tier import Tier
from services.kvstore.valkey import EmbeddedValkey

SHARED_MEMORY = Path("/dev/shm")
_DEADLINE_SECONDS = 60.0

Turn = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Medians in bytes/s. `verify_share` is the checksum's part of our time."""

    tier: str
    ours: float
    plain: float
    ratio: float
    verify_share: float


@dataclass(frozen=True, slots=True)
class Bandwidths:
    """Of all blobs of a history."""

    history_tokens: int
    blob_bytes: int
    num_blobs: int
    checksum_bytes_per_second: float
    tiers: tuple[Bandwidth, ...]


@dataclass(frozen=True, slots=True)
class _Blobs:
    """What is moved: bodies, then tails."""

    num_bodies: int
    payloads: Sequence[memoryview]

    def kind(self, number: int) -> BlobKind:
        return BlobKind.BODY if number < self.num_bodies else BlobKind.TAIL

    def key(self, number: int) -> bytes:
        return self.num_bodies.to_bytes(16, "big") + number.to_bytes(16, "big")

    def sealed(self) -> list[bytearray]:
        return [self._sealed(number) for number in range(len(self.payloads))]

    def _sealed(self, number: int) -> bytearray:
        payload = self.payloads[number]
        header = BlobHeader(
            kind=self.kind(number),
            key=self.key(number),
            model_digest=bytes(DIGEST_BYTES),
            layout_digest=bytes(DIGEST_BYTES),
            start=0,
            end=128,
            payload_nbytes=len(payload),
        )
        blob = bytearray(HEADER_BYTES + len(payload))
        seal_into(memoryview(blob), header, _filler(payload))
        return blob


async def measure_bandwidth(
    rig: Rig, folder: Path, history_tokens: int, repeats: int
) -> Bandwidths:
    pool = rig.pool(PoolCapacity(1, history_tokens, MAX_STEP_TOKENS))
    num_bodies = history_tokens // pool.layout.block_tokens
    sizes = [pool.body_nbytes] * num_bodies
    sizes += [pool.tail_nbytes] * (num_bodies // KvCacheConfig().resume_every_blocks)
    draw = np.random.default_rng(0)
    blobs = _Blobs(num_bodies, [memoryview(draw.bytes(size)) for size in sizes])
    total = sum(sizes)
    checksum = total / await _median(repeats * 3, _async(lambda: _checksums(blobs.payloads)))
    tell(f"bandwidth of RAM, {history_tokens} tokens")
    target = _Pool(pool, blobs)
    ram = await _ram(target, blobs, repeats * 5)
    async with rig.client(pool.layout_digest) as client:
        leased = await _leased(client, target, blobs, repeats * 5)
    tell(f"bandwidth of the disk, {history_tokens} tokens")
    disk = await _disk(folder, blobs, repeats)
    tell(f"bandwidth of Redis, {history_tokens} tokens")
    cold = await _cold(folder, blobs, repeats)
    found = {"ram": ram, "disk": disk, "cold": cold, "leased": leased}
    return Bandwidths(
        history_tokens=history_tokens,
        blob_bytes=total,
        num_blobs=len(sizes),
        checksum_bytes_per_second=checksum,
        tiers=tuple(
            Bandwidth(
                tier=name,
                ours=total / ours,
                plain=total / plain,
                ratio=plain / ours,
                verify_share=total / checksum / ours,
            )
            for name, (ours, plain) in found.items()
        ),
    )


class _Pool:
    """Where payloads from RAM go, and the plain copies of them beside it."""

    def __init__(self, pool: KVPool, blobs: _Blobs) -> None:
        self._pool = pool
        self._payloads = blobs.payloads
        self._handle = pool.allocate(blobs.num_bodies * pool.layout.block_tokens)
        self._tail = np.empty(pool.tail_nbytes, np.uint8)
        self._targets = [np.empty(len(payload), np.uint8) for payload in blobs.payloads]

    def consume(self, number: int, payload: memoryview) -> None:
        if number < len(self._handle.blocks):
            self._pool.write_body(int(self._handle.blocks[number]), payload)
        else:
            self._tail[:] = payload

    def copy(self) -> None:
        for target, payload in zip(self._targets, self._payloads, strict=True):
            target[:] = payload


async def _ram(pool: _Pool, blobs: _Blobs, repeats: int) -> tuple[float, float]:
    sealed = blobs.sealed()
    keys = [blobs.key(number) for number in range(len(sealed))]
    folder = Path(tempfile.mkdtemp(prefix="model1-bench-", dir=SHARED_MEMORY))
    try:
        arena = Arena.create(folder / f"bench{FILE_SUFFIX}", 2 * sum(map(len, sealed)))
        tier = RamTier(arena, S3Fifo(), time.monotonic, lambda _key: False, lambda _key: False)
        for key, blob in zip(keys, sealed, strict=True):
            reservation = tier.reserve(key, len(blob))
            assert reservation is not None
            arena.view(reservation.span)[:] = blob
            tier.let_go(tier.insert(reservation, read_header(memoryview(blob))))

        def ours() -> None:
            for number, key in enumerate(keys):
                resident = tier.use(key)
                assert resident is not None
                blob = arena.view(resident.span)
                digest = bytes(DIGEST_BYTES)
                payload = open_blob(blob, key=key, model_digest=digest, layout_digest=digest)
                pool.consume(number, payload)
                tier.let_go(resident)

        seconds = await _taking_turns(repeats, _async(ours), _async(pool.copy))
        arena.close()
        return seconds
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _leased(
    client: KvClient, pool: _Pool, blobs: _Blobs, repeats: int
) -> tuple[float, float]:
    payloads = blobs.payloads
    keys = [blobs.key(number) for number in range(len(payloads))]
    await client.save(
        [
            SaveItem(key, blobs.kind(number), 0, 128, len(payload), _filler(payload))
            for number, (key, payload) in enumerate(zip(keys, payloads, strict=True))
        ]
    )

    async def ours() -> None:
        deadline_s = asyncio.get_running_loop().time() + _DEADLINE_SECONDS
        async with client.acquire(keys, deadline_s=deadline_s, consume=pool.consume) as blocks:
            async for block in blocks:
                assert block.tier is Tier.RAM

    return await _taking_turns(repeats, ours, _async(pool.copy))


async def _disk(folder: Path, blobs: _Blobs, repeats: int) -> tuple[float, float]:
    sealed = blobs.sealed()
    plain_file = folder / "plain"
    plain_file.write_bytes(b"".join(sealed))
    buffers = [memoryview(bytearray(len(blob))) for blob in sealed]
    directory = folder / f"bandwidth-{blobs.num_bodies}"
    tier = DiskTier(DiskConfig(directory, 4 * sum(map(len, sealed))))
    try:
        for number, blob in enumerate(sealed):
            tier.put(blobs.key(number), memoryview(blob))
        tier.flush()

        def ours() -> None:
            for number, buffer in enumerate(buffers):
                assert tier.get_into(blobs.key(number), buffer) is not None

        def plain() -> None:
            descriptor = os.open(plain_file, os.O_RDONLY)
            try:
                for buffer in buffers:
                    assert os.readv(descriptor, [buffer]) == len(buffer)
            finally:
                os.close(descriptor)

        files = [plain_file, *(path for path in directory.rglob("*") if path.is_file())]
        return await _taking_turns(
            repeats, _async(ours), _async(plain), before=lambda: _drop_page_cache(files)
        )
    finally:
        tier.close()


async def _cold(folder: Path, blobs: _Blobs, repeats: int) -> tuple[float, float]:
    sealed = blobs.sealed()
    parts = [
        blob[start : start + PART_BYTES]
        for blob in sealed
        for start in range(0, len(blob), PART_BYTES)
    ]
    largest = memoryview(bytearray(max(map(len, sealed))))
    total = sum(map(len, sealed))
    server = EmbeddedValkey(folder / f"bandwidth-valkey-{blobs.num_bodies}", max_bytes=8 * total)
    link = RedisLink(RedisConfig(server.url, server.password))
    raw = redis.Redis(host=server.host, port=server.port, password=server.password)
    try:
        tier = ColdTier(link, max_bytes=4 * total, ttl_seconds=3600.0)
        for number, blob in enumerate(sealed):
            assert tier.put(blobs.key(number), memoryview(blob))
        for number, part in enumerate(parts):
            raw.set(f"plain:{number}", bytes(part))

        def ours() -> None:
            for number in range(len(sealed)):
                assert tier.get_into(blobs.key(number), lambda nbytes: largest[:nbytes]) is not None

        def plain() -> None:
            for number in range(len(parts)):
                assert raw.get(f"plain:{number}") is not None

        return await _taking_turns(repeats, _async(ours), _async(plain))
    finally:
        raw.close()
        link.close()
        server.stop()


async def _taking_turns(
    repeats: int, ours: Turn, plain: Turn, before: Callable[[], None] = lambda: None
) -> tuple[float, float]:
    """Median seconds of both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for side, times in zip((ours, plain), seconds, strict=True):
            before()
            start = time.perf_counter()
            await side()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


async def _median(repeats: int, turn: Turn) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        await turn()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _async(work: Callable[[], None]) -> Turn:
    async def turn() -> None:
        work()

    return turn


def _checksums(payloads: Sequence[memoryview]) -> None:
    for payload in payloads:
        xxhash.xxh3_64_intdigest(payload)


def _drop_page_cache(files: Sequence[Path]) -> None:
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _filler(payload: memoryview) -> Callable[[memoryview], None]:
    def fill(out: memoryview) -> None:
        out[:] = payload

    return fill
