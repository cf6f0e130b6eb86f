"""Session records over gRPC, and their copies in a real Valkey."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from model1.errors import InvalidRequest
from services.gateway.store import Store
from services.gateway.stores import StoreSet
from services.kvstore.cold_records import ColdRecords, Record
from services.kvstore.redis_link import RedisConfig, RedisLink
from services.kvstore.valkey import EmbeddedValkey
from services.session_record import SessionHead, SessionName, SessionRecord
from tests.services.session_store import session_store

TEA = SessionName("tea", "my-secret")


def record(
    version: int, token_ids: tuple[int, ...] = (5, 6, 7), *, name: SessionName = TEA
) -> SessionRecord:
    head = SessionHead(name=name, version=version, num_tokens=len(token_ids), worker="attention-0")
    return SessionRecord(head, token_ids)


@pytest.fixture
def link(own_valkey: EmbeddedValkey) -> Iterator[RedisLink]:
    link = RedisLink(RedisConfig(own_valkey.url, own_valkey.password, timeout_seconds=10.0))
    yield link
    link.close()


@pytest.fixture
def cold(link: RedisLink) -> ColdRecords:
    return ColdRecords(link, ttl_seconds=100.0)


@pytest.fixture
async def stores() -> AsyncIterator[StoreSet]:
    stores = StoreSet()
    yield stores
    await stores.close()


async def copied(cold: ColdRecords, num: int) -> None:
    async with asyncio.timeout(10):
        while len(cold.names()) < num:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_session_outlives_every_store(
    stores: StoreSet, cold: ColdRecords, link: RedisLink
) -> None:
    async with session_store("kvstore-0", cold=cold) as row:
        await stores.update([row])
        await stores.save(record(1), 0)
        await stores.save(record(2, (5, 6, 7, 8)), 1)
        await copied(cold, 1)
    # What waited was copied before the store closed. Nobody finds names or salts in Redis.
    [name] = cold.names()
    assert "tea" not in name
    kept = cold.get_record(name)
    assert kept is not None
    assert (kept.version, b"secret" in kept.data) == (2, False)
    async with session_store("kvstore-1", cold=cold) as row:
        await stores.update([row])
        assert await stores.load(TEA) == record(2, (5, 6, 7, 8))
        assert await stores.load(SessionName("tea", "")) is None
        await stores.save(record(3), 2)
        assert await stores.load(TEA) == record(3)


async def test_a_copy_that_was_changed_is_not_given_out(
    stores: StoreSet, cold: ColdRecords
) -> None:
    async with session_store("kvstore-0", cold=cold) as row:
        await stores.update([row])
        await stores.save(record(1), 0)
        await copied(cold, 1)
    [name] = cold.names()
    kept = cold.get_record(name)
    assert kept is not None
    data = bytearray(kept.data)
    data[-1] ^= 1
    assert cold.put_record(name, bytes(data), 1, 2)
    async with session_store("kvstore-1", cold=cold) as row:
        await stores.update([row])
        assert await stores.load(TEA) is None


async def test_a_copy_of_another_session_is_not_given_out(
    stores: StoreSet, cold: ColdRecords
) -> None:
    mine, yours = SessionName("tea", "my-secret"), SessionName("tea", "your-secret")
    async with session_store("kvstore-0", cold=cold) as row:
        await stores.update([row])
        await stores.save(record(1, (5,), name=mine), 0)
        await copied(cold, 1)
        [name_of_mine] = cold.names()
        await stores.save(record(1, (6,), name=yours), 0)
        await copied(cold, 2)
    [name_of_yours] = set(cold.names()) - {name_of_mine}
    swapped = cold.get_record(name_of_yours)
    assert swapped is not None
    assert cold.put_record(name_of_mine, swapped.data, 1, 2)
    async with session_store("kvstore-1", cold=cold) as row:
        await stores.update([row])
        assert await stores.load(mine) is None
        assert await stores.load(yours) == record(1, (6,), name=yours)


async def test_an_older_copy_does_not_replace_a_newer_one(
    stores: StoreSet, cold: ColdRecords
) -> None:
    async with session_store("kvstore-0", cold=cold) as row:
        await stores.update([row])
        await stores.save(record(7), 6)
    async with session_store("kvstore-1", cold=cold) as row:
        away = Store(row)
        assert await away.put(record(2), 1) is None  # it knows no better
        await away.close()
    async with session_store("kvstore-2", cold=cold) as row:
        await stores.update([row])
        assert await stores.load(TEA) == record(7)


async def test_a_redis_that_is_gone_holds_nobody_up(
    stores: StoreSet, cold: ColdRecords, own_valkey: EmbeddedValkey, tmp_path: Path
) -> None:
    async with session_store("kvstore-0", tmp_path, cold) as row:
        await stores.update([row])
        own_valkey.stop()
        async with asyncio.timeout(20):
            assert await stores.load(SessionName("new", "")) is None
            await stores.save(record(1), 0)
            assert await stores.load(TEA) == record(1)


async def test_a_record_that_contradicts_itself_is_refused(stores: StoreSet) -> None:
    head = SessionHead(name=TEA, version=1, num_tokens=4)
    async with session_store("kvstore-0") as row:
        store = Store(row)
        with pytest.raises(InvalidRequest, match="a record of 4 tokens has 2"):
            await store.put(SessionRecord(head, (5, 6)), 0)
        await store.close()


class _FirstPutFails:
    """Records in memory, of which the first cannot be put, for a reason nobody has thought of."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self._fails = True

    def get_record(self, name: str) -> Record | None:
        return self.records.get(name)

    def put_record(self, name: str, data: bytes, expected_version: int, new_version: int) -> bool:
        if self._fails:
            self._fails = False
            raise IndexError("pop from empty list")
        self.records[name] = Record(new_version, data)
        return True


async def test_a_copy_that_fails_does_not_end_the_copying(stores: StoreSet) -> None:
    cold = _FirstPutFails()
    async with session_store("kvstore-0", cold=cold) as row:
        await stores.update([row])
        await stores.save(record(1), 0)
        await stores.save(record(1, name=SessionName("other", "")), 0)
        async with asyncio.timeout(5):
            while len(cold.records) < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await stores.save(record(2), 1)
    assert [kept.version for kept in cold.records.values()] == [1, 2]


async def test_a_version_that_does_not_follow_is_refused(stores: StoreSet) -> None:
    async with session_store("kvstore-0") as row:
        store = Store(row)
        with pytest.raises(InvalidRequest, match="version 2 cannot follow 2"):
            await store.put(record(2), 2)
        await store.close()
