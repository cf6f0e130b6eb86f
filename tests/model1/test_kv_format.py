"""An FP8 pool against one in the model's dtype whose rows are rounded when they are written.

Attention that reads records must give that reference's bits at every step, and, like every other
path, the same bits however the prompt is cut and whoever shares the step.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model1.batch import Chunk
from model1.config import AttentionKind, ModelConfig
from model1.fp8 import Fp8IndexKey, Fp8Record, RowRecord
from model1.kv_arrays import KVRows
from model1.kv_capacity import PoolCapacity
from model1.kv_layout import KVFormat
from model1.kv_pool import KVHandle, KVPool
from model1.model import Model
from tests.services import tiny_model
from tests.services.tiny_model import prompt

SWA, CSA, HCA = AttentionKind.SWA, AttentionKind.CSA, AttentionKind.HCA
TOKENS = 300  # 2 HCA entries, 75 CSA entries to choose 4 from
BLOCK = 128
CONFIGS = {
    (head_dim, rope_dim): replace(
        tiny_model.CONFIG,
        attention_kinds=(CSA, SWA, HCA, CSA),
        hash_routed=(True, False, False, False),
        head_dim=head_dim,
        qk_rope_head_dim=rope_dim,
        index_head_dim=rope_dim + 12,
        eos_token_ids=(),
    )
    # One tile that is short, a short one behind a whole one, the released size.
    for head_dim, rope_dim in ((16, 8), (96, 16), (512, 64))
}
DEVICES = (
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
)

each_device = pytest.mark.parametrize("device", DEVICES)
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=map(str, CONFIGS))
each_dtype = pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16")
)
each_dtype_float32_slow = pytest.mark.parametrize(
    "dtype",
    (
        pytest.param(torch.float32, marks=pytest.mark.slow, id="float32"),
        pytest.param(torch.bfloat16, id="bfloat16"),
    ),
)


class RoundedRows:
    """`KVRows` in the model's dtype that hold what an FP8 record of each row would say."""

    def __init__(self, rows: KVRows, record: RowRecord) -> None:
        self._rows, self._record = rows, record
        self.per_unit, self.unit_stride, self.dtype = rows.per_unit, rows.unit_stride, rows.dtype
        self.gather, self.gather_units = rows.gather, rows.gather_units

    def write(self, numbers: Tensor, values: Tensor) -> None:
        self._rows.write(numbers, self._record.decode(self._record.encode(values), self.dtype))


@cache
def model_of(config: ModelConfig, dtype: torch.dtype, device: str = "cpu") -> Model:
    return tiny_model.random_model(config, 7, dtype, device)


def pool_of(model: Model, kv_format: KVFormat) -> KVPool:
    device = model.trunk.embed.weight.device
    capacity = PoolCapacity(4, 4096, TOKENS + 4)
    return KVPool(model.config, capacity, model.trunk.dtype, device, kv_format=kv_format)


def simulating_pool(model: Model) -> KVPool:
    pool, config = pool_of(model, KVFormat.NATIVE), model.config
    record = Fp8Record(config.head_dim, config.qk_rope_head_dim)
    for layer, kind in zip(pool.layers, config.attention_kinds, strict=True):
        layer.window = RoundedRows(layer.window, record)
        if kind is not SWA:
            layer.entries = RoundedRows(layer.entries, record)
        if kind is CSA:
            layer.index_keys = RoundedRows(layer.index_keys, Fp8IndexKey(config.index_head_dim))
    return pool


def run(
    model: Model,
    pool: KVPool,
    handle: KVHandle,
    ids: Sequence[int],
    sizes: Sequence[int],
    others: Sequence[KVHandle] = (),
) -> Tensor:
    """Logits of the rest of `ids`, in chunks of these sizes over again; `others` go along."""
    parts, next_size = [], cycle(sizes)
    while (start := handle.num_tokens) < len(ids):
        piece = ids[start : start + next(next_size)]
        chunks = [
            Chunk(other, other.num_tokens, [9, 8, 7][: 1 + i], 0) for i, other in enumerate(others)
        ]
        parts.append(model.step(pool, [*chunks, Chunk(handle, start, piece, len(piece))]))
    return torch.cat(parts)


