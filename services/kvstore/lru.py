"""Evicts what was used longest ago."""

from __future__ import annotations

from collections.abc import Callable


class Lru:
    """The plainest eviction policy: one list, the next to leave in front."""

    def __init__(self) -> None:
        self._keys: dict[bytes, None] = {}

    def insert(self, key: bytes, nbytes: int, now: float) -> None:
        self._keys[key] = None

    def touch(self, key: bytes, now: float) -> None:
        del self._keys[key]
        self._keys[key] = None

    def remove(self, key: bytes) -> None:
        del self._keys[key]

    def evict(self, now: float, evictable: Callable[[bytes], bool]) -> bytes | None:
        key = next(filter(evictable, self._keys), None)
        if key is not None:
            del self._keys[key]
        return key
