"""The names of the tiers, fastest first, and what the store asks of each tier below its RAM."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
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


# Room in the arena for a blob of that many bytes, writable, until the load ends; raises NoRoom.
# Asked again, it takes the first room back.
Room: TypeAlias = Callable[[int], Awaitable[memoryview]]


class TierUsage(NamedTuple):
    """What a tier holds, and what became of the rest. `failures`: what failed -> times."""

    num_blobs: int
    used_bytes: int
    max_bytes: int
    evicted_blobs: int
    failures: Mapping[str, int]


class VerifyReport(NamedTuple):
    """What reading every blob of a tier found. `damaged`: reason -> blobs."""

    num_blobs: int
    damaged: Mapping[str, int]


class LowerTier(Protocol):
    """A tier below RAM. That it is down or slow is no error but a miss."""

    @property
    def tier(self) -> Tier: ...

    @property
    def degraded(self) -> str | None:
        """Why the tier is not fully usable now, in words."""

    def has(self, key: bytes) -> bool:
        """Whether the blob is there, as far as it is known without asking anybody."""

    async def contains(self, keys: Sequence[bytes]) -> Sequence[bool]: ...

    async def load(self, key: bytes, room: Room) -> BlobHeader | None:
        """Put the verified blob at the start of a room; None if the tier does not have it.

        Raises blob.Damaged, and what `room` raises. When it is cancelled it ends only after the
        last of its threads let go of the room.
        """

    async def drop(self, keys: Sequence[bytes]) -> int:
        """Forget these; how many it had."""


class KeptTier(LowerTier, Protocol):
    """A tier that this node's store fills and looks after."""

    async def store(self, key: bytes, blob: memoryview) -> bool:
        """Keep the blob; whether the tier holds it now. It is lent until this returns.

        Raises blob.Damaged, storing nothing, for what does not verify.
        """

    async def evict(self, nbytes: int) -> int:
        """Make way for so many bytes; how many were freed."""

    async def verify(self, *, repair: bool) -> VerifyReport: ...

    async def usage(self) -> TierUsage: ...

    async def tick(self) -> None:
        """Called about once a second, for what nobody asks for."""

    async def close(self) -> None: ...
