"""Where the blocks of a resting session are put before it goes on: every tier, every pair.

Pure: keys in, places out.
"""

import itertools
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from services.kv_keys import KeyChain
from services.kvstore.tier import Tier

BLOCK_TOKENS = 128


class Place(StrEnum):
    DEVICE = "device"
    RAM = "ram"
    DISK = "disk"
    PEER = "peer"
    COLD = "cold"

    @property
    def tier(self) -> Tier:
        """Raises KeyError for the device, which is no tier of the store."""
        return Tier[self.name]


class Pair(NamedTuple):
    """Blocks alternate between two places, which may be the same."""

    first: Place
    second: Place

    def __str__(self) -> str:
        return self.first if self.first is self.second else f"{self.first} + {self.second}"


PAIRS = tuple(itertools.starmap(Pair, itertools.combinations_with_replacement(Place, 2)))


class SessionKeys(NamedTuple):
    """Of a history whose first whole blocks are computed: bodies, and tails at resume points."""

    bodies: Sequence[bytes]
    tails: Sequence[bytes]

    @classmethod
    def of(cls, root: bytes, tokens: Sequence[int], resume_every: int) -> "SessionKeys":
        """What a worker that has computed these tokens has stored of them."""
        chain = KeyChain(root)
        chain.extend(tokens)
        boundaries = resume_boundaries(len(chain.body_keys), resume_every)
        return cls(chain.body_keys, [chain.tail_key(boundary) for boundary in boundaries])

    @property
    def all(self) -> list[bytes]:
        return [*self.bodies, *self.tails]


def resume_boundaries(num_blocks: int, resume_every: int) -> list[int]:
    """Where so many computed blocks can be resumed: at every N-th boundary and at the last."""
    return sorted({*range(resume_every, num_blocks + 1, resume_every), num_blocks} - {0})


def spread(keys: SessionKeys, pair: Pair) -> dict[Place, list[bytes]]:
    """Every second body and tail in each place; the device has a prefix, or it has nothing."""
    places: dict[Place, list[bytes]] = {place: [] for place in pair}
    if pair.first is Place.DEVICE is not pair.second:
        middle = -(-len(keys.bodies) // 2)
        places[Place.DEVICE] += keys.bodies[:middle]
        places[pair.second] += [*keys.bodies[middle:], *keys.tails]
        return places
    for kind in keys:
        for index, key in enumerate(kind):
            places[pair[index % 2]].append(key)
    return places
