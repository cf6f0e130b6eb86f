"""Blobs that tests save and read back: their payload follows from their number."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b

import numpy as np

from services.kvstore.blob import BlobKind
from services.kvstore.client import KvClient, KvClientConfig, SaveItem
from services.kvstore.tier import Tier

MODEL_DIGEST = bytes(range(16))
LAYOUT_DIGEST = bytes(range(16, 32))
BLOCK_TOKENS = 128
NBYTES = 4096


def key_of(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def payload_of(number: int, nbytes: int = NBYTES) -> bytes:
    return np.random.default_rng(number).bytes(nbytes)


def item_of(number: int, nbytes: int = NBYTES) -> SaveItem:
    payload = payload_of(number, nbytes)

    def fill(view: memoryview) -> None:
        view[:] = payload

    start = number * BLOCK_TOKENS
    return SaveItem(key_of(number), BlobKind.BODY, start, start + BLOCK_TOKENS, nbytes, fill)


def client_config(address: str, *, call_timeout_seconds: float = 5.0) -> KvClientConfig:
    return KvClientConfig(
        address=address,
        name="worker-0",
        model_digest=MODEL_DIGEST,
        layout_digest=LAYOUT_DIGEST,
        call_timeout_seconds=call_timeout_seconds,
    )


async def read(
    client: KvClient, numbers: Sequence[int], *, timeout_s: float = 5.0, nbytes: int = NBYTES
) -> list[Tier | None]:
    """The tier that each came from; asserts that what came is what was saved."""
    keys = [key_of(number) for number in numbers]
    payloads: dict[int, bytes] = {}

    def consume(index: int, payload: memoryview) -> None:
        assert index not in payloads
        payloads[index] = bytes(payload)

    tiers: dict[int, Tier | None] = {}
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    async with client.acquire(keys, deadline_s=deadline_s, consume=consume) as blocks:
        async for block in blocks:
            assert block.index not in tiers
            tiers[block.index] = block.tier
    assert sorted(tiers) == list(range(len(numbers)))
    for index, number in enumerate(numbers):
        assert (index in payloads) == (tiers[index] is not None)
        assert payloads.get(index, payload_of(number, nbytes)) == payload_of(number, nbytes)
    return [tiers[index] for index in range(len(numbers))]


async def eventually(holds: Callable[[], Awaitable[bool]], *, timeout_s: float = 10.0) -> None:
    """Wait for something that the other process does when it gets to it."""
    async with asyncio.timeout(timeout_s):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)
