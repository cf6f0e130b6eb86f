"""A worker's client against a store in another process."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from services.kvstore.client import KvClient, SaveItem
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
from tests.services.kvstore.store_process import StoreProcess, running_store


@pytest.fixture
def config(tmp_path: Path) -> KvStoreConfig:
    # A socket path, so that a store that was killed is started again at the same address.
    return KvStoreConfig(
        name="store-0",
        address=f"unix:/tmp/model1-test-{secrets.token_hex(6)}.sock",
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
    assert client.num_leases == 0
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


async def test_consume_gets_the_payloads_in_a_thread(client: KvClient) -> None:
    await client.save([item_of(number) for number in range(40)])
    payloads: dict[int, bytes] = {}
    deadline_s = asyncio.get_running_loop().time() + 5

    def copy(index: int, payload: memoryview) -> None:
        payloads[index] = bytes(payload)

    keys = [key_of(number) for number in range(41)]
    async with client.acquire(keys, deadline_s=deadline_s, consume=copy) as blocks:
        tiers = {block.index: block.tier async for block in blocks}
        assert client.num_leases == 0
    assert payloads == {number: payload_of(number) for number in range(40)}
    assert tiers == {**dict.fromkeys(range(40), Tier.RAM), 40: None}


async def test_an_error_of_consume_reaches_the_caller(client: KvClient) -> None:
    await client.save([item_of(0)])

    def fail(_index: int, _payload: memoryview) -> None:
        raise RuntimeError("the pool refuses")

    with pytest.raises(RuntimeError, match="the pool refuses"):
        async with client.acquire([key_of(0)], deadline_s=1e12, consume=fail) as blocks:
            await anext(blocks)
    assert client.num_leases == 0


async def test_leased_blocks_stay_while_others_leave(
    client: KvClient, config: KvStoreConfig
) -> None:
    await client.save([item_of(0)])
    deadline_s = asyncio.get_running_loop().time() + 5
    async with client.acquire([key_of(0)], deadline_s=deadline_s) as blocks:
        block = await anext(blocks)
        many = 2 * config.ram_bytes // NBYTES
        assert (await client.save([item_of(number) for number in range(1, many)])).dropped == 0
        assert block.payload is not None
        assert bytes(block.payload) == payload_of(0)
    assert await read(client, [0, 1, many - 1]) == [Tier.RAM, None, Tier.RAM]


async def test_room_comes_back_with_an_early_release(
    client: KvClient, config: KvStoreConfig
) -> None:
    await client.save([item_of(0)])
    deadline_s = asyncio.get_running_loop().time() + 5
    many = [item_of(number) for number in range(1, config.ram_bytes // NBYTES)]
    async with client.acquire([key_of(0)], deadline_s=deadline_s) as blocks:
        block = await anext(blocks)
        block.release()
        assert block.payload is None
        await client.save(many)
        assert await client.locate([key_of(0)]) == [None]


async def test_a_dead_store_is_a_miss_at_once_and_comes_back_by_itself(
    client: KvClient, store: StoreProcess, config: KvStoreConfig
) -> None:
    await client.save([item_of(0), item_of(1)])
    loop = asyncio.get_running_loop()
    async with client.acquire([key_of(0), key_of(1)], deadline_s=loop.time() + 60) as blocks:
        first = await anext(blocks)
        store.kill()

        async def noticed() -> bool:
            return not client.connected

        await eventually(noticed)
        started = loop.time()
        assert await client.locate([key_of(0)]) == [None]
        assert await read(client, [0, 1], timeout_s=60) == [None, None]
        assert await client.save([item_of(2)]) == (0, 0, 1)
        await client.prefetch([key_of(0)])
        assert loop.time() - started < 1
        with running_store(config):
            async with asyncio.timeout(10):
                await client.wait_connected()
            assert await client.save([item_of(5)]) == (1, 0, 0)
            assert await read(client, [0, 5]) == [None, Tier.RAM]
            # The memory of the dead store's arena is still what it was.
            assert first.payload is not None
            assert bytes(first.payload) == payload_of(first.index)
        assert client.num_breaks == 1


async def test_a_frozen_store_costs_a_timeout_and_no_error(
    store: StoreProcess,
) -> None:
    client = await KvClient.open(client_config(store.address, call_timeout_seconds=0.3))
    async with asyncio.timeout(10):
        await client.wait_connected()
    await client.save([item_of(0)])
    store.freeze()
    reading = asyncio.create_task(read(client, [0], timeout_s=0.3))
    assert await client.locate([key_of(0)]) == [None]
    assert await reading == [None]
    async with asyncio.timeout(0.1):  # one timeout for all: from now on nothing waits for it
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
    client = await KvClient.open(client_config(store.address, call_timeout_seconds=0.3))
    async with asyncio.timeout(10):
        await client.wait_connected()

    async def compute() -> None:
        while True:
            time.sleep(0.15)  # noqa: ASYNC251 as a model's layers do
            await asyncio.sleep(0)

    computing = asyncio.create_task(compute())
    assert await client.save([item_of(0)]) == (1, 0, 0)
    assert await client.locate([key_of(0)]) == [Tier.RAM]
    computing.cancel()
    await client.close()


async def test_without_any_store_everything_is_a_miss(tmp_path: Path) -> None:
    client = await KvClient.open(client_config(f"unix:{tmp_path}/nobody.sock"))
    assert await client.locate([key_of(0)]) == [None]
    assert await read(client, [0], timeout_s=60) == [None]
    assert await client.save([item_of(0)]) == (0, 0, 1)
    await client.close()
