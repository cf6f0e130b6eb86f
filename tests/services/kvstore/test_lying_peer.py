"""A peer that answers, and not with the truth: what it sends is a miss, and Redis is asked next."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import grpc.aio
import pytest

from protos import kvstore_pb2, kvstore_pb2_grpc
from services import rpc
from services.kv_keys import KEY_BYTES
from services.kvstore.admin import Admin
from services.kvstore.blob import HEADER_BYTES, BlobHeader, seal_into
from services.kvstore.blocking import ColdConfig
from services.kvstore.peer_link import MAX_PART_BYTES, PeerLimits
from services.kvstore.redis_link import RedisConfig
from services.kvstore.server import KvStoreServer
from services.kvstore.tier import Tier
from services.kvstore.valkey import EmbeddedValkey
from tests.services.kvstore.blobs import (
    LAYOUT_DIGEST,
    MODEL_DIGEST,
    eventually,
    item_of,
    key_of,
    read,
)
from tests.services.kvstore.conftest import Connect, OpenStore

NBYTES = 600_000  # three parts
LIED_ABOUT, HONEST = 0, 1

Parts = list[kvstore_pb2.PeerPart]
# The right parts of a blob, and what is sent instead.
Lie = Callable[[Parts], Parts]


def _sealed(number: int, *, model_digest: bytes = MODEL_DIGEST) -> bytes:
    item = item_of(number, NBYTES)
    header = BlobHeader(
        kind=item.kind,
        key=item.key,
        model_digest=model_digest,
        layout_digest=LAYOUT_DIGEST,
        start=item.start,
        end=item.end,
        payload_nbytes=NBYTES,
    )
    blob = memoryview(bytearray(header.nbytes))
    seal_into(blob, header, item.fill)
    return bytes(blob)


def _parts(blob: bytes) -> Parts:
    return [
        kvstore_pb2.PeerPart(
            total_bytes=len(blob), offset=offset, data=blob[offset : offset + MAX_PART_BYTES]
        )
        for offset in range(0, len(blob), MAX_PART_BYTES)
    ]


def _flipped(at: int) -> Lie:
    def lie(parts: Parts) -> Parts:
        blob = bytearray(b"".join(part.data for part in parts))
        blob[at] ^= 0x20
        return _parts(bytes(blob))

    return lie


def _of_another_key(_parts_: Parts) -> Parts:
    return _parts(_sealed(7))


def _of_another_model(_parts_: Parts) -> Parts:
    return _parts(_sealed(LIED_ABOUT, model_digest=bytes(16)))


def _part_of_another_blob(parts: Parts) -> Parts:
    return [parts[0], _parts(_sealed(7))[1], parts[2]]


def _cut_off(parts: Parts) -> Parts:
    return _parts(b"".join(part.data for part in parts)[: NBYTES // 2])


def _claims(total_bytes: int) -> Lie:
    def lie(parts: Parts) -> Parts:
        for part in parts:
            part.total_bytes = total_bytes
        return parts

    return lie


def _in_order(*order: int) -> Lie:
    return lambda parts: [parts[number] for number in order]


def _longer_at_the_end(parts: Parts) -> Parts:
    parts[-1].data += b"more"
    return parts


def _short_of_a_header(parts: Parts) -> Parts:
    parts[0].data = parts[0].data[: HEADER_BYTES - 1]
    return parts


def _empty_part(parts: Parts) -> Parts:
    return [parts[0], kvstore_pb2.PeerPart(total_bytes=parts[0].total_bytes), *parts[1:]]


LIES = {
    "flipped payload": (_flipped(NBYTES // 2), "payload_checksum"),
    "flipped header": (_flipped(40), "header_checksum"),
    "another blob": (_of_another_key, "key"),
    "another model": (_of_another_model, "model"),
    "a part of another blob": (_part_of_another_blob, "payload_checksum"),
    "truncated": (_cut_off, "truncated"),
    "no length": (_claims(0), "truncated"),
    "one byte longer": (_claims(HEADER_BYTES + NBYTES + 1), "truncated"),
    "one byte shorter": (_claims(HEADER_BYTES + NBYTES - 1), "truncated"),
    "all of RAM": (_claims(15 << 20), "truncated"),
    "more than memory": (_claims(1 << 63), "truncated"),
    "swapped parts": (_in_order(0, 2, 1), "truncated"),
    "last part first": (_in_order(2, 0, 1), "magic"),
    "a part twice": (_in_order(0, 1, 1, 2), "truncated"),
    "a part too few": (_in_order(0, 2), "truncated"),
    "more than it said": (_longer_at_the_end, "truncated"),
    "no whole header": (_short_of_a_header, "truncated"),
    "an empty part": (_empty_part, "truncated"),
}


class _Liar(kvstore_pb2_grpc.KvStoreServicer):
    """Lies about one blob, and tells the truth about the others."""

    def __init__(self) -> None:
        self.lie: Lie = lambda parts: parts
        self.presence: Callable[[int], bytes] = lambda num_keys: b"\1" * num_keys
        self.fetched: list[bytes] = []

    async def Exchange(
        self,
        request_iterator: AsyncIterator[kvstore_pb2.PeerRequest],
        context: grpc.aio.ServicerContext[kvstore_pb2.PeerRequest, kvstore_pb2.PeerResponse],
    ) -> None:
        await context.send_initial_metadata(())
        async for request in request_iterator:
            answer = partial(kvstore_pb2.PeerResponse, call_id=request.call_id)
            if request.contains:
                num_keys = len(request.contains) // KEY_BYTES
                await context.write(answer(presence=self.presence(num_keys)))
            for index, key in enumerate(_split(request.fetch)):
                self.fetched.append(key)
                number = LIED_ABOUT if key == key_of(LIED_ABOUT) else HONEST
                parts = _parts(_sealed(number))
                for part in self.lie(parts) if number == LIED_ABOUT else parts:
                    part.index = index
                    await context.write(answer(part=part))


def _split(keys: bytes) -> list[bytes]:
    return [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]


@asynccontextmanager
async def _listening(liar: _Liar) -> AsyncIterator[str]:
    service = rpc.Service(
        kvstore_pb2.DESCRIPTOR.services_by_name["KvStore"].full_name,
        partial(kvstore_pb2_grpc.add_KvStoreServicer_to_server, liar),
    )
    async with await rpc.start_server([service], "127.0.0.1:0") as server:
        yield server.address


@pytest.fixture
def liar() -> _Liar:
    return _Liar()


@pytest.fixture
async def server(
    open_store: OpenStore, valkey: EmbeddedValkey, liar: _Liar
) -> AsyncIterator[KvStoreServer]:
    """Both blobs are in Redis, and one more is in RAM; the only peer is the liar."""
    redis = RedisConfig(valkey.url, valkey.password, timeout_seconds=10.0, slow_seconds=10.0)
    async with _listening(liar) as address:
        server = await open_store(
            ram_bytes=16 << 20,
            disk=None,
            cold=ColdConfig(redis=redis, max_bytes=1 << 30, ttl_seconds=1000.0),
            peer_limits=PeerLimits(contains_timeout_seconds=5.0, fetch_timeout_seconds=0.5),
        )
        for number in (LIED_ABOUT, HONEST, 2):
            await Admin(server.store, server.leases).write(bytearray(_sealed(number)))
        await server.store.flush()
        for number in (LIED_ABOUT, HONEST):
            assert server.store.ram.drop_key(key_of(number))
        await server.set_peers([address])

        async def connected() -> bool:
            return server.peers.degraded is None

        await eventually(connected)
        yield server
        await server.set_peers([])


@pytest.mark.parametrize("name", LIES)
async def test_a_lie_is_counted_by_its_reason_and_the_next_tier_is_asked(
    server: KvStoreServer, liar: _Liar, connect: Connect, name: str
) -> None:
    liar.lie, reason = LIES[name]
    worker = await connect(server)
    tiers = await read(worker, [LIED_ABOUT, HONEST, 2], nbytes=NBYTES)
    assert tiers == [Tier.COLD, Tier.PEER, Tier.RAM]  # nothing left RAM for a lie
    assert server.store.stats[Tier.PEER].damaged == {reason: 1}
    assert not worker.restored.damaged
    assert sorted(liar.fetched) == sorted(_keys(LIED_ABOUT, HONEST))


async def test_a_peer_that_says_nothing_of_a_blob_is_late_and_the_next_tier_is_asked(
    server: KvStoreServer, liar: _Liar, connect: Connect
) -> None:
    liar.lie = lambda parts: parts[:2]
    worker = await connect(server)
    assert await read(worker, [HONEST, LIED_ABOUT], nbytes=NBYTES) == [Tier.PEER, Tier.COLD]


@pytest.mark.parametrize("num_more", [-1, 1, 1000])
async def test_an_answer_for_other_than_the_keys_asked_is_none(
    server: KvStoreServer, liar: _Liar, connect: Connect, num_more: int
) -> None:
    liar.presence = lambda num_keys: b"\1" * (num_keys + num_more)
    worker = await connect(server)
    async with asyncio.timeout(3):
        keys = _keys(LIED_ABOUT, HONEST, 2)
        assert await worker.locate(keys) == [Tier.COLD, Tier.COLD, Tier.RAM]
    tiers = await read(worker, [LIED_ABOUT, HONEST], nbytes=NBYTES)
    assert tiers == [Tier.COLD, Tier.COLD]
    assert liar.fetched == []


def _keys(*numbers: int) -> Sequence[bytes]:
    return [key_of(number) for number in numbers]
