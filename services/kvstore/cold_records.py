"""Small records with a version in the Redis of the cold tier: the last version wins.

    model1:record:{<name>}   version (8 bytes, little-endian), data

Knows nothing of what a record says. What cannot be reached is as if it were not there. Thread-safe;
every call may block on the network.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from services.kvstore.redis_link import RedisDown, RedisLink

MAX_RECORD_BYTES = 64 << 20
_PREFIX = "model1:record:{"
_VERSION = struct.Struct("<Q")


class Record(NamedTuple):
    version: int  # above 0
    data: bytes


class ColdRecords:
    """Records in the Redis of a link, which stays the caller's; each lives that long unwritten."""

    def __init__(self, link: RedisLink, *, ttl_seconds: float) -> None:
        self._link = link
        self._ttl_ms = max(1, round(1000 * ttl_seconds))

    def get_record(self, name: str) -> Record | None:
        try:
            value: bytes | None = self._link.call("GET", _key(name), writes=False)
        except RedisDown:
            return None
        if value is None or len(value) < _VERSION.size:
            return None
        return Record(_VERSION.unpack_from(value)[0], value[_VERSION.size :])

    def put_record(self, name: str, data: bytes, expected_version: int, new_version: int) -> bool:
        """Whether the record was written: not if its version there is another one (0: none)."""
        if len(data) > MAX_RECORD_BYTES:
            raise ValueError(f"a record of {len(data)} bytes; {MAX_RECORD_BYTES} are the most")
        if not expected_version < new_version:
            raise ValueError(f"version {new_version} cannot follow {expected_version}")
        expected = _VERSION.pack(expected_version) if expected_version else b""
        value = _VERSION.pack(new_version) + data
        try:
            return self._link.set_if_prefix(_key(name), expected, value, self._ttl_ms)
        except RedisDown:
            return False

    def names(self) -> list[str]:
        """Of every record; goes through all keys of the server."""
        try:
            found = list(self._link.scan(f"{_PREFIX}*".encode()))
        except RedisDown:
            return []
        return sorted(key.decode()[len(_PREFIX) : -1] for key in found)


def _key(name: str) -> bytes:
    return f"{_PREFIX}{name}}}".encode()
