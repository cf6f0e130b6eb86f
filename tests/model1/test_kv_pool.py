"""The pool under any order of claims, steps, resumes and releases.

Nothing leaks, and what is shared or can be found is what was written.
"""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model1.config import AttentionKind
from model1.errors import ConfigError, PoolExhausted
from model1.kv_capacity import PoolCapacity
from model1.kv_pool import KVHandle, KVPool
from tests.services import tiny_model

CSA_LAYER = tiny_model.CONFIG.attention_kinds.index(AttentionKind.CSA)


@dataclass(eq=False)
class Sequence:
    """What a sequence is known to have: its own account, beside the pool's."""

    handle: KVHandle
    max_tokens: int
    blocks: list[int]
    num_shared: int
    num_tokens: int = 0
    page_of: dict[int, int] = field(default_factory=dict)  # number -> page, while it is visible

    def visible(self, window: int) -> range:
        """Committed positions that the next query's window covers."""
        return range(max(0, self.num_tokens + 1 - window), self.num_tokens)


class PoolUnderLoad(RuleBasedStateMachine):
    """Steps never exceed what the pool was built for; then it must never run out of pages.

    Every private block is stamped when it is claimed: a stamp that changes while the block is
    held, pinned or to be found by its name would be another sequence's KV.
    """

    @initialize(
        window=st.sampled_from((2, 4, 6, 8, 16)),
        block=st.sampled_from((4, 8, 12)),
        max_sequences=st.integers(1, 4),
        max_tokens=st.integers(1, 120),
        max_step_tokens=st.integers(1, 40),
        hot_entries=st.sampled_from((None, 1, 6, 1000)),
    )
    def build(
        self,
        window: int,
        block: int,
        max_sequences: int,
        max_tokens: int,
        max_step_tokens: int,
        hot_entries: int | None,
    ) -> None:
        config = replace(tiny_model.CONFIG, sliding_window=window, hca_ratio=block)
        self.window, self.block, self.max_step_tokens = window, block, max_step_tokens
        self.now = 0.0
        self.pool = KVPool(
            config,
            PoolCapacity(max_sequences, max_tokens, max_step_tokens, hot_entries),
            clock=lambda: self.now,
        )
        self.free_slots, self.num_blocks = max_sequences, -(-max_tokens // block)
        self.running: list[Sequence] = []
        self.pins = Counter[int]()
        self.stamps: dict[int, bytes] = {}
        self.num_stamps = 0
        self.named: dict[bytes, int] = {}
        self.num_named = 0
        self.idle_since: dict[int, float] = {}  # named blocks that nobody holds

    @property
    def held(self) -> Counter[int]:
        return Counter(b for s in self.running for b in s.blocks) + self.pins

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        """With named blocks in any order; often of just the size that fits or does not."""
        keys = data.draw(st.permutations([*self.named])) if self.named else []
        keys = keys[: data.draw(st.integers(0, 4))]
        shared = self.pool.lookup(keys)
        assert shared == [self.named[key] for key in keys]
        available = self.num_blocks - len({*self.held, *shared})
        sizes = st.one_of(st.integers(0, 6), st.integers(available, available + 1))
        num_blocks = max(1, len(shared) + data.draw(sizes))
        num_tokens = num_blocks * self.block - data.draw(st.integers(0, self.block - 1))
        needed = num_blocks - len(shared)
        fits = self.free_slots > 0 and needed <= available
        assert self.pool.can_allocate(num_tokens, shared) == fits
        if not fits:
            with pytest.raises(PoolExhausted) as caught:
                self.pool.allocate(num_tokens, shared)
            for number in (num_tokens, needed, available, self.free_slots):
                assert str(number) in str(caught.value)
            return
        handle = self.pool.allocate(num_tokens, shared)
        blocks = handle.blocks.tolist()
        assert len(set(blocks)) == num_blocks and 0 not in blocks
        assert blocks[: len(shared)] == shared
        claimed = blocks[len(shared) :]
        assert not self.held.keys() & set(claimed), "a held block was given to another"
        num_free = self.num_blocks - len(self.held) - len(self.idle_since)
        longest_idle = [block for block in self.idle_since if block not in shared]
        evicted = [block for block in longest_idle if block in claimed]
        assert evicted == longest_idle[: max(0, needed - num_free)]
        self._evicted(evicted)
        for block in shared:
            self.idle_since.pop(block, None)
        for block in claimed:
            self.num_stamps += 1
            self.stamps[block] = self.num_stamps.to_bytes(4, "little")
            self.pool.write_body(block, self._body(block))
        self.free_slots -= 1
        self.running.append(Sequence(handle, num_tokens, blocks, len(shared)))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        ends = self._grow(data)
        for sequence, end in ends.items():
            self.pool.commit(sequence.handle, end)
            sequence.num_tokens = end

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def step_that_fails(self, data: st.DataObject) -> None:
        for sequence in self._grow(data):
            self._free(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        first = max(sequence.num_shared, sequence.num_tokens // self.block + 1)
        last = sequence.max_tokens // self.block
        if first > last:
            return
        position = self.block * data.draw(st.integers(first, last))
        tail = data.draw(st.integers(0, 255)).to_bytes(1, "little") * self.pool.tail_nbytes
        self.pool.write_tail(sequence.handle, position, tail)
        sequence.num_tokens = position
        page_tokens = self.window // 2
        pages = range(
            max(0, position + 1 - self.window) // page_tokens, -(-position // page_tokens)
        )
        assert sequence.handle.first_page == pages.start
        sequence.page_of = dict(zip(pages, sequence.handle.pages, strict=True))
        again = bytearray(self.pool.tail_nbytes)
        self.pool.read_tail(sequence.handle, again)
        if position >= self.window - 1:
            assert bytes(again) == tail

    @precondition(lambda self: self.running)
    @rule(data=st.data(), reuse=st.booleans())
    def name(self, data: st.DataObject, reuse: bool) -> None:
        """All complete blocks, by new keys or by one that may have a block already."""
        sequence = data.draw(st.sampled_from(self.running))
        complete = sequence.num_tokens // self.block
        unnamed = [
            index
            for index, block in enumerate(sequence.blocks[:complete])
            if block not in self.named.values()
        ]
        if not unnamed:
            return
        for index in unnamed:
            self.num_named += 1
            key = self.num_named.to_bytes(2, "little")
            if reuse and self.named:
                key = data.draw(st.sampled_from([*self.named]))
            self.pool.name(sequence.handle, index, key)
            self.named.setdefault(key, sequence.blocks[index])
            self.pool.name(sequence.handle, index, key)  # saying it again changes nothing

    @precondition(lambda self: self.named or self.running)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([*self.held, *self.named.values()]))
        self.pool.pin(block)
        self.pins[block] += 1
        self.idle_since.pop(block, None)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([*self.pins]))
        self.pool.unpin(block)
        self.pins -= Counter([block])
        self._left([block])

    @rule(seconds=st.integers(1, 10))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from([*self.named, b"unknown"])))
        gone = {key for key in keys if self.named.get(key) in self.idle_since}
        assert self.pool.forget(keys) == len(gone)
        self._evicted([self.named[key] for key in gone])

    @rule(seconds=st.integers(0, 10))
    def forget_idle(self, seconds: int) -> None:
        gone = [b for b, since in self.idle_since.items() if self.now - since > seconds]
        assert self.pool.forget_idle(seconds) == len(gone)
        self._evicted(gone)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self._free(data.draw(st.sampled_from(self.running)))

    @invariant()
    def every_unit_is_accounted_for(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        usage = self.pool.usage()
        assert usage.sequences == len(self.running) == usage.max_sequences - self.free_slots
        assert usage.blocks == len(self.held) and usage.max_blocks == self.num_blocks
        assert usage.cached_blocks == len(self.idle_since)
        assert usage.pinned_blocks == len(self.pins)
        assert usage.pages == sum(len(s.handle.pages) for s in self.running) <= usage.max_pages
        assert all(0 not in s.handle.pages for s in self.running)

    @invariant()
    def what_is_held_or_can_be_found_is_as_it_was_written(self) -> None:
        if not hasattr(self, "pool"):
            return
        for key, block in self.named.items():
            assert self.pool.lookup([key, b"unknown", key]) == [block]
        for block in {*self.held, *self.named.values()}:
            body = bytearray(self.pool.body_nbytes)
            self.pool.read_body(block, body)
            assert body == self._body(block)
            entries = self.pool.layers[CSA_LAYER].entries.gather_units(torch.tensor([[block]]))
            stamp = int.from_bytes(self.stamps[block], "little")
            assert (entries.view(torch.int32) == stamp).all()

    @invariant()
    def what_a_next_query_sees_stays_where_it_was_written(self) -> None:
        for sequence in getattr(self, "running", ()):
            handle, page_tokens = sequence.handle, self.window // 2
            assert len(handle.pages) <= 3
            for position in sequence.visible(self.window):
                number = position // page_tokens
                page = handle.pages[number - handle.first_page]
                assert number >= handle.first_page
                assert page == sequence.page_of[number]

    def teardown(self) -> None:
        for sequence in list(getattr(self, "running", ())):
            self._free(sequence)
            self.pool.check()
        if hasattr(self, "pool"):
            for block in [*self.pins.elements()]:
                self.pool.unpin(block)
                self.pool.check()

    def _grow(self, data: st.DataObject) -> dict[Sequence, int]:
        """Pages for a step of any legal mix; returns where each of its sequences ends."""
        room, ends = self.max_step_tokens, dict[Sequence, int]()
        ready = [s for s in self.running if s.num_tokens >= s.num_shared * self.block]
        for sequence in data.draw(st.permutations(ready)):
            most = min(room, sequence.max_tokens - sequence.num_tokens)
            num_new = data.draw(st.one_of(st.just(min(1, most)), st.integers(0, most)))
            if num_new == 0:
                continue
            room -= num_new
            end = ends[sequence] = sequence.num_tokens + num_new
            self.pool.grow_window(sequence.handle, end)
            page_tokens, handle = self.window // 2, sequence.handle
            for number in range(sequence.num_tokens // page_tokens, (end - 1) // page_tokens + 1):
                page = handle.pages[number - handle.first_page]
                assert sequence.page_of.setdefault(number, page) == page
        return ends

    def _free(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.free_slots += 1
        self.pool.free(sequence.handle)
        self._left(sequence.blocks)
        assert not sequence.handle.pages and not len(sequence.handle.blocks)

    def _left(self, blocks: list[int]) -> None:
        """Somebody let go of these: of the named ones that nobody holds, a cache remains."""
        for block in reversed(blocks):  # the last blocks of a prefix are the first to go
            if block not in self.held and block in self.named.values():
                self.idle_since[block] = self.now

    def _evicted(self, blocks: list[int]) -> None:
        for block in blocks:
            del self.idle_since[block]
        self.named = {key: b for key, b in self.named.items() if b not in blocks}

    def _body(self, block: int) -> bytes:
        size = self.pool.body_nbytes
        return (self.stamps[block] * (-(-size // 4)))[:size]


TestPoolUnderLoad = PoolUnderLoad.TestCase
TestPoolUnderLoad.settings = settings(max_examples=80, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("window", (2, 4, 8, 16))
def test_there_are_pages_when_every_sequence_stands_worst_for_the_step(window: int) -> None:
    """Random steps hardly ever bring all sequences to the same, worst offset in a page at once."""
    config = replace(tiny_model.CONFIG, sliding_window=window)
    num_sequences = 4
    for num_new in range(1, 2 * window):
        for offset in range(window // 2):
            capacity = PoolCapacity(num_sequences, 1024, num_sequences * num_new)
            pool = KVPool(config, capacity)
            handles = [pool.allocate(256) for _ in range(num_sequences)]
            for handle in handles:
                for end in range(1, 2 * window + offset + 1):
                    pool.grow_window(handle, end)
                    pool.commit(handle, end)
            for handle in handles:
                pool.grow_window(handle, handle.num_tokens + num_new)
            pool.check()


def test_a_sequence_of_one_token_more_than_there_are_blocks_is_told_the_numbers() -> None:
    pool = tiny_model.pool(max_sequences=2, max_tokens=256)
    first = pool.allocate(129)
    assert not pool.can_allocate(1)
    with pytest.raises(PoolExhausted) as caught:
        pool.allocate(1)
    assert str(caught.value) == (
        "1 tokens need 1 KV blocks and a sequence slot; free are 0 blocks and 1 slots"
    )
    pool.free(first)
    assert pool.can_allocate(256)


def test_a_step_beyond_what_the_pool_was_built_for_is_told_the_limit() -> None:
    pool = tiny_model.pool(max_sequences=1, max_step_tokens=8)
    handle = pool.allocate(400)
    with pytest.raises(PoolExhausted, match="more than 8 tokens"):
        pool.grow_window(handle, 400)
    pool.check()
    pool.free(handle)
    assert pool.usage().pages == 0


def test_a_handle_is_given_back_once() -> None:
    pool = tiny_model.pool()
    handle = pool.allocate(10)
    pool.free(handle)
    with pytest.raises(KeyError):
        pool.free(handle)
    pool.check()


def test_arrays_are_those_of_each_layers_kind_and_their_bytes_are_told() -> None:
    pool = tiny_model.pool(max_sequences=3, max_tokens=300, max_step_tokens=10)
    usage = pool.usage()
    assert (usage.max_sequences, usage.max_blocks) == (3, 3)
    pages, blocks, slots, d, di = usage.max_pages + 1, usage.max_blocks + 1, 3, 16, 16
    hidden = tiny_model.CONFIG.hidden_size
    shapes = {
        AttentionKind.SWA: {"window": (pages, 4, d)},
        AttentionKind.CSA: {
            "window": (pages, 4, d),
            "entries": (blocks, 32, d),
            "index_keys": (blocks, 32, di),
            "state": (slots, 8, hidden),  # two windows
        },
        AttentionKind.HCA: {
            "window": (pages, 4, d),
            "entries": (blocks, 1, d),
            "state": (slots, 128, hidden),
        },
    }
    num_bytes = 0
    for layer, kind in zip(pool.layers, tiny_model.CONFIG.attention_kinds, strict=True):
        rows = {name: rows.units for name, rows in vars(layer).items()}
        assert {name: tuple(t.shape) for name, t in rows.items()} == shapes[kind]
        num_bytes += sum(4 * t.numel() for t in rows.values())
    assert usage.num_bytes == num_bytes


def test_a_byte_budget_becomes_as_many_blocks_as_fit() -> None:
    config = tiny_model.CONFIG
    within = partial(PoolCapacity.within, max_sequences=3, max_step_tokens=40)
    for dtype in (torch.float32, torch.bfloat16):
        least = KVPool(config, PoolCapacity(3, 128, 40), dtype).usage().num_bytes
        for more in (0, 1, 5_000, 1_000_000):
            capacity = within(least + more, config, dtype)
            pool = KVPool(config, capacity, dtype)
            assert capacity.max_tokens % 128 == 0
            assert least + more - pool.body_nbytes < pool.usage().num_bytes <= least + more
        with pytest.raises(ConfigError, match=f"at least {least} bytes, not {least - 1}"):
            within(least - 1, config, dtype)


def test_where_tokens_take_no_bytes_every_sequence_may_have_the_whole_context() -> None:
    config = replace(tiny_model.CONFIG, attention_kinds=(AttentionKind.SWA,) * 3)
    least = KVPool(config, PoolCapacity(3, 128, 40)).usage().num_bytes
    capacity = PoolCapacity.within(
        least, config, torch.float32, max_sequences=3, max_step_tokens=40
    )
    pool = KVPool(config, capacity)
    assert pool.usage().num_bytes == least
    for _ in range(3):
        pool.allocate(config.max_position_embeddings)
