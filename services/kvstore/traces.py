"""Made-up traffic to compare eviction policies on: seeded, endless patterns cut to a length.

A trace is a list of requests; a request asks for the blobs of a history, from its start.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

BODY_BYTES = 1 << 20
TAIL_BYTES = 4 << 20
TAIL_EVERY_BLOCKS = 8


class Blob(NamedTuple):
    key: bytes
    nbytes: int


class Trace(NamedTuple):
    name: str
    requests: list[list[Blob]]

    @property
    def distinct_bytes(self) -> int:
        """What a cache would need to hold everything."""
        return sum({blob.key: blob.nbytes for each in self.requests for blob in each}.values())


def all_traces(num_requests: int, seed: int = 0) -> list[Trace]:
    return [
        zipf(num_requests, seed),
        scan(num_requests, seed),
        loop(num_requests),
        multi_turn(num_requests, seed),
    ]


def zipf(num_requests: int, seed: int = 0) -> Trace:
    """Independent requests for single blobs, a few of them popular: systems' prompts."""
    numbers = _zipf(np.random.default_rng(seed), num_requests)
    return Trace("zipf", [[_single("zipf", number)] for number in numbers])


def scan(num_requests: int, seed: int = 0) -> Trace:
    """The same, with long runs in between of what is never asked for again: batch jobs."""
    rng = np.random.default_rng(seed)
    requests: list[list[Blob]] = []
    fresh = 0
    for number in _zipf(rng, num_requests):
        if rng.random() < 0.001:
            run = range(fresh, fresh + int(rng.integers(200, 800)))
            fresh = run.stop
            requests += [[_single("once", each)] for each in run]
        requests.append([_single("zipf", number)])
    return Trace("scan", requests[:num_requests])


def loop(num_requests: int, num_blobs: int = 2000) -> Trace:
    """The same blobs over and over in the same order: an evaluation that runs again and again."""
    return Trace("loop", [[_single("loop", n % num_blobs)] for n in range(num_requests)])


def multi_turn(num_requests: int, seed: int = 0) -> Trace:
    """Chats: each turn asks for its whole history, which starts with one of a few system prompts.

    Sessions come and go; most are short, some are long, and half are never taken up again.
    """
    rng = np.random.default_rng(seed)
    sessions: list[list[int]] = []  # system prompt, id, turns taken, turns in all
    requests: list[list[Blob]] = []
    num_sessions = 0
    while len(requests) < num_requests:
        if not sessions or rng.random() < 0.25:
            turns = 1 if rng.random() < 0.5 else 2 + int(rng.geometric(0.15))
            sessions.append([int(rng.zipf(1.5)) % 20, num_sessions, 0, turns])
            num_sessions += 1
        # Who has spoken last is the likeliest to speak next.
        back = min(int(rng.geometric(0.05)), len(sessions))
        session = sessions.pop(-back)
        system_prompt, session_id, turn, num_turns = session
        requests.append(_history(system_prompt, session_id, 4 + 3 * turn))
        if turn + 1 < num_turns:
            sessions.append([system_prompt, session_id, turn + 1, num_turns])
    return Trace("multi-turn", requests)


_SYSTEM_BLOCKS = 8


def _history(system_prompt: int, session_id: int, num_blocks: int) -> list[Blob]:
    def name(block: int) -> str:
        return f"system {system_prompt}" if block < _SYSTEM_BLOCKS else f"session {session_id}"

    blobs: list[Blob] = []
    for block in range(_SYSTEM_BLOCKS + num_blocks):
        blobs.append(Blob(_key(name(block), block), BODY_BYTES))
        if (block + 1) % TAIL_EVERY_BLOCKS == 0:
            blobs.append(Blob(_key(name(block) + " tail", block), TAIL_BYTES))
    return blobs


def _single(name: str, number: int) -> Blob:
    return Blob(_key(name, number), BODY_BYTES)


def _key(name: str, number: int) -> bytes:
    return blake2b(f"{name} {number}".encode(), digest_size=32).digest()


def _zipf(rng: np.random.Generator, num: int, num_blobs: int = 10_000) -> Iterator[int]:
    """Exponent 0.9: between web traffic (0.7) and word counts (1)."""
    weights = 1 / np.arange(1, num_blobs + 1) ** 0.9
    return iter(rng.choice(num_blobs, size=num, p=weights / weights.sum()).tolist())
