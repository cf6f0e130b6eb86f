"""The form in which KV state lies in every tier: one header, one payload, both checksummed.

    offset size
      0     8   magic
      8     2   format version
     10     2   kind
     12     4   token position where the range starts
     16     4   token position where it ends (exclusive)
     20     4   0
     24     8   payload length in bytes
     32    32   key
     64    16   model digest
     80    16   layout digest
     96     8   0
    104     8   xxh3_64 of the payload
    112     8   0
    120     8   xxh3_64 of bytes 0..119

Integers are little-endian. The header is a multiple of 64 bytes, so that a payload in an aligned
buffer is aligned for vector loads. Every reader verifies; what does not verify is `Damaged`: a tier
counts it and treats it as a miss. Knows no tier, and not what a payload means.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import TypeAlias

import xxhash

from services.kv_keys import DIGEST_BYTES, KEY_BYTES

HEADER_BYTES = 128
FORMAT_VERSION = 1

MAGIC = b"MODEL1KV"
_CHECKED = struct.Struct(f"<8sHHII4xQ{KEY_BYTES}s{DIGEST_BYTES}s{DIGEST_BYTES}s8xQ8x")
_CHECKSUM = struct.Struct("<Q")
_BLANK = bytes(HEADER_BYTES)

# Magic, version, kind, start, end, payload length, key, model digest, layout digest, and the
# checksum that the payload must have.
_Fields: TypeAlias = tuple[bytes, int, int, int, int, int, bytes, bytes, bytes, int]


class BlobKind(IntEnum):
    BODY = 1  # the compressed entries and index keys of one block, all layers
    TAIL = 2  # what resuming at a boundary needs beside the bodies before it


class DamageReason(StrEnum):
    """Why a blob is not what was asked for, in the order in which it is looked at."""

    TRUNCATED = "truncated"
    MAGIC = "magic"
    VERSION = "version"
    HEADER_CHECKSUM = "header_checksum"
    HEADER_FIELD = "header_field"
    KEY = "key"
    MODEL = "model"
    LAYOUT = "layout"
    PAYLOAD_CHECKSUM = "payload_checksum"


_KINDS = frozenset(map(int, BlobKind))


class Damaged(Exception):
    """These bytes are not the blob that was asked for. Never served; recomputed instead."""

    def __init__(self, reason: DamageReason) -> None:
        super().__init__(f"damaged blob: {reason}")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What reading every blob of a tier found."""

    num_blobs: int
    damaged: Counter[DamageReason]


@dataclass(frozen=True, slots=True)
class BlobHeader:
    """What a blob says about itself. Tokens [start, end) of one sequence."""

    kind: BlobKind
    key: bytes
    model_digest: bytes
    layout_digest: bytes
    start: int
    end: int
    payload_nbytes: int

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise ValueError(f"a blob's key has {KEY_BYTES} bytes, got {len(self.key)}")
        for digest in (self.model_digest, self.layout_digest):
            if len(digest) != DIGEST_BYTES:
                raise ValueError(f"a blob's digests have {DIGEST_BYTES} bytes, got {len(digest)}")
        if not 0 <= self.start <= self.end < 2**32:
            raise ValueError(f"not a token range: [{self.start}, {self.end})")
        if self.payload_nbytes < 0:
            raise ValueError(f"a payload of {self.payload_nbytes} bytes")

    @property
    def nbytes(self) -> int:
        """Of the whole blob."""
        return HEADER_BYTES + self.payload_nbytes


