"""The same sessions as the oracle's, between whose turns every block is moved to some tier.

A worker in this process; the node's store, another node's store and a Valkey server in processes of
their own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.generation import KvUsage
from tests.soak.nodes import TwoNodes
from tests.soak.places import PAIRS, Pair, Place, SessionKeys, spread
from tests.soak.requests import answer, request
from tests.soak.traffic import Session
from tests.soak.worker import CONCURRENT_SESSIONS, Worker


@dataclass(slots=True)
class Resumes:
    """Turns that went on from stored blocks, by where these lay."""

    sessions: int = 0  # with at least one such turn
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

    def __init__(self, worker: Worker, nodes: TwoNodes) -> None:
        self.resumes = Resumes()
        self._worker = worker
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
        is_resumed = False
        for _ in session.turns:
            said, usage = await answer(self._worker.engine, request(session, answers))
            answers.append(said)
            if pair is not None:
                self.resumes.count(pair, usage)
                is_resumed = True
            pair = None
            if len(answers) < len(session.turns):
                keys = self._worker.keys_of(session, answers)
                if keys.bodies:
                    pair = next(self._pairs)
                    await self._worker.until_stored(keys)
                    await self.put(keys, pair)
                else:
                    self.resumes.without_blocks += 1
        self.resumes.sessions += is_resumed

    async def scatter(self, session: Session, pair: Pair) -> None:
        """Move the blocks of a session that was played."""
        keys = self._worker.keys_of(session, self._answers[session.name])
        if keys.bodies:
            await self.put(keys, pair)

    async def put(self, keys: SessionKeys, pair: Pair) -> None:
        """Move blocks that are in the store already."""
        for place, chosen in spread(keys, pair).items():
            if place is not Place.DEVICE:
                self._worker.engine.release(chosen)
                await self._nodes.put(chosen, place.tier)
