"""The session records of one store: on disk when it has one, in memory until the disk takes them.

The last version wins, and a put says which version it goes on from. A deleted session leaves its
version behind, so that a store that was away does not bring it back. Every record read is verified.
Blocks its caller for the time of the disk; knows no gRPC and no KV.
"""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from protos import session_store_pb2
from services.session_record import (
    SessionHead,
    SessionName,
    SessionRecord,
    head_from_wire,
    head_to_wire,
    packed,
    unpacked,
    without_salt,
)

FILE_NAME = "sessions.db"
# Of records that no disk has taken; about 8,000 sessions of 8K tokens.
MAX_HELD_BYTES = 256 * 2**20

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    salt BLOB NOT NULL, session_id TEXT NOT NULL, version INTEGER NOT NULL, last_used REAL NOT NULL,
    head BLOB NOT NULL, token_ids BLOB NOT NULL, checksum BLOB NOT NULL,
    PRIMARY KEY (salt, session_id)
);
CREATE INDEX IF NOT EXISTS by_last_used ON sessions (salt, last_used DESC);
"""


class Durability(StrEnum):
    """What a record that was accepted survives: a power cut only with ALWAYS, a kill with each."""

    NEVER = "never"
    INTERVAL = "interval"
    ALWAYS = "always"


_SYNCHRONOUS = {
    Durability.NEVER: "OFF",
    Durability.INTERVAL: "NORMAL",
    Durability.ALWAYS: "FULL",
}


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
        self, directory: Path | None, durability: Durability = Durability.INTERVAL
    ) -> None:
        self._path = None if directory is None else directory / FILE_NAME
        self._durability = durability
        self._lock = threading.Lock()
        self._rows: sqlite3.Connection | None = None
        self._held: dict[SessionName, SessionRecord] = {}
        self.num_damaged = 0
        self.degraded: str | None = None
        with self._lock:
            self._try_disk()

    def get(self, name: SessionName) -> SessionRecord | None:
        """The record, or what a deleted session left. Raises `RecordsUnreadable`."""
        with self._lock:
            if name in self._held:
                return self._held[name]
            row = self._row(name, "head, token_ids, checksum")
            if row is None:
                return None
            head, token_ids, checksum = row
            if _checksum(head, token_ids) != checksum:
                self.num_damaged += 1
                raise RecordsUnreadable(f"the record of session {name.session_id!r} is damaged")
            return SessionRecord(_head(head, name.cache_salt), unpacked(token_ids))

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
            heads = {head.name: head for head in self._heads_on_disk(cache_salt, max_heads)}
            heads |= {
                name: record.head
                for name, record in self._held.items()
                if name.cache_salt == cache_salt
            }
        newest = sorted(heads.values(), key=lambda head: -head.last_used_s)
        return newest[:max_heads]

    def tick(self) -> None:
        """Call about once a second: a disk that failed is tried again."""
        with self._lock:
            if self.degraded is not None:
                self._try_disk()

    def close(self) -> None:
        with self._lock:
            self._close_disk()

    @property
    def num_held(self) -> int:
        """Records that no disk has taken."""
        return len(self._held)

    def _version(self, name: SessionName) -> int:
        """0: unknown. A damaged record has one, so that it can be written over."""
        if name in self._held:
            return self._held[name].head.version
        row = self._row(name, "version")
        return 0 if row is None else int(row[0])

    def _row(self, name: SessionName, columns: str) -> tuple[Any, ...] | None:
        with self._reading() as rows:
            if rows is None:
                return None
            found: tuple[Any, ...] | None = rows.execute(
                f"SELECT {columns} FROM sessions WHERE salt = ? AND session_id = ?",
                (_salt_key(name.cache_salt), name.session_id),
            ).fetchone()
        return found

    def _heads_on_disk(self, cache_salt: str, max_heads: int) -> list[SessionHead]:
        with self._reading() as rows:
            if rows is None:
                return []
            found = rows.execute(
                "SELECT head FROM sessions WHERE salt = ? ORDER BY last_used DESC LIMIT ?",
                (_salt_key(cache_salt), max_heads),
            ).fetchall()
        return [_head(head, cache_salt) for (head,) in found]

    def _written(self, record: SessionRecord) -> bool:
        if self._rows is None or self.degraded is not None:
            return False
        try:
            self._write(self._rows, record)
        except sqlite3.Error as error:
            self.degraded = str(error)
            return False
        self._held.pop(record.head.name, None)
        return True

    def _write(self, rows: sqlite3.Connection, record: SessionRecord) -> None:
        head = record.head
        data = head_to_wire(without_salt(record).head).SerializeToString()
        token_ids = packed(record.token_ids)
        with rows:
            rows.execute(
                "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    _salt_key(head.name.cache_salt),
                    head.name.session_id,
                    head.version,
                    head.last_used_s,
                    data,
                    token_ids,
                    _checksum(data, token_ids),
                ),
            )

    def _hold(self, record: SessionRecord) -> None:
        others = sum(
            4 * len(held.token_ids) for name, held in self._held.items() if name != record.head.name
        )
        if others + 4 * len(record.token_ids) > MAX_HELD_BYTES:
            raise RecordsFull(
                f"{len(self._held)} sessions wait in memory for a disk that takes them"
            )
        self._held[record.head.name] = record

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection | None]:
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
                self._rows = _open(self._path, self._durability)
            for name, record in list(self._held.items()):
                row = self._row(name, "version")
                if row is None or row[0] < record.head.version:
                    self._write(self._rows, record)
                self._held.pop(name, None)
            with self._rows:  # that it can be written again, even if nothing waits
                self._rows.execute("PRAGMA user_version = 1")
        except (sqlite3.Error, OSError, RecordsUnreadable) as error:
            self.degraded = str(error)
            return
        self.degraded = None

    def _close_disk(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None


def _open(path: Path, durability: Durability) -> sqlite3.Connection:
    path.touch(mode=0o600)
    rows = sqlite3.connect(path, check_same_thread=False)
    try:
        rows.execute("PRAGMA journal_mode = WAL")
        rows.execute(f"PRAGMA synchronous = {_SYNCHRONOUS[durability]}")
        rows.executescript(_SCHEMA)
    except sqlite3.OperationalError:
        rows.close()
        raise
    except sqlite3.DatabaseError:  # not a database any more: start anew beside it
        rows.close()
        path.replace(path.with_suffix(".damaged"))
        return _open(path, durability)
    return rows


def _head(data: bytes, cache_salt: str) -> SessionHead:
    head = head_from_wire(session_store_pb2.SessionRecord.FromString(data))
    return replace(head, name=SessionName(head.name.session_id, cache_salt))


def _salt_key(cache_salt: str) -> bytes:
    return blake2b(cache_salt.encode(), digest_size=16, person=b"model1-session").digest()


def _checksum(head: bytes, token_ids: bytes) -> bytes:
    state = xxhash.xxh3_128(head)
    state.update(token_ids)
    return state.digest()
