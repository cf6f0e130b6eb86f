"""Damage where a tier keeps its blobs, and the read path of a worker over it: each case a miss.

Every batch lies in one tier alone, so that nothing but a miss or wrong bytes can come of it.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from services.kvstore.client import KvClient
from services.kvstore.tier import Tier
from tests.soak.blobs import Case, Tally, cases, client_config
from tests.soak.damage import Damage
from tests.soak.nodes import TwoNodes, two_nodes

_TOGETHER = 256
_RECORD_HEADER_KEY = 32  # offset of the key in a blob's header


class Site(Protocol):
    """A place to do damage in."""

    async def damage(self, nodes: TwoNodes, batch: Sequence[Case], draw: random.Random) -> None:
        """The batch lies in the site's tier alone: put what is wrong in its place."""


class ArenaSite:
    """The shared memory of the home node's store, or of the peer's."""

    def __init__(self, *, of_peer: bool) -> None:
        self._of_peer = of_peer

    async def damage(self, nodes: TwoNodes, batch: Sequence[Case], draw: random.Random) -> None:
        store = nodes.peer if self._of_peer else nodes.home
        spans = await store.do("spans", keys=[case.key.hex() for case in batch])
        _scribble(Path(await store.do("arena")), batch, [offset for offset, _ in spans], draw)


class DiskSite:
    """The segment files; every other time the store is killed and scans them when it comes back."""

    def __init__(self) -> None:
        self._restarts = itertools.cycle((False, True))

    async def damage(self, nodes: TwoNodes, batch: Sequence[Case], draw: random.Random) -> None:
        restarts = next(self._restarts)
        if restarts:
            await nodes.home.kill()
        segments = sorted(path for path in nodes.home_disk.iterdir() if path.stat().st_size)
        places = {path: _find(path, batch) for path in segments}
        for path, offsets in places.items():
            found = [case for case, offset in zip(batch, offsets, strict=True) if offset >= 0]
            _scribble(path, found, [offset for offset in offsets if offset >= 0], draw)
        assert sum(offset >= 0 for offsets in places.values() for offset in offsets) == len(batch)
        if restarts:
            await nodes.restart_home()


async def corrupt(tier: Tier, site: Site, *, num_cases: int, seed: int, directory: Path) -> Tally:
    """Save, leave in `tier` alone, damage, read through a worker's client."""
    tally, draw = Tally(type(site).__name__), random.Random(seed)
    async with two_nodes(directory) as nodes:
        client = await KvClient.open(client_config(nodes.home.address))
        endless = cases(seed)
        while tally.injected.total() < num_cases:
            async with asyncio.timeout(30):
                await client.wait_connected()
            batch = list(itertools.islice(endless, _TOGETHER))
            saved = await client.save([case.item() for case in batch])
            assert saved.stored == len(batch), saved
            await nodes.isolate([case.key for case in batch], tier)
            await site.damage(nodes, batch, draw)
            await _read_all(client, batch, tally)
            await _assert_gone(client, [case for case in batch if _is_dropped(case, tier)])
        assert client.num_leases == 0
        await client.close()
        await nodes.check()
    return tally


async def _read_all(client: KvClient, batch: Sequence[Case], tally: Tally) -> None:
    """As a worker restores: every key once, verified payloads or misses."""
    async with asyncio.timeout(30):
        await client.wait_connected()
    deadline_s = asyncio.get_running_loop().time() + 60
    async with client.acquire([case.key for case in batch], deadline_s=deadline_s) as blocks:
        async for block in blocks:
            payload = None if block.payload is None else bytes(block.payload)
            tally.read(batch[block.index], payload)


def _is_dropped(case: Case, tier: Tier) -> bool:
    """A peer, which serves any model, keeps sound blobs of models that are not its asker's."""
    is_sound = case.damage in (Damage.OTHER_MODEL, Damage.OTHER_LAYOUT)
    return case.damage is not None and not (tier is Tier.PEER and is_sound)


async def _assert_gone(client: KvClient, damaged: Sequence[Case]) -> None:
    """What was found damaged is not offered again."""
    async with asyncio.timeout(10):
        while any(await client.locate([case.key for case in damaged])):  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # a peer hears of it later


def _find(path: Path, batch: Sequence[Case]) -> list[int]:
    """Where the blob of each case starts in the file; -1 if it is not in it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        # Blobs of a key are appended: the last one counts.
        found = [content.rfind(case.key) for case in batch]
    return [at - _RECORD_HEADER_KEY if at >= 0 else -1 for at in found]


def _scribble(
    path: Path, batch: Sequence[Case], offsets: Sequence[int], draw: random.Random
) -> None:
    with path.open("r+b") as file:
        for case, offset in zip(batch, offsets, strict=True):
            assert os.pread(file.fileno(), len(case.blob), offset) == case.blob
            os.pwrite(file.fileno(), case.in_place(draw), offset)
