"""A worker in this process over a store in another: what the proofs drive.

Nothing of the product is changed but one thing: loading counts as free.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from model1.kv_pool import KVPool
from services.attention.engine import Engine, EngineConfig
from services.attention.kv_cache import KvCacheConfig
from services.attention.local import LocalExperts
from services.attention.scheduler import SchedulerLimits
from services.kv_keys import root_key
from services.kvstore.acquisition import Acquisition
from services.kvstore.client import KvClient, KvClientConfig, Saved, SaveItem
from services.kvstore.tier import Tier, TierCost
from tests.soak.ledger import RecordingTrunk
from tests.soak.places import SessionKeys
from tests.soak.soak_model import soak_model
from tests.soak.traffic import LONGEST_TOKENS, Session, said_so_far

CONCURRENT_SESSIONS = 32
RESUME_EVERY_BLOCKS = 8
STORED_TIMEOUT_SECONDS = 60.0
MODEL_DIGEST = b"model of a proof"
# Less than the sessions of a wave need: blocks leave the device for want of room as well.
POOL_TOKENS = 16 * LONGEST_TOKENS
MAX_STEP_TOKENS = 512
# On a machine with other things to do: what is stored must be loaded, not given up.
LOAD_SECONDS = 60.0
_POLL_SECONDS = 0.25
_FREE = TierCost(latency_seconds=0.0, bytes_per_second=1e15)


class EagerStore:
    """A `BlockStore`: the client as it is, but loading counts as free and is waited for.

    A worker of a tiny model would rather compute than load, and rightly so. Every second prefetch
    is left out: then blocks come from their tier while the request waits, and else from RAM.
    """

    def __init__(self, client: KvClient, load_seconds: float) -> None:
        self._client = client
        self._load_seconds = load_seconds
        self._prefetches = itertools.cycle((True, False))

    @property
    def connected(self) -> bool:
        return self._client.connected

    async def locate(self, keys: Sequence[bytes]) -> list[Tier | None]:
        return await self._client.locate(keys)

    def acquire(
        self,
        keys: Sequence[bytes],
        *,
        deadline_s: float,
        consume: Callable[[int, memoryview], None],
    ) -> Acquisition:
        patient_s = asyncio.get_running_loop().time() + self._load_seconds
        return self._client.acquire(keys, deadline_s=patient_s, consume=consume)

    async def prefetch(self, keys: Sequence[bytes]) -> None:
        if next(self._prefetches):
            await self._client.prefetch(keys)

    async def save(self, items: Sequence[SaveItem]) -> Saved:
        return await self._client.save(items)

    def costs(self) -> Mapping[Tier, TierCost]:
        return dict.fromkeys(Tier, _FREE)


@dataclass(frozen=True, slots=True)
class Worker:
    """A running engine, what its passes said, and what it has in the store."""

    engine: Engine
    trunk: RecordingTrunk
    pool: KVPool
    client: KvClient

    def keys_of(
        self,
        session: Session,
        answers: Sequence[tuple[int, ...]],
        resume_every: int = RESUME_EVERY_BLOCKS,
    ) -> SessionKeys:
        """Of what is computed: the last token is said, but nothing was computed from it yet."""
        root = root_key(MODEL_DIGEST, self.pool.layout_digest, session.cache_salt)
        return SessionKeys.of(root, said_so_far(session, answers)[:-1], resume_every)

    def release(self, session: Session, answers: Sequence[tuple[int, ...]]) -> None:
        """Let the worker keep nothing of the session, tails between resume points included."""
        self.engine.release(self.keys_of(session, answers, resume_every=1).all)

    async def until_stored(self, keys: SessionKeys) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + STORED_TIMEOUT_SECONDS
        missing = keys.all
        while True:
            found = await self.client.locate(missing)
            missing = [key for key, tier in zip(missing, found, strict=True) if tier is None]
            if not missing:
                return
            assert loop.time() < deadline_s, (
                f"not stored after {STORED_TIMEOUT_SECONDS} s: "
                f"{sum(key in missing for key in keys.bodies)} of {len(keys.bodies)} bodies, "
                f"{sum(key in missing for key in keys.tails)} of {len(keys.tails)} tails; "
                f"{self.engine.stats().kv}"
            )
            await asyncio.sleep(_POLL_SECONDS)


@asynccontextmanager
async def running_worker(address: str, load_seconds: float = LOAD_SECONDS) -> AsyncIterator[Worker]:
    """Of the node whose store is at `address`; its engine is checked at the end."""
    model = soak_model()
    trunk = RecordingTrunk(model.trunk)
    pool = model.pool(POOL_TOKENS, CONCURRENT_SESSIONS)
    client = await KvClient.open(
        KvClientConfig(
            address=address,
            name="soak",
            model_digest=MODEL_DIGEST,
            layout_digest=pool.layout_digest,
            call_timeout_seconds=load_seconds,
        )
    )
    async with asyncio.timeout(LOAD_SECONDS):
        await client.wait_connected()
    config = EngineConfig(
        limits=SchedulerLimits(max_batch_tokens=MAX_STEP_TOKENS, max_sequences=CONCURRENT_SESSIONS),
        kv=KvCacheConfig(
            resume_every_blocks=RESUME_EVERY_BLOCKS,
            load_timeout_seconds=load_seconds,
            load_patience_seconds=load_seconds,
        ),
    )
    engine = Engine(
        trunk,
        pool,
        LocalExperts(model.experts),
        config,
        store=EagerStore(client, load_seconds),
        model_digest=MODEL_DIGEST,
    )
    running = asyncio.create_task(engine.run())
    try:
        yield Worker(engine, trunk, pool, client)
    finally:
        engine.close()
        await running
        engine.check()
        await client.close()
