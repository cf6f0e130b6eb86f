"""Evicts what was used longest ago."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable


class Lru:
    """The plainest eviction policy: one list, the next to leave in front."""

    def __init__(self) -> None:
        # Not a dict: that walks over what was deleted in front whenever it looks for the first.
        self._keys: OrderedDict[bytes, None] = OrderedDict()

    def insert(self, key: bytes, nbytes: int, now: float) -> None:
        self._keys[key] = None

    def touch(self, key: bytes, now: float) -> None:
        self._keys.move_to_end(key)

    def remove(self, key: bytes) -> None:
        del self._keys[key]

    def evict(self, now: float, evictable: Callable[[bytes], bool]) -> bytes | None:
        key = next(filter(evictable, self._keys), None)
        if key is not None:
            del self._keys[key]
        return key
