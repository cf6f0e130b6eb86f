"""Sessions that go on over damaged blocks: right tokens, and nothing computed that need not be.

The damage is done in the tier where the blocks lie, under a running worker.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from tests.soak.damage import Damage, Target, damaged
from tests.soak.ledger import Ledger, compare
from tests.soak.nodes import TwoNodes, two_nodes
from tests.soak.places import BLOCK_TOKENS, SessionKeys, resume_boundaries
from tests.soak.requests import answer, request
from tests.soak.resident import run_resident
from tests.soak.sites import Site
from tests.soak.soak_model import soak_model
from tests.soak.traffic import Session, sessions
from tests.soak.worker import (
    CONCURRENT_SESSIONS,
    RESUME_EVERY_BLOCKS,
    Worker,
    running_worker,
)

LONGEST_TOKENS = 4096
NUM_LAYERS = 2  # with a body
# Of so many sessions one goes on twice at once.
TWINS_EVERY = 4
MISSING = "missing part of a boundary"


@dataclass(slots=True)
class DamagedReport:
    tier: str
    sessions: int = 0
    twins: int = 0
    damaged_blobs: Counter[str] = field(default_factory=Counter)
    computed_tokens: int = 0
    needed_tokens: int = 0  # that no sound blob could have spared
    # Requests that computed another number of tokens than needed.
    wrong_spans: list[str] = field(default_factory=list)
    different_tokens: int = 0
    different_logits: int = 0


async def go_on_over_damage(
    site: Site, *, num_sessions: int, seed: int, directory: Path
) -> DamagedReport:
    """Errors of a request propagate: there must be none."""
    report = DamagedReport(site.tier.name)
    played = list(itertools.islice(_two_turn_sessions(seed), num_sessions))
    twins = played[::TWINS_EVERY]
    async with two_nodes(directory) as nodes, running_worker(nodes.home.address) as worker:
        at_once = asyncio.Semaphore(CONCURRENT_SESSIONS)
        ledger = Ledger()

        async def play(session: Session) -> None:
            async with at_once:
                rig = _Rig(site, nodes, worker, report)
                ledger.answers |= await _play(rig, session, has_twin=session in twins)

        async with asyncio.TaskGroup() as tasks:
            for session in played:
                tasks.create_task(play(session))
        ledger.rows = worker.trunk.rows.copy()
    differences = compare(_oracle(played, twins), ledger)
    report.different_tokens, report.different_logits = differences.tokens, differences.logits
    return report


class _Rig(NamedTuple):
    site: Site
    nodes: TwoNodes
    worker: Worker
    report: DamagedReport


async def _play(
    rig: _Rig, session: Session, *, has_twin: bool
) -> dict[tuple[str, int], tuple[int, ...]]:
    """The answers; those of a twin under another name."""
    engine, worker, report = rig.worker.engine, rig.worker, rig.report
    first, _ = await answer(engine, request(session, ()))
    keys = worker.keys_of(session, [first])
    await worker.until_stored(keys)
    worker.release(session, [first])
    await rig.nodes.isolate(keys.all, rig.site.tier)
    draw = random.Random(session.name)
    hurt = set(draw.sample(keys.all, min(draw.choice((1, 1, 2, 4)), len(keys.all))))
    await _damage(rig, keys, hurt, draw)

    asked = request(session, [first])
    twin = replace(asked, request_id=f"{asked.request_id} twin")
    answers = {(session.name, 0): first}
    needed = _needed_tokens(keys, hurt, len(asked.token_ids))
    for name, (said, usage) in zip(
        (session.name, f"{session.name} twin"),
        await asyncio.gather(answer(engine, asked), *([answer(engine, twin)] if has_twin else [])),
        strict=False,
    ):
        answers[name, 1] = said
        report.computed_tokens += usage.computed_tokens
        report.needed_tokens += needed
        # Of two at once, one may find on the device what the other has just computed.
        is_right = usage.computed_tokens == needed or (has_twin and usage.computed_tokens < needed)
        if not is_right:
            report.wrong_spans.append(f"{name}: {usage.computed_tokens}, not {needed}")
    report.sessions += 1
    report.twins += has_twin
    return answers


async def _damage(
    rig: _Rig, keys: SessionKeys, hurt: Collection[bytes], draw: random.Random
) -> None:
    sound = dict(zip(keys.all, await rig.site.read(rig.nodes, keys.all), strict=True))
    for kind in keys:
        for index, key in enumerate(kind):
            if key not in hurt:
                continue
            damage = draw.choice([*Damage, None])
            rig.report.damaged_blobs[damage or MISSING] += 1
            if damage is None:
                await rig.nodes.drop(key, rig.site.tier)
                continue
            blob, neighbour = sound[key], sound[kind[index - 1]]
            other = neighbour if neighbour != blob else draw.randbytes(len(blob))
            wrong = damaged(damage, Target(blob, other, NUM_LAYERS), draw)
            await rig.site.write(rig.nodes, [key], [wrong.ljust(len(blob), b"\xff")])


def _needed_tokens(keys: SessionKeys, hurt: Collection[bytes], num_tokens: int) -> int:
    """What a worker must compute of a prompt of so many tokens: from each damage back to the
    nearest boundary that it can be resumed at, and what is behind the last one."""
    num_blocks = len(keys.bodies)
    boundaries = resume_boundaries(num_blocks, RESUME_EVERY_BLOCKS)
    resumable = {
        boundary for boundary, key in zip(boundaries, keys.tails, strict=True) if key not in hurt
    }
    position, computed = 0, 0
    while position < num_blocks:
        reachable = {position}
        for boundary in range(position + 1, num_blocks + 1):
            if keys.bodies[boundary - 1] in hurt:
                break
            reachable.add(boundary)
        jump = max(reachable & resumable, default=position)
        computed += jump == position
        position = max(jump, position + (jump == position))
    return num_tokens - (num_blocks - computed) * BLOCK_TOKENS


def _two_turn_sessions(seed: int) -> Iterator[Session]:
    """That share nothing with one another, and have some blocks to damage after the first turn."""
    for first in itertools.count(step=64):
        for session in sessions(seed, first, 64, LONGEST_TOKENS):
            turn = session.turns[0]
            if len(turn.prompt) + turn.max_tokens > 3 * BLOCK_TOKENS:
                yield replace(session, cache_salt=session.name, turns=session.turns[:2])


def _oracle(played: Sequence[Session], twins: Sequence[Session]) -> Ledger:
    """A twin says once more what its original says in its second turn."""
    ledger, again = run_resident(soak_model(), played), run_resident(soak_model(), twins)
    first = run_resident(soak_model(), [replace(each, turns=each.turns[:1]) for each in twins])
    ledger.rows += again.rows - first.rows
    for twin in twins:
        ledger.answers[f"{twin.name} twin", 1] = again.answers[twin.name, 1]
    return ledger
