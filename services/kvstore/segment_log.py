"""The segments of one directory as one log of blobs within a byte budget.

Nothing but the segments is kept on disk; the index is rebuilt from their headers. Room is made by
dropping whole segments, oldest first; what of it was read since it was written, or is pinned, moves
to the newest. Passes every OSError on: what a failing disk means is its owner's to decide.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.kvstore.blob import BlobHeader, Damaged, check_blob
from services.kvstore.segment import FILE_MODE, Segment, record_nbytes
from services.kvstore.segment_index import Entry, SegmentIndex, Victim

_SEGMENT_NAME = "{:012d}.segment"
_SEGMENT_GLOB = "[0-9]" * 12 + ".segment"
_PROBE_NAME = "probe"


class DiskInUse(RuntimeError):
    """Another live store uses the directory."""


@dataclass(frozen=True, slots=True)
class ScanReport:
    """What opening a directory found."""

    num_blobs: int
    seconds: float
    cut_bytes: int  # of an end that a crash tore
    errors: tuple[OSError, ...]  # one for each segment that could not be read to its end


@dataclass(slots=True)
class Evictions:
    """What making room cost, since the log was built."""

    num_blobs: int = 0
    num_bytes: int = 0  # of the segments dropped
    num_kept: int = 0  # blobs that moved to the newest segment instead


class SegmentLog:
    """Owner of the directory's segments and of their index.

    `find`, `forget`, `read` and the properties are for any thread. What writes is for one thread at
    a time: the owner locks. `is_pinned` is called with a lock held and must not call back.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int,
        segment_bytes: int,
        syncs: bool,
        is_pinned: Callable[[bytes], bool],
    ) -> None:
        self.directory = directory
        self.evictions = Evictions()
        self._max_bytes = max_bytes
        self._segment_bytes = segment_bytes
        self._syncs = syncs
        self._is_pinned = is_pinned
        self._lock = threading.Lock()  # guards the index; never held during I/O
        self._index = SegmentIndex()
        self._directory: int | None = None  # its descriptor, locked while we live
        self._next_segment_id = 0
        self._newest_is_ours = False
        self.has_unsynced = False

    def __len__(self) -> int:
        with self._lock:
            return len(self._index)

    @property
    def used_bytes(self) -> int:
        with self._lock:
            return self._index.used_bytes

    @property
    def num_segments(self) -> int:
        with self._lock:
            return len(self._index.slots)

    def keys(self) -> list[bytes]:
        with self._lock:
            return self._index.keys()

    def find(self, key: bytes) -> Entry | None:
        with self._lock:
            return self._index.find(key)

    def read(self, key: bytes, entry: Entry, out: memoryview) -> BlobHeader:
        """The blob of an entry that `find` gave, verified; raises Damaged.

        The entry may have been dropped since: its file is readable as long as we hold it.
        """
        blob = out[: entry.nbytes]
        entry.slot.segment.read_into(entry.offset, blob)
        return check_blob(blob, key)

    def forget(self, key: bytes, entry: Entry) -> bool:
        """The key is not found again, here or by a scan; False if it lay elsewhere by then."""
        with self._lock:
            is_current = self._index.find(key) is entry
            if is_current:
                self._index.forget(key)
        # All of it: in its payload may be the header of another blob, behind which a scan would
        # overlook what follows. If it fails, a scan finds the blob, and a read what is wrong.
        with contextlib.suppress(OSError):
            entry.slot.segment.erase(entry.offset, entry.nbytes)
        return is_current

    def open(self) -> ScanReport:
        """Take the directory and index what it holds, whatever was indexed before.

        Raises DiskInUse.
        """
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_directory()
        started = time.perf_counter()
        index = SegmentIndex()
        cut_bytes = 0
        errors = []
        paths = sorted(self.directory.glob(_SEGMENT_GLOB))
        for path in paths:
            try:
                cut_bytes += _scan(path, index, is_newest=path == paths[-1])
            except OSError as error:
                errors.append(error)
        with self._lock:
            self._index.clear()
            self._index = index
        # A header that lies where none belongs may claim more bytes than its file has, and is
        # passed over for that. Appending to the file would make it true, and hide the appended.
        self._newest_is_ours = False
        self._next_segment_id = 1 + max((int(path.stem) for path in paths), default=0)
        seconds = time.perf_counter() - started
        return ScanReport(len(index), seconds, cut_bytes, tuple(errors))

    def try_writing(self, num_bytes: int) -> None:
        """Write as much as that beside the segments, and read it back."""
        path = self.directory / _PROBE_NAME
        data = bytes(num_bytes)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, FILE_MODE)
        try:
            written = os.pwrite(descriptor, data, 0)
            if self._syncs:  # or the page cache says yes to anything
                os.fsync(descriptor)
            if written != num_bytes or os.pread(descriptor, num_bytes, 0) != data:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)

    def append(self, key: bytes, blob: memoryview) -> None:
        """Make room for the blob and write it after all others."""
        self.make_room(record_nbytes(len(blob)))
        self._append(key, blob)

    def erase(self, key: bytes) -> bool:
        """Forget a blob and overwrite it; False if there was none."""
        with self._lock:
            entry = self._index.forget(key)
        if entry is None:
            return False
        entry.slot.segment.erase(entry.offset, entry.nbytes)
        return True

    def make_room(self, num_bytes: int) -> None:
        """Drop segments until so much more fits into the budget."""
        while self._index.used_bytes + num_bytes > self._max_bytes and self._index.slots:
            with self._lock:
                victim = self._index.victim(self._is_pinned)
            self._drop(victim)

    def drop_oldest(self) -> int:
        """Drop the oldest segment with all that is in it; returns its bytes, 0 if there is none."""
        if not self._index.slots:
            return 0
        oldest = self._index.slots[0]
        self._drop(Victim(oldest, []))
        return oldest.num_bytes

    def sync(self) -> None:
        """Return when all that was appended survives a loss of power."""
        if self.has_unsynced and self._index.slots:
            self._index.slots[-1].segment.sync()
        self.has_unsynced = False

    def check(self) -> None:
        with self._lock:
            self._index.check()

    def close(self) -> None:
        """Let go of the files and of the directory. Idempotent."""
        with self._lock:
            self._index.clear()
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None

    def _lock_directory(self) -> None:
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._directory is not None:
            if os.path.samestat(os.fstat(descriptor), os.fstat(self._directory)):
                os.close(descriptor)
                return
            os.close(self._directory)  # another directory has its name now
            self._directory = None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise DiskInUse(f"another store uses {self.directory}") from None
        self._directory = descriptor

    def _append(self, key: bytes, blob: memoryview) -> None:
        slots = self._index.slots
        num_bytes = record_nbytes(len(blob))
        # A blob larger than a segment gets one of its own.
        if (
            not slots
            or not self._newest_is_ours
            or 0 < slots[-1].num_bytes > self._segment_bytes - num_bytes
        ):
            self._start_segment()
        slot = slots[-1]
        offset = slot.segment.append(blob)
        self.has_unsynced = True
        with self._lock:
            self._index.add(key, slot, offset, len(blob))

    def _start_segment(self) -> None:
        if self._syncs:
            self.sync()  # of the files, only the newest is ever unsynced
        path = self.directory / _SEGMENT_NAME.format(self._next_segment_id)
        self._next_segment_id += 1
        segment = Segment(path, create=True)
        with self._lock:
            self._index.add_slot(segment)
        self._newest_is_ours = True
        if self._syncs and self._directory is not None:
            os.fsync(self._directory)  # the name of the file

    def _drop(self, victim: Victim) -> None:
        kept = []
        for key in victim.kept:
            entry = victim.slot.entries.get(key)
            if entry is not None:
                blob = memoryview(bytearray(entry.nbytes))
                with contextlib.suppress(OSError, Damaged):  # one less to keep
                    self.read(key, entry, blob)
                    kept.append((key, blob))
        victim.slot.segment.remove()
        with self._lock:
            kept = [(key, blob) for key, blob in kept if key in victim.slot.entries]
            self.evictions.num_blobs += len(victim.slot.entries) - len(kept)
            self.evictions.num_bytes += victim.slot.num_bytes
            self.evictions.num_kept += len(kept)
            self._index.drop(victim.slot)
        for key, blob in kept:
            self._append(key, blob)


def _scan(path: Path, index: SegmentIndex, *, is_newest: bool) -> int:
    """Index a segment, or what can be read of it; returns the bytes of a torn end that it cut."""
    segment = Segment(path, create=False)
    records = []
    try:
        for record in segment.scan():
            records.append(record)
        return segment.cut_after_last_whole(records) if is_newest else 0
    finally:
        slot = index.add_slot(segment)
        for record in records:
            index.add(record.header.key, slot, record.offset, record.header.nbytes)
