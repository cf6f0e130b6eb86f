"""Blobs of several parts in Redis, of which one is not what it should be: a miss with a reason."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from protos import kvstore_pb2, kvstore_pb2_grpc
from services import rpc
from services.kvstore.admin import Admin
from services.kvstore.blob import HEADER_BYTES, BlobHeader, BlobKind, seal_into
from services.kvstore.blocking import ColdConfig
from services.kvstore.cold import PART_BYTES
from services.kvstore.redis_link import RedisConfig, RedisLink
from services.kvstore.server import KvStoreServer
from services.kvstore.tier import Tier
from services.kvstore.valkey import EmbeddedValkey
from tests.services.kvstore.blobs import LAYOUT_DIGEST, MODEL_DIGEST, item_of, key_of, read
from tests.services.kvstore.conftest import Connect, OpenStore, idle

NBYTES = 600_000  # three parts
OTHER = 100

# Gets the key and the parts of a blob, and the parts of another; what Redis has instead.
Fault = Callable[[bytes, list[bytes], list[bytes]], list[bytes | None]]


def _without(part: int) -> Fault:
    return lambda _key, parts, _other: [*parts[:part], None, *parts[part + 1 :]]


def _of_another_blob(part: int) -> Fault:
    return lambda _key, parts, other: [*parts[:part], other[part], *parts[part + 1 :]]


def _of_an_older_generation(part: int) -> Fault:
    """The same block was computed twice, and not to the last bit alike."""

    def fault(key: bytes, parts: list[bytes], _other: list[bytes]) -> list[bytes | None]:
        header = BlobHeader(
            kind=BlobKind.BODY,
            key=key,
            model_digest=MODEL_DIGEST,
            layout_digest=LAYOUT_DIGEST,
            start=0,
            end=128,
            payload_nbytes=NBYTES,
        )
        older = memoryview(bytearray(header.nbytes))

        def fill(view: memoryview) -> None:
            view[:] = b"\7" * len(view)

        seal_into(older, header, fill)
        older_part = bytes(older[part * PART_BYTES : (part + 1) * PART_BYTES])
        return [*parts[:part], older_part, *parts[part + 1 :]]

    return fault


def _cut(part: int, num_bytes: int) -> Fault:
    return lambda _key, parts, _other: [*parts[:part], parts[part][:num_bytes], *parts[part + 1 :]]


def _longer(part: int) -> Fault:
    return lambda _key, parts, _other: [*parts[:part], parts[part] + b"x", *parts[part + 1 :]]


def _in_order(*order: int) -> Fault:
    return lambda _key, parts, _other: [parts[number] for number in order]


FAULTS: dict[str, tuple[Fault, str | None]] = {
    "no first part": (_without(0), None),  # no blob is known there
    "no second part": (_without(1), None),
    "no last part": (_without(2), None),
    "first part of another blob": (_of_another_blob(0), "key"),
    "second part of another blob": (_of_another_blob(1), "payload_checksum"),
    "last part of another blob": (_of_another_blob(2), "payload_checksum"),
    "older first part": (_of_an_older_generation(0), "payload_checksum"),
    "older second part": (_of_an_older_generation(1), "payload_checksum"),
    "older last part": (_of_an_older_generation(2), "payload_checksum"),
    "first two swapped": (_in_order(1, 0, 2), "magic"),
    "last two swapped": (_in_order(0, 2, 1), "truncated"),
    "header cut": (_cut(0, HEADER_BYTES - 1), "truncated"),
    "first part cut": (_cut(0, PART_BYTES - 1), "truncated"),
    "last part cut": (_cut(2, 1000), "truncated"),
    "empty part": (_cut(1, 0), "truncated"),
    "longer last part": (_longer(2), "truncated"),
}


@pytest.fixture
def link(valkey: EmbeddedValkey) -> Iterator[RedisLink]:
    config = RedisConfig(valkey.url, valkey.password, timeout_seconds=10.0, slow_seconds=10.0)
    with closing(RedisLink(config)) as link:
        yield link


def _names(number: int) -> list[bytes]:
    return [b"{model1:%s}:%d" % (key_of(number).hex().encode(), part) for part in range(3)]


def _damage(link: RedisLink, number: int, fault: Fault) -> None:
    def parts_of(number: int) -> list[bytes]:
        return [link.call("GET", name, writes=False) for name in _names(number)]

    faulty = fault(key_of(number), parts_of(number), parts_of(OTHER))
    for name, part in zip(_names(number), faulty, strict=True):
        if part is None:
            link.call("DEL", name, writes=True)
        else:
            link.call("SET", name, part, writes=True)


async def _only_in_redis(server: KvStoreServer, numbers: list[int]) -> None:
    await server.store.flush()
    await idle(server)
    await Admin(server.store, server.leases).drop(Tier.RAM, [key_of(each) for each in numbers])


async def test_a_part_that_is_not_the_blobs_own_is_a_miss_with_its_reason(
    open_store: OpenStore, connect: Connect, valkey: EmbeddedValkey, link: RedisLink
) -> None:
    redis = RedisConfig(valkey.url, valkey.password, timeout_seconds=10.0, slow_seconds=10.0)
    cold = ColdConfig(redis=redis, max_bytes=1 << 30, ttl_seconds=1000.0)
    server = await open_store(ram_bytes=24 << 20, disk=None, cold=cold)
    worker = await connect(server)
    numbers = [*range(len(FAULTS)), OTHER]
    items = [item_of(number, NBYTES) for number in numbers]
    assert (await worker.save(items)).stored == len(items)
    await _only_in_redis(server, numbers)
    damaged = server.store.stats[Tier.COLD].damaged
    for number, (name, (fault, reason)) in enumerate(FAULTS.items()):
        _damage(link, number, fault)
        before = Counter(damaged)
        assert await read(worker, [number], nbytes=NBYTES) == [None], name
        assert damaged - before == ({} if reason is None else {reason: 1}), name
        assert await worker.locate([key_of(number)]) == [None], name
    assert not worker.restored.damaged
    async with rpc.channel(server.address) as channel:
        stat = await kvstore_pb2_grpc.KvAdminStub(channel).Stat(kvstore_pb2.KvStatRequest())
    assert stat.tiers[-1].tier == kvstore_pb2.KV_TIER_COLD
    assert dict(stat.tiers[-1].failures) == {"part missing": 2}
    # What was missed is computed and saved again, and whole from then on.
    assert (await worker.save(items[:-1])).stored == len(FAULTS)
    await _only_in_redis(server, numbers)
    assert await read(worker, numbers, nbytes=NBYTES) == [Tier.COLD] * len(numbers)
