"""How fast blobs move through each tier, against the plainest way to move the same bytes.

    ram    the client's path into the KV pool, verified      copying the same sizes in memory
    disk   the tier's own reads, verified                     plain reads of a file of those sizes
    cold   the tier's own reads, verified                     a loop of GETs of the same values

Reads of the disk come from the device: both sides drop the page cache before each turn.
"""

import asyncio
import os
import statistics
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
from services.kvstore.blob import HEADER_BYTES, BlobHeader, BlobKind, seal_into
from services.kvstore.client import KvClient, SaveItem
from services.kvstore.cold import PART_BYTES, ColdTier
from services.kvstore.disk import DiskConfig, DiskTier
from services.kvstore.redis_link import RedisConfig, RedisLink
from services.kvstore.tier import Tier
from services.kvstore.valkey import EmbeddedValkey

NUM_BODIES = 64  # 8K tokens
NUM_TAILS = 8
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
    blob_bytes: int
    num_blobs: int
    checksum_bytes_per_second: float
    tiers: tuple[Bandwidth, ...]


async def measure_bandwidth(rig: Rig, folder: Path, repeats: int) -> Bandwidths:
    pool = rig.pool(PoolCapacity(1, NUM_BODIES * 128, MAX_STEP_TOKENS))
    sizes = [pool.body_nbytes] * NUM_BODIES + [pool.tail_nbytes] * NUM_TAILS
    draw = np.random.default_rng(0)
    payloads = [memoryview(draw.bytes(size)) for size in sizes]
    total = sum(sizes)
    checksum = total / await _median(repeats * 3, _async(lambda: _checksums(payloads)))
    tell("bandwidth of RAM")
    async with rig.client(pool.layout_digest) as client:
        ram = await _ram(client, pool, payloads, repeats * 5)
    tell("bandwidth of the disk")
    disk = await _disk(folder, payloads, repeats)
    tell("bandwidth of Redis")
    cold = await _cold(folder, payloads, repeats)
    return Bandwidths(
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
            for name, (ours, plain) in {"ram": ram, "disk": disk, "cold": cold}.items()
        ),
    )


async def _ram(
    client: KvClient, pool: KVPool, payloads: Sequence[memoryview], repeats: int
) -> tuple[float, float]:
    keys = [bytes([1]) * 28 + number.to_bytes(4, "big") for number in range(len(payloads))]

    def filler(payload: memoryview) -> Callable[[memoryview], None]:
        def fill(out: memoryview) -> None:
            out[:] = payload

        return fill

    await client.save(
        [
            SaveItem(key, _kind(number), 0, 128, len(payload), filler(payload))
            for number, (key, payload) in enumerate(zip(keys, payloads, strict=True))
        ]
    )
    handle = pool.allocate(NUM_BODIES * 128)
    tail = np.empty(pool.tail_nbytes, np.uint8)
    targets = [np.empty(len(payload), np.uint8) for payload in payloads]

    def consume(index: int, payload: memoryview) -> None:
        if index < NUM_BODIES:
            pool.write_body(int(handle.blocks[index]), payload)
        else:
            tail[:] = payload

    async def ours() -> None:
        deadline_s = asyncio.get_running_loop().time() + _DEADLINE_SECONDS
        async with client.acquire(keys, deadline_s=deadline_s, consume=consume) as blocks:
            async for block in blocks:
                assert block.tier is Tier.RAM

    def copy() -> None:
        for target, payload in zip(targets, payloads, strict=True):
            target[:] = payload

    return await _taking_turns(repeats, ours, _async(copy))


async def _disk(folder: Path, payloads: Sequence[memoryview], repeats: int) -> tuple[float, float]:
    blobs = [_sealed(number, payload) for number, payload in enumerate(payloads)]
    plain_file = folder / "plain"
    plain_file.write_bytes(b"".join(blobs))
    buffers = [memoryview(bytearray(len(blob))) for blob in blobs]
    directory = folder / "bandwidth"
    tier = DiskTier(DiskConfig(directory, 4 * sum(map(len, blobs))))
    try:
        for number, blob in enumerate(blobs):
            tier.put(_key(number), memoryview(blob))
        tier.flush()

        def ours() -> None:
            for number, buffer in enumerate(buffers):
                assert tier.get_into(_key(number), buffer) is not None

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


async def _cold(folder: Path, payloads: Sequence[memoryview], repeats: int) -> tuple[float, float]:
    blobs = [_sealed(number, payload) for number, payload in enumerate(payloads)]
    parts = [
        blob[start : start + PART_BYTES]
        for blob in blobs
        for start in range(0, len(blob), PART_BYTES)
    ]
    largest = memoryview(bytearray(max(map(len, blobs))))
    total = sum(map(len, blobs))
    server = EmbeddedValkey(folder / "bandwidth-valkey", max_bytes=8 * total)
    link = RedisLink(RedisConfig(server.url, server.password))
    raw = redis.Redis(host=server.host, port=server.port, password=server.password)
    try:
        tier = ColdTier(link, max_bytes=4 * total, ttl_seconds=3600.0)
        for number, blob in enumerate(blobs):
            assert tier.put(_key(number), memoryview(blob))
        for number, part in enumerate(parts):
            raw.set(f"plain:{number}", bytes(part))

        def ours() -> None:
            for number in range(len(blobs)):
                assert tier.get_into(_key(number), lambda nbytes: largest[:nbytes]) is not None

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


def _key(number: int) -> bytes:
    return bytes([2]) * 28 + number.to_bytes(4, "big")


def _kind(number: int) -> BlobKind:
    return BlobKind.BODY if number < NUM_BODIES else BlobKind.TAIL


def _sealed(number: int, payload: memoryview) -> bytearray:
    header = BlobHeader(
        kind=_kind(number),
        key=_key(number),
        model_digest=bytes(16),
        layout_digest=bytes(16),
        start=0,
        end=128,
        payload_nbytes=len(payload),
    )
    blob = bytearray(HEADER_BYTES + len(payload))

    def fill(out: memoryview) -> None:
        out[:] = payload

    seal_into(memoryview(blob), header, fill)
    return blob
