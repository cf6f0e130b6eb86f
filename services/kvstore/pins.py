"""Which keys eviction spares, and until when. Knows nothing of who holds the blobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class Pins:
    """`clock` is in seconds. Threads may ask; one changes it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[bytes, float] = {}

    def __len__(self) -> int:
        now = self._clock()
        return sum(until > now for until in self._until.values())

    def __contains__(self, key: bytes) -> bool:
        until = self._until.get(key)
        return until is not None and until > self._clock()

    def pin(self, keys: Iterable[bytes], until: float) -> None:
        """Until then on the clock, or longer if they are pinned for longer."""
        for key in keys:
            self._until[key] = max(until, self._until.get(key, until))

    def unpin(self, keys: Iterable[bytes]) -> int:
        """How many of them were pinned."""
        return sum(self._until.pop(key, None) is not None for key in keys)

    def forget_expired(self) -> None:
        now = self._clock()
        for key in [key for key, until in self._until.items() if until <= now]:
            del self._until[key]