@each_device
@each_config
@each_dtype_float32_slow
@pytest.mark.parametrize(
    ("sizes", "num_others"),
    (
        ([TOKENS], 0),
        ([1, 3, 50, 64], 0),
        ([97, 1], 3),
        pytest.param([97], 3, marks=pytest.mark.slow),
        pytest.param([1, 90], 2, marks=pytest.mark.slow),
    ),
    ids=str,
)
def test_reading_records_is_reading_rounded_rows(
    config: ModelConfig, dtype: torch.dtype, device: str, sizes: list[int], num_others: int
) -> None:
    model, ids = model_of(config, dtype, device), prompt(TOKENS)
    whole = model.logits(ids, KVFormat.FP8)
    assert whole.isfinite().all()
    assert not torch.equal(whole, model.logits(ids))
    for pool in (pool_of(model, KVFormat.FP8), simulating_pool(model)):
        others = [pool.allocate(TOKENS) for _ in range(num_others)]
        handle = pool.allocate(TOKENS)
        assert torch.equal(run(model, pool, handle, ids, sizes, others), whole)
        pool.check()


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_both_stay_the_same_in_any_traffic(data: st.DataObject) -> None:
    model = model_of(CONFIGS[96, 16], data.draw(st.sampled_from((torch.float32, torch.bfloat16))))
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    prompts = [prompt(n, seed) for seed, n in enumerate(lengths)]
    pools = (pool_of(model, KVFormat.FP8), simulating_pool(model))
    handles = [[pool.allocate(n) for n in lengths] for pool in pools]
    while unfinished := [i for i, n in enumerate(lengths) if handles[0][i].num_tokens < n]:
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique=True))
        sizes = [data.draw(st.sampled_from((1, 2, 3, 31, 64, 150))) for _ in chosen]
        logits = []
        for pool, held in zip(pools, handles, strict=True):
            pieces = [
                (held[i], prompts[i][held[i].num_tokens :][:size])
                for i, size in zip(chosen, sizes, strict=True)
            ]
            chunks = [Chunk(h, h.num_tokens, piece, len(piece)) for h, piece in pieces]
            logits.append(model.step(pool, chunks))
            pool.check()
        assert torch.equal(*logits)


@each_device
@each_dtype
def test_a_sequence_resumes_from_records(dtype: torch.dtype, device: str) -> None:
    """Bodies and tails carry records as they are."""
    model, ids = model_of(CONFIGS[96, 16], dtype, device), prompt(TOKENS)
    first, second = pool_of(model, KVFormat.FP8), pool_of(model, KVFormat.FP8)
    boundary = 2 * BLOCK
    before, after = first.allocate(TOKENS), second.allocate(TOKENS)
    run(model, first, before, ids[:boundary], [boundary])
    tail = bytearray(first.tail_nbytes)
    first.read_tail(before, tail)
    for source, target in zip(before.blocks[:2], after.blocks[:2], strict=True):
        body = bytearray(first.body_nbytes)
        first.read_body(int(source), body)
        second.write_body(int(target), body)
    second.write_tail(after, boundary, tail)
    resumed = run(model, second, after, ids, [7, 1])
    assert torch.equal(resumed, model.logits(ids, KVFormat.FP8)[boundary:])


def test_greedy_tokens_are_those_of_the_logits() -> None:
    model, ids = model_of(CONFIGS[16, 8], torch.bfloat16), list(prompt(110))
    generated = model.generate(ids, max_tokens=30, kv_format=KVFormat.FP8)
    logits = model.logits(ids + generated[:-1], KVFormat.FP8)[len(ids) - 1 :]
    assert generated == logits.argmax(dim=-1).tolist()


@each_config
@each_dtype
def test_records_take_their_bytes_and_no_more(config: ModelConfig, dtype: torch.dtype) -> None:
    """A body: CSA entries and their index keys, HCA entries. A tail: window and CSA state."""
    pool = pool_of(model_of(config, dtype), KVFormat.FP8)
    row = Fp8Record(config.head_dim, config.qk_rope_head_dim).num_bytes
    index_key = config.index_head_dim + 4
    assert pool.body_nbytes == 2 * 32 * (row + index_key) + row
    state = 2 * 4 * config.hidden_size * dtype.itemsize
    assert pool.tail_nbytes == 4 * (config.sliding_window - 1) * row + state
