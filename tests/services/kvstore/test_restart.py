"""Stores that are killed: what was flushed is there again, and nothing of the dead is left."""

import asyncio
from pathlib import Path

import pytest

from protos import kvstore_pb2, kvstore_pb2_grpc
from services import rpc
from services.kvstore.client import KvClient
from services.kvstore.config import KvStoreConfig
from services.kvstore.disk import DiskConfig
from services.kvstore.tier import Tier
from tests.services.kvstore.blobs import client_config, eventually, item_of, read
from tests.services.kvstore.store_process import running_store

NUM_BLOBS = 400


@pytest.fixture
def config(tmp_path: Path, socket_address: str) -> KvStoreConfig:
    return KvStoreConfig(
        name="store-0",
        address=socket_address,
        arena_dir=tmp_path / "arena",
        ram_bytes=4 << 20,
        disk=DiskConfig(tmp_path / "disk", 64 << 20, segment_bytes=1 << 20),
    )


async def _reconnected(client: KvClient, num_breaks: int) -> None:
    async def is_back() -> bool:
        return client.connected and client.num_breaks == num_breaks

    await eventually(is_back)


async def _waiting_blobs(address: str) -> int:
    async with rpc.channel(address) as channel:
        stat = await kvstore_pb2_grpc.KvAdminStub(channel).Stat(kvstore_pb2.KvStatRequest())
    return sum(tier.waiting_blobs for tier in stat.tiers)


async def test_a_killed_store_has_every_flushed_block_again(
    config: KvStoreConfig, tmp_path: Path
) -> None:
    client = await KvClient.open(client_config(config.address))
    with running_store(config) as store:
        async with asyncio.timeout(10):
            await client.wait_connected()
        for start in range(0, NUM_BLOBS, 16):
            await client.save([item_of(number) for number in range(start, start + 16)])

        async def flushed() -> bool:
            return await _waiting_blobs(config.address) == 0

        await eventually(flushed)
        store.kill()
    assert len(list((tmp_path / "arena").glob("*.arena"))) == 1
    with running_store(config) as store:
        await _reconnected(client, 1)
        assert await read(client, range(NUM_BLOBS + 1)) == [Tier.DISK] * NUM_BLOBS + [None]
        # The dead store's memory was given back.
        assert len(list((tmp_path / "arena").glob("*.arena"))) == 1
        assert store.stop() == 0
    assert list((tmp_path / "arena").glob("*.arena")) == []
    await client.close()


@pytest.mark.slow
async def test_a_store_killed_while_it_writes_serves_no_wrong_block(
    config: KvStoreConfig,
) -> None:
    client = await KvClient.open(client_config(config.address))
    found = 0
    for attempt in range(5):
        with running_store(config) as store:
            await _reconnected(client, 2 * attempt)
            first = attempt * 64
            saving = asyncio.create_task(
                client.save([item_of(number) for number in range(first, first + 64)])
            )
            await asyncio.sleep(0.004 * attempt)
            store.kill()
            saved = await saving  # no error, whatever became of them
            assert sum(saved) == 64
        with running_store(config):
            await _reconnected(client, 2 * attempt + 1)
            tiers = await read(client, range(first + 64))  # asserts every payload
            found += sum(tier is not None for tier in tiers[first:])
    assert found < 5 * 64
    await client.close()
