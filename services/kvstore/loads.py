"""Owns the blobs on their way from a lower tier into RAM: each is loaded once for all who want it.

What does not verify is counted, dropped where it lay, and asked of the next tier. Knows neither who
wants a blob nor what happens to it afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import NamedTuple, TypeAlias

from services.kvstore.blob import BlobHeader, Damaged, DamageReason
from services.kvstore.ram import RamTier, Reservation, Resident
from services.kvstore.stats import TierStats
from services.kvstore.tier import LowerTier, NoRoom, Tier

log = logging.getLogger(__name__)


class Identity(NamedTuple):
    """What a blob must carry for a worker to understand it; 16 bytes each."""

    model_digest: bytes
    layout_digest: bytes


class Found(NamedTuple):
    """A blob in RAM and the tier that had it; the receiver is among its users."""

    resident: Resident
    tier: Tier


Waiter: TypeAlias = Callable[[Found | None], None]


class Loads:
    """`arrived` hears of every blob that came into RAM. `max_loads` groups of keys at once."""

    def __init__(
        self,
        ram: RamTier,
        lower: Sequence[LowerTier],
        stats: Mapping[Tier, TierStats],
        *,
        arrived: Callable[[Found], None],
        clock: Callable[[], float],
        max_loads: int,
        room_wait_seconds: float,
    ) -> None:
        self.num_without_room = 0
        self._ram = ram
        self._lower = lower
        self._stats = stats
        self._arrived = arrived
        self._clock = clock
        self._room_wait_seconds = room_wait_seconds
        self._slots = asyncio.Semaphore(max_loads)
        self._waiters: dict[bytes, list[Waiter]] = {}  # of each key that is being loaded
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many blobs are under way."""
        return len(self._waiters)

    async def load(
        self,
        wanted: Mapping[int, bytes],
        deliver: Callable[[int, Found | None], None],
        identity: Identity | None,
    ) -> None:
        """Call `deliver` once for each key of `wanted`; None if no tier has it.

        Cancelled, it delivers no more. What is under way goes on for whoever else waits for it.
        """
        waiters: dict[int, Waiter] = {}
        all_settled = asyncio.Event()

        def waiter(index: int) -> Waiter:
            def settled(found: Found | None) -> None:
                del waiters[index]
                deliver(index, found)
                if not waiters:
                    all_settled.set()

            return settled

        joined: dict[int, list[Waiter]] = {}
        new: dict[bytes, list[Waiter]] = {}
        for index, key in wanted.items():
            if key not in self._waiters:
                self._waiters[key] = new[key] = []
            joined[index] = self._waiters[key]
            waiters[index] = waiter(index)
            joined[index].append(waiters[index])
        if new:
            task = asyncio.create_task(self._run(new, identity), name=f"load {len(new)} blobs")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            if waiters:
                await all_settled.wait()
        finally:
            for index, unsettled in waiters.items():
                joined[index].remove(unsettled)

    async def close(self) -> None:
        """Give up what is under way: misses."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _run(self, load: dict[bytes, list[Waiter]], identity: Identity | None) -> None:
        try:
            async with self._slots:
                wanted = [key for key, waiters in load.items() if waiters]
                for key in load.keys() - wanted:
                    self._settle(key, None)  # who asks from now on gets a load of its own
                for lower in self._lower:
                    if wanted:
                        wanted = await self._load_from(lower, wanted, identity)
        except NoRoom:
            self.num_without_room += 1
        finally:
            for key, waiters in load.items():
                if self._waiters.get(key) is waiters:  # not settled, nor asked for again since
                    self._settle(key, None)

    async def _load_from(
        self, lower: LowerTier, keys: Sequence[bytes], identity: Identity | None
    ) -> list[bytes]:
        """Load what the tier has of these; returns the rest. Raises NoRoom."""
        rooms = _Rooms(self._ram, self._room_wait_seconds)
        stats = self._stats[lower.tier]
        left = dict.fromkeys(keys)
        damaged: list[bytes] = []
        started = self._clock()
        stats.begin(started)
        try:
            async with aclosing(lower.load(keys, rooms)) as loaded:
                async for key, outcome in loaded:
                    if identity is not None:
                        outcome = _required(outcome, identity)
                    if isinstance(outcome, BlobHeader):
                        found = Found(self._ram.insert(rooms.take(key), outcome), lower.tier)
                        stats.loaded(self._clock(), started, outcome)
                        self._arrived(found)
                        del left[key]
                        self._settle(key, found)
                    elif isinstance(outcome, Damaged):
                        stats.damaged[outcome.reason] += 1
                        damaged.append(key)
        except NoRoom:
            raise
        except Exception:  # a bug of the tier; the next one may have what is left
            log.exception("load_failed tier=%s blobs=%d", lower.tier.name, len(left))
        finally:
            rooms.close()
            stats.end(self._clock(), num_missed=len(left))
        if damaged:
            log.warning("damaged_blobs tier=%s blobs=%d", lower.tier.name, len(damaged))
            await lower.drop(damaged)
        return list(left)

    def _settle(self, key: bytes, found: Found | None) -> None:
        """The use of `found` is this object's. Once settled, a key is settled."""
        for waiter in self._waiters.pop(key):
            if found is not None:
                found.resident.users += 1
            waiter(found)
        if found is not None:
            self._ram.let_go(found.resident)


class _Rooms:
    """Reservations of RAM for the blobs of one load."""

    def __init__(self, ram: RamTier, wait_seconds: float) -> None:
        self._ram = ram
        self._wait_seconds = wait_seconds
        self._reservations: dict[bytes, Reservation] = {}

    def make(self, key: bytes, nbytes: int) -> memoryview | None:
        """Room for the blob of `key`, writable; None while there is none. Asked again for the same
        key, it takes the first one back."""
        self.give_back(key)
        reservation = self._ram.reserve(key, nbytes)
        if reservation is None:
            return None
        self._reservations[key] = reservation
        return self._ram.arena.view(reservation.span)

    async def wait_for(self, key: bytes, nbytes: int) -> memoryview:
        """As `make`, as soon as there is room; raises NoRoom if that takes too long."""
        try:
            async with asyncio.timeout(self._wait_seconds):
                while (memory := self.make(key, nbytes)) is None:
                    await self._ram.wait_for_room()
        except TimeoutError:
            raise NoRoom from None
        return memory

    def take(self, key: bytes) -> Reservation:
        """The room of `key` holds its blob; it is the caller's now."""
        return self._reservations.pop(key)

    def give_back(self, key: bytes) -> None:
        if (reservation := self._reservations.pop(key, None)) is not None:
            self._ram.abandon(reservation)

    def close(self) -> None:
        for key in list(self._reservations):
            self.give_back(key)


def _required(
    outcome: BlobHeader | Damaged | None, identity: Identity
) -> BlobHeader | Damaged | None:
    if isinstance(outcome, BlobHeader):
        if outcome.model_digest != identity.model_digest:
            return Damaged(DamageReason.MODEL)
        if outcome.layout_digest != identity.layout_digest:
            return Damaged(DamageReason.LAYOUT)
    return outcome
