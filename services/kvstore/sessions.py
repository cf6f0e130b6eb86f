"""The session records of one store: on disk when it has one, in memory until the disk takes them.

The last version wins, and a put says which version it goes on from. A deleted session leaves its
version behind, so that a store that was away does not bring it back. Every record read is verified.
Blocks its caller for the time of the disk; knows no gRPC and no KV.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from services.kvstore.session_rows import Durability, RowDamaged, SessionRows
from services.session_record import SessionHead, SessionName, SessionRecord

FILE_NAME = "sessions.db"
# Of records that no disk has taken; about 8,000 sessions of 8K tokens.
MAX_HELD_BYTES = 256 * 2**20
# A store that was away for longer may bring a deleted session back.
TOMBSTONE_SECONDS = 30 * 86400.0
PURGE_INTERVAL_SECONDS = 3600.0


class Put(NamedTuple):
    """What became of a put, and the version that the table has now."""

    is_accepted: bool
    version: int


class RecordsUnreadable(Exception):
    """The disk does not answer, or not with what was written: the record may be elsewhere."""


class RecordsFull(Exception):
    """No disk takes records, and memory holds as many as it may."""


class SessionTable:
    """Thread-safe. `directory` None: memory only, gone with the process."""

    def __init__(
        self,
        directory: Path | None,
        durability: Durability = Durability.INTERVAL,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.num_damaged = 0
        self.degraded: str | None = None
        self._path = None if directory is None else directory / FILE_NAME
        self._durability = durability
        self._clock = clock
        self._purged_s = 0.0
        self._lock = threading.Lock()
        self._rows: SessionRows | None = None
        self._held: dict[SessionName, SessionRecord] = {}  # that no disk has taken
        with self._lock:
            self._try_disk()

    def get(self, name: SessionName) -> SessionRecord | None:
        """The record, or what a deleted session left. Raises `RecordsUnreadable`."""
        with self._lock:
            if name in self._held:
                return self._held[name]
            with self._reading() as rows:
                try:
                    return rows.read(name) if rows else None
                except RowDamaged:
                    self.num_damaged += 1
                    words = f"the record of session {name.session_id!r} is damaged"
                    raise RecordsUnreadable(words) from None

    def put(self, record: SessionRecord, expected_version: int) -> Put:
        """Accepted unless there is a version above `expected_version`. Raises `RecordsFull` or
        `RecordsUnreadable`."""
        assert record.head.version > expected_version
        name = record.head.name
        with self._lock:
            known_version = self._version(name)
            if known_version > expected_version:
                return Put(False, known_version)
            if not self._written(record):
                self._hold(record)
            return Put(True, record.head.version)

    def heads(self, cache_salt: str, max_heads: int) -> list[SessionHead]:
        """Of one salt, the last used first, deleted ones included. Raises `RecordsUnreadable`."""
        with self._lock:
            with self._reading() as rows:
                on_disk = rows.heads(cache_salt, max_heads) if rows else []
            heads = {head.name: head for head in on_disk}
            heads |= {
                name: record.head
                for name, record in self._held.items()
                if name.cache_salt == cache_salt
            }
        newest = sorted(heads.values(), key=lambda head: -head.last_used_s)
        return newest[:max_heads]

    def tick(self) -> None:
        """Call about once a second: a disk that failed is tried again, and what deleted sessions
        left is forgotten when it is old."""
        with self._lock:
            if self.degraded is not None:
                self._try_disk()
            now_s = self._clock()
            if now_s - self._purged_s >= PURGE_INTERVAL_SECONDS:
                self._purged_s = now_s
                self._purge(now_s - TOMBSTONE_SECONDS)

    def close(self) -> None:
        with self._lock:
            if self._rows is not None:
                self._rows.close()
                self._rows = None

    @property
    def num_held(self) -> int:
        """Records that no disk has taken."""
        return len(self._held)

    def _version(self, name: SessionName) -> int:
        if name in self._held:
            return self._held[name].head.version
        with self._reading() as rows:
            return rows.version(name) if rows else 0

    def _written(self, record: SessionRecord) -> bool:
        if self._rows is None or self.degraded is not None:
            return False
        try:
            self._rows.write(record)
        except sqlite3.Error as error:
            self.degraded = str(error)
            return False
        self._held.pop(record.head.name, None)
        return True

    def _hold(self, record: SessionRecord) -> None:
        others = sum(
            4 * len(held.token_ids) for name, held in self._held.items() if name != record.head.name
        )
        if others + 4 * len(record.token_ids) > MAX_HELD_BYTES:
            raise RecordsFull(f"{len(self._held)} sessions wait in memory for a disk")
        self._held[record.head.name] = record

    @contextmanager
    def _reading(self) -> Iterator[SessionRows | None]:
        """None: there is no disk to ask."""
        if self._rows is None and not self._nothing_is_on_disk():
            raise RecordsUnreadable(f"session records cannot be read: {self.degraded}")
        try:
            yield self._rows
        except sqlite3.Error as error:
            self.degraded = str(error)
            raise RecordsUnreadable(f"session records cannot be read: {error}") from error

    def _nothing_is_on_disk(self) -> bool:
        if self._path is None:
            return True
        try:
            # Not when the folder is missing too: then a disk is, with whatever is on it.
            return self._path.parent.is_dir() and not self._path.exists()
        except OSError:
            return False

    def _try_disk(self) -> None:
        """Open what is not open, and write what is held."""
        if self._path is None:
            return
        try:
            if self._rows is None:
                self._rows = SessionRows(self._path, self._durability)
            for name, record in list(self._held.items()):
                if self._rows.version(name) < record.head.version:
                    self._rows.write(record)
                del self._held[name]
            self._rows.probe()
        except (sqlite3.Error, OSError) as error:
            self.degraded = str(error)
            return
        self.degraded = None

    def _purge(self, before_s: float) -> None:
        for name, record in list(self._held.items()):
            if record.head.is_deleted and record.head.last_used_s < before_s:
                del self._held[name]
        if self._rows is None or self.degraded is not None:
            return
        try:
            self._rows.forget_deleted(before_s)
        except sqlite3.Error as error:
            self.degraded = str(error)
