"""The oracle: the same sessions with everything resident, in a loop of its own.

A session's KV stays where it was computed from its first token to its last, so nothing that the
tiers do can reach it. Shares model and pool with a worker, and nothing of the engine, the keys or
the store.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from model1.batch import Chunk
from model1.kv_pool import KVHandle
from model1.model import Model
from model1.sampling import SamplingParams, sample
from tests.soak.ledger import Ledger, LogitsRow, digest_row
from tests.soak.traffic import Session

MAX_STEP_TOKENS = 512
CONCURRENT_SESSIONS = 32


@dataclass(eq=False)
class _Live:
    session: Session
    handle: KVHandle
    turn: int = 0
    pending: list[int] = field(default_factory=list)  # tokens to compute
    answer: list[int] = field(default_factory=list)


def run_resident(model: Model, sessions: Sequence[Session]) -> Ledger:
    """All turns of all sessions, up to CONCURRENT_SESSIONS at once."""
    ledger = Ledger()
    waiting = deque(sessions)
    most = sorted((session.num_tokens for session in sessions), reverse=True)
    blocks = sum(-(-tokens // 128) * 128 for tokens in most[:CONCURRENT_SESSIONS])
    pool = model.pool(blocks, min(CONCURRENT_SESSIONS, len(sessions)))
    live: list[_Live] = []
    while live or waiting:
        while waiting and len(live) < CONCURRENT_SESSIONS:
            session = waiting.popleft()
            handle = pool.allocate(session.num_tokens)
            live.append(_Live(session, handle, pending=list(session.turns[0].prompt)))
        chunks = _chunks(live)
        logits = model.step(pool, [chunk for _, chunk in chunks])
        rows = iter(logits)
        for each, chunk in chunks:
            del each.pending[: len(chunk.token_ids)]
            if chunk.num_logits:
                _draw(each, next(rows), ledger)
        for each in [each for each in live if each.turn == len(each.session.turns)]:
            live.remove(each)
            pool.free(each.handle)
    pool.check()
    return ledger


def _chunks(live: Sequence[_Live]) -> list[tuple[_Live, Chunk]]:
    """Sessions with the least to compute first: those that decode."""
    budget, chunks = MAX_STEP_TOKENS, list[tuple[_Live, Chunk]]()
    for each in sorted(live, key=lambda each: len(each.pending)):
        if budget:
            ids = each.pending[:budget]
            wants = int(len(ids) == len(each.pending))
            chunks.append((each, Chunk(each.handle, each.handle.num_tokens, ids, wants)))
            budget -= len(ids)
    return chunks


def _draw(each: _Live, logits: torch.Tensor, ledger: Ledger) -> None:
    turn, position = each.session.turns[each.turn], each.handle.num_tokens
    params = SamplingParams(
        temperature=turn.temperature, top_p=turn.top_p, top_k=turn.top_k, seed=turn.seed
    )
    ledger.rows[LogitsRow(position, digest_row(logits))] += 1
    each.answer.append(sample(logits, params, position))
    each.pending = [each.answer[-1]]
    if len(each.answer) == turn.max_tokens:
        ledger.answers[each.session.name, each.turn] = tuple(each.answer)
        each.answer = []
        each.turn += 1
        if each.turn < len(each.session.turns):
            each.pending += each.session.turns[each.turn].prompt
