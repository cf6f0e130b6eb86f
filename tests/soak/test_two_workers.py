"""A session that goes back and forth between the workers of two nodes, and outlives one of them.

The nodes are two stores on this machine, each with a worker of its own; tests/e2e/test_two_nodes.py
has two raylets.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from services.generation import KvUsage
from services.kvstore.tier import Tier
from tests.soak.ledger import Ledger, compare
from tests.soak.nodes import two_nodes
from tests.soak.requests import answer, request
from tests.soak.resident import run_resident
from tests.soak.soak_model import soak_model
from tests.soak.traffic import Session, sessions
from tests.soak.worker import Worker, running_worker

NUM_SESSIONS = 60
LONGEST_TOKENS = 2048


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_sessions_move_between_nodes_and_outlive_one(tmp_path: Path) -> None:
    chosen = [each for each in sessions(12, 0, 1200, LONGEST_TOKENS) if _is_resumed(each)]
    played = chosen[:NUM_SESSIONS]
    answers: dict[str, list[tuple[int, ...]]] = {session.name: [] for session in played}
    async with (
        two_nodes(tmp_path) as nodes,
        running_worker(nodes.home.address) as there,
        running_worker(nodes.peer.address) as here,
    ):
        await _turn(there, played, answers)
        from_peer = await _turn(here, played, answers)
        await nodes.peer.do("flush")
        # The other node dies; what this one has of the sessions goes as well, but for Redis.
        await nodes.home.kill()
        for session in played:
            keys = here.keys_of(session, answers[session.name]).all
            here.release(session, answers[session.name])
            for tier in (Tier.RAM, Tier.DISK):
                await nodes.peer.drop(tier, keys)
        from_redis = await _turn(here, played, answers)
        await nodes.restart_home()
        ledger = Ledger(
            {
                (name, turn): said
                for name, all_ in answers.items()
                for turn, said in enumerate(all_)
            },
            there.trunk.rows + here.trunk.rows,
        )
    differences = compare(run_resident(soak_model(), played), ledger)
    print(f"{len(played)} sessions; second turns {+from_peer}; third turns {+from_redis}")
    assert (differences.tokens, differences.logits) == (0, 0), differences
    assert from_peer["peer"] > 0 and from_peer["cold"] == 0
    assert from_redis["cold"] > 0
    for usage in (from_peer, from_redis):
        assert usage["computed"] < sum(usage.values()) / 2


def _is_resumed(session: Session) -> bool:
    first = session.turns[0]
    return len(session.turns) == 3 and len(first.prompt) + first.max_tokens > 2 * 128


async def _turn(
    worker: Worker, played: Sequence[Session], answers: dict[str, list[tuple[int, ...]]]
) -> Counter[str]:
    """The next turn of all sessions; where the tokens of their prompts came from."""
    tokens = Counter[str]()

    async def play(session: Session) -> None:
        said, usage = await answer(worker.engine, request(session, answers[session.name]))
        answers[session.name].append(said)
        for field in KvUsage.__dataclass_fields__:
            tokens[field.removesuffix("_tokens")] += getattr(usage, field)
        await worker.until_stored(worker.keys_of(session, answers[session.name]))

    async with asyncio.TaskGroup() as tasks:
        for session in played:
            tasks.create_task(play(session))
    return tokens
