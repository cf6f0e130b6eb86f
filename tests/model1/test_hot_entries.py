"""CSA entries in host memory: the same bits as with all of them on the device, at every size."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model1.batch import Chunk
from model1.errors import ConfigError
from model1.hot_entries import EntryTraffic, HotSlots
from model1.kv_capacity import PoolCapacity
from model1.kv_layout import KVFormat, Unit
from model1.kv_pool import KVHandle, KVPool
from model1.model import Model
from tests.model1.kv_models import CONFIG, model_of
from tests.services import tiny_model
from tests.services.tiny_model import prompt

F32, BF16 = torch.float32, torch.bfloat16
CSA_LAYERS = 2
NUM_ROWS = 40


@st.composite
def batches(draw: st.DrawFn) -> list[list[int]]:
    """Row numbers asked for one after the other, some of them many times; negative: forget."""
    favourites = draw(st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=5))
    row = st.one_of(st.sampled_from(favourites), st.integers(0, NUM_ROWS - 1))
    forget = st.lists(row, min_size=1, max_size=6, unique=True).map(lambda r: [-1 - i for i in r])
    return draw(st.lists(st.one_of(st.lists(row, max_size=12), forget), max_size=40))


@settings(max_examples=200, deadline=None)
@given(num_slots=st.integers(1, 30), asked=batches())
def test_slots_hold_what_they_were_said_to_hold(num_slots: int, asked: list[list[int]]) -> None:
    slots = HotSlots(NUM_ROWS, num_slots)
    version = np.zeros(NUM_ROWS, np.int64)  # what a row holds
    held = np.full((num_slots, 2), -1)  # (row, version) that was copied to a slot
    for rows in asked:
        if rows and rows[0] < 0:
            changed = np.array([-1 - row for row in rows])
            version[changed] += 1
            slots.forget(changed)
            continue
        if len(rows) > num_slots:
            continue
        where, new_rows, new_slots = slots.place(np.array(rows, np.int64))
        assert len(set(new_rows.tolist())) == len(new_rows) == len(set(new_slots.tolist()))
        held[new_slots] = np.stack([new_rows, version[new_rows]], axis=-1)
        assert held[where].tolist() == [[row, version[row]] for row in rows]


def test_a_working_set_that_fits_is_copied_once() -> None:
    slots = HotSlots(10_000, 3_000)
    draw = np.random.default_rng(0)
    for _ in range(3):  # three sets, one after the other: the old one goes
        working_set = draw.permutation(10_000)[:1_500]
        copied = [
            len(slots.place(draw.choice(working_set, 200, replace=False))[1]) for _ in range(150)
        ]
        assert sum(copied) <= 1_500 and not any(copied[100:])


def test_what_is_used_all_the_time_stays_while_others_pass_through() -> None:
    slots, steady = HotSlots(100_000, 256), np.arange(100)
    copied = 0
    for step in range(200):
        slots.place(1_000 + 50 * step + np.arange(50))
        if step % 2:
            copied += len(slots.place(steady)[1])
    assert copied == 100


def pool_of(
    model: Model,
    hot_entries: int | None,
    kv_format: KVFormat = KVFormat.NATIVE,
    max_tokens: int = 4096,
) -> KVPool:
    capacity = PoolCapacity(4, max_tokens, 600, hot_entries)
    return KVPool(model.config, capacity, model.trunk.dtype, kv_format=kv_format)


def traffic(model: Model, pool: KVPool) -> Iterator[Tensor]:
    """Logits of a few sequences of other lengths: prompts in chunks, then together token by token;
    one ends, and another takes its blocks; in the end one prompt beside decode steps.
    """
    lengths = (300, 90, 30)
    handles = [pool.allocate(420) for _ in lengths]
    prompts = [prompt(n, seed=n) for n in lengths]

    def step(chunks: Sequence[tuple[KVHandle, Sequence[int]]]) -> Tensor:
        return model.step(
            pool, [Chunk(handle, handle.num_tokens, ids, len(ids)) for handle, ids in chunks]
        )

    for handle, ids in zip(handles, prompts, strict=True):
        for start in range(0, len(ids), 77):
            yield step([(handle, ids[start : start + 77])])
    for i in range(12):
        yield step([(handle, [2 + (7 * i) % 250]) for handle in handles])
    pool.free(handles.pop(0))
    newcomer, ids = pool.allocate(420), prompt(400, seed=5)
    for start in range(0, 400, 50):
        others = [(handle, [3 + start % 250]) for handle in handles]
        yield step([(newcomer, ids[start : start + 50]), *others])
    for i in range(9):
        yield step([(newcomer, [5 + i])])
    pool.check()


@pytest.mark.parametrize(
    ("topk", "dtype", "sizes"),
    (
        (70, BF16, (1, 100)),
        pytest.param(70, BF16, (32, 1000), marks=pytest.mark.slow),
        pytest.param(4, F32, (1, 32, 100, 1000), marks=pytest.mark.slow),
    ),
)
def test_logits_are_those_of_a_pool_with_all_entries_on_the_device(
    topk: int, dtype: torch.dtype, sizes: tuple[int, ...]
) -> None:
    """From a buffer that holds nothing that is asked for to one that holds everything.

    `topk` 4: entries to choose from for all but the first tokens. 70: two tiles of entries, all
    chosen until token 280.
    """
    model = model_of(8, dtype, topk)
    expected = [*traffic(model, pool_of(model, None))]
    for hot_entries in sizes:
        pool = pool_of(model, hot_entries)
        for logits, right in zip(traffic(model, pool), expected, strict=True):
            assert torch.equal(logits, right)
        used = pool.usage().entries
        assert (used.hits > 0, used.bypassed > 0) == (hot_entries > 1, hot_entries < 1000)


@pytest.mark.parametrize("hot_entries", (32, pytest.param(1000, marks=pytest.mark.slow)))
def test_fp8_records_are_held_as_records(hot_entries: int) -> None:
    model = model_of(8, BF16)
    expected = [*traffic(model, pool_of(model, None, KVFormat.FP8))]
    pool = pool_of(model, hot_entries, KVFormat.FP8)
    for logits, right in zip(traffic(model, pool), expected, strict=True):
        assert torch.equal(logits, right)


@pytest.mark.parametrize("hot_entries", (1, pytest.param(1000, marks=pytest.mark.slow)))
def test_bodies_come_and_go_as_from_the_device(hot_entries: int) -> None:
    """Into blocks whose earlier contents were in the buffer, and out of them again."""
    model = model_of(8, BF16)
    resident, hot = pool_of(model, None), pool_of(model, hot_entries, max_tokens=512)
    assert resident.layout_digest == hot.layout_digest
    assert (resident.body_nbytes, resident.tail_nbytes) == (hot.body_nbytes, hot.tail_nbytes)
    for seed in range(2):
        ids = prompt(300, seed)
        source = resident.allocate(400)
        model.step(resident, [Chunk(source, 0, ids[:256], 0)])
        tail = bytearray(resident.tail_nbytes)
        resident.read_tail(source, tail)
        target = hot.allocate(400)
        for ours, theirs in zip(target.blocks[:2], source.blocks[:2], strict=True):
            body, again = bytearray(hot.body_nbytes), bytearray(hot.body_nbytes)
            resident.read_body(int(theirs), body)
            hot.write_body(int(ours), body)
            hot.read_body(int(ours), again)
            assert body == again
        hot.write_tail(target, 256, tail)
        for token in islice(cycle(ids), 40):
            expected, logits = (
                model.step(pool, [Chunk(handle, handle.num_tokens, [token], 1)])
                for pool, handle in ((resident, source), (hot, target))
            )
            assert torch.equal(logits, expected)
        resident.free(source)
        hot.free(target)


def test_decode_steps_find_most_entries_where_the_last_step_left_them() -> None:
    model = model_of(8, F32)
    pool = pool_of(model, 64)
    handle = pool.allocate(420)
    model.step(pool, [Chunk(handle, 0, prompt(300), 1)])
    before = pool.usage().entries
    for token in range(100):
        model.step(pool, [Chunk(handle, handle.num_tokens, [2 + token], 1)])
    after = pool.usage().entries
    asked = after.hits + after.misses - before.hits - before.misses
    assert asked == 100 * CSA_LAYERS * 64 and after.bypassed == before.bypassed  # a padded tile
    assert after.hits - before.hits > 0.9 * asked


def test_the_device_holds_the_buffer_instead_of_the_entries() -> None:
    for kv_format, row_bytes in ((KVFormat.NATIVE, 32), (KVFormat.FP8, None)):
        capacity = PoolCapacity(2, 1000, 64, hot_entries=50)
        pool = KVPool(CONFIG, capacity, BF16, kv_format=kv_format)
        resident = KVPool(
            CONFIG, replace(capacity, hot_entries=None), BF16, kv_format=kv_format
        ).usage()
        usage, spec = pool.usage(), pool.layout.arrays["csa_entries"]
        row_bytes = row_bytes or spec.row_nbytes
        assert usage.host_bytes == (1 + 8) * 32 * CSA_LAYERS * row_bytes
        assert usage.num_bytes == (
            resident.num_bytes - usage.host_bytes + 50 * CSA_LAYERS * row_bytes
        )
        assert resident.host_bytes == 0 and resident.entries == EntryTraffic()


def test_a_byte_budget_is_of_the_device() -> None:
    for hot_entries in (10, 1000):
        least = KVPool(CONFIG, PoolCapacity(2, 128, 64, hot_entries), BF16).usage().num_bytes
        capacity = PoolCapacity.within(
            least + 100_000,
            CONFIG,
            BF16,
            max_sequences=2,
            max_step_tokens=64,
            hot_entries=hot_entries,
        )
        pool = KVPool(CONFIG, capacity, BF16)
        on_device = pool.layout.nbytes(Unit.BLOCK) - pool.layout.arrays["csa_entries"].unit_nbytes
        assert least + 100_000 - on_device < pool.usage().num_bytes <= least + 100_000
        assert capacity.max_tokens > 128 and capacity.hot_entries == hot_entries


def test_a_session_may_be_longer_than_the_device_has_room_for() -> None:
    model = model_of(8, BF16)
    with_hot = PoolCapacity(1, 512, 64, hot_entries=64)
    budget = KVPool(model.config, with_hot, BF16).usage().num_bytes
    resident = PoolCapacity.within(budget, model.config, BF16, max_sequences=1, max_step_tokens=64)
    assert resident.max_tokens < 400
    logits = []
    for capacity in (with_hot, replace(with_hot, hot_entries=None)):
        pool, ids = KVPool(model.config, capacity, BF16), prompt(500)
        handle = pool.allocate(512)
        for start in range(0, 500, 50):
            chunk = Chunk(handle, start, ids[start : start + 50], 50)
            logits.append(model.step(pool, [chunk]))
    assert all(torch.equal(a, b) for a, b in zip(logits[:10], logits[10:], strict=True))


def test_a_buffer_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        PoolCapacity(1, 128, 1, hot_entries=0)


def test_models_without_such_layers_need_no_buffer() -> None:
    config = replace(tiny_model.CONFIG, attention_kinds=tiny_model.CONFIG.attention_kinds[:1] * 3)
    usage = KVPool(config, PoolCapacity(1, 256, 64, hot_entries=10)).usage()
    assert usage.host_bytes == 0
    assert usage.num_bytes == KVPool(config, PoolCapacity(1, 256, 64)).usage().num_bytes
