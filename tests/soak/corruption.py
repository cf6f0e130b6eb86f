"""Damage where a tier keeps its blobs, and the read path of a worker over it: each case a miss.

Every batch lies in one tier alone, so that nothing but a miss or wrong bytes can come of it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

from services.kvstore.client import KvClient
from services.kvstore.tier import Tier
from tests.soak.blobs import Case, Tally, cases, client_config
from tests.soak.damage import Damage
from tests.soak.nodes import two_nodes
from tests.soak.sites import Site

_TOGETHER = 256


async def corrupt(site: Site, *, num_cases: int, seed: int, directory: Path) -> Tally:
    """Save, leave in the site's tier alone, damage, read through a worker's client.

    A store whose disk is damaged is restarted every other time: it then scans what is damaged.
    """
    tally, draw = Tally(site.tier.name), random.Random(seed)
    restarts = itertools.cycle((False, site.tier is Tier.DISK))
    async with two_nodes(directory) as nodes:
        client = await KvClient.open(client_config(nodes.home.address))
        endless = cases(seed)
        while tally.injected.total() < num_cases:
            async with asyncio.timeout(30):
                await client.wait_connected()
            batch = list(itertools.islice(endless, _TOGETHER))
            saved = await client.save([case.item() for case in batch])
            assert saved.stored == len(batch), saved
            keys = [case.key for case in batch]
            await nodes.isolate(keys, site.tier)
            if restart := next(restarts):
                await nodes.home.kill()
            assert await site.read(nodes, keys) == [case.blob for case in batch]
            wrong = [case.in_place(draw) if site.is_fixed_size else case.wrong for case in batch]
            await site.write(nodes, keys, wrong)
            if restart:
                await nodes.restart_home()
            await _read_all(client, batch, tally)
            await _assert_gone(client, [case for case in batch if _is_dropped(case, site.tier)])
        await client.close()
    return tally


async def _read_all(client: KvClient, batch: Sequence[Case], tally: Tally) -> None:
    """As a worker restores: every key once, verified payloads or misses."""
    async with asyncio.timeout(30):
        await client.wait_connected()
    payloads: dict[int, bytes] = {}
    deadline_s = asyncio.get_running_loop().time() + 60

    def consume(index: int, payload: memoryview) -> None:
        payloads[index] = bytes(payload)

    keys = [case.key for case in batch]
    async with client.acquire(keys, deadline_s=deadline_s, consume=consume) as blocks:
        served = {block.index async for block in blocks if block.tier is not None}
    assert served == payloads.keys()
    for index, case in enumerate(batch):
        tally.read(case, payloads.get(index))


def _is_dropped(case: Case, tier: Tier) -> bool:
    """A peer, which serves any model, keeps sound blobs of models that are not its asker's."""
    is_sound = case.damage in (Damage.OTHER_MODEL, Damage.OTHER_LAYOUT)
    return case.damage is not None and not (tier is Tier.PEER and is_sound)


async def _assert_gone(client: KvClient, damaged: Sequence[Case]) -> None:
    """What was found damaged is not offered again."""
    async with asyncio.timeout(10):
        while any(await client.locate([case.key for case in damaged])):  # noqa: ASYNC110
            await asyncio.sleep(0.05)  # a peer hears of it later
