"""The same sessions as the oracle's, between whose turns every block is moved to some tier.

A worker in this process; the node's store, another node's store and a Valkey server in processes of
their own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from model1.kv_pool import KVPool
from services.attention.engine import Engine
from services.generation import KvUsage
from services.kv_keys import root_key
from services.kvstore.acquisition import Acquisition
from services.kvstore.client import KvClient, Saved, SaveItem
from services.kvstore.tier import Tier, TierCost
from tests.soak.nodes import TwoNodes
from tests.soak.places import PAIRS, Pair, Place, SessionKeys, spread
from tests.soak.requests import answer, request
from tests.soak.traffic import Session, said_so_far

CONCURRENT_SESSIONS = 32
RESUME_EVERY_BLOCKS = 8
STORED_TIMEOUT_SECONDS = 60.0
MODEL_DIGEST = b"model of a proof"
_POLL_SECONDS = 0.25
_FREE = TierCost(latency_seconds=0.0, bytes_per_second=1e15)


class EagerStore:
    """A `BlockStore`: the client as it is, but loading counts as free and is waited for.

    A worker of a tiny model would rather compute than load, and rightly so. Every second prefetch
    is left out: then blocks come from their tier while the request waits, and else from RAM.
    """

    def __init__(self, client: KvClient) -> None:
        self._client = client
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
        patient_s = asyncio.get_running_loop().time() + STORED_TIMEOUT_SECONDS
        return self._client.acquire(keys, deadline_s=patient_s, consume=consume)

    async def prefetch(self, keys: Sequence[bytes]) -> None:
        if next(self._prefetches):
            await self._client.prefetch(keys)

    async def save(self, items: Sequence[SaveItem]) -> Saved:
        return await self._client.save(items)

    def costs(self) -> Mapping[Tier, TierCost]:
        return dict.fromkeys(Tier, _FREE)


@dataclass(slots=True)
class Resumes:
    """Turns that went on from stored blocks, by where these lay."""

    by_pair: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)  # restored, by the worker's own account
    computed_tokens: int = 0  # of the prompts of resumed turns
    without_blocks: int = 0  # turns of histories shorter than a block

    def count(self, pair: Pair, usage: KvUsage) -> None:
        """A turn after which the worker gave this account of itself."""
        self.by_pair[str(pair)] += 1
        for place in Place:
            self.tokens[place] += getattr(usage, f"{place}_tokens")
        self.computed_tokens += usage.computed_tokens


class TieredRun:
    """Plays sessions on an engine and moves their blocks about between the turns."""

    def __init__(self, engine: Engine, pool: KVPool, client: KvClient, nodes: TwoNodes) -> None:
        self.resumes = Resumes()
        self._engine = engine
        self._pool = pool
        self._client = client
        self._nodes = nodes
        self._pairs = itertools.cycle(PAIRS)
        self._answers: dict[str, list[tuple[int, ...]]] = {}

    async def play(self, sessions: Sequence[Session]) -> dict[tuple[str, int], tuple[int, ...]]:
        """All turns of all sessions, CONCURRENT_SESSIONS at once: the answers."""
        at_once = asyncio.Semaphore(CONCURRENT_SESSIONS)

        async def play_one(session: Session) -> None:
            async with at_once:
                await self._play(session)

        self._answers.clear()
        async with asyncio.TaskGroup() as tasks:
            for session in sessions:
                tasks.create_task(play_one(session))
        return {
            (name, turn): said
            for name, answers in self._answers.items()
            for turn, said in enumerate(answers)
        }

    async def _play(self, session: Session) -> None:
        answers = self._answers[session.name] = []
        pair: Pair | None = None
        for _ in session.turns:
            said, usage = await answer(self._engine, request(session, answers))
            answers.append(said)
            if pair is not None:
                self.resumes.count(pair, usage)
            pair = None
            if len(answers) < len(session.turns):
                keys = self.keys_of(session, answers)
                if keys.bodies:
                    pair = next(self._pairs)
                    await self.until_stored(keys)
                    await self.put(keys, pair)
                else:
                    self.resumes.without_blocks += 1

    async def scatter(self, session: Session, pair: Pair) -> None:
        """Move the blocks of a session that was played."""
        keys = self.keys_of(session, self._answers[session.name])
        if keys.bodies:
            await self.put(keys, pair)

    async def put(self, keys: SessionKeys, pair: Pair) -> None:
        """Move blocks that are in the store already."""
        for place, chosen in spread(keys, pair).items():
            if place is not Place.DEVICE:
                self._engine.release(chosen)
                await self._nodes.put(chosen, place.tier)

    async def until_stored(self, keys: SessionKeys) -> None:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + STORED_TIMEOUT_SECONDS
        missing = keys.all
        while True:
            found = await self._client.locate(missing)
            missing = [key for key, tier in zip(missing, found, strict=True) if tier is None]
            if not missing:
                return
            assert loop.time() < deadline_s, (
                f"not stored after {STORED_TIMEOUT_SECONDS} s: "
                f"{sum(key in missing for key in keys.bodies)} of {len(keys.bodies)} bodies, "
                f"{sum(key in missing for key in keys.tails)} of {len(keys.tails)} tails; "
                f"{self._engine.stats().kv}"
            )
            await asyncio.sleep(_POLL_SECONDS)

    def keys_of(self, session: Session, answers: Sequence[tuple[int, ...]]) -> SessionKeys:
        """Of what is computed: the last token is said, but nothing was computed from it yet."""
        root = root_key(MODEL_DIGEST, self._pool.layout_digest, session.cache_salt)
        return SessionKeys.of(root, said_so_far(session, answers)[:-1], RESUME_EVERY_BLOCKS)
