"""What is kept of a session between its turns, and its wire form.

The token ids are the truth: whatever KV is lost can be computed from them. Knows neither who keeps
records nor who uses them.
"""

import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from protos import session_store_pb2

TOKEN_ID_BYTES = 4

# In the initial metadata of an import: the session is taken, its blobs may follow.
IMPORT_ACCEPTED = ("model1-import", "accepted")


class SessionName(NamedTuple):
    """Sessions of different salts are different sessions, whatever their ids."""

    session_id: str
    cache_salt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionHead:
    """All of a record but what was said. Times in seconds since 1970."""

    name: SessionName
    version: int  # 1, 2, 3, ...: grows with every write
    num_tokens: int
    kv_root: bytes = b""  # start of the chain of block keys, as the last worker told it
    created_s: float = 0.0
    last_used_s: float = 0.0
    pinned_until_s: float = 0.0
    worker: str = ""  # of the last turn
    is_deleted: bool = False


@dataclass(frozen=True, slots=True)
class SessionRecord:
    head: SessionHead
    token_ids: tuple[int, ...]


def without_salt(record: SessionRecord) -> SessionRecord:
    """As it may lie on disk or in Redis: who knows a tenant's salt is taken for the tenant."""
    name = SessionName(record.head.name.session_id, "")
    return SessionRecord(replace(record.head, name=name), record.token_ids)


def packed(token_ids: Sequence[int]) -> bytes:
    """4 bytes an id, little-endian."""
    ids = array("I", token_ids)
    assert ids.itemsize == TOKEN_ID_BYTES
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()


def unpacked(data: bytes) -> tuple[int, ...]:
    """Raises ValueError if the bytes are no whole number of ids."""
    ids = array("I")
    ids.frombytes(data)
    if sys.byteorder == "big":
        ids.byteswap()
    return tuple(ids)


def head_to_wire(head: SessionHead) -> session_store_pb2.SessionRecord:
    return session_store_pb2.SessionRecord(
        session_id=head.name.session_id,
        cache_salt=head.name.cache_salt,
        version=head.version,
        num_tokens=head.num_tokens,
        kv_root=head.kv_root,
        created_unix_seconds=head.created_s,
        last_used_unix_seconds=head.last_used_s,
        pinned_until_unix_seconds=head.pinned_until_s,
        worker=head.worker,
        deleted=head.is_deleted,
    )


def head_from_wire(message: session_store_pb2.SessionRecord) -> SessionHead:
    return SessionHead(
        name=SessionName(message.session_id, message.cache_salt),
        version=message.version,
        num_tokens=message.num_tokens,
        kv_root=message.kv_root,
        created_s=message.created_unix_seconds,
        last_used_s=message.last_used_unix_seconds,
        pinned_until_s=message.pinned_until_unix_seconds,
        worker=message.worker,
        is_deleted=message.deleted,
    )


def record_to_wire(record: SessionRecord) -> session_store_pb2.SessionRecord:
    message = head_to_wire(record.head)
    message.token_ids = packed(record.token_ids)
    return message


def record_from_wire(message: session_store_pb2.SessionRecord) -> SessionRecord:
    """Raises ValueError if the token ids are not as many as the record says."""
    token_ids = unpacked(message.token_ids)
    if len(token_ids) != message.num_tokens:
        raise ValueError(f"a record of {message.num_tokens} tokens has {len(token_ids)}")
    return SessionRecord(head_from_wire(message), token_ids)
