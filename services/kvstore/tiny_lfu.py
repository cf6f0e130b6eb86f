"""Evicts by W-TinyLFU: a new blob displaces an old one only if it has been asked for more often.

Einziger, Friedman, Manes, "TinyLFU: a highly efficient cache admission policy" (2017), with sizes
in bytes and with blobs that must not leave. How often a key was asked for is estimated in little
memory, also after it left, and fades.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

# Of the resident bytes: what came last is not compared yet. The paper's 0.01 is for traffic without
# recency; chats lose ten points by 0.1 (`model1 kv simulate`).
WINDOW_SHARE = 0.3
PROTECTED_SHARE = 0.8  # of the others: what was used since it was admitted

_ROWS = 4
_MAX_COUNT = 15
_HALVED = bytes(count // 2 for count in range(256))


class Sketch:
    """A count-min sketch of how often keys came up; all counts are halved now and then."""

    def __init__(self, width: int = 1 << 16) -> None:
        self._width = width
        self._counts = bytearray(_ROWS * width)
        self._num_added = 0

    def add(self, key: bytes) -> None:
        for at in self._places(key):
            if self._counts[at] < _MAX_COUNT:
                self._counts[at] += 1
        self._num_added += 1
        if self._num_added >= 10 * self._width:
            self._counts = self._counts.translate(_HALVED)
            self._num_added //= 2

    def count(self, key: bytes) -> int:
        return min(self._counts[at] for at in self._places(key))

    def _places(self, key: bytes) -> list[int]:
        # Keys are hashes already: any four bytes of one are as good as a hash of it.
        return [
            row * self._width + int.from_bytes(key[4 * row : 4 * row + 4], "little") % self._width
            for row in range(_ROWS)
        ]


class _List:
    """Keys from the longest unused to the last used, and their bytes."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[bytes, int] = OrderedDict()
        self.nbytes = 0

    def push(self, key: bytes, nbytes: int) -> None:
        self.sizes[key] = nbytes
        self.nbytes += nbytes

    def pop(self, key: bytes) -> int:
        nbytes = self.sizes.pop(key)
        self.nbytes -= nbytes
        return nbytes

    def first(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        return next(filter(evictable, self.sizes), None)


class TinyLfu:
    def __init__(self) -> None:
        self._sketch = Sketch()
        self._window = _List()
        self._probation = _List()
        self._protected = _List()

    def insert(self, key: bytes, nbytes: int, now: float) -> None:
        self._sketch.add(key)
        self._window.push(key, nbytes)

    def touch(self, key: bytes, now: float) -> None:
        self._sketch.add(key)
        if key in self._probation.sizes:
            self._protected.push(key, self._probation.pop(key))
            limit = PROTECTED_SHARE * (self._probation.nbytes + self._protected.nbytes)
            while self._protected.nbytes > limit and len(self._protected.sizes) > 1:
                demoted = next(iter(self._protected.sizes))
                self._probation.push(demoted, self._protected.pop(demoted))
        else:
            self._list_of(key).sizes.move_to_end(key)

    def remove(self, key: bytes) -> None:
        self._list_of(key).pop(key)

    def evict(self, now: float, evictable: Callable[[bytes], bool]) -> bytes | None:
        candidate = self._candidate(evictable)
        victim = self._probation.first(evictable) or self._protected.first(evictable)
        if candidate is not None and victim is not None:
            if self._sketch.count(candidate) > self._sketch.count(victim):
                self._probation.push(candidate, self._window.pop(candidate))
            else:
                victim = candidate
        leaving = victim or candidate or self._window.first(evictable)
        if leaving is not None:
            self.remove(leaving)
        return leaving

    def _candidate(self, evictable: Callable[[bytes], bool]) -> bytes | None:
        """The key that has to leave the window, and is to be compared.

        What came while nothing had to leave is admitted as it is.
        """
        main = self._probation.nbytes + self._protected.nbytes
        limit = WINDOW_SHARE * (self._window.nbytes + main)
        while self._window.nbytes > limit:
            oldest = next(iter(self._window.sizes))
            if self._window.nbytes - self._window.sizes[oldest] <= limit:
                return self._window.first(evictable)
            self._probation.push(oldest, self._window.pop(oldest))
        return None

    def _list_of(self, key: bytes) -> _List:
        for each in (self._window, self._probation):
            if key in each.sizes:
                return each
        return self._protected
