"""Records in several stores, some of which are away."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from services.errors import SessionChanged, SessionsOff, Unavailable
from services.gateway.store import StoreAddress
from services.gateway.stores import StoreSet
from services.session_record import SessionHead, SessionName, SessionRecord
from tests.services.session_store import session_store

NAMES = [SessionName(f"session {i}", "salt") for i in range(8)]


def record(name: SessionName, version: int, *, is_deleted: bool = False) -> SessionRecord:
    head = SessionHead(
        name=name,
        version=version,
        num_tokens=1,
        last_used_s=float(version),
        is_deleted=is_deleted,
    )
    return SessionRecord(head, (version,))


class Stores:
    """Stores that can be stopped and started again with what they had."""

    def __init__(self, folder: Path, num_stores: int) -> None:
        self.set = StoreSet()
        self._folders = {f"kvstore-{i}": folder / str(i) for i in range(num_stores)}
        for each in self._folders.values():
            each.mkdir()
        self._running: dict[str, tuple[AsyncExitStack, StoreAddress]] = {}

    async def start(self, *names: str) -> None:
        for name in names or self._folders:
            stack = AsyncExitStack()
            row = await stack.enter_async_context(session_store(name, self._folders[name]))
            self._running[name] = (stack, row)
        await self._tell()

    async def stop(self, *names: str) -> None:
        for name in names or list(self._running):
            stack, _ = self._running.pop(name)
            await stack.aclose()

    async def _tell(self) -> None:
        await self.set.update([row for _, row in self._running.values()])


@pytest.fixture
async def stores(tmp_path: Path):
    three = Stores(tmp_path, 3)
    await three.start()
    yield three
    await three.stop()
    await three.set.close()


async def test_what_is_saved_is_loaded(stores: Stores) -> None:
    for name in NAMES:
        assert await stores.set.load(name) is None
        await stores.set.save(record(name, 1), 0)
        await stores.set.save(record(name, 2), 1)
        assert await stores.set.load(name) == record(name, 2)


async def test_any_one_store_may_be_lost(stores: Stores) -> None:
    for name in NAMES:
        await stores.set.save(record(name, 1), 0)
    for lost in ("kvstore-0", "kvstore-1", "kvstore-2"):
        await stores.stop(lost)
        for name in NAMES:
            assert await stores.set.load(name) == record(name, 1)
        heads = await stores.set.heads("salt", 100)
        assert {head.name for head in heads} == set(NAMES)
        await stores.start(lost)


async def test_a_store_that_comes_back_does_not_bring_the_old_back(stores: Stores) -> None:
    for name in NAMES:
        await stores.set.save(record(name, 1), 0)
    await stores.stop("kvstore-1")
    for name in NAMES[:4]:
        await stores.set.save(record(name, 2), 1)
    for name in NAMES[4:]:
        await stores.set.save(record(name, 2, is_deleted=True), 1)
    await stores.start("kvstore-1")
    for name in NAMES:
        found = await stores.set.load(name)
        assert found is not None
        assert found.head.version == 2
        await stores.set.save(record(name, 3), 2)
    await stores.stop("kvstore-0")
    assert {head.name for head in await stores.set.heads("salt", 100)} == set(NAMES)


async def test_deleted_sessions_are_not_listed(stores: Stores) -> None:
    for name in NAMES:
        await stores.set.save(record(name, 1), 0)
    await stores.stop("kvstore-2")
    for name in NAMES[2:]:
        await stores.set.save(record(name, 2, is_deleted=True), 1)
    await stores.start("kvstore-2")
    assert {head.name for head in await stores.set.heads("salt", 100)} == set(NAMES[:2])
    assert await stores.set.heads("other", 100) == []


async def test_of_two_writers_one_is_told_that_it_lost(stores: Stores) -> None:
    other = StoreSet()
    await other.update([row for _, row in stores._running.values()])
    for name in NAMES:
        saved = await asyncio.gather(
            stores.set.save(record(name, 1), 0),
            other.save(SessionRecord(record(name, 1).head, (99,)), 0),
            return_exceptions=True,
        )
        lost = [outcome for outcome in saved if outcome is not None]
        assert len(lost) == 1
        assert isinstance(lost[0], SessionChanged)
        assert "version 1" in str(lost[0])
    await other.close()


async def test_when_both_copies_may_be_away_nobody_says_that_there_is_none(stores: Stores) -> None:
    name = NAMES[0]
    await stores.stop("kvstore-0")
    assert await stores.set.load(name) is None
    await stores.stop("kvstore-1")
    with pytest.raises(Unavailable, match="2 KV stores that may know session 'session 0' are away"):
        await stores.set.load(name)
    await stores.stop("kvstore-2")
    with pytest.raises(Unavailable):
        await stores.set.save(record(name, 1), 0)
    with pytest.raises(Unavailable):
        await stores.set.heads("salt", 10)


async def test_without_stores_there_are_no_sessions() -> None:
    none = StoreSet()
    with pytest.raises(SessionsOff):
        await none.load(NAMES[0])
    with pytest.raises(SessionsOff):
        await none.save(record(NAMES[0], 1), 0)
    with pytest.raises(SessionsOff):
        await none.heads("", 10)
