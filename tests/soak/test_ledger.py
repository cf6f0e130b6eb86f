"""That the comparison can be trusted: equal runs are equal, and a fault in a block shows."""

import asyncio
import random
from collections import Counter
from dataclasses import replace

import pytest

from model1.batch import Chunk
from model1.config import AttentionKind
from model1.kv_pool import KVPool
from services.attention.engine import Engine, EngineConfig
from services.attention.local import LocalExperts
from services.attention.scheduler import SchedulerLimits
from tests.services import tiny_model
from tests.soak.ledger import Ledger, LogitsRow, RecordingTrunk, compare, digest_row
from tests.soak.requests import answer, request
from tests.soak.resident import run_resident
from tests.soak.soak_model import CONFIG, INDEX_TOPK, soak_model
from tests.soak.traffic import LONGEST_TOKENS, Session, sessions

BLOCK_TOKENS = 128


@pytest.mark.parametrize(
    ("count", "longest_tokens"), ((5, 600), pytest.param(8, 1000, marks=pytest.mark.slow))
)
async def test_an_engine_without_tiers_says_what_the_resident_oracle_says(
    count: int, longest_tokens: int
) -> None:
    model = soak_model()
    traffic = sessions(seed=3, first=0, count=count, longest_tokens=longest_tokens)
    trunk, ledger = RecordingTrunk(model.trunk), Ledger()
    limits = SchedulerLimits(max_batch_tokens=200, max_sequences=7)
    pool = model.pool(7 * 1024, 7)
    engine = Engine(trunk, pool, LocalExperts(model.experts), EngineConfig(limits=limits))
    running = asyncio.create_task(engine.run())

    async def play(session: Session) -> None:
        answers: list[tuple[int, ...]] = []
        for turn in range(len(session.turns)):
            answers.append((await answer(engine, request(session, answers))).token_ids)
            ledger.answers[session.name, turn] = answers[-1]

    await asyncio.gather(*map(play, traffic))
    engine.close()
    await running
    engine.check()
    ledger.rows = trunk.rows
    differences = compare(run_resident(model, traffic), ledger)
    assert (differences.tokens, differences.logits) == (0, 0), differences
    assert differences.compared_tokens == differences.compared_logits > 100


def test_every_difference_is_counted() -> None:
    rows = Counter({LogitsRow(5, b"a"): 2, LogitsRow(6, b"b"): 1})
    oracle = Ledger({("s", 0): (1, 2, 3), ("s", 1): (4,)}, rows)
    same = replace(oracle, rows=Counter(rows))
    assert compare(oracle, same)[:4] == (0, 0, 4, 3)
    wrong_token = replace(same, answers={("s", 0): (1, 9, 3), ("s", 1): (4,)})
    assert compare(oracle, wrong_token).tokens == 1
    missing_turn = replace(same, answers={("s", 0): (1, 2, 3)})
    assert compare(oracle, missing_turn).tokens == 1
    for changed in (
        Counter({LogitsRow(5, b"a"): 1, LogitsRow(6, b"b"): 1}),  # one is missing
        Counter({LogitsRow(5, b"a"): 3, LogitsRow(6, b"b"): 1}),  # one too many
        Counter({LogitsRow(5, b"a"): 2, LogitsRow(7, b"b"): 1}),  # another position
        Counter({LogitsRow(5, b"a"): 2, LogitsRow(6, b"c"): 1}),  # other bits
    ):
        assert compare(oracle, replace(same, rows=changed)).logits == 1


def test_the_model_may_select_far_fewer_entries_than_there_are() -> None:
    assert set(CONFIG.attention_kinds) == set(AttentionKind)
    assert LONGEST_TOKENS // CONFIG.csa_ratio > 10 * INDEX_TOPK


@pytest.mark.parametrize("fault", ["body", "tail", "body of another sequence", "two in each other"])
def test_a_fault_in_any_block_changes_the_logits(fault: str) -> None:
    """Else zero differences would say nothing."""
    draw = random.Random(fault)
    prompt = tiny_model.prompt(6 * BLOCK_TOKENS, seed=1)
    model = soak_model()
    bodies, tail = _stored(prompt)
    others, _ = _stored(tiny_model.prompt(6 * BLOCK_TOKENS, seed=2))
    right = _digest_after(bodies, tail)
    assert right == _digest_after(bodies, tail)
    assert right == digest_row(model.logits((*prompt, 7))[-1])
    for index in range(len(bodies)):
        wrong, wrong_tail = list(bodies), tail
        if fault == "body":
            wrong[index] = draw.randbytes(len(bodies[index]))
        elif fault == "tail":
            wrong_tail = bytes(len(tail))
        elif fault == "body of another sequence":
            wrong[index] = others[index]
        else:
            wrong[index], wrong[index - 1] = wrong[index - 1], wrong[index]
        assert _digest_after(wrong, wrong_tail) != right, f"{fault} {index}"


def _stored(prompt: tuple[int, ...]) -> tuple[list[bytes], bytes]:
    """The bodies of all blocks of the prompt, and the tail at its end."""
    model = soak_model()
    pool = model.pool(1024)
    handle = pool.allocate(1024)
    for start in range(0, len(prompt), 256):
        model.step(pool, [Chunk(handle, start, prompt[start : start + 256], 0)])
    bodies = []
    for block in handle.blocks[: len(prompt) // BLOCK_TOKENS].tolist():
        body = bytearray(pool.body_nbytes)
        pool.read_body(block, memoryview(body))
        bodies.append(bytes(body))
    tail = bytearray(pool.tail_nbytes)
    pool.read_tail(handle, memoryview(tail))
    return bodies, bytes(tail)


def _digest_after(bodies: list[bytes], tail: bytes) -> bytes:
    """Of the logits of one token more."""
    model = soak_model()
    pool: KVPool = model.pool(1024)
    handle = pool.allocate(1024)
    for block, body in zip(handle.blocks.tolist(), bodies, strict=False):
        pool.write_body(block, body)
    position = len(bodies) * BLOCK_TOKENS
    pool.write_tail(handle, position, tail)
    return digest_row(model.step(pool, [Chunk(handle, position, [7], 1)])[0])
