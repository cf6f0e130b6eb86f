"""Which blocks are free, held or kept as a cache: reference counts, names, and who goes first.

A block is *held* while a sequence has it or it is pinned. Held blocks may be shared. A block whose
contents are complete may get a name (the key of its contents); when its last holder leaves, a named
block stays *cached* until its memory is needed or it was idle for too long, others are free at
once. Plain bookkeeping: knows nothing of tensors, sequences or what keys mean.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockTable:
    """Blocks 1 to `num_blocks`. `clock` tells seconds, for `forget_idle` only."""

    def __init__(self, num_blocks: int, clock: Callable[[], float]) -> None:
        self._num_blocks = num_blocks
        self._clock = clock
        self._free = list(range(num_blocks, 0, -1))
        self._holders = [0] * (num_blocks + 1)  # sequences and pins
        self._pins = Counter[int]()
        self._key_of: dict[int, bytes] = {}
        self._named: dict[bytes, int] = {}
        # Named and nobody's, the longest idle first -> since when.
        self._cached = OrderedDict[int, float]()

    @property
    def num_held(self) -> int:
        return self._num_blocks - len(self._free) - len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    def num_available(self, shared: Sequence[int] = ()) -> int:
        """Blocks that `claim` could give out beside `shared`."""
        reused = sum(block in self._cached for block in set(shared))
        return len(self._free) + len(self._cached) - reused

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Blocks of the longest run of known names from the first key."""
        found = []
        for key in keys:
            block = self._named.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def claim(self, num_blocks: int, shared: Sequence[int]) -> list[int]:
        """Hold `shared`, and so many blocks of nobody's beside them: `[*shared, *claimed]`.

        The cache gives way when no block is free, longest idle first. The caller has asked
        `num_available`.
        """
        assert num_blocks <= self.num_available(shared)
        for block in shared:
            assert self._holders[block] or block in self._cached, f"shared block {block} is free"
            self._hold(block)
        while len(self._free) < num_blocks:
            self._forget(next(iter(self._cached)))
        claimed = [self._free.pop() for _ in range(num_blocks)]
        for block in claimed:
            self._holders[block] = 1
        return [*shared, *claimed]

    def release(self, blocks: Sequence[int]) -> None:
        """A sequence leaves. Of its cached blocks the last go first: a prefix serves more."""
        for block in reversed(blocks):
            self._leave(block)

    def pin(self, block: int) -> None:
        """Hold a block that is held or cached, beside who else does."""
        assert self._holders[block] or block in self._cached, f"pinned block {block} is free"
        self._hold(block)
        self._pins[block] += 1

    def unpin(self, block: int) -> None:
        assert self._pins[block], f"block {block} is not pinned"
        self._pins[block] -= 1
        if not self._pins[block]:
            del self._pins[block]
        self._leave(block)

    def name(self, block: int, key: bytes) -> None:
        """Let `lookup` find a held block. A key that has a block keeps it: first name wins."""
        assert self._holders[block], f"named block {block} is free"
        assert self._key_of.get(block, key) == key, f"block {block} has another name"
        if key not in self._named:
            self._named[key] = block
            self._key_of[block] = key

    def is_private(self, block: int) -> bool:
        """Held once, and not to be found: its contents may change."""
        return self._holders[block] == 1 and block not in self._key_of

    def forget(self, keys: Iterable[bytes]) -> int:
        """Free the cached blocks of these names; how many there were."""
        blocks = [self._named[key] for key in dict.fromkeys(keys) if key in self._named]
        idle = [block for block in blocks if block in self._cached]
        for block in idle:
            self._forget(block)
        return len(idle)

    def forget_idle(self, older_than_s: float) -> int:
        """Free the blocks that have been cached for more than so long; how many there were."""
        oldest = self._clock() - older_than_s
        idle = [block for block, since in self._cached.items() if since < oldest]
        for block in idle:
            self._forget(block)
        return len(idle)

    def check(self, held: Iterable[int]) -> None:
        """`held` are the blocks of all sequences, one as often as it is shared; AssertionError if
        a block was lost, is in two places, or counts other holders than it has.
        """
        holders = Counter(held) + self._pins
        ids = sorted([*self._free, *self._cached, *holders])
        assert ids == list(range(1, self._num_blocks + 1)), f"blocks leaked or held twice: {ids}"
        for block in range(1, self._num_blocks + 1):
            counted, actual = self._holders[block], holders[block]
            assert counted == actual, f"block {block} counts {counted} holders of {actual}"
        assert self._named == {key: block for block, key in self._key_of.items()}, "names differ"
        assert self._cached.keys() <= self._key_of.keys(), "a cached block has no name"
        assert not self._key_of.keys() & set(self._free), "a free block has a name"

    def _hold(self, block: int) -> None:
        self._cached.pop(block, None)
        self._holders[block] += 1

    def _leave(self, block: int) -> None:
        assert self._holders[block]
        self._holders[block] -= 1
        if self._holders[block]:
            return
        if block in self._key_of:
            self._cached[block] = self._clock()
        else:
            self._free.append(block)

    def _forget(self, block: int) -> None:
        """Free a cached block."""
        del self._cached[block]
        del self._named[self._key_of.pop(block)]
        self._free.append(block)
