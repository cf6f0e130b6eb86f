"""A sequence that goes on from bodies and a tail gives the bits of one that was never interrupted.

What it does not get back is poison: NaN where nothing may be read at all, huge numbers where rows
are read and masked, as those of a window page that no query may see.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model1.batch import Chunk
from model1.config import AttentionKind
from model1.kv_capacity import PoolCapacity
from model1.kv_layout import KVFormat
from model1.kv_pool import KVHandle, KVPool
from model1.model import Model
from tests.model1.kv_models import CONFIG, CSA, HCA, SWA, model_of
from tests.services.tiny_model import prompt

BLOCK = 128
NUM_BLOCKS = 3
TOKENS = NUM_BLOCKS * BLOCK + 60
MASKED = 3e4
# Pages that boundaries fall inside of, at the edge of, and a window longer than a block.
WINDOWS = (2, 8, 12, 128, 200)


def pool_of(model: Model, *, poisoned: bool = False) -> KVPool:
    pool = KVPool(model.config, PoolCapacity(4, 4096, 600), model.trunk.dtype)
    if poisoned:
        for layer in pool.layers:
            for name, rows in vars(layer).items():
                if name == "state":
                    rows.units.fill_(torch.nan)
                else:
                    rows.units[1:] = MASKED  # unit 0 is nobody's and stays zero
    return pool


@dataclass(frozen=True)
class Recorded:
    """One uninterrupted run: logits `[TOKENS, vocab]`, bodies, and the tail of each boundary."""

    ids: tuple[int, ...]
    logits: Tensor
    bodies: list[bytes]
    tails: dict[int, bytes]


@cache
def recorded(window: int, dtype: torch.dtype, seed: int = 0) -> Recorded:
    model, ids = model_of(window, dtype), prompt(TOKENS, seed)
    pool = pool_of(model)
    handle = pool.allocate(TOKENS)
    ends = [*range(0, TOKENS, BLOCK), TOKENS]
    parts, tails = [], {}
    for start, end in pairwise(ends):
        parts.append(run(model, pool, handle, ids, [end - start], end))
        if end % BLOCK == 0:
            tails[end] = tail_of(pool, handle)
    bodies = [body_of(pool, int(block)) for block in handle.blocks[:NUM_BLOCKS]]
    return Recorded(ids, torch.cat(parts), bodies, tails)


def run(
    model: Model,
    pool: KVPool,
    handle: KVHandle,
    ids: Sequence[int],
    sizes: Sequence[int],
    end: int,
    beside: Sequence[Chunk] = (),
) -> Tensor:
    """Logits of the sequence from where it stands to `end`, in chunks of these sizes over again.

    `beside` take part in the first step.
    """
    parts, next_size = [], cycle(sizes)
    while (start := handle.num_tokens) < end:
        piece = ids[start : min(end, start + next(next_size))]
        logits = model.step(pool, [Chunk(handle, start, piece, len(piece)), *beside])
        parts.append(logits[: len(piece)])
        beside = ()
    return torch.cat(parts)


def body_of(pool: KVPool, block: int) -> bytes:
    out = bytearray(pool.body_nbytes)
    pool.read_body(block, out)
    return bytes(out)


def tail_of(pool: KVPool, handle: KVHandle) -> bytes:
    out = np.full(pool.tail_nbytes, 0xA5, np.uint8)
    pool.read_tail(handle, out)
    return out.tobytes()


def restore(pool: KVPool, handle: KVHandle, run: Recorded, first: int, position: int) -> None:
    for index in range(first, position // BLOCK):
        pool.write_body(int(handle.blocks[index]), run.bodies[index])
    pool.write_tail(handle, position, run.tails[position])


def assert_same_bits(logits: Tensor, expected: Tensor) -> None:
    wrong = (logits != expected).any(dim=-1).nonzero().flatten().tolist()
    assert logits.shape == expected.shape
    assert not wrong, f"{len(wrong)} of {len(logits)} rows differ, first at {wrong[:5]}"


@pytest.mark.parametrize(
    "dtype",
    (
        pytest.param(torch.float32, marks=pytest.mark.slow, id="float32"),
        pytest.param(torch.bfloat16, id="bfloat16"),
    ),
)
@pytest.mark.parametrize("window", [pytest.param(WINDOWS[0], marks=pytest.mark.slow), *WINDOWS[1:]])
def test_a_sequence_resumes_at_every_boundary_beside_others(
    window: int, dtype: torch.dtype
) -> None:
    model, whole = model_of(window, dtype), recorded(window, dtype)
    for position in whole.tails:
        for sizes in ([150], [1, 1, 1, 1, 1, 60]):
            pool = pool_of(model, poisoned=True)
            fresh, other = pool.allocate(64), pool.allocate(TOKENS)
            restore(pool, other, recorded(window, dtype, seed=1), 0, 2 * BLOCK)
            handle = pool.allocate(TOKENS)
            restore(pool, handle, whole, 0, position)
            beside = [Chunk(fresh, 0, prompt(20), 0), Chunk(other, 2 * BLOCK, [7], 0)]
            end = min(TOKENS, position + 150)
            logits = run(model, pool, handle, whole.ids, sizes, end, beside)
            assert_same_bits(logits, whole.logits[position:end])
            pool.check()


@pytest.mark.parametrize("window", WINDOWS)
def test_bodies_and_tails_are_the_same_bytes_wherever_they_were_computed(window: int) -> None:
    """Also after a resume: what is stored again is what was stored."""
    model, whole = model_of(window, torch.bfloat16), recorded(window, torch.bfloat16)
    pool = pool_of(model, poisoned=True)
    handle = pool.allocate(TOKENS)
    restore(pool, handle, whole, 0, BLOCK)
    assert tail_of(pool, handle) == whole.tails[BLOCK]
    run(model, pool, handle, whole.ids, [50], 2 * BLOCK)
    assert tail_of(pool, handle) == whole.tails[2 * BLOCK]
    assert [body_of(pool, int(block)) for block in handle.blocks[:2]] == whole.bodies[:2]


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    window=st.sampled_from(WINDOWS),
    computed=st.integers(0, 2 * BLOCK),
    position=st.sampled_from((BLOCK, 2 * BLOCK, 3 * BLOCK)),
    size=st.sampled_from((7, 64, 200)),
)
def test_an_island_of_loaded_blocks_may_follow_on_computed_ones(
    window: int, computed: int, position: int, size: int
) -> None:
    """Compute [0, computed), load from the block it stands in to `position`, compute on."""
    model, whole = model_of(window, torch.float32), recorded(window, torch.float32)
    pool = pool_of(model, poisoned=True)
    handle = pool.allocate(TOKENS)
    if computed:
        run(model, pool, handle, whole.ids, [100], min(computed, position - 1))
    restore(pool, handle, whole, handle.num_tokens // BLOCK, position)
    pool.check()
    logits = run(model, pool, handle, whole.ids, [size], TOKENS)
    assert_same_bits(logits, whole.logits[position:])


def test_sequences_share_a_prefix_and_none_changes_it() -> None:
    model, whole = model_of(8, torch.bfloat16), recorded(8, torch.bfloat16)
    pool = pool_of(model, poisoned=True)
    first = pool.allocate(TOKENS)
    restore(pool, first, whole, 0, 2 * BLOCK)
    for index in range(2):
        pool.name(first, index, bytes([index]))
    shared = pool.lookup([b"\0", b"\1", b"\2"])
    assert shared == first.blocks[:2].tolist()
    others = [pool.allocate(TOKENS, shared[:n]) for n in (2, 1)]
    for handle, position in zip(others, (2 * BLOCK, BLOCK), strict=True):
        pool.write_tail(handle, position, whole.tails[position])
    for handle in (first, *others):
        start = handle.num_tokens
        assert_same_bits(run(model, pool, handle, whole.ids, [33, 1], TOKENS), whole.logits[start:])
        pool.check()
    pool.free(first)
    assert [body_of(pool, block) for block in shared] == whole.bodies[:2]
    late = pool.allocate(TOKENS, pool.lookup([b"\0", b"\1"]))
    pool.write_tail(late, 2 * BLOCK, whole.tails[2 * BLOCK])
    assert_same_bits(run(model, pool, late, whole.ids, [200], TOKENS), whole.logits[2 * BLOCK :])


def test_shared_and_named_blocks_cannot_be_written() -> None:
    model, whole = model_of(8, torch.float32), recorded(8, torch.float32)
    pool = pool_of(model)
    handle = pool.allocate(TOKENS)
    restore(pool, handle, whole, 0, BLOCK)
    block = int(handle.blocks[0])
    pool.name(handle, 0, b"a")
    with pytest.raises(AssertionError, match="alone"):
        pool.write_body(block, whole.bodies[0])
    other = pool.allocate(TOKENS, [block])
    with pytest.raises(AssertionError, match="shared"):
        model.step(pool, [Chunk(other, 0, whole.ids[:5], 0)])
    with pytest.raises(AssertionError, match="not complete"):
        pool.name(handle, 1, b"b")


def test_blocks_come_and_go_while_another_sequence_is_in_a_step() -> None:
    """What a worker's copying thread does, all at once and over again."""
    model, whole = model_of(8, torch.bfloat16), recorded(8, torch.bfloat16)
    pool, done = pool_of(model, poisoned=True), threading.Event()

    def copy_in_and_out() -> int:
        rounds = 0
        while not done.is_set() or not rounds:
            handle = pool.allocate(TOKENS)
            restore(pool, handle, whole, 0, NUM_BLOCKS * BLOCK)
            for index, body in enumerate(whole.bodies):
                pool.name(handle, index, bytes([index]))
                block = int(handle.blocks[index])
                pool.pin(block)
                assert body_of(pool, block) == body
                pool.unpin(block)
            assert tail_of(pool, handle) == whole.tails[NUM_BLOCKS * BLOCK]
            pool.free(handle)
            assert pool.forget([bytes([index]) for index in range(NUM_BLOCKS)]) == NUM_BLOCKS
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as thread:
        copied = thread.submit(copy_in_and_out)
        handle = pool.allocate(TOKENS)
        logits = run(model, pool, handle, whole.ids, [1, 60], TOKENS)
        done.set()
        assert copied.result(timeout=60) > 0
    assert_same_bits(logits, whole.logits)
    pool.free(handle)
    pool.check()
    assert pool.usage().blocks == pool.usage().cached_blocks == pool.usage().pages == 0


