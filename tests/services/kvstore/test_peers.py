"""Stores that ask each other, over real streams; one of them in a process that is killed."""

import asyncio
import time
from pathlib import Path

from services.kvstore.client import KvClient
from services.kvstore.config import KvStoreConfig
from services.kvstore.peer_link import PeerLimits
from services.kvstore.server import KvStoreServer
from services.kvstore.tier import Tier
from tests.services.kvstore.blobs import client_config, eventually, item_of, key_of, read
from tests.services.kvstore.conftest import Connect, OpenStore, idle
from tests.services.kvstore.store_process import running_store

LARGE = 700_000  # three parts


async def _introduced(server: KvStoreServer, *addresses: str) -> None:
    await server.set_peers(addresses)

    async def connected() -> bool:
        return server.peers.degraded is None

    await eventually(connected)


async def test_blocks_come_from_another_nodes_ram_and_disk(
    open_store: OpenStore, connect: Connect
) -> None:
    here, there = await open_store("here"), await open_store("there")
    await _introduced(here, there.address)
    worker, other = await connect(here), await connect(there)
    await other.save([item_of(number) for number in range(8)])
    await there.store.flush()
    await idle(there)
    there.store.ram.evict(1 << 30)
    await other.save([item_of(number) for number in range(8, 16)])
    assert await worker.locate([key_of(number) for number in range(17)]) == [Tier.PEER] * 16 + [
        None
    ]
    assert await read(worker, range(17)) == [Tier.PEER] * 16 + [None]
    assert await read(worker, range(16)) == [Tier.RAM] * 16
    await here.store.flush()  # and now they are on this node's disk as well
    await idle(here)
    here.store.ram.evict(1 << 30)
    assert await read(worker, range(16)) == [Tier.DISK] * 16


async def test_a_large_block_comes_in_parts(open_store: OpenStore, connect: Connect) -> None:
    settings = {"ram_bytes": 4 << 20, "disk": None}
    here, there = await open_store("here", **settings), await open_store("there", **settings)
    await _introduced(here, there.address)
    worker, other = await connect(here), await connect(there)
    await other.save([item_of(number, LARGE) for number in range(3)])
    assert await read(worker, range(3), nbytes=LARGE) == [Tier.PEER] * 3


async def test_damage_at_a_peer_is_a_miss_here_and_dropped_there(
    open_store: OpenStore, connect: Connect
) -> None:
    here, there = await open_store("here"), await open_store("there", disk=None)
    await _introduced(here, there.address)
    worker, other = await connect(here), await connect(there)
    await other.save([item_of(number) for number in range(3)])
    resident = there.store.ram.hold(key_of(1))
    assert resident is not None
    there.store.ram.arena.view(resident.span)[777] ^= 1
    there.store.ram.let_go(resident)
    assert await read(worker, range(3)) == [Tier.PEER, None, Tier.PEER]
    assert here.store.stats[Tier.PEER].damaged == {"payload_checksum": 1}

    async def dropped() -> bool:
        return key_of(1) not in there.store.ram

    await eventually(dropped)


async def test_stores_that_ask_each_other_come_to_an_end(
    open_store: OpenStore, connect: Connect
) -> None:
    here, there = await open_store("here"), await open_store("there")
    await _introduced(here, there.address)
    await _introduced(there, here.address)
    worker, other = await connect(here), await connect(there)
    found = await asyncio.gather(*(read(each, range(20)) for each in (worker, other)))
    assert {tier for tiers in found for tier in tiers} == {None}


async def test_a_dead_or_frozen_peer_is_a_miss(
    open_store: OpenStore, connect: Connect, tmp_path: Path
) -> None:
    limits = PeerLimits(contains_timeout_seconds=0.5, fetch_timeout_seconds=1.0)
    here = await open_store("here", peer_limits=limits)
    worker = await connect(here)
    config = KvStoreConfig(name="there", arena_dir=tmp_path / "there", ram_bytes=1 << 20)
    with running_store(config) as there:
        await _introduced(here, there.address)
        other = await KvClient.open(client_config(there.address))
        async with asyncio.timeout(10):
            await other.wait_connected()
        await other.save([item_of(number) for number in range(8)])
        await other.close()
        assert await read(worker, [0]) == [Tier.PEER]
        there.freeze()
        started = time.monotonic()
        assert await worker.locate([key_of(1)]) == [None]
        assert await read(worker, [1], timeout_s=60) == [None]
        assert time.monotonic() - started < 20  # far less than its patience
        there.thaw()

        async def answers() -> bool:
            return await read(worker, [2]) == [Tier.PEER]

        await eventually(answers)
        there.kill()

        async def noticed() -> bool:
            return here.peers.degraded is not None

        await eventually(noticed)
        assert there.address in (here.peers.degraded or "")
        assert await read(worker, [0, 3]) == [Tier.RAM, None]


async def test_a_block_seen_at_a_peer_that_is_gone_is_asked_of_the_others(
    open_store: OpenStore, connect: Connect
) -> None:
    here, there = await open_store("here"), await open_store("there")
    third = await open_store("third")
    worker = await connect(here)
    for each in (there, third):
        await (await connect(each)).save([item_of(0)])
    await _introduced(here, there.address)
    assert await worker.locate([key_of(0)]) == [Tier.PEER]
    await _introduced(here, third.address)
    assert await read(worker, [0]) == [Tier.PEER]
