"""Where each tier keeps its blobs, for somebody who has no business there."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import redis

from services.kv_keys import KEY_BYTES
from services.kvstore.tier import Tier
from tests.soak.damage import HEADER_BYTES
from tests.soak.nodes import TwoNodes
from tests.soak.store_process import StoreProcess

# A blob's header.
_MAGIC = b"MODEL1KV"
_KEY_OFFSET = 32
_RECORD_ALIGNMENT = 512  # on disk
_PAYLOAD_NBYTES = struct.Struct("<24xQ")


class Site(Protocol):
    """The blobs of a tier, past everybody who guards them. Keys that are not there are an error."""

    # Whether a blob's place is as long as the blob, whatever is written there.
    is_fixed_size: bool

    @property
    def tier(self) -> Tier: ...

    async def read(self, nodes: TwoNodes, keys: Sequence[bytes]) -> list[bytes]: ...

    async def write(self, nodes: TwoNodes, keys: Sequence[bytes], blobs: Sequence[bytes]) -> None:
        """Put these bytes in the place of each blob; what is longer than the place is cut."""


class _Span(NamedTuple):
    path: Path
    offset: int
    nbytes: int


class ArenaSite:
    """The shared memory of the home node's store, or of the peer's."""

    is_fixed_size = True

    def __init__(self, tier: Tier) -> None:
        assert tier is Tier.RAM or tier is Tier.PEER
        self.tier = tier

    async def read(self, nodes: TwoNodes, keys: Sequence[bytes]) -> list[bytes]:
        return _read(await self._spans(nodes, keys))

    async def write(self, nodes: TwoNodes, keys: Sequence[bytes], blobs: Sequence[bytes]) -> None:
        _write(await self._spans(nodes, keys), blobs)

    async def _spans(self, nodes: TwoNodes, keys: Sequence[bytes]) -> list[_Span]:
        store: StoreProcess = nodes.home if self.tier is Tier.RAM else nodes.peer
        path = Path(await store.do("arena"))
        spans = await store.do("spans", keys=[key.hex() for key in keys])
        return [_Span(path, offset, nbytes) for offset, nbytes in spans]


class DiskSite:
    """The segment files of the home node's store."""

    is_fixed_size = True
    tier = Tier.DISK

    async def read(self, nodes: TwoNodes, keys: Sequence[bytes]) -> list[bytes]:
        found = _blobs_on_disk(nodes.home_disk)
        return _read([found[key] for key in keys])

    async def write(self, nodes: TwoNodes, keys: Sequence[bytes], blobs: Sequence[bytes]) -> None:
        found = _blobs_on_disk(nodes.home_disk)
        _write([found[key] for key in keys], blobs)


def _blobs_on_disk(directory: Path) -> dict[bytes, _Span]:
    """Whatever looks like a blob, by key; of several of one key the last, which counts."""
    found = {}
    for path in sorted(directory.glob("*.segment")):
        if not path.stat().st_size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            at = content.find(_MAGIC)
            while at >= 0:
                header = content[at : at + HEADER_BYTES]
                if at % _RECORD_ALIGNMENT == 0 and len(header) == HEADER_BYTES:
                    (payload_nbytes,) = _PAYLOAD_NBYTES.unpack_from(header)
                    key = header[_KEY_OFFSET : _KEY_OFFSET + KEY_BYTES]
                    found[key] = _Span(path, at, HEADER_BYTES + payload_nbytes)
                at = content.find(_MAGIC, at + 1)
    return found


class RedisSite:
    """The values in the Valkey that both nodes use."""

    is_fixed_size = False
    tier = Tier.COLD

    async def read(self, nodes: TwoNodes, keys: Sequence[bytes]) -> list[bytes]:
        with _redis(nodes) as client:
            return [client.get(_value_name(key)) for key in keys]

    async def write(self, nodes: TwoNodes, keys: Sequence[bytes], blobs: Sequence[bytes]) -> None:
        with _redis(nodes) as client:
            for key, blob in zip(keys, blobs, strict=True):
                client.set(_value_name(key), blob, keepttl=True)


def _redis(nodes: TwoNodes) -> redis.Redis:
    valkey = nodes.valkey
    return redis.Redis(host=valkey.host, port=valkey.port, password=valkey.password)


def _value_name(key: bytes) -> str:
    """Of a blob that fits a value; a longer one has more of them."""
    return f"{{model1:{key.hex()}}}:0"


def _read(spans: Sequence[_Span]) -> list[bytes]:
    blobs = []
    for path, offset, nbytes in spans:
        with path.open("rb") as file:
            blobs.append(os.pread(file.fileno(), nbytes, offset))
    return blobs


def _write(spans: Sequence[_Span], blobs: Sequence[bytes]) -> None:
    for (path, offset, nbytes), blob in zip(spans, blobs, strict=True):
        with path.open("r+b") as file:
            os.pwrite(file.fileno(), blob[:nbytes], offset)