@pytest.mark.parametrize("kind", (SWA, CSA, HCA))
def test_a_model_may_have_layers_of_one_kind_only(kind: AttentionKind) -> None:
    config = replace(CONFIG, attention_kinds=(kind,) * 6)
    pool = KVPool(config, PoolCapacity(1, 256, 64))
    handle = pool.allocate(256)
    tail = bytes(i % 251 for i in range(pool.tail_nbytes))
    body = bytes(i % 241 for i in range(pool.body_nbytes))
    pool.write_body(int(handle.blocks[0]), body)
    pool.write_tail(handle, BLOCK, tail)
    assert body_of(pool, int(handle.blocks[0])) == body
    assert tail_of(pool, handle) == tail
    # 7 window rows of each layer; CSA: 32 entries and keys, 4 rows for the compressors.
    window, row = 7 * 6 * 64, 6 * 64
    sizes = {SWA: (0, 0), CSA: (64 * row, 4 * 6 * 4 * CONFIG.hidden_size), HCA: (row, 0)}
    assert (len(body), len(tail)) == (sizes[kind][0], window + sizes[kind][1])


def test_a_tail_is_of_a_boundary() -> None:
    model, whole = model_of(8, torch.float32), recorded(8, torch.float32)
    pool = pool_of(model)
    handle = pool.allocate(TOKENS)
    with pytest.raises(AssertionError, match="boundary"):
        tail_of(pool, handle)
    run(model, pool, handle, whole.ids, [127], 127)
    with pytest.raises(AssertionError, match="boundary"):
        tail_of(pool, handle)
    with pytest.raises(AssertionError, match="bytes instead of"):
        pool.write_tail(handle, BLOCK, b"short")
    pool.check()


def layouts() -> Iterator[bytes]:
    for window in (8, 128):
        for dtype in (torch.float32, torch.bfloat16):
            for kinds in (CONFIG.attention_kinds, (SWA, *CONFIG.attention_kinds[1:])):
                for head_dim in (16, 32):
                    config = replace(
                        CONFIG, sliding_window=window, attention_kinds=kinds, head_dim=head_dim
                    )
                    for kv_format in KVFormat:
                        pool = KVPool(config, PoolCapacity(1, 128, 1), dtype, kv_format=kv_format)
                        yield pool.layout_digest


def test_pools_whose_bytes_differ_in_meaning_have_other_digests() -> None:
    digests = [*layouts()]
    assert len({*digests}) == len(digests) and digests == [*layouts()]
    assert {len(digest) for digest in digests} == {16}
