"""Measures what loads from a tier cost before anybody asks for one: a few blobs there and back.

Whether to load or to recompute is decided by these figures until real loads replace them.
"""

from __future__ import annotations

import secrets
import time
from contextlib import aclosing

from services.kv_keys import DIGEST_BYTES, KEY_BYTES
from services.kvstore.blob import BlobHeader, BlobKind, seal_into
from services.kvstore.tier import KeptTier, TierCost

NUM_BLOBS = 8
PAYLOAD_BYTES = 64 * 1024
# Of the tier's budget; in a smaller one it would push out what is worth more.
MAX_SHARE = 0.01


async def measured_cost(tier: KeptTier) -> TierCost | None:
    """None if the tier is too small for it, or does not give back what it was given."""
    if MAX_SHARE * (await tier.usage()).max_bytes < NUM_BLOBS * PAYLOAD_BYTES:
        return None
    blobs = [_random_blob() for _ in range(NUM_BLOBS)]
    keys = [header.key for header, _ in blobs]
    try:
        for header, blob in blobs:
            if not await tier.store(header.key, blob):
                return None
        num_loaded, first_seconds = 0, 0.0
        started = time.perf_counter()
        async with aclosing(tier.load(keys, _OwnMemory())) as loaded:
            async for _key, outcome in loaded:
                num_loaded += isinstance(outcome, BlobHeader)
                first_seconds = first_seconds or time.perf_counter() - started
        seconds = time.perf_counter() - started
        if num_loaded < NUM_BLOBS:
            return None
        nbytes = sum(header.nbytes for header, _ in blobs)
        return TierCost(latency_seconds=first_seconds, bytes_per_second=nbytes / seconds)
    finally:
        await tier.drop(keys)


class _OwnMemory:
    """Rooms beside the arena, so that nothing has to leave it for this."""

    def make(self, key: bytes, nbytes: int) -> memoryview:
        return memoryview(bytearray(nbytes))

    async def wait_for(self, key: bytes, nbytes: int) -> memoryview:
        return self.make(key, nbytes)


def _random_blob() -> tuple[BlobHeader, memoryview]:
    header = BlobHeader(
        kind=BlobKind.BODY,
        key=secrets.token_bytes(KEY_BYTES),
        model_digest=bytes(DIGEST_BYTES),
        layout_digest=bytes(DIGEST_BYTES),
        start=0,
        end=0,
        payload_nbytes=PAYLOAD_BYTES,
    )
    blob = memoryview(bytearray(header.nbytes))

    def fill(view: memoryview) -> None:
        view[:] = secrets.token_bytes(len(view))

    seal_into(blob, header, fill)
    return header, blob
