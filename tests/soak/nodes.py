"""Two nodes on this machine: their stores, and a Redis (a Valkey server) that both use.

Every one is a process of its own; the nodes are two ports of the loopback address.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from services.kvstore.blocking import ColdConfig
from services.kvstore.config import KvStoreConfig
from services.kvstore.disk import DiskConfig
from services.kvstore.redis_link import RedisConfig
from services.kvstore.tier import Tier
from services.kvstore.valkey import EmbeddedValkey
from tests.soak.store_process import StoreProcess

RAM_BYTES = 256 << 20
DISK_BYTES = 4 << 30
REDIS_BYTES = 2 << 30


class TwoNodes:
    """`home` is where the worker is."""

    def __init__(
        self, directory: Path, valkey: EmbeddedValkey, home: StoreProcess, peer: StoreProcess
    ) -> None:
        self.valkey = valkey
        self.home = home
        self.peer = peer
        self.home_disk = directory / "home" / "disk"

    async def put(self, keys: Sequence[bytes], tier: Tier) -> None:
        """Let `tier` be the first of home's tiers that has these blobs, wherever they are now."""
        assert await self.home.bring(keys) == len(keys), "a blob is nowhere"
        await self.home.do("flush")
        if tier is Tier.PEER:
            assert await self.peer.bring(keys) == len(keys)
        if tier > Tier.RAM:
            await self.home.drop(Tier.RAM, keys)
        if tier > Tier.DISK:
            await self.home.drop(Tier.DISK, keys)
        if tier > Tier.PEER:
            await self.peer.do("flush")
            for above in (Tier.RAM, Tier.DISK):
                await self.peer.drop(above, keys)

    async def isolate(self, keys: Sequence[bytes], tier: Tier) -> None:
        """As `put`, and no tier after it has them; of a peer, its RAM has them."""
        await self.put(keys, tier)
        if tier < Tier.DISK:
            await self.home.drop(Tier.DISK, keys)
        if tier is Tier.PEER:
            await self.peer.do("flush")
            await self.peer.drop(Tier.DISK, keys)
        if tier < Tier.COLD:
            await self.home.drop(Tier.COLD, keys)

    async def drop(self, key: bytes, tier: Tier) -> None:
        """From a tier in which it was isolated."""
        holder, its_tier = (self.peer, Tier.RAM) if tier is Tier.PEER else (self.home, tier)
        assert await holder.drop(its_tier, [key]) == 1

    async def restart_home(self) -> None:
        """After its end, at the same address and over the same files."""
        self.home = await StoreProcess.start(self.home.config)
        await self.home.do("peers", addresses=[self.peer.address])

    async def resident_bytes(self) -> list[int]:
        return [await store.do("rss") for store in (self.home, self.peer)]

    async def check(self) -> None:
        """Nothing leaked in any tier."""
        for store in (self.home, self.peer):
            await store.do("check")

    async def stop(self) -> None:
        """Orderly; a store that does not end well is an AssertionError."""
        for store in (self.home, self.peer):
            assert await store.stop() == 0

    async def kill(self) -> None:
        """Nothing is left of them, however they ended."""
        for store in (self.home, self.peer):
            await store.kill()
            _remove_socket(store.address)


@asynccontextmanager
async def two_nodes(directory: Path) -> AsyncIterator[TwoNodes]:
    """Nothing may be under way in the end: what leaked in any tier is an AssertionError."""
    valkey = await asyncio.to_thread(
        EmbeddedValkey, directory / "valkey", max_bytes=2 * REDIS_BYTES
    )
    try:
        redis = RedisConfig(
            url=valkey.url,
            password=valkey.password,
            # On a machine with other things to do: a busy Redis is to be used all the same.
            timeout_seconds=30.0,
            slow_seconds=20.0,
        )
        home = await StoreProcess.start(_store_config("home", directory, redis))
        peer = await StoreProcess.start(_store_config("peer", directory, redis))
        nodes = TwoNodes(directory, valkey, home, peer)
        try:
            await home.do("peers", addresses=[peer.address])
            await peer.do("peers", addresses=[home.address])
            yield nodes
            await nodes.check()
            await nodes.stop()
        finally:
            await nodes.kill()
    finally:
        await asyncio.to_thread(valkey.stop)


def _remove_socket(address: str) -> None:
    Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _store_config(name: str, directory: Path, redis: RedisConfig) -> KvStoreConfig:
    return KvStoreConfig(
        name=name,
        address=f"unix:/tmp/model1-proof-{secrets.token_hex(6)}.sock",
        arena_dir=directory / name / "arena",
        ram_bytes=RAM_BYTES,
        disk=DiskConfig(directory / name / "disk", max_bytes=DISK_BYTES),
        cold=ColdConfig(redis=redis, max_bytes=REDIS_BYTES, ttl_seconds=86400),
    )
