"""What the KV cache of a worker asks of its node's block store.

`services.kvstore.client.KvClient` is one; the tests have another, in memory. None of these raise
because the store is away, slow or damaged: then blocks are missing, and saving them is dropped.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from services.kvstore.acquisition import Block
from services.kvstore.client import Saved, SaveItem
from services.kvstore.tier import Tier, TierCost


class BlockStore(Protocol):
    """Blobs by key, in tiers."""

    @property
    def connected(self) -> bool:
        """False: everything would be a miss now."""

    async def locate(self, keys: Sequence[bytes]) -> list[Tier | None]:
        """The nearest tier of each key; a hint."""

    def acquire(
        self,
        keys: Sequence[bytes],
        *,
        deadline_s: float,
        consume: Callable[[int, memoryview], None],
    ) -> AbstractAsyncContextManager[AsyncIterator[Block]]:
        """Each key once, as it arrives: its tier, or None for a miss. Before that, `consume` gets
        the verified payload, in another thread. After `deadline_s` on the loop's clock the rest are
        misses. Once left, no `consume` runs any more.
        """

    async def prefetch(self, keys: Sequence[bytes]) -> None:
        """Have these brought nearer; waits for nothing."""

    async def save(self, items: Sequence[SaveItem]) -> Saved:
        """Keep these; `fill` is called in another thread, and never again once this returns."""

    def costs(self) -> Mapping[Tier, TierCost]:
        """What loading from each tier takes, as measured."""
