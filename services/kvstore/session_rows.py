"""Session records in a SQLite file: a row each, with a checksum. Every call may raise its errors.

Neither salts nor anything derived from them but a hash is written. Knows no versions' order; who
calls sees to it that one thread does so at a time.
"""

import sqlite3
from dataclasses import replace
from enum import StrEnum
from hashlib import blake2b
from pathlib import Path
from typing import Any

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


class RowDamaged(Exception):
    """The row is not what was written."""


class SessionRows:
    """Of one open file."""

    def __init__(self, path: Path, durability: Durability) -> None:
        self._rows = _open(path, durability)

    def read(self, name: SessionName) -> SessionRecord | None:
        """Raises `RowDamaged`."""
        row = self._row(name, "head, token_ids, checksum")
        if row is None:
            return None
        head, token_ids, checksum = row
        if _checksum(head, token_ids) != checksum:
            raise RowDamaged
        return SessionRecord(_head(head, name.cache_salt), unpacked(token_ids))

    def version(self, name: SessionName) -> int:
        """0: unknown. A damaged row has one, so that it can be written over."""
        row = self._row(name, "version")
        return 0 if row is None else int(row[0])

    def heads(self, cache_salt: str, max_heads: int) -> list[SessionHead]:
        """The last used first. What is damaged is left out, and the others are found."""
        found = self._rows.execute(
            "SELECT head, token_ids, checksum FROM sessions WHERE salt = ? "
            "ORDER BY last_used DESC LIMIT ?",
            (_salt_key(cache_salt), max_heads),
        )
        return [
            _head(head, cache_salt)
            for head, token_ids, checksum in found
            if _checksum(head, token_ids) == checksum
        ]

    def write(self, record: SessionRecord) -> None:
        name = record.head.name
        head = head_to_wire(without_salt(record).head).SerializeToString()
        token_ids = packed(record.token_ids)
        with self._rows:
            self._rows.execute(
                "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    _salt_key(name.cache_salt),
                    name.session_id,
                    record.head.version,
                    record.head.last_used_s,
                    head,
                    token_ids,
                    _checksum(head, token_ids),
                ),
            )

    def forget_deleted(self, before_s: float) -> None:
        """What sessions left that were deleted before that time."""
        with self._rows:  # only a deleted session has no token
            self._rows.execute(
                "DELETE FROM sessions WHERE length(token_ids) = 0 AND last_used < ?", (before_s,)
            )

    def probe(self) -> None:
        """That the file can be written, even if there is nothing to write."""
        with self._rows:
            self._rows.execute("PRAGMA user_version = 1")

    def close(self) -> None:
        self._rows.close()

    def _row(self, name: SessionName, columns: str) -> tuple[Any, ...] | None:
        found: tuple[Any, ...] | None = self._rows.execute(
            f"SELECT {columns} FROM sessions WHERE salt = ? AND session_id = ?",
            (_salt_key(name.cache_salt), name.session_id),
        ).fetchone()
        return found


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
