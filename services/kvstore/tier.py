"""The names of the tiers, fastest first, and what the store asks of each tier below its RAM.

`DiskTier`, `Peers` and `ColdTier` come in through here; the store knows none of them by name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeAlias

from services.kvstore.blob import BlobHeader


class Tier(IntEnum):
    """Where a blob lies. The numbers are those of protos.kvstore's KvTier."""

    RAM = 1
    DISK = 2
    PEER = 3
    COLD = 4


class TierCost(NamedTuple):
    """Loading n bytes takes about latency_seconds + n / bytes_per_second."""

    latency_seconds: float
    bytes_per_second: float


class NoRoom(Exception):
    """RAM has no room for the blob, and nothing that could leave."""


# Room in the arena for a blob of that many bytes, writable; raises NoRoom. Asked again for another
# length, it gives another room and takes the first one back.
Room: TypeAlias = Callable[[int], Awaitable[memoryview]]


class LowerTier(Protocol):
    """A tier below RAM. None of these raise because the tier is down: that is a miss."""

    @property
    def tier(self) -> Tier: ...

    @property
    def degraded(self) -> str | None:
        """Why the tier is not fully usable now, in words."""

    async def contains(self, keys: Sequence[bytes]) -> list[bool]: ...

    async def load(self, key: bytes, room: Room) -> BlobHeader | None:
        """Put the verified blob at the start of a room; None if the tier does not have it.

        Raises blob.Damaged after dropping the tier's copy, and what `room` raises. When it is
        cancelled it ends only after the last of its threads let go of the room.
        """

    async def store(self, key: bytes, blob: memoryview) -> bool:
        """Keep the blob; False if the tier cannot now. `blob` is lent until this returns."""

    async def drop(self, keys: Sequence[bytes]) -> int: ...
