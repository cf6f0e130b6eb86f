"""Loads that several wait for, over a tier that answers when the test says so."""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path

import pytest

from services.kvstore.arena import Arena
from services.kvstore.loads import Found, Loads
from services.kvstore.lru import Lru
from services.kvstore.pins import Pins
from services.kvstore.ram import RamTier
from services.kvstore.stats import TierStats
from services.kvstore.store import StoreLimits, TieredStore
from services.kvstore.tier import Below, Loaded, Rooms, Tier
from tests.services.kvstore.gated_tier import GatedTier
from tests.services.kvstore.sample_blobs import sample_key


@pytest.fixture
def ram(tmp_path: Path) -> Iterator[RamTier]:
    ram = RamTier(
        Arena.create(tmp_path / "ram.arena", 1 << 20),
        Lru(),
        clock=time.monotonic,
        unsaved=lambda _key: False,
        pinned=lambda _key: False,
    )
    yield ram
    ram.check()
    assert ram.num_uses == 0
    ram.arena.close()


async def test_who_asks_for_what_others_gave_up_while_they_waited_gets_it(ram: RamTier) -> None:
    tier = GatedTier()
    loads = Loads(
        ram,
        [tier],
        {Tier.DISK: TierStats()},
        arrived=lambda _found: None,
        clock=time.monotonic,
        max_loads=1,
        room_wait_seconds=1.0,
    )
    found: dict[int, bool] = {}

    def deliver(index: int, what: Found | None) -> None:
        found[index] = what is not None
        if what is not None:
            ram.let_go(what.resident)

    def load(*numbers: int) -> asyncio.Task[None]:
        wanted = {number: sample_key(number) for number in numbers}
        return asyncio.create_task(loads.load(wanted, deliver, None))

    async def others_run() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    first = load(0)  # has the only slot
    await others_run()
    gives_up, stays = load(1, 2), load(2)
    await others_run()
    gives_up.cancel()
    tier.asked[0][1].set()
    await first
    await others_run()
    assert [keys for keys, _ in tier.asked] == [[sample_key(0)], [sample_key(2)]]
    comes_late = load(1)
    await others_run()
    tier.asked[1][1].set()
    await stays
    await others_run()
    for _, gate in tier.asked[2:]:
        gate.set()
    async with asyncio.timeout(5):
        await comes_late
    assert found == {0: True, 1: True, 2: True}
    assert len(loads) == 0
    await loads.close()


class _BrokenTier(GatedTier):
    """Raises what nobody has thought of."""

    tier = Tier.PEER

    def has(self, key: bytes) -> bool:
        return False

    async def contains(self, keys: Sequence[bytes]) -> Sequence[bool]:
        raise IndexError("pop from empty list")

    async def load(self, keys: Sequence[bytes], rooms: Rooms) -> AsyncGenerator[Loaded]:
        await rooms.wait_for(keys[0], 1000)
        raise IndexError("pop from empty list")
        yield keys[0], None


async def test_a_tier_with_a_bug_is_a_miss_and_the_next_one_is_asked(ram: RamTier) -> None:
    tier = GatedTier()
    loads = Loads(
        ram,
        [_BrokenTier(), tier],
        {Tier.DISK: TierStats(), Tier.PEER: TierStats()},
        arrived=lambda _found: None,
        clock=time.monotonic,
        max_loads=1,
        room_wait_seconds=1.0,
    )
    found: list[Found | None] = []
    loading = asyncio.create_task(
        loads.load({0: sample_key(0)}, lambda _index, what: found.append(what), None)
    )
    async with asyncio.timeout(5):
        while not tier.asked and not loading.done():  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _, gate in tier.asked:
            gate.set()
        await loading
    assert [what and what.tier for what in found] == [Tier.DISK]
    for what in found:
        if what is not None:
            ram.let_go(what.resident)
    await loads.close()


async def test_a_tier_with_a_bug_does_not_keep_a_locate_from_its_answer(tmp_path: Path) -> None:
    store = TieredStore(
        Arena.create(tmp_path / "store.arena", 1 << 20),
        Lru(),
        Below(peers=_BrokenTier()),
        Pins(time.time),
        StoreLimits(),
        clock=time.monotonic,
    )
    assert await store.locate([sample_key(0)], timeout_seconds=5.0) == [None]
    await store.close()
    store.ram.arena.close()
