"""A worker's client against a store in another process."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from protos import kvstore_pb2, kvstore_pb2_grpc
from services import duplex
from services.kvstore.client import Block, KvClient, SaveItem
from services.kvstore.config import KvStoreConfig
from services.kvstore.tier import Tier
from tests.services.kvstore.blobs import (
    NBYTES,
    client_config,
    eventually,
    item_of,
    key_of,
    payload_of,
    read,
)
from tests.services.kvstore.conftest import Connect, OpenStore, idle
from tests.services.kvstore.store_process import StoreProcess, running_store


@pytest.fixture
def config(tmp_path: Path, socket_address: str) -> KvStoreConfig:
    return KvStoreConfig(
        name="store-0",
        address=socket_address,
        arena_dir=tmp_path / "arena",
        ram_bytes=1 << 20,
    )


@pytest.fixture
def store(config: KvStoreConfig) -> Iterator[StoreProcess]:
    with running_store(config) as store:
        yield store


@pytest.fixture
async def client(store: StoreProcess) -> AsyncIterator[KvClient]:
    client = await KvClient.open(client_config(store.address))
    async with asyncio.timeout(10):
        await client.wait_connected()
    yield client
    await client.close()


async def test_what_was_saved_is_found_and_read_in_ram(client: KvClient) -> None:
    assert await client.save([item_of(number) for number in range(20)]) == (20, 0, 0)
    found = await client.locate([key_of(number) for number in range(22)])
    assert found == [Tier.RAM] * 20 + [None] * 2
    assert await read(client, range(22)) == [Tier.RAM] * 20 + [None] * 2


async def test_a_block_that_is_stored_is_not_filled_again(client: KvClient) -> None:
    await client.save([item_of(1)])

    def fill(_view: memoryview) -> None:
        raise AssertionError("filled")

    item = item_of(1)
    again = SaveItem(item.key, item.kind, item.start, item.end, item.nbytes, fill)
    assert await client.save([again, item_of(2)]) == (1, 1, 0)


async def test_a_fill_that_fails_drops_its_block_alone(client: KvClient) -> None:
    def fail(_view: memoryview) -> None:
        raise RuntimeError("no such block in the pool")

    bad = item_of(1)
    bad = SaveItem(bad.key, bad.kind, bad.start, bad.end, bad.nbytes, fail)
    assert await client.save([item_of(0), bad, item_of(2)]) == (2, 0, 1)
    assert await read(client, range(3)) == [Tier.RAM, None, Tier.RAM]


async def test_payloads_are_consumed_in_another_thread(client: KvClient) -> None:
    await client.save([item_of(0)])
    threads = set[int]()
    deadline_s = asyncio.get_running_loop().time() + 5
    async with client.acquire(
        [key_of(0)],
        deadline_s=deadline_s,
        consume=lambda _index, _payload: threads.add(threading.get_ident()),
    ) as blocks:
        assert [block async for block in blocks] == [Block(0, Tier.RAM)]
    assert threads and threading.get_ident() not in threads


async def test_a_payload_is_read_only(client: KvClient) -> None:
    await client.save([item_of(0)])

    def write(_index: int, payload: memoryview) -> None:
        payload[0] = 1

    with pytest.raises(TypeError, match="read-only"):
        async with client.acquire([key_of(0)], deadline_s=1e12, consume=write) as blocks:
            await anext(blocks)


async def test_an_error_of_consume_reaches_the_caller_and_ends_the_reading(
    client: KvClient,
) -> None:
    await client.save([item_of(number) for number in range(30)])
    seen: list[int] = []

    def fail(index: int, _payload: memoryview) -> None:
        seen.append(index)
        if index == 3:
            raise RuntimeError("the pool refuses")

    keys = [key_of(number) for number in range(30)]
    with pytest.raises(RuntimeError, match="the pool refuses"):
        async with client.acquire(keys, deadline_s=1e12, consume=fail) as blocks:
            async for block in blocks:
                assert block.index < 3
    assert seen == [0, 1, 2, 3]
    assert await read(client, range(30)) == [Tier.RAM] * 30


async def test_nothing_is_consumed_once_the_acquisition_was_left(client: KvClient) -> None:
    await client.save([item_of(number) for number in range(200)])
    keys = [key_of(number) for number in range(200)]
    consumed: list[int] = []

    def consume(index: int, _payload: memoryview) -> None:
        consumed.append(index)

    for turns in range(20):
        async with client.acquire(keys, deadline_s=1e12, consume=consume):
            for _ in range(turns):
                await asyncio.sleep(0.0002)
        num_consumed = len(consumed)
        await asyncio.sleep(0.002)
        assert len(consumed) == num_consumed


async def test_a_busy_loop_does_not_hold_up_a_reading_or_a_saving(
    client: KvClient, store: StoreProcess
) -> None:
    """While this loop stands still, as in a long step, the store gets all, and all is consumed."""
    saving = asyncio.create_task(client.save([item_of(number) for number in range(100)]))
    await asyncio.sleep(0)
    with grpc.insecure_channel(store.address) as channel:
        stat = kvstore_pb2_grpc.KvAdminStub(channel).Stat
        give_up_at = time.monotonic() + 30
        while sum(tier.blobs for tier in stat(kvstore_pb2.KvStatRequest()).tiers) < 100:
            assert time.monotonic() < give_up_at, "the saving waits for this loop"
            time.sleep(0.01)  # noqa: ASYNC251
    assert await saving == (100, 0, 0)

    left, consumed = set(range(100)), threading.Event()

    def consume(index: int, _payload: memoryview) -> None:
        left.remove(index)
        if not left:
            consumed.set()

    async def read_all() -> int:
        keys = [key_of(number) for number in range(100)]
        async with client.acquire(keys, deadline_s=1e12, consume=consume) as blocks:
            return len([block async for block in blocks if block.tier is Tier.RAM])

    reading = asyncio.create_task(read_all())
    for _ in range(3):  # until it has asked
        await asyncio.sleep(0)
    assert consumed.wait(30), "the reading waits for this loop"
    assert await reading == 100


async def test_blocks_that_are_being_read_stay_while_others_leave(
    client: KvClient, config: KvStoreConfig
) -> None:
    await client.save([item_of(0)])
    other = await KvClient.open(client_config(config.address))
    async with asyncio.timeout(10):
        await other.wait_connected()
    entered, go_on = threading.Event(), threading.Event()
    payloads: list[bytes] = []

    def consume(_index: int, payload: memoryview) -> None:
        entered.set()
        assert go_on.wait(10)
        payloads.append(bytes(payload))

    deadline_s = asyncio.get_running_loop().time() + 10
    async with client.acquire([key_of(0)], deadline_s=deadline_s, consume=consume) as blocks:
        await asyncio.to_thread(entered.wait)
        many = 2 * config.ram_bytes // NBYTES
        assert (await other.save([item_of(number) for number in range(1, many)])).dropped == 0
        go_on.set()
        assert await anext(blocks) == Block(0, Tier.RAM)
    assert payloads == [payload_of(0)]
    assert await read(other, [0, 1, many - 1]) == [Tier.RAM, None, Tier.RAM]
    await other.close()


async def test_a_dead_store_is_a_miss_at_once_and_comes_back_by_itself(
    store: StoreProcess, config: KvStoreConfig
) -> None:
    client = await KvClient.open(client_config(store.address, call_timeout_seconds=60.0))
    async with asyncio.timeout(10):
        await client.wait_connected()
    await client.save([item_of(0), item_of(1)])
    loop = asyncio.get_running_loop()
    payloads: list[bytes] = []

    def consume(_index: int, payload: memoryview) -> None:
        store.kill()
        time.sleep(0.2)  # the memory of the dead store's arena is still what it was
        payloads.append(bytes(payload))

    async with client.acquire([key_of(0)], deadline_s=loop.time() + 60, consume=consume) as blocks:
        assert await anext(blocks) == Block(0, Tier.RAM)
    assert payloads == [payload_of(0)]

    async def noticed() -> bool:
        return not client.connected

    await eventually(noticed)
    async with asyncio.timeout(9):  # whoever waited for the store would wait for longer
        assert await client.locate([key_of(0)]) == [None]
        assert await read(client, [0, 1], timeout_s=60) == [None, None]
        assert await client.save([item_of(2)]) == (0, 0, 1)
        await client.prefetch([key_of(0)])
    with running_store(config):
        async with asyncio.timeout(10):
            await client.wait_connected()
        assert await client.save([item_of(5)]) == (1, 0, 0)
        assert await read(client, [0, 5]) == [None, Tier.RAM]
        assert client.num_breaks == 1
        await client.close()


async def test_a_frozen_store_costs_a_timeout_and_no_error(
    store: StoreProcess,
) -> None:
    client = await KvClient.open(client_config(store.address, call_timeout_seconds=1.0))
    async with asyncio.timeout(10):
        await client.wait_connected()
    await client.save([item_of(0)])
    store.freeze()
    reading = asyncio.create_task(read(client, [0], timeout_s=1.0))
    assert await client.locate([key_of(0)]) == [None]
    assert await reading == [None]
    async with asyncio.timeout(0.9):  # one timeout for all: from now on nothing waits for it
        assert await client.locate([key_of(0)]) == [None]
        assert await read(client, [0], timeout_s=10) == [None]
        assert await client.save([item_of(1)]) == (0, 0, 1)
    store.thaw()

    async def answers() -> bool:
        return await client.locate([key_of(0)]) == [Tier.RAM]

    await eventually(answers)
    assert await read(client, [0]) == [Tier.RAM]
    assert await client.save([item_of(1)]) == (1, 0, 0)
    await client.close()


async def test_a_loop_that_is_busy_elsewhere_is_not_a_store_that_is_late(
    store: StoreProcess,
) -> None:
    client = await KvClient.open(client_config(store.address, call_timeout_seconds=0.6))
    async with asyncio.timeout(10):
        await client.wait_connected()

    async def compute() -> None:
        while True:
            time.sleep(0.3)  # noqa: ASYNC251  as a model's layers do
            await asyncio.sleep(0)

    computing = asyncio.create_task(compute())
    assert await client.save([item_of(0)]) == (1, 0, 0)
    assert await client.locate([key_of(0)]) == [Tier.RAM]
    computing.cancel()
    await client.close()


async def test_leases_end_also_while_the_store_reads_nothing(
    open_store: OpenStore, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await open_store()
    client = await connect(server)
    await client.save([item_of(0)])

    def consume(_index: int, _payload: memoryview) -> None:
        monkeypatch.setattr(duplex, "MAX_UNSENT_MESSAGES", 0)

    deadline_s = asyncio.get_running_loop().time() + 10
    async with client.acquire([key_of(0)], deadline_s=deadline_s, consume=consume) as blocks:
        assert [block.tier async for block in blocks] == [Tier.RAM]
    assert not client.connected
    await idle(server)


async def test_a_store_whose_arena_cannot_be_mapped_is_a_miss_and_not_tried_again_and_again(
    open_store: OpenStore, caplog: pytest.LogCaptureFixture
) -> None:
    server = await open_store()
    server.store.ram.arena.path.unlink()
    client = await KvClient.open(client_config(server.address))

    async def refused() -> bool:
        return "kvstore_not_attached" in caplog.text

    await eventually(refused)
    assert await client.locate([key_of(0)]) == [None]
    await client.close()
    assert caplog.text.count("kvstore_not_attached") == 1
    assert "stream_refused" not in caplog.text


async def test_a_closed_client_is_told_to_prefetch_in_vain(client: KvClient) -> None:
    await client.close()
    await client.prefetch([key_of(0)])


async def test_without_any_store_everything_is_a_miss(tmp_path: Path) -> None:
    client = await KvClient.open(client_config(f"unix:{tmp_path}/nobody.sock"))
    assert await client.locate([key_of(0)]) == [None]
    assert await read(client, [0], timeout_s=60) == [None]
    assert await client.save([item_of(0)]) == (0, 0, 1)
    await client.close()
