"""The names of the tiers, fastest first, and what the store asks of each tier below its RAM."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol, TypeAlias

from services.kvstore.blob import BlobHeader, Damaged, VerifyReport


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


class Rooms(Protocol):
    """RAM for the blobs of one load, each by its key, until the load ends."""

    def make(self, key: bytes, nbytes: int) -> memoryview | None:
        """Room for a blob of so many bytes, writable; None while there is none. Asked again for
        the same key, it takes the first one back."""

    async def wait_for(self, key: bytes, nbytes: int) -> memoryview:
        """As `make`, as soon as there is room; raises NoRoom if that takes too long."""


# What became of a key: the header of the verified blob in its room, damage, or no such blob.
Loaded: TypeAlias = tuple[bytes, BlobHeader | Damaged | None]


class TierUsage(NamedTuple):
    """What a tier holds, and what became of the rest. `failures`: what failed -> times."""

    num_blobs: int
    used_bytes: int
    max_bytes: int
    evicted_blobs: int
    failures: Mapping[str, int]


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

    def load(self, keys: Sequence[bytes], rooms: Rooms) -> AsyncGenerator[Loaded]:
        """Put the verified blobs at the start of their rooms; each key once, in any order.

        A key that does not come at all is a miss. Raises NoRoom. It ends, also when it is closed
        or cancelled, only after the last of its threads let go of the rooms.
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


class Below(NamedTuple):
    """The tiers below RAM, fastest first. Those that are None are off."""

    disk: KeptTier | None = None
    peers: LowerTier | None = None
    cold: KeptTier | None = None

    @property
    def tiers(self) -> list[LowerTier]:
        return [tier for tier in self if tier is not None]

    @property
    def kept(self) -> list[KeptTier]:
        """Those that get every new blob."""
        return [tier for tier in (self.disk, self.cold) if tier is not None]
