"""The tiers of one store together, through a worker's client, on a real arena and a real disk."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from services.kvstore.admin import Admin
from services.kvstore.disk import DiskConfig
from services.kvstore.server import KvStoreServer
from services.kvstore.tier import Tier
from tests.services.kvstore.blobs import (
    NBYTES,
    eventually,
    item_of,
    key_of,
    payload_of,
    read,
)
from tests.services.kvstore.conftest import Connect, OpenStore, idle


def _admin(server: KvStoreServer) -> Admin:
    return Admin(server.store, server.leases)


def _flip_a_bit_in_ram(server: KvStoreServer, number: int, at: int = 1000) -> None:
    resident = server.store.ram.hold(key_of(number))
    assert resident is not None
    server.store.ram.arena.view(resident.span)[at] ^= 0x10
    server.store.ram.let_go(resident)


def _flip_a_bit_on_disk(directory: Path, number: int) -> None:
    """In the payload of every copy."""
    key = key_of(number)
    for path in directory.rglob("*"):
        data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
        at = data.find(key)
        while at >= 0:
            data[at + 2000] ^= 0x10
            path.write_bytes(data)
            at = data.find(key, at + 1)


async def test_what_left_ram_comes_back_from_the_disk(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store()
    client = await connect(server)
    many = 2 * server.store.ram.arena.capacity_bytes // NBYTES
    for start in range(0, many, 32):
        await client.save([item_of(number) for number in range(start, start + 32)])
        await server.store.flush()
    assert await client.locate([key_of(0), key_of(many - 1)]) == [Tier.DISK, Tier.RAM]
    assert await read(client, range(40)) == [Tier.DISK] * 40
    assert await read(client, range(40)) == [Tier.RAM] * 40
    assert server.store.ram.counts.lost_blobs == 0
    assert Tier.DISK in server.store.costs()


async def test_a_store_that_was_stopped_finds_its_disk_again(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store()
    client = await connect(server)
    await client.save([item_of(number) for number in range(20)])
    await client.close()
    await server.stop(grace_seconds=5.0)  # writes back what waits
    again = await open_store()
    client = await connect(again)
    assert await read(client, range(21)) == [Tier.DISK] * 20 + [None]


async def test_damage_in_ram_is_read_again_from_the_disk(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store()
    client = await connect(server)
    await client.save([item_of(number) for number in range(3)])
    await server.store.flush()
    _flip_a_bit_in_ram(server, 1)
    assert await read(client, range(3)) == [Tier.RAM, Tier.DISK, Tier.RAM]
    assert client.restored.damaged == {"payload_checksum": 1}
    assert server.store.stats[Tier.RAM].damaged == {"payload_checksum": 1}
    assert await read(client, range(3)) == [Tier.RAM] * 3


async def test_damage_in_ram_and_on_disk_is_a_miss(
    open_store: OpenStore, connect: Connect, tmp_path: Path
) -> None:
    server = await open_store()
    client = await connect(server)
    await client.save([item_of(number) for number in range(3)])
    await server.store.flush()
    _flip_a_bit_in_ram(server, 1)
    _flip_a_bit_on_disk(tmp_path / "store-0" / "disk", 1)
    assert await read(client, range(3)) == [Tier.RAM, None, Tier.RAM]
    assert server.store.stats[Tier.DISK].damaged == {"payload_checksum": 1}
    assert await client.locate([key_of(1)]) == [None]
    # The block is computed again and saved again.
    assert await client.save([item_of(1)]) == (1, 0, 0)
    assert await read(client, range(3)) == [Tier.RAM] * 3


async def test_damage_in_ram_does_not_spread_to_the_disk(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store()
    client = await connect(server)
    await client.save([item_of(0)])
    _flip_a_bit_in_ram(server, 0)  # before it is written back, or after: never while it is
    await server.store.flush()
    await server.store.suspect(key_of(0))
    assert await read(client, [0]) in ([None], [Tier.DISK])
    assert (await _admin(server).verify(Tier.DISK, repair=False)).damaged == {}


@pytest.mark.parametrize("from_disk", [False, True])
async def test_two_that_wait_for_one_damaged_block_both_get_it_right(
    open_store: OpenStore, connect: Connect, tmp_path: Path, from_disk: bool
) -> None:
    server = await open_store()
    clients = [await connect(server) for _ in range(4)]
    await clients[0].save([item_of(number) for number in range(4)])
    await server.store.flush()
    if from_disk:
        await _admin(server).drop(Tier.RAM, [key_of(2)])
        _flip_a_bit_on_disk(tmp_path / "store-0" / "disk", 2)
        expected: set[Tier | None] = {None}
    else:
        _flip_a_bit_in_ram(server, 2)
        expected = {Tier.DISK, Tier.RAM}  # RAM: after another one's report
    for tiers in await asyncio.gather(*(read(client, range(4)) for client in clients)):
        assert (tiers[0], tiers[1], tiers[3]) == (Tier.RAM,) * 3
        assert tiers[2] in expected
    damaged = server.store.stats[Tier.DISK if from_disk else Tier.RAM].damaged
    assert damaged["payload_checksum"] == 1 if from_disk else damaged["payload_checksum"] >= 1


async def test_a_block_is_loaded_once_for_all_who_wait(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store()
    clients = [await connect(server) for _ in range(4)]
    await clients[0].save([item_of(number) for number in range(8)])
    await server.store.flush()
    keys = [key_of(number) for number in range(8)]
    await _admin(server).drop(Tier.RAM, keys)
    await asyncio.gather(*(read(client, range(8)) for client in clients))
    assert server.store.stats[Tier.DISK].hits == 8


async def test_a_restore_larger_than_ram_flows(open_store: OpenStore, connect: Connect) -> None:
    server = await open_store(ram_bytes=256 << 10)
    client = await connect(server)
    for start in range(0, 128, 16):
        await client.save([item_of(number) for number in range(start, start + 16)])
        await server.store.flush()
    assert None not in await read(client, range(128), timeout_s=20)  # 512 KiB


async def test_pinned_blocks_stay_on_a_node_without_a_disk(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store(disk=None)
    client = await connect(server)
    await client.save([item_of(number) for number in range(4)])
    server.store.pins.pin([key_of(1)], until=1e12)
    server.store.ram.evict(1 << 30)
    assert await read(client, range(4)) == [None, Tier.RAM, None, None]
    await idle(server)
    assert server.store.pins.unpin([key_of(1)]) == 1
    server.store.ram.evict(1 << 30)
    assert await read(client, [1]) == [None]


async def test_cancelled_readers_and_writers_leave_nothing_behind(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store(ram_bytes=512 << 10)
    client = await connect(server)
    for start in range(0, 256, 16):
        await client.save([item_of(number) for number in range(start, start + 16)])
        await server.store.flush()
    for delay_ms in range(150):
        first = delay_ms * 7 % 200
        task = asyncio.create_task(
            read(client, range(first, first + 40))
            if delay_ms % 3
            else client.save([item_of(1000 + delay_ms * 20 + more) for more in range(20)])
        )
        await asyncio.sleep(delay_ms % 12 / 1000)
        task.cancel()
        await asyncio.wait([task])
    await idle(server)
    server.check()
    assert await read(client, [255]) in ([Tier.RAM], [Tier.DISK])


async def test_what_a_worker_reads_stays_as_it_is_while_the_store_stops(
    open_store: OpenStore, connect: Connect
) -> None:
    """A load that waits for room must not get that of a worker that is in the middle of a copy."""
    large = 600_000  # of which RAM holds one
    server = await open_store()
    client = await connect(server)
    for number in (1, 0):
        await client.save([item_of(number, large)])
        await server.store.flush()
        await idle(server)
    entered, go_on = threading.Event(), threading.Event()
    payloads: list[bytes] = []

    def consume(_index: int, payload: memoryview) -> None:
        entered.set()
        assert go_on.wait(10)
        payloads.append(bytes(payload))

    deadline_s = asyncio.get_running_loop().time() + 10
    async with client.acquire([key_of(0)], deadline_s=deadline_s, consume=consume):
        await asyncio.to_thread(entered.wait)
        server.store.promote([key_of(1)])
        await asyncio.sleep(0.1)
        await server.stop(grace_seconds=0.1)
        go_on.set()
    assert payloads == [payload_of(0, large)]


async def test_a_disk_that_hangs_does_not_keep_the_store_from_tidying_up(
    open_store: OpenStore, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def fdatasync(_descriptor: int) -> None:
        hangs.set()
        assert goes_on.wait(20)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr("services.kvstore.server.TICK_SECONDS", 0.05)
    disk = DiskConfig(tmp_path / "disk", 4 << 20, fsync_interval_seconds=0.05)
    server = await open_store(disk=disk, ttl_seconds=1.0)
    client = await connect(server)
    await client.save([item_of(0)])
    assert await asyncio.to_thread(hangs.wait, 10)
    assert key_of(0) in server.store.ram

    async def left_ram() -> bool:
        return key_of(0) not in server.store.ram

    try:
        await eventually(left_ram, timeout_s=5)
    finally:
        goes_on.set()
