"""What a store finds out about its tiers before anybody asks for a blob."""

from pathlib import Path

from protos import kvstore_pb2, kvstore_pb2_grpc
from services import rpc
from services.kvstore.disk import DiskConfig
from services.kvstore.tier import Tier
from tests.services.kvstore.blobs import eventually
from tests.services.kvstore.conftest import OpenStore


async def test_costs_are_known_before_the_first_load(open_store: OpenStore, tmp_path: Path) -> None:
    server = await open_store(disk=DiskConfig(tmp_path / "disk", 1 << 30))

    async def measured() -> bool:
        return Tier.DISK in server.store.costs()

    await eventually(measured)
    cost = server.store.costs()[Tier.DISK]
    assert 0 < cost.latency_seconds < 1
    assert cost.bytes_per_second > 1e6
    # It left nothing behind, and counts as nobody's load.
    async with rpc.channel(server.address) as channel:
        stat = await kvstore_pb2_grpc.KvAdminStub(channel).Stat(kvstore_pb2.KvStatRequest())
    assert [(tier.blobs, tier.hits, tier.stored_blobs) for tier in stat.tiers] == [(0, 0, 0)] * 3


async def test_a_small_tier_is_not_filled_to_be_measured(open_store: OpenStore) -> None:
    server = await open_store()
    assert server.store.below.disk is not None
    await server.store.measure(server.store.below.disk)
    assert server.store.costs() == {}
    assert (await server.store.below.disk.usage()).used_bytes == 0
