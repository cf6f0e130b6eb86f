"""The same sessions on less device memory: identical tokens, and the time that each one takes.

Many sessions of several turns, a few active at once, the others idle meanwhile. Each budget is a
worker of its own on the same store; they take turns session by session. On the full budget every
session stays on the device; on the others idle ones leave and come back.
"""

import asyncio
import statistics
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from cluster.bench_kv.rig import Answer, Rig, Tokens, Worker, random_tokens, tell
from cluster.bench_workload import SidesDiffer
from model1.kv_capacity import PoolCapacity
from services.attention.kv_cache import KvCacheConfig

ACTIVE_SESSIONS = 2
MAX_STEP_TOKENS = 128  # the window pages of a step are no part of what sessions keep
TURN_TOKENS = 16
ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Load:
    """What the sessions are."""

    sessions: int = 12
    history_tokens: int = 4096
    turns: int = 2

    @property
    def max_tokens(self) -> int:
        """Of one session at its end."""
        return self.history_tokens + (self.turns + 1) * (TURN_TOKENS + ANSWER_TOKENS)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of the device's KV arrays; CSA entries of active sessions may lie in host memory."""

    saved: float  # share of the full budget's bytes
    device_bytes: int
    hot_entries: int | None
    seconds_per_token: float
    # Median over the turns of this budget's time per token against the full one's.
    ratio: float
    first_token_seconds: float
    restored_tokens: int


async def measure_budgets(rig: Rig, load: Load, savings: Sequence[float]) -> list[Budget]:
    """The full budget first. Raises `SidesDiffer`."""
    room = load.max_tokens + 128  # of one session, in whole blocks
    full = PoolCapacity(ACTIVE_SESSIONS, load.sessions * room, MAX_STEP_TOKENS)
    full_bytes = rig.pool_bytes(full)
    capacities = [
        full,
        *(_smaller(rig, full, room, int(full_bytes * (1 - saving))) for saving in savings),
    ]
    vocab = rig.config.vocab_size
    histories = [
        random_tokens(load.history_tokens, vocab, f"session {number}")
        for number in range(load.sessions)
    ]
    turns: list[list[Answer]] = [[] for _ in capacities]
    async with AsyncExitStack() as parts:
        workers = [
            await parts.enter_async_context(rig.worker(capacity, kv=KvCacheConfig()))
            for capacity in capacities
        ]
        for number, history in enumerate(histories):
            tell(f"session {number + 1} of {load.sessions}: {load.history_tokens} tokens")
            answer = await workers[0].answer(history, ANSWER_TOKENS)
            histories[number] = history + answer.token_ids
            await workers[0].written_back()
        for turn in range(load.turns + 1):  # one to warm up: all of them saw every session
            tell(f"turn {turn + 1} of {load.turns + 1}")
            for first in range(0, load.sessions, ACTIVE_SESSIONS):
                active = range(first, min(first + ACTIVE_SESSIONS, load.sessions))
                prompts = [
                    histories[n] + random_tokens(TURN_TOKENS, vocab, f"{turn} of {n}")
                    for n in active
                ]
                answers = [await _answer_all(worker, prompts) for worker in workers]
                for of_budget, gathered in zip(answers, turns, strict=True):
                    if [a.token_ids for a in of_budget] != [a.token_ids for a in answers[0]]:
                        raise SidesDiffer("on a smaller device: other tokens")
                    if turn:
                        gathered += of_budget
                for n, prompt, answer in zip(active, prompts, answers[0], strict=True):
                    histories[n] = prompt + answer.token_ids
        return [
            _budget(capacity, worker, full_bytes, gathered, turns[0])
            for capacity, worker, gathered in zip(capacities, workers, turns, strict=True)
        ]


def _smaller(rig: Rig, full: PoolCapacity, room: int, num_bytes: int) -> PoolCapacity:
    """At most so many bytes, if the active sessions fit: whole and as many blocks as there is room
    for, or with their CSA entries in host memory and as many of these hot as there is room for.
    """
    block_tokens = rig.config.hca_ratio
    fewest = -(-ACTIVE_SESSIONS * room // block_tokens)
    for blocks in range(full.max_tokens // block_tokens, fewest - 1, -1):
        whole = replace(full, max_tokens=blocks * block_tokens)
        if rig.pool_bytes(whole) <= num_bytes:
            return whole
    hot = ACTIVE_SESSIONS * rig.config.index_topk
    smallest = replace(full, max_tokens=fewest * block_tokens, hot_entries=hot)
    while rig.pool_bytes(larger := replace(smallest, hot_entries=2 * hot)) <= num_bytes:
        hot, smallest = 2 * hot, larger
    return smallest


async def _answer_all(worker: Worker, prompts: Sequence[Tokens]) -> list[Answer]:
    return await asyncio.gather(*(worker.answer(prompt, ANSWER_TOKENS) for prompt in prompts))


def _budget(
    capacity: PoolCapacity,
    worker: Worker,
    full_bytes: int,
    answers: Sequence[Answer],
    full: Sequence[Answer],
) -> Budget:
    device_bytes = worker.pool.usage().num_bytes
    ratios = [a.seconds_per_token / b.seconds_per_token for a, b in zip(answers, full, strict=True)]
    return Budget(
        saved=1 - device_bytes / full_bytes,
        device_bytes=device_bytes,
        hot_entries=capacity.hot_entries,
        seconds_per_token=statistics.median(a.seconds_per_token for a in answers),
        ratio=statistics.median(ratios),
        first_token_seconds=statistics.median(a.first_token_seconds for a in answers),
        restored_tokens=sum(a.kv_usage.ram_tokens + a.kv_usage.disk_tokens for a in answers),
    )
