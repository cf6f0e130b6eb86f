"""Every kind of damage in every tier of a store is found, is a miss there, and is repaired."""

from collections.abc import Callable
from pathlib import Path

import pytest

from services.kvstore.admin import Admin
from services.kvstore.blob import HEADER_BYTES, BlobHeader, read_header, seal_into
from services.kvstore.blocking import ColdConfig
from services.kvstore.redis_link import RedisConfig
from services.kvstore.server import KvStoreServer
from services.kvstore.tier import Tier
from services.kvstore.valkey import EmbeddedValkey
from tests.services.kvstore.blobs import NBYTES, item_of, key_of, read
from tests.services.kvstore.conftest import Connect, OpenStore, idle

Damage = Callable[[bytearray, bytes], None]


def _flip(at: int) -> Damage:
    def damage(blob: bytearray, _other: bytes) -> None:
        blob[at] ^= 0x04

    return damage


def _zero_page(blob: bytearray, _other: bytes) -> None:
    blob[1024:3072] = bytes(2048)


def _torn(blob: bytearray, other: bytes) -> None:
    blob[2000:] = other[2000:]


def _swap_payload(blob: bytearray, other: bytes) -> None:
    blob[HEADER_BYTES:] = other[HEADER_BYTES:]


def _swap_header(blob: bytearray, other: bytes) -> None:
    blob[:HEADER_BYTES] = other[:HEADER_BYTES]


def _swap_all(blob: bytearray, other: bytes) -> None:
    """As a stale pointer would find it: a whole blob, and another one."""
    blob[:] = other


def _erase(blob: bytearray, _other: bytes) -> None:
    blob[:] = bytes(len(blob))


def _sealed_again(**changes: bytes) -> Damage:
    """Valid checksums, and not what the worker's model or layout is."""

    def damage(blob: bytearray, _other: bytes) -> None:
        header = read_header(memoryview(blob))
        payload = bytes(blob[HEADER_BYTES:])
        foreign = BlobHeader(
            kind=header.kind,
            key=header.key,
            model_digest=changes.get("model_digest", header.model_digest),
            layout_digest=changes.get("layout_digest", header.layout_digest),
            start=header.start,
            end=header.end,
            payload_nbytes=header.payload_nbytes,
        )

        def fill(view: memoryview) -> None:
            view[:] = payload

        seal_into(memoryview(blob), foreign, fill)

    return damage


DAMAGES: dict[str, Damage] = {
    "magic": _flip(0),
    "version": _flip(8),
    "kind": _flip(10),
    "token range": _flip(13),
    "length": _flip(24),
    "key": _flip(40),
    "model digest": _flip(70),
    "layout digest": _flip(90),
    "payload checksum": _flip(106),
    "header checksum": _flip(125),
    "first payload byte": _flip(HEADER_BYTES),
    "last payload byte": _flip(HEADER_BYTES + NBYTES - 1),
    "zero page": _zero_page,
    "torn write": _torn,
    "swapped payload": _swap_payload,
    "swapped header": _swap_header,
    "another blob": _swap_all,
    "nothing": _erase,
    "another model": _sealed_again(model_digest=b"another model---"),
    "another layout": _sealed_again(layout_digest=b"another layout--"),
}
NUMBERS = range(3)


def _blob_in_ram(server: KvStoreServer, number: int) -> memoryview:
    resident = server.store.ram.hold(key_of(number))
    assert resident is not None
    server.store.ram.let_go(resident)
    return server.store.ram.arena.view(resident.span)


def _damage_on_disk(directory: Path, blob: bytes, damaged: bytes) -> None:
    num_found = 0
    for path in directory.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        if blob in data:
            with path.open("r+b") as file:  # in place: the store has it open
                file.seek(data.index(blob))
                file.write(damaged)
            num_found += 1
    assert num_found == 1


@pytest.mark.parametrize("kind", DAMAGES)
async def test_damage_in_ram(open_store: OpenStore, connect: Connect, kind: str) -> None:
    server = await open_store(disk=None)
    client = await connect(server)
    await client.save([item_of(number) for number in NUMBERS])
    view = _blob_in_ram(server, 1)
    damaged = bytearray(view)
    DAMAGES[kind](damaged, bytes(_blob_in_ram(server, 2)))
    view[:] = damaged
    assert await read(client, NUMBERS) == [Tier.RAM, None, Tier.RAM]
    assert server.store.stats[Tier.RAM].damaged.total() == client.restored.damaged.total() == 1
    assert await client.save([item_of(1)]) == (1, 0, 0)
    assert await read(client, NUMBERS) == [Tier.RAM] * 3


@pytest.mark.parametrize("kind", DAMAGES)
async def test_damage_on_disk(
    open_store: OpenStore, connect: Connect, tmp_path: Path, kind: str
) -> None:
    server = await open_store()
    client = await connect(server)
    await client.save([item_of(number) for number in NUMBERS])
    await server.store.flush()
    blobs = [bytes(_blob_in_ram(server, number)) for number in NUMBERS]
    await idle(server)
    admin = Admin(server.store, server.leases)
    await admin.drop(Tier.RAM, [key_of(number) for number in NUMBERS])
    damaged = bytearray(blobs[1])
    DAMAGES[kind](damaged, blobs[2])
    _damage_on_disk(tmp_path / "store-0" / "disk", blobs[1], bytes(damaged))
    assert await read(client, NUMBERS) == [Tier.DISK, None, Tier.DISK]
    assert server.store.stats[Tier.DISK].damaged.total() == 1
    assert client.restored.damaged.total() == 0  # it never got so far
    assert await client.save([item_of(1)]) == (1, 0, 0)
    await server.store.flush()
    await idle(server)
    await admin.drop(Tier.RAM, [key_of(number) for number in NUMBERS])
    assert await read(client, NUMBERS) == [Tier.DISK] * 3


async def test_damage_in_every_tier_but_the_last_is_not_seen(
    open_store: OpenStore, connect: Connect, tmp_path: Path, valkey: EmbeddedValkey
) -> None:
    redis = RedisConfig(valkey.url, valkey.password, timeout_seconds=5.0, slow_seconds=5.0)
    server = await open_store(cold=ColdConfig(redis=redis, max_bytes=1 << 30, ttl_seconds=1000.0))
    client = await connect(server)
    await client.save([item_of(number) for number in NUMBERS])
    await server.store.flush()
    view = _blob_in_ram(server, 1)
    blob, damaged = bytes(view), bytearray(view)
    _zero_page(damaged, b"")
    view[:] = damaged
    _damage_on_disk(tmp_path / "store-0" / "disk", blob, bytes(damaged))
    assert await read(client, NUMBERS) == [Tier.RAM, Tier.COLD, Tier.RAM]
    assert server.store.stats[Tier.RAM].damaged.total() == 1
    assert server.store.stats[Tier.DISK].damaged.total() == 1
    # And every copy is whole again.
    await server.store.flush()
    assert not (await Admin(server.store, server.leases).verify(Tier.DISK, repair=False)).damaged
    assert await read(client, NUMBERS) == [Tier.RAM] * 3
