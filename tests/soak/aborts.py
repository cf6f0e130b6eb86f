"""Requests that are aborted at any moment: queued, looking up, loading, computing, or answering.

Nothing may be left of them, in the worker or in any tier, and no memory may be lost on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from dataclasses import dataclass, field
from pathlib import Path

from services.attention.engine import Engine
from services.errors import RequestCancelled
from services.generation import GenerationRequest
from tests.soak.nodes import two_nodes
from tests.soak.places import PAIRS
from tests.soak.store_process import resident_bytes
from tests.soak.tiered import TieredRun
from tests.soak.traffic import Session, sessions
from tests.soak.worker import CONCURRENT_SESSIONS, running_worker

LONGEST_TOKENS = 2048
HISTORIES = 48
# Long enough for some to answer; most are gone before.
MEAN_PATIENCE_SECONDS = 0.15
MEASUREMENTS = 12
# Before so many requests, the blocks of their session are moved to other tiers.
SCATTERED_SHARE = 0.05


@dataclass(slots=True)
class AbortReport:
    aborted: int = 0
    finished: int = 0  # before the abort came
    # Resident bytes of the worker, then of each store, at each measurement.
    rss_bytes: list[list[int]] = field(default_factory=list)

    @property
    def growth(self) -> list[float]:
        """Of each process: the last third's mean over the middle third's, less one."""
        third = len(self.rss_bytes) // 3
        middle, last = self.rss_bytes[third : 2 * third], self.rss_bytes[-third:]
        return [
            sum(late) / len(late) / (sum(early) / len(early)) - 1
            for early, late in zip(zip(*middle, strict=True), zip(*last, strict=True), strict=True)
        ]


async def abort_many(num_aborts: int, seed: int, directory: Path) -> AbortReport:
    """Leaves through the checks of worker and nodes: nothing is held, in any process."""
    report, draw = AbortReport(), random.Random(f"aborts {seed}")
    known = sessions(seed, 0, HISTORIES, LONGEST_TOKENS)
    async with two_nodes(directory) as nodes, running_worker(nodes.home.address) as worker:
        run = TieredRun(worker, nodes)
        await run.play(known)  # whose blocks then lie in the tiers
        every = num_aborts // MEASUREMENTS
        while report.aborted < num_aborts:
            before = report.aborted
            async with asyncio.TaskGroup() as tasks:
                for number in range(CONCURRENT_SESSIONS):
                    lane = _Lane(
                        f"lane {number}", run, worker.engine, known, random.Random(draw.random())
                    )
                    tasks.create_task(lane.run(report, before + every))
            report.rss_bytes.append([resident_bytes(), *await nodes.resident_bytes()])
    return report


@dataclass(slots=True)
class _Lane:
    """One client after the other."""

    name: str
    run_of_known: TieredRun
    engine: Engine
    known: list[Session]
    draw: random.Random

    async def run(self, report: AbortReport, until_aborted: int) -> None:
        number = report.aborted
        while report.aborted < until_aborted:
            number += 1
            session = self.draw.choice(self.known)
            if self.draw.random() < SCATTERED_SHARE:
                await self.run_of_known.scatter(session, self.draw.choice(PAIRS))
            asked = _request(f"{self.name} {number}", session, self.draw)
            await _ask_and_leave(self.engine, asked, self.draw, report)


def _request(name: str, session: Session, draw: random.Random) -> GenerationRequest:
    """A known history, up to some point, and sometimes something new behind it."""
    tokens = session.turns[0].prompt
    new = tuple(draw.choices(range(2, 258), k=draw.choice((0, 0, 5, 300))))
    return GenerationRequest(
        request_id=name,
        token_ids=(*tokens[: draw.randint(1, len(tokens))], *new),
        max_tokens=draw.choice((1, 20, 200)),
        stop_token_ids=frozenset(),
        temperature=0.0,
        cache_salt=session.cache_salt,
    )


async def _ask_and_leave(
    engine: Engine, asked: GenerationRequest, draw: random.Random, report: AbortReport
) -> None:
    patience_s = draw.choice((0.0, draw.expovariate(1 / MEAN_PATIENCE_SECONDS)))
    leaves = draw.random() < 0.5
    with engine.submit(asked) as stream:
        try:
            async with asyncio.timeout(patience_s):
                async for _ in stream:
                    pass
        except TimeoutError:
            if stream.has_ended:  # at that very moment
                report.finished += 1
                return
            report.aborted += 1
            if leaves:
                return
            engine.abort(asked.request_id)
            with contextlib.suppress(RequestCancelled):
                async for _ in stream:
                    pass
        else:
            report.finished += 1
