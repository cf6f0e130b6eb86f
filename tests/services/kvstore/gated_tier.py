"""A tier below RAM that answers when the test says so."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from services.kvstore.blob import check_blob
from services.kvstore.tier import Loaded, Rooms, Tier
from tests.services.kvstore.sample_blobs import sample_blob


class GatedTier:
    """Has every sample blob. `asked` is what it was asked for, each with a gate to its answer."""

    tier = Tier.DISK
    degraded = None

    def __init__(self) -> None:
        self.asked: list[tuple[Sequence[bytes], asyncio.Event]] = []

    def has(self, key: bytes) -> bool:
        return True

    async def contains(self, keys: Sequence[bytes]) -> Sequence[bool]:
        return [True] * len(keys)

    async def load(self, keys: Sequence[bytes], rooms: Rooms) -> AsyncGenerator[Loaded]:
        gate = asyncio.Event()
        self.asked.append((keys, gate))
        await gate.wait()
        for key in keys:
            blob = sample_blob(int.from_bytes(key, "big"))
            room = await rooms.wait_for(key, len(blob))
            room[:] = blob
            yield key, check_blob(room, key)

    async def drop(self, keys: Sequence[bytes]) -> int:
        return 0
