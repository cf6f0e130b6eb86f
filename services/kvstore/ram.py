"""Owns which blob lies in which span of the arena, who uses it, and what leaves when room is short.

    reserved  a span that somebody fills; nobody else sees it
    resident  a blob that lookups find; it may leave while nobody uses it and it is not pinned
    leaving   found no more; its span is free when the last user lets go

Plain calls from one thread. Knows no other tier; `unsaved` tells which blobs exist nowhere else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from services.kvstore.arena import Arena
from services.kvstore.blob import BlobHeader
from services.kvstore.spans import Span

# How many blobs that exist nowhere else an eviction passes over in search of one that does. When a
# slow tier is far behind there are thousands, and no time to look at them all for each new blob.
MAX_SPARED = 64


class EvictionPolicy(Protocol):
    """Decides which resident blob leaves next. `now` is in seconds on any one clock."""

    def insert(self, key: bytes, nbytes: int, now: float) -> None: ...

    def touch(self, key: bytes, now: float) -> None: ...

    def remove(self, key: bytes) -> None: ...

    def evict(self, now: float, evictable: Callable[[bytes], bool]) -> bytes | None:
        """The next to leave among those for which `evictable` holds, removed from the policy."""


@dataclass(eq=False, slots=True)
class Reservation:
    """A span that is being filled with the blob of `key`."""

    key: bytes
    span: Span


@dataclass(eq=False, slots=True)
class Resident:
    """A blob in the arena; its users may look at its span."""

    header: BlobHeader
    span: Span
    created_seconds: float
    used_seconds: float
    users: int = 0
    leaving: bool = False


@dataclass(slots=True)
class RamCounts:
    inserted_blobs: int = 0
    inserted_bytes: int = 0
    evicted_blobs: int = 0
    # Of the evicted, those that no other tier had.
    lost_blobs: int = 0
    refused_reservations: int = 0
    # Sums over the blobs that left: divide by evicted_blobs.
    lifetime_seconds: float = 0.0
    # Sum over the uses of a blob of the time since the use before; divide by reuses.
    reuse_gap_seconds: float = 0.0
    reuses: int = 0


@dataclass(eq=False)
class RamTier:
    """`arena` becomes this object's. `clock` is in seconds.

    What is `pinned` stays, what is `unsaved` stays as long as others can make way.
    """

    arena: Arena
    policy: EvictionPolicy
    clock: Callable[[], float]
    unsaved: Callable[[bytes], bool]
    pinned: Callable[[bytes], bool]
    counts: RamCounts = field(default_factory=RamCounts)
    _residents: dict[bytes, Resident] = field(default_factory=dict)
    _leaving: set[Resident] = field(default_factory=set)
    _reservations: set[Reservation] = field(default_factory=set)
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    def __contains__(self, key: bytes) -> bool:
        return key in self._residents

    def __len__(self) -> int:
        return len(self._residents)

    def __iter__(self) -> Iterator[bytes]:
        return iter(list(self._residents))

    # --- reading

    def use(self, key: bytes) -> Resident | None:
        """The blob of `key`, with the caller among its users; None is a miss."""
        resident = self._residents.get(key)
        if resident is None:
            return None
        now = self.clock()
        self.counts.reuse_gap_seconds += now - resident.used_seconds
        self.counts.reuses += 1
        resident.used_seconds = now
        resident.users += 1
        self.policy.touch(key, now)
        return resident

    def hold(self, key: bytes) -> Resident | None:
        """As `use`, for the store's own errands, which say nothing of what is worth keeping."""
        resident = self._residents.get(key)
        if resident is not None:
            resident.users += 1
        return resident

    def let_go(self, resident: Resident) -> None:
        """The end of one `use`, `hold` or `insert`."""
        assert resident.users > 0, "a blob was let go more often than it was used"
        resident.users -= 1
        if not resident.users:
            if resident.leaving:
                self._leaving.remove(resident)
                self.arena.free(resident.span)
            self._wake()  # also when it stays: now it may be evicted

    # --- writing

    def reserve(self, key: bytes, nbytes: int) -> Reservation | None:
        """A span of `nbytes`, if need be in the place of blobs that leave; None if none can."""
        fits = nbytes <= self.arena.capacity_bytes
        while (span := self.arena.allocate(nbytes) if fits else None) is None:
            if not fits or not self._evict_one():
                self.counts.refused_reservations += 1
                return None
        reservation = Reservation(key, span)
        self._reservations.add(reservation)
        return reservation

    def abandon(self, reservation: Reservation) -> None:
        """The span will not be filled, or its blob is not wanted."""
        self._reservations.remove(reservation)
        self.arena.free(reservation.span)
        self._wake()

    def insert(self, reservation: Reservation, header: BlobHeader) -> Resident:
        """The reservation holds the blob now; the caller is its first user.

        If somebody else was faster, that blob is returned and this one's span is free.
        """
        if (resident := self.hold(header.key)) is not None:
            self.abandon(reservation)
            return resident
        self._reservations.remove(reservation)
        now = self.clock()
        resident = Resident(header, reservation.span, now, now, users=1)
        self._residents[header.key] = resident
        self.policy.insert(header.key, reservation.span.length, now)
        self.counts.inserted_blobs += 1
        self.counts.inserted_bytes += header.nbytes
        return resident

    async def wait_for_room(self) -> None:
        """Until something was freed or may be evicted that could not before."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            await waiting
        finally:
            if waiting in self._waiting:
                self._waiting.remove(waiting)

    # --- leaving

    def drop(self, resident: Resident) -> bool:
        """Nobody finds this copy any more; False if that was so already."""
        if resident.leaving:
            return False
        key = resident.header.key
        del self._residents[key]
        self.policy.remove(key)
        self._leave(resident)
        return True

    def drop_key(self, key: bytes) -> bool:
        resident = self._residents.get(key)
        return resident is not None and self.drop(resident)

    def evict(self, nbytes: int) -> int:
        """Let blobs go until `nbytes` are freed or none can leave; the bytes that were freed."""
        before = self.used_bytes
        while before - self.used_bytes < nbytes and self._evict_one():
            pass
        return before - self.used_bytes

    def drop_unused_for(self, seconds: float) -> int:
        """Drop what nobody asked for in that time, pinned blobs aside; how many."""
        before = self.clock() - seconds
        idle = [
            resident
            for key, resident in self._residents.items()
            if resident.used_seconds < before and self._may_leave(key)
        ]
        return sum(map(self.drop, idle))

    # --- what there is

    @property
    def used_bytes(self) -> int:
        return self.arena.used_bytes

    @property
    def num_uses(self) -> int:
        """Of blobs, and reservations: 0 when nobody has anything under way."""
        used = (*self._residents.values(), *self._leaving)
        return sum(resident.users for resident in used) + len(self._reservations)

    def check(self) -> None:
        """Every span of the arena has exactly one owner here."""
        self.arena.check()
        spans = [each.span for each in (*self._residents.values(), *self._leaving)]
        spans += [each.span for each in self._reservations]
        offsets = [span.offset for span in spans]
        assert len(set(offsets)) == len(offsets), "a span has two owners"
        owned = sum(span.footprint for span in spans)
        assert owned == self.arena.used_bytes, (
            f"{self.arena.used_bytes - owned} bytes have no owner"
        )
        assert all(each.leaving and each.users for each in self._leaving), "a leaver overstays"
        assert not any(each.leaving for each in self._residents.values()), "a ghost is found"

    def _evict_one(self) -> bool:
        """Prefer what another tier has; better a lost blob than one that is not taken at all."""
        now = self.clock()
        num_spared = 0

        def evictable(key: bytes) -> bool:
            nonlocal num_spared
            if not self._may_leave(key):
                return False
            is_spared = num_spared < MAX_SPARED and self.unsaved(key)
            num_spared += is_spared
            return not is_spared

        key = self.policy.evict(now, evictable)
        if key is None and num_spared:
            key = self.policy.evict(now, self._may_leave)
        if key is None:
            return False
        self.counts.lost_blobs += self.unsaved(key)
        resident = self._residents.pop(key)
        self.counts.evicted_blobs += 1
        self.counts.lifetime_seconds += now - resident.created_seconds
        self._leave(resident)
        return True

    def _may_leave(self, key: bytes) -> bool:
        return not self._residents[key].users and not self.pinned(key)

    def _leave(self, resident: Resident) -> None:
        resident.leaving = True
        if resident.users:
            self._leaving.add(resident)
        else:
            self.arena.free(resident.span)
            self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)
