"""What storage, a crash or a faulty writer can make of a blob: every kind of it, at random.

Works on the bytes of a sealed blob by the layout that services/kvstore/blob.py documents, and with
checksums of its own: a fault of the code under test does not hide itself here.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass
from enum import StrEnum

import xxhash

HEADER_BYTES = 128
_PAYLOAD_CHECKSUM = slice(104, 112)
_HEADER_CHECKED, _HEADER_CHECKSUM = slice(0, 120), slice(120, 128)
_MODEL, _LAYOUT = slice(64, 80), slice(80, 96)
SECTOR_BYTES, PAGE_BYTES = 512, 4096


class Damage(StrEnum):
    """Of a blob that is there. What is missing altogether is another matter: see `Missing`."""

    BIT_FLIP = "bit flip"
    TRUNCATION = "truncation"
    SWAPPED_PAYLOADS = "swapped payloads"
    STALE_GENERATION = "stale generation"  # the whole and sound blob of another key
    LAYER_ORDER = "wrong layer order"  # the layers' parts in another order, checksums unchanged
    OTHER_LAYOUT = "wrong layout"  # sound, but its writer had another dtype or layer order
    OTHER_MODEL = "wrong model"  # sound, but of another model
    TORN_WRITE = "torn write"  # what lay there before, from some sector on
    ZERO_PAGE = "zero page"


@dataclass(frozen=True, slots=True)
class Target:
    """A sealed blob, a sound one of another key and of the same length, and the model's layers."""

    blob: bytes
    other: bytes
    num_layers: int


def damaged(damage: Damage, target: Target, draw: random.Random) -> bytes:
    """Bytes to stand where the blob stood: never equal to it, and shorter only if truncated."""
    wrong = bytearray(target.blob)
    if damage is Damage.TRUNCATION:
        del wrong[draw.randrange(len(wrong)) :]
    elif damage is Damage.BIT_FLIP:
        # As likely in the header as in the payload, which is far longer.
        first, end = draw.choice(((0, HEADER_BYTES), (HEADER_BYTES, len(wrong))))
        wrong[draw.randrange(first, end)] ^= 1 << draw.randrange(8)
    elif damage is Damage.SWAPPED_PAYLOADS:
        wrong[HEADER_BYTES:] = target.other[HEADER_BYTES:]
    elif damage is Damage.STALE_GENERATION:
        wrong[:] = target.other
    elif damage is Damage.LAYER_ORDER:
        wrong[HEADER_BYTES:] = _other_order(target, draw)
    elif damage is Damage.OTHER_LAYOUT:
        if draw.random() < 0.5:
            wrong[HEADER_BYTES:] = _other_order(target, draw)
        wrong[_LAYOUT] = draw.randbytes(16)
        _seal(wrong)
    elif damage is Damage.OTHER_MODEL:
        wrong[_MODEL] = draw.randbytes(16)
        _seal(wrong)
    elif damage is Damage.TORN_WRITE:
        before = draw.choice((target.other, bytes(len(wrong)), draw.randbytes(len(wrong))))
        cut = draw.randrange(0, len(wrong), SECTOR_BYTES)
        if draw.random() < 0.5:
            wrong[cut:] = before[cut:]  # its end never reached the medium
        else:
            cut = max(cut, SECTOR_BYTES)
            wrong[:cut] = before[:cut]  # its start did not: sectors are written in any order
    else:
        start = draw.randrange(0, len(wrong), PAGE_BYTES)
        wrong[start : start + PAGE_BYTES] = bytes(len(wrong[start : start + PAGE_BYTES]))
    assert wrong != target.blob, f"{damage} left the blob as it was"
    return bytes(wrong)


def _other_order(target: Target, draw: random.Random) -> bytes:
    """The payload with its layers' equal parts in another order; odd bytes stay at the end."""
    payload = target.blob[HEADER_BYTES:]
    size = len(payload) // target.num_layers
    parts = [payload[i * size : (i + 1) * size] for i in range(target.num_layers)]
    while (shuffled := draw.sample(parts, len(parts))) == parts:
        pass
    return b"".join(shuffled) + payload[size * target.num_layers :]


def _seal(blob: bytearray) -> None:
    """Checksums that fit."""
    blob[_PAYLOAD_CHECKSUM] = struct.pack("<Q", xxhash.xxh3_64_intdigest(blob[HEADER_BYTES:]))
    blob[_HEADER_CHECKSUM] = struct.pack("<Q", xxhash.xxh3_64_intdigest(blob[_HEADER_CHECKED]))
