"""Tails in host memory: what resuming at a boundary needs beside the blocks' bodies.

A fixed number of slots of one size. A slot is *held* while a sequence may need it, a save reads it
or a load fills it; a tail that nobody holds stays as a cache until the room is needed, the longest
unused first. Knows neither what a tail means nor where else it is kept.
"""

from collections import OrderedDict
from collections.abc import Iterable

import numpy as np


class Tail:
    """One slot; the bytes are whole and final once it has a key. Its `TailCache` changes it."""

    __slots__ = ("buffer", "key", "num_holders")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer  # writable, exactly tail_nbytes
        self.key: bytes | None = None
        self.num_holders = 0


class TailCache:
    """Owner of the slots."""

    def __init__(self, num_slots: int, tail_nbytes: int) -> None:
        # The system provides the memory of a slot when it is first written.
        arena = np.empty((num_slots, tail_nbytes), dtype=np.uint8)
        self._slots = [Tail(memoryview(row)) for row in arena]  # type: ignore[arg-type]
        self._free = self._slots[::-1]
        self._of_key: OrderedDict[bytes, Tail] = OrderedDict()  # the longest unused first

    def __contains__(self, key: bytes) -> bool:
        return key in self._of_key

    @property
    def num_held(self) -> int:
        return sum(tail.num_holders > 0 for tail in self._slots)

    def find(self, key: bytes) -> Tail | None:
        """The tail of that key, held."""
        tail = self._of_key.get(key)
        if tail is not None:
            self._of_key.move_to_end(key)
            tail.num_holders += 1
        return tail

    def reserve(self) -> Tail | None:
        """A slot to fill, held; None when every slot is held. Give it a key, or release it."""
        if self._free:
            tail = self._free.pop()
        else:
            idle = (tail for tail in self._of_key.values() if not tail.num_holders)
            found = next(idle, None)
            if found is None:
                return None
            tail = found
            self._forget(tail)
        tail.num_holders = 1
        return tail

    def publish(self, tail: Tail, key: bytes) -> Tail:
        """The slot is filled: from now on `find` finds it. Returns the tail to hold instead.

        That is another one if the key has a tail already: its bytes are the same.
        """
        assert tail.num_holders == 1 and tail.key is None
        if key in self._of_key:
            self.release(tail)
            present = self.find(key)
            assert present is not None
            return present
        tail.key = key
        self._of_key[key] = tail
        return tail

    def hold(self, tail: Tail) -> None:
        """One more holder of a tail that is held already."""
        assert tail.num_holders
        tail.num_holders += 1

    def release(self, tail: Tail) -> None:
        """One holder less. A tail without a key is then forgotten."""
        assert tail.num_holders
        tail.num_holders -= 1
        if not tail.num_holders and tail.key is None:
            self._free.append(tail)

    def supersede(self, tail: Tail) -> None:
        """Release a tail that a later one of the same sequence replaces: the first to give way."""
        self.release(tail)
        if not tail.num_holders and tail.key is not None:
            self._of_key.move_to_end(tail.key, last=False)

    def forget(self, keys: Iterable[bytes]) -> int:
        """Free the slots of these tails, held ones excepted; how many there were."""
        idle = [
            tail
            for key in dict.fromkeys(keys)
            if (tail := self._of_key.get(key)) is not None and not tail.num_holders
        ]
        for tail in idle:
            self._forget(tail)
            self._free.append(tail)
        return len(idle)

    def check(self) -> None:
        """Every slot is free, has a key, or is being filled; AssertionError otherwise."""
        keyed, free = list(self._of_key.values()), self._free
        assert len({id(tail) for tail in (*keyed, *free)}) == len(keyed) + len(free)
        for tail in self._slots:
            is_filling = tail.num_holders > 0 and tail.key is None
            assert (tail in keyed) + (tail in free) + is_filling == 1, "a tail's slot leaked"
        assert all(self._of_key[key].key == key for key in self._of_key)
        assert not any(tail.num_holders for tail in free)

    def _forget(self, tail: Tail) -> None:
        assert tail.key is not None
        del self._of_key[tail.key]
        tail.key = None