def seal_into(buffer: memoryview, header: BlobHeader, fill: Callable[[memoryview], None]) -> None:
    """Make `buffer` the blob: `fill` writes the whole payload, the header goes in last.

    `buffer` is writable, one-dimensional bytes, at least `header.nbytes` long. Until this returns,
    and for ever if `fill` raises, what lies there is not a blob for any reader.
    """
    payload = buffer[HEADER_BYTES : header.nbytes]
    if len(payload) != header.payload_nbytes:
        raise ValueError(f"{len(buffer)} bytes have no room for a blob of {header.nbytes}")
    buffer[:HEADER_BYTES] = _BLANK
    fill(payload)
    checked = _CHECKED.pack(
        MAGIC,
        FORMAT_VERSION,
        header.kind,
        header.start,
        header.end,
        header.payload_nbytes,
        header.key,
        header.model_digest,
        header.layout_digest,
        xxhash.xxh3_64_intdigest(payload),
    )
    buffer[:HEADER_BYTES] = checked + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(checked))


def read_header(buffer: memoryview) -> BlobHeader:
    """The header at the start of `buffer`, verified by itself; the payload need not be there.

    Raises Damaged.
    """
    return _header_of(_verified_fields(buffer))


def check_blob(buffer: memoryview, key: bytes) -> BlobHeader:
    """Verify that `buffer` starts with the blob of `key`, whatever its model; raises Damaged."""
    fields = _verified_fields(buffer)
    header = _header_of(fields)
    if header.key != key:
        raise Damaged(DamageReason.KEY)
    _verified_payload(buffer, fields)
    return header


def open_blob(
    buffer: memoryview, *, key: bytes, model_digest: bytes, layout_digest: bytes
) -> memoryview:
    """The payload of the blob at the start of `buffer`, a view and no copy.

    Raises Damaged unless it is the blob of `key`, of this model in this layout, bit for bit as it
    was sealed.
    """
    fields = _verified_fields(buffer)
    _, _, kind, start, end, _, sealed_key, sealed_model, sealed_layout, _ = fields
    # Not as a BlobHeader: that takes as long as the checksum of a payload.
    if kind not in _KINDS or start > end:
        raise Damaged(DamageReason.HEADER_FIELD)
    if sealed_key != key:
        raise Damaged(DamageReason.KEY)
    if sealed_model != model_digest:
        raise Damaged(DamageReason.MODEL)
    if sealed_layout != layout_digest:
        raise Damaged(DamageReason.LAYOUT)
    return _verified_payload(buffer, fields)


def _verified_fields(buffer: memoryview) -> _Fields:
    if len(buffer) < HEADER_BYTES:
        raise Damaged(DamageReason.TRUNCATED)
    checked = bytes(buffer[: _CHECKED.size])
    fields: _Fields = _CHECKED.unpack(checked)
    if fields[0] != MAGIC:
        raise Damaged(DamageReason.MAGIC)
    if fields[1] != FORMAT_VERSION:
        raise Damaged(DamageReason.VERSION)
    (checksum,) = _CHECKSUM.unpack(buffer[_CHECKED.size : HEADER_BYTES])
    if checksum != xxhash.xxh3_64_intdigest(checked):
        raise Damaged(DamageReason.HEADER_CHECKSUM)
    return fields


def _header_of(fields: _Fields) -> BlobHeader:
    _, _, kind, start, end, payload_nbytes, key, model_digest, layout_digest, _ = fields
    try:
        return BlobHeader(
            kind=BlobKind(kind),
            key=key,
            model_digest=model_digest,
            layout_digest=layout_digest,
            start=start,
            end=end,
            payload_nbytes=payload_nbytes,
        )
    except ValueError as error:  # sealed by something that is not this code
        raise Damaged(DamageReason.HEADER_FIELD) from error


def _verified_payload(buffer: memoryview, fields: _Fields) -> memoryview:
    payload_nbytes, checksum = fields[5], fields[9]
    payload = buffer[HEADER_BYTES : HEADER_BYTES + payload_nbytes]
    if len(payload) != payload_nbytes:
        raise Damaged(DamageReason.TRUNCATED)
    if xxhash.xxh3_64_intdigest(payload) != checksum:
        raise Damaged(DamageReason.PAYLOAD_CHECKSUM)
    return payload
