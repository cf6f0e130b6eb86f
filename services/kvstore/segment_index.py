"""Which blob lies where in the segments of a disk tier, and what is dropped to make room.

Plain bookkeeping: reads and writes nothing. Not thread-safe: its owner locks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from services.kvstore.segment import Segment, record_nbytes


@dataclass(slots=True, eq=False)
class Slot:
    """A segment, and the blobs of it that can be found."""

    segment: Segment
    num_bytes: int = 0  # of the file, with padding and what is dead in it
    entries: dict[bytes, Entry] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Entry:
    """Where a blob lies. `was_read` since it was written there: then it outlives its segment."""

    slot: Slot
    offset: int
    nbytes: int
    was_read: bool = False


class Victim(NamedTuple):
    """A segment to drop, and the keys of it to move to the newest segment."""

    slot: Slot
    kept: list[bytes]


class SegmentIndex:
    """Segments from the oldest to the newest, which is the one appended to."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.used_bytes = 0
        self._entries: dict[bytes, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> list[bytes]:
        return list(self._entries)

    def find(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def add_slot(self, segment: Segment) -> Slot:
        """The segment becomes the newest; its bytes count from now on."""
        slot = Slot(segment, segment.num_bytes)
        self.slots.append(slot)
        self.used_bytes += slot.num_bytes
        return slot

    def add(self, key: bytes, slot: Slot, offset: int, nbytes: int) -> None:
        """A blob that was appended to the slot's segment. A later one of the same key replaces."""
        self.forget(key)
        self._entries[key] = slot.entries[key] = Entry(slot, offset, nbytes)
        grown = max(slot.num_bytes, offset + record_nbytes(nbytes)) - slot.num_bytes
        slot.num_bytes += grown
        self.used_bytes += grown

    def forget(self, key: bytes) -> Entry | None:
        """Its bytes stay used until its segment is dropped."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            del entry.slot.entries[key]
        return entry

    def drop(self, slot: Slot) -> None:
        for key in list(slot.entries):
            self.forget(key)
        self.slots.remove(slot)
        self.used_bytes -= slot.num_bytes

    def clear(self) -> None:
        """Let go of every segment now: entries and slots refer to each other."""
        for slot in self.slots:
            slot.entries.clear()
        self.slots.clear()
        self._entries.clear()
        self.used_bytes = 0

    def victim(self, is_pinned: Callable[[bytes], bool]) -> Victim:
        """The oldest segment that is not mostly pinned, and what outlives it.

        At least half of a victim is freed, so that making room ends. Where every segment is mostly
        pinned, the oldest goes with all that is in it.
        """
        for slot in self.slots:
            kept = {key: entry for key, entry in slot.entries.items() if is_pinned(key)}
            room = slot.num_bytes // 2 - sum(record_nbytes(entry.nbytes) for entry in kept.values())
            if room < 0:
                continue
            for key, entry in slot.entries.items():
                cost = record_nbytes(entry.nbytes)
                if entry.was_read and key not in kept and cost <= room:
                    kept[key] = entry
                    room -= cost
            return Victim(slot, list(kept))
        return Victim(self.slots[0], [])

    def check(self) -> None:
        """Every entry is in exactly one slot, lies inside of it and overlaps no other there."""
        assert self.used_bytes == sum(slot.num_bytes for slot in self.slots)
        assert sum(len(slot.entries) for slot in self.slots) == len(self._entries)
        for slot in self.slots:
            end = 0
            for key, entry in sorted(slot.entries.items(), key=lambda item: item[1].offset):
                assert self._entries[key] is entry
                assert entry.slot is slot
                assert entry.offset >= end, f"{key.hex()} overlaps the record before it"
                end = entry.offset + record_nbytes(entry.nbytes)
            assert end <= slot.num_bytes
