"""A real Valkey below RAM and disk, and what a store makes of its troubles."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import closing

import pytest

from services.kvstore.admin import Admin
from services.kvstore.blocking import ColdConfig
from services.kvstore.client import KvClient
from services.kvstore.redis_link import RedisConfig, RedisLink
from services.kvstore.server import KvStoreServer
from services.kvstore.tier import Tier
from services.kvstore.valkey import EmbeddedValkey
from tests.services.kvstore.blobs import eventually, item_of, key_of, read
from tests.services.kvstore.conftest import Connect, OpenStore, idle
from tests.services.kvstore.tcp_proxy import TcpProxy

# Of a blob in these tests: 3 parts.
NBYTES = 600_000
TIMEOUT_SECONDS = 10.0


def _cold(valkey: EmbeddedValkey, url: str | None = None) -> ColdConfig:
    # Nothing here is about speed.
    redis = RedisConfig(
        url or valkey.url,
        valkey.password,
        timeout_seconds=TIMEOUT_SECONDS,
        slow_seconds=TIMEOUT_SECONDS,
        probe_seconds=0.1,
    )
    return ColdConfig(redis=redis, max_bytes=1 << 30, ttl_seconds=1000.0)


async def _leave(server: KvStoreServer, tiers: Sequence[Tier], numbers: Sequence[int]) -> None:
    """Everything is written back, then these leave those tiers."""
    await server.store.flush()
    await idle(server)
    admin = Admin(server.store, server.leases)
    for tier in tiers:
        await admin.drop(tier, [key_of(number) for number in numbers])


async def _save(client: KvClient, numbers: Sequence[int]) -> None:
    saved = await client.save([item_of(number, NBYTES) for number in numbers])
    assert saved.dropped == 0


@pytest.fixture
async def server(open_store: OpenStore, valkey: EmbeddedValkey) -> AsyncIterator[KvStoreServer]:
    yield await open_store(ram_bytes=16 << 20, cold=_cold(valkey))


async def test_what_left_ram_and_disk_comes_back_from_redis(
    server: KvStoreServer, connect: Connect
) -> None:
    client = await connect(server)
    await _save(client, range(6))
    await _leave(server, (Tier.RAM, Tier.DISK), range(6))
    keys = [key_of(number) for number in range(7)]
    assert await client.locate(keys) == [Tier.COLD] * 6 + [None]
    assert await read(client, range(7), nbytes=NBYTES) == [Tier.COLD] * 6 + [None]
    await client.locate(keys)
    assert Tier.COLD in client.costs()
    # It went to the disk on its way up.
    await _leave(server, (Tier.RAM,), range(6))
    assert await read(client, range(6), nbytes=NBYTES) == [Tier.DISK] * 6


async def test_another_node_finds_the_blocks_of_one_that_is_gone(
    open_store: OpenStore, valkey: EmbeddedValkey, connect: Connect
) -> None:
    there = await open_store("there", ram_bytes=16 << 20, cold=_cold(valkey))
    other = await connect(there)
    await _save(other, range(10, 14))
    await there.store.flush()
    await other.close()
    await there.stop(grace_seconds=5.0)
    here = await open_store("here", ram_bytes=16 << 20, cold=_cold(valkey))
    worker = await connect(here)
    assert await read(worker, range(10, 14), nbytes=NBYTES) == [Tier.COLD] * 4


async def test_damage_in_redis_is_a_miss_and_dropped_there(
    server: KvStoreServer, connect: Connect, valkey: EmbeddedValkey
) -> None:
    client = await connect(server)
    await _save(client, range(20, 24))
    await _leave(server, (Tier.RAM, Tier.DISK), range(20, 24))
    with closing(RedisLink(RedisConfig(valkey.url, valkey.password))) as link:
        for number, part in ((21, 1), (22, 0)):
            name = b"{model1:%s}:%d" % (key_of(number).hex().encode(), part)
            value = bytearray(link.call("GET", name, writes=False))
            value[1000] ^= 1
            link.call("SET", name, bytes(value), writes=True)
    expected = [Tier.COLD, None, None, Tier.COLD]
    assert await read(client, range(20, 24), nbytes=NBYTES) == expected
    assert server.store.stats[Tier.COLD].damaged == {"payload_checksum": 2}
    assert await client.locate([key_of(21)]) == [None]


async def _is_degraded(server: KvStoreServer) -> bool:
    cold = server.store.below.cold
    return cold is not None and cold.degraded is not None


async def _has_written_all(server: KvStoreServer) -> bool:
    return server.store.write_backs[Tier.COLD].num_waiting == 0


async def test_serving_goes_on_without_redis(
    open_store: OpenStore, own_valkey: EmbeddedValkey, connect: Connect
) -> None:
    server = await open_store(ram_bytes=16 << 20, cold=_cold(own_valkey))
    client = await connect(server)
    await _save(client, range(3))
    await server.store.flush()
    own_valkey.stop()
    await _save(client, range(3, 6))
    assert await read(client, range(6), nbytes=NBYTES) == [Tier.RAM] * 6
    assert await client.locate([key_of(99)]) == [None]
    await eventually(lambda: _is_degraded(server))
    assert Tier.COLD not in server.store.costs()
    # What came meanwhile waits, in case that it comes back.
    assert server.store.write_backs[Tier.COLD].num_waiting == 3


async def test_a_killed_redis_is_used_again_when_it_is_back(
    open_store: OpenStore, own_valkey: EmbeddedValkey, connect: Connect
) -> None:
    server = await open_store(ram_bytes=16 << 20, cold=_cold(own_valkey))
    client = await connect(server)
    await _save(client, range(3))
    await server.store.flush()
    assert own_valkey.pid is not None
    os.kill(own_valkey.pid, signal.SIGKILL)
    await _save(client, range(3, 6))
    assert await read(client, range(6), nbytes=NBYTES) == [Tier.RAM] * 6
    await eventually(lambda: _has_written_all(server))
    await _leave(server, (Tier.RAM, Tier.DISK), range(6))
    # What it had is lost; what came meanwhile was written when it was back.
    assert await read(client, range(3, 6), nbytes=NBYTES) == [Tier.COLD] * 3
    assert not await _is_degraded(server)


async def test_a_wiped_redis_is_a_miss(
    open_store: OpenStore, own_valkey: EmbeddedValkey, connect: Connect
) -> None:
    server = await open_store(ram_bytes=16 << 20, cold=_cold(own_valkey))
    client = await connect(server)
    await _save(client, range(3))
    await _leave(server, (Tier.RAM, Tier.DISK), range(3))
    config = RedisConfig(own_valkey.url, own_valkey.password)
    with closing(RedisLink(config)) as link:
        link.call("FLUSHALL", writes=True)
    assert await read(client, range(3), nbytes=NBYTES) == [None] * 3
    await _save(client, range(3))
    await _leave(server, (Tier.RAM, Tier.DISK), range(3))
    assert await read(client, range(3), nbytes=NBYTES) == [Tier.COLD] * 3


async def test_a_slow_redis_holds_up_nobody_who_finds_blocks_elsewhere(
    open_store: OpenStore, own_valkey: EmbeddedValkey, connect: Connect
) -> None:
    with closing(TcpProxy(own_valkey.port)) as proxy:
        cold = _cold(own_valkey, f"redis://127.0.0.1:{proxy.port}")
        server = await open_store(ram_bytes=16 << 20, cold=cold)
        client = await connect(server)
        proxy.gate.clear()
        async with asyncio.timeout(0.9 * TIMEOUT_SECONDS):  # whoever asked it would wait for longer
            await _save(client, range(3))
            assert await read(client, range(3), nbytes=NBYTES) == [Tier.RAM] * 3
        proxy.gate.set()
        await server.store.flush()
