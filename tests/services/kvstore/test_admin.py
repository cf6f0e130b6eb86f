"""KvAdmin over gRPC: figures, pins, eviction, verification, blobs out of one store into another."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest

from protos import kvstore_pb2, kvstore_pb2_grpc
from services import rpc
from services.kvstore.admin import Admin
from services.kvstore.arena import Arena
from services.kvstore.client import KvClient
from services.kvstore.disk import DiskConfig
from services.kvstore.leases import LeaseBook
from services.kvstore.lru import Lru
from services.kvstore.pins import Pins
from services.kvstore.server import KvStoreServer
from services.kvstore.store import StoreLimits, TieredStore
from services.kvstore.tier import Below, Tier
from tests.services.kvstore.blobs import NBYTES, client_config, eventually, item_of, key_of, read
from tests.services.kvstore.conftest import Connect, OpenStore, idle
from tests.services.kvstore.gated_tier import GatedTier
from tests.services.kvstore.sample_blobs import sample_blob, sample_key

RAM, DISK = kvstore_pb2.KV_TIER_RAM, kvstore_pb2.KV_TIER_DISK


@pytest.fixture
async def server(open_store: OpenStore) -> KvStoreServer:
    return await open_store()


@pytest.fixture
async def admin(server: KvStoreServer) -> AsyncIterator[kvstore_pb2_grpc.KvAdminStub]:
    async with rpc.channel(server.address) as channel:
        yield kvstore_pb2_grpc.KvAdminStub(channel)


def _keys(numbers: Sequence[int]) -> list[bytes]:
    return [key_of(number) for number in numbers]


async def test_stat_tells_of_every_tier_in_blobs_bytes_and_tokens(
    server: KvStoreServer, admin: kvstore_pb2_grpc.KvAdminStub, connect: Connect
) -> None:
    worker = await connect(server)
    await worker.save([item_of(number) for number in range(10)])
    await server.store.flush()
    await admin.Evict(kvstore_pb2.KvEvictRequest(tier=RAM, keys=_keys(range(4))))
    await read(worker, range(12))
    stat = await admin.Stat(kvstore_pb2.KvStatRequest())
    assert (stat.store, stat.workers, stat.loads) == ("store-0", 1, 0)
    ram, disk, peers = stat.tiers
    assert [ram.tier, disk.tier, peers.tier] == [RAM, DISK, kvstore_pb2.KV_TIER_PEER]
    assert (ram.blobs, ram.hits, ram.misses) == (10, 6, 6)
    assert (disk.blobs, disk.hits, disk.misses) == (10, 4, 2)
    assert (ram.hit_tokens, disk.hit_tokens) == (6 * 128, 4 * 128)
    assert disk.loaded_bytes == 4 * (NBYTES + 128)
    assert (disk.stored_blobs, disk.waiting_blobs, disk.dropped_blobs) == (10, 0, 0)
    assert 0 < disk.load_seconds_p50 <= disk.load_seconds_p99 < 1
    assert ram.budget_bytes >= ram.used_bytes > 10 * NBYTES
    assert not any(tier.degraded for tier in stat.tiers)
    assert not peers.HasField("blobs")


async def test_evicted_keys_leave_one_tier_alone(
    server: KvStoreServer, admin: kvstore_pb2_grpc.KvAdminStub, connect: Connect
) -> None:
    worker = await connect(server)
    await worker.save([item_of(number) for number in range(6)])
    await server.store.flush()
    evict = kvstore_pb2.KvEvictRequest
    assert (await admin.Evict(evict(tier=RAM, keys=_keys([0, 1, 9])))).blobs == 2
    assert (await admin.Evict(evict(tier=DISK, keys=_keys([1, 2])))).blobs == 2
    where = await admin.Where(kvstore_pb2.KvWhereRequest(keys=_keys(range(4)), timeout_seconds=1))
    assert list(where.tiers) == [DISK, 0, RAM, RAM]
    assert (await admin.Evict(evict(tier=RAM, bytes=2 * NBYTES))).freed_bytes >= 2 * NBYTES
    assert (await admin.Evict(evict(tier=DISK, bytes=1))).freed_bytes >= 1


async def test_prefetch_brings_blocks_into_ram_and_counts_them(
    server: KvStoreServer, admin: kvstore_pb2_grpc.KvAdminStub, connect: Connect
) -> None:
    worker = await connect(server)
    await worker.save([item_of(number) for number in range(6)])
    await server.store.flush()
    await admin.Evict(kvstore_pb2.KvEvictRequest(tier=RAM, keys=_keys(range(6))))
    prefetch = kvstore_pb2.KvPrefetchRequest(keys=_keys(range(8)), timeout_seconds=5)
    assert (await admin.Prefetch(prefetch)).resident == 6
    assert await read(worker, range(6)) == [Tier.RAM] * 6


async def test_verify_finds_damage_and_repairs_by_forgetting(
    server: KvStoreServer, admin: kvstore_pb2_grpc.KvAdminStub, connect: Connect
) -> None:
    worker = await connect(server)
    await worker.save([item_of(number) for number in range(6)])
    await server.store.flush()
    for number in (2, 3):
        resident = server.store.ram.hold(key_of(number))
        assert resident is not None
        server.store.ram.arena.view(resident.span)[64 if number == 2 else 500] ^= 1
        server.store.ram.let_go(resident)
    for repair, damaged in ((False, 2), (True, 2), (True, 0)):
        report = await admin.Verify(kvstore_pb2.KvVerifyRequest(tier=RAM, repair=repair))
        assert sum(report.damaged.values()) == damaged
    assert report.blobs == 4
    assert (await admin.Verify(kvstore_pb2.KvVerifyRequest(tier=DISK))).blobs == 6


async def test_pins_hold_until_they_expire_or_are_taken_away(
    server: KvStoreServer, admin: kvstore_pb2_grpc.KvAdminStub
) -> None:
    await admin.Pin(kvstore_pb2.KvPinRequest(keys=_keys(range(3)), until=1e12))
    await admin.Pin(kvstore_pb2.KvPinRequest(keys=_keys([5]), until=1.0))  # 1970
    assert (await admin.Stat(kvstore_pb2.KvStatRequest())).pinned_keys == 3
    unpin = kvstore_pb2.KvUnpinRequest(keys=_keys([0, 7]))
    assert (await admin.Unpin(unpin)).unpinned == 1
    assert (await admin.Stat(kvstore_pb2.KvStatRequest())).pinned_keys == 2


async def test_gc_drops_what_nobody_asked_for_in_time(
    open_store: OpenStore, connect: Connect
) -> None:
    server = await open_store("short", ttl_seconds=1000.0)
    clock = server.store.ram.clock
    worker = await connect(server)
    await worker.save([item_of(number) for number in range(4)])
    await server.store.flush()
    server.store.ram.clock = lambda: clock() + 2000.0
    await worker.save([item_of(9)])
    await server.store.flush()
    async with rpc.channel(server.address) as channel:
        await kvstore_pb2_grpc.KvAdminStub(channel).Gc(kvstore_pb2.KvGcRequest())
    assert await worker.locate(_keys([0, 9])) == [Tier.DISK, Tier.RAM]


async def test_blobs_read_from_one_store_are_written_into_another(
    server: KvStoreServer,
    admin: kvstore_pb2_grpc.KvAdminStub,
    open_store: OpenStore,
    connect: Connect,
) -> None:
    worker = await connect(server)
    large = 700_000
    big = await open_store("big", ram_bytes=8 << 20)
    await worker.save([item_of(number) for number in range(3)])
    big_worker = await connect(big)
    await big_worker.save([item_of(number, large) for number in (10, 11)])
    parts = [part async for part in admin.Read(kvstore_pb2.KvReadRequest(keys=_keys([0, 1, 7, 2])))]
    async with rpc.channel(big.address) as channel:
        big_admin = kvstore_pb2_grpc.KvAdminStub(channel)
        large_parts = [
            part async for part in big_admin.Read(kvstore_pb2.KvReadRequest(keys=_keys([10, 11])))
        ]
    assert (len(parts), len(large_parts)) == (3, 6)
    other = await open_store("other", ram_bytes=8 << 20)
    other_worker = await connect(other)
    parts[1].data = parts[1].data[:-1] + bytes([parts[1].data[-1] ^ 1])
    async with rpc.channel(other.address) as channel:
        write = kvstore_pb2_grpc.KvAdminStub(channel).Write
        written = await write(iter([*parts, *large_parts, parts[0]]))
    assert (written.stored, written.present, written.refused) == (4, 1, 1)
    assert await read(other_worker, range(3)) == [Tier.RAM, None, Tier.RAM]
    assert await read(other_worker, [10, 11], nbytes=large) == [Tier.RAM] * 2
    await idle(server)


async def test_more_than_ram_holds_is_written_and_read(
    server: KvStoreServer, admin: kvstore_pb2_grpc.KvAdminStub, open_store: OpenStore
) -> None:
    big = await open_store("big", ram_bytes=8 << 20)
    client = await KvClient.open(client_config(big.address))
    async with asyncio.timeout(10):
        await client.wait_connected()
    numbers = range(500)  # 2 MB, in a store with 1 MB of RAM
    assert (await client.save([item_of(number) for number in numbers])).stored == 500
    async with rpc.channel(big.address) as channel:
        stub = kvstore_pb2_grpc.KvAdminStub(channel)
        parts = [part async for part in stub.Read(kvstore_pb2.KvReadRequest(keys=_keys(numbers)))]
    written = await admin.Write(iter(parts))
    assert (written.stored, written.present, written.refused) == (500, 0, 0)
    assert server.store.ram.counts.lost_blobs == 0
    await server.store.flush()
    read_back = [part async for part in admin.Read(kvstore_pb2.KvReadRequest(keys=_keys(numbers)))]
    assert read_back == parts
    await client.close()


async def test_blobs_of_a_slow_tier_are_read_together(tmp_path: Path) -> None:
    tier = GatedTier()
    store = TieredStore(
        Arena.create(tmp_path / "ram.arena", 1 << 20),
        Lru(),
        Below(peers=tier),
        Pins(time.time),
        StoreLimits(),
        clock=time.monotonic,
    )
    keys = [sample_key(number) for number in range(20)]
    read: list[bytes] = []

    async def read_all() -> None:
        async with aclosing(Admin(store, LeaseBook(store.ram)).read(keys)) as blobs:
            async for blob in blobs:
                read.append(bytes(blob))

    reading = asyncio.create_task(read_all())
    while not reading.done():
        for _, gate in tier.asked:
            gate.set()
        await asyncio.sleep(0)
    await reading
    assert read == [bytes(sample_blob(number)) for number in range(20)]
    assert [len(asked) for asked, _ in tier.asked] == [16, 4]
    await store.close()
    store.check()
    store.ram.arena.close()


@pytest.mark.parametrize(
    ("offset", "total", "data"), [(1, 9, b"x"), (0, 0, b"x"), (0, 2, b""), (0, 1 << 40, b"x")]
)
async def test_parts_that_are_no_whole_are_refused(
    admin: kvstore_pb2_grpc.KvAdminStub, offset: int, total: int, data: bytes
) -> None:
    part = kvstore_pb2.BlobPart(total_bytes=total, offset=offset, data=data)
    with pytest.raises(grpc.aio.AioRpcError, match="parts of a blob"):
        await admin.Write(iter([part]))


async def test_bad_requests_are_refused_by_name(admin: kvstore_pb2_grpc.KvAdminStub) -> None:
    for call in (
        admin.Where(kvstore_pb2.KvWhereRequest(keys=[b"short"], timeout_seconds=1)),
        admin.Evict(kvstore_pb2.KvEvictRequest(tier=kvstore_pb2.KV_TIER_PEER, bytes=1)),
        admin.Evict(kvstore_pb2.KvEvictRequest(bytes=1)),
        admin.Verify(kvstore_pb2.KvVerifyRequest(tier=kvstore_pb2.KV_TIER_COLD)),
        admin.Prefetch(kvstore_pb2.KvPrefetchRequest(timeout_seconds=float("nan"))),
        admin.Pin(kvstore_pb2.KvPinRequest(until=float("inf"))),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_serving_goes_on_without_a_disk_that_works_and_uses_it_when_it_does(
    open_store: OpenStore, connect: Connect, tmp_path: Path
) -> None:
    place = tmp_path / "no-folder"
    place.write_text("a file is in the way")
    disk = DiskConfig(place, 4 << 20, segment_bytes=1 << 20, probe_seconds=0.1)
    server = await open_store("without", disk=disk)
    worker = await connect(server)
    async with rpc.channel(server.address) as channel:
        admin = kvstore_pb2_grpc.KvAdminStub(channel)

        async def disk_stat() -> kvstore_pb2.KvTierStat:
            stat = await admin.Stat(kvstore_pb2.KvStatRequest())
            return next(tier for tier in stat.tiers if tier.tier == DISK)

        assert await worker.save([item_of(number) for number in range(4)]) == (4, 0, 0)
        assert await read(worker, range(5)) == [Tier.RAM] * 4 + [None]
        stat = await disk_stat()
        assert (stat.degraded, stat.waiting_blobs) != ("", 0)
        place.unlink()

        async def is_back() -> bool:
            return not (await disk_stat()).degraded

        await eventually(is_back)
        await server.store.flush()
        assert (await disk_stat()).blobs == 4
        await admin.Evict(kvstore_pb2.KvEvictRequest(tier=RAM, keys=_keys(range(4))))
        assert await read(worker, range(4)) == [Tier.DISK] * 4


async def test_session_records_without_a_disk_say_why_until_there_is_one(
    open_store: OpenStore, tmp_path: Path
) -> None:
    place = tmp_path / "unmounted"
    server = await open_store("without", sessions_dir=place)
    async with rpc.channel(server.address) as channel:
        admin = kvstore_pb2_grpc.KvAdminStub(channel)

        async def reason() -> str:
            return (await admin.Stat(kvstore_pb2.KvStatRequest())).sessions.degraded

        assert "No such file" in await reason()
        place.mkdir()

        async def is_back() -> bool:
            return not await reason()

        await eventually(is_back)
