"""The benchmark's KV store, in a process of its own as in a deployment.

Run as `python -m cluster.bench_kv.store_process`: its settings as a JSON line on stdin, answered by
its address; then a command in every further line, answered by a JSON line. It ends with its stdin.
"""

import asyncio
import json
import shutil
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.bench_child import Child, started
from services.kvstore.tier import Tier


@dataclass(frozen=True, slots=True)
class StoreSettings:
    folder: str
    ram_bytes: int
    disk_bytes: int
    cold_bytes: int


class BenchStore:
    """The other end: what the benchmark tells its store to do."""

    def __init__(self, child: Child, address: str) -> None:
        self.address = address
        self._child = child

    async def flush(self) -> None:
        """Until everything that RAM holds has reached the tiers below."""
        await self._child.ask(json.dumps({"flush": True}))

    async def drop(self, keys: Sequence[bytes], tiers: Sequence[Tier]) -> None:
        """Let these tiers forget the blobs."""
        question = {"drop": [key.hex() for key in keys], "tiers": [int(tier) for tier in tiers]}
        await self._child.ask(json.dumps(question))


@asynccontextmanager
async def bench_store(settings: StoreSettings) -> AsyncIterator[BenchStore]:
    async with started("cluster.bench_kv.store_process") as child:
        address = json.loads(await child.ask(json.dumps(asdict(settings))))
        yield BenchStore(child, address)


async def _serve(settings: StoreSettings) -> None:
    from services.kvstore.admin import Admin
    from services.kvstore.blocking import ColdConfig
    from services.kvstore.config import KvStoreConfig
    from services.kvstore.disk import DiskConfig
    from services.kvstore.redis_link import RedisConfig
    from services.kvstore.server import KvStoreServer
    from services.kvstore.valkey import EmbeddedValkey

    folder = Path(settings.folder)
    arena_dir = Path("/dev/shm") / folder.name
    valkey = EmbeddedValkey(folder / "valkey", max_bytes=settings.cold_bytes)
    server = await KvStoreServer.open(
        KvStoreConfig(
            name="bench",
            arena_dir=arena_dir,
            ram_bytes=settings.ram_bytes,
            disk=DiskConfig(folder / "disk", settings.disk_bytes),
            cold=ColdConfig(
                redis=RedisConfig(valkey.url, valkey.password),
                max_bytes=settings.cold_bytes,
                ttl_seconds=3600.0,
            ),
        )
    )
    try:
        print(json.dumps(server.address), flush=True)
        admin = Admin(server.store, server.leases)
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            if "flush" in command:
                await server.store.flush()
            else:
                keys = [bytes.fromhex(key) for key in command["drop"]]
                for tier in command["tiers"]:
                    await admin.drop(Tier(tier), keys)
            print(json.dumps("done"), flush=True)
    finally:
        await server.stop(grace_seconds=1.0)
        valkey.stop()
        shutil.rmtree(arena_dir, ignore_errors=True)


if __name__ == "__main__":
    asyncio.run(_serve(StoreSettings(**json.loads(sys.stdin.readline()))))
