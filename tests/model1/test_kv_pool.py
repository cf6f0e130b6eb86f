"""The pool under any order of claims, steps and releases: nothing leaks, nothing is shared."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from model1.config import AttentionKind
from model1.errors import PoolExhausted
from model1.kv_pool import KVHandle, KVPool, PoolCapacity
from tests.services import tiny_model


@dataclass(eq=False)
class Sequence:
    """What a sequence is known to have: its own account, beside the pool's."""

    handle: KVHandle
    max_tokens: int
    num_tokens: int = 0
    page_of: dict[int, int] = field(default_factory=dict)  # number -> page, while it is visible

    def visible(self, window: int) -> range:
        """Committed positions that the next query's window covers."""
        return range(max(0, self.num_tokens + 1 - window), self.num_tokens)


class PoolUnderLoad(RuleBasedStateMachine):
    """Steps never exceed what the pool was built for; then it must never run out of pages."""

    @initialize(
        window=st.sampled_from((2, 4, 6, 8, 16)),
        block=st.sampled_from((4, 8, 128)),
        max_sequences=st.integers(1, 4),
        max_tokens=st.integers(1, 200),
        max_step_tokens=st.integers(1, 40),
    )
    def build(
        self, window: int, block: int, max_sequences: int, max_tokens: int, max_step_tokens: int
    ) -> None:
        config = replace(tiny_model.CONFIG, sliding_window=window, hca_ratio=block)
        self.window, self.block, self.max_step_tokens = window, block, max_step_tokens
        self.pool = KVPool(config, PoolCapacity(max_sequences, max_tokens, max_step_tokens))
        self.free_slots, self.free_blocks = max_sequences, -(-max_tokens // block)
        self.running: list[Sequence] = []

    @rule(num_tokens=st.integers(1, 120))
    def allocate(self, num_tokens: int) -> None:
        num_blocks = -(-num_tokens // self.block)
        fits = self.free_slots > 0 and num_blocks <= self.free_blocks
        assert self.pool.can_allocate(num_tokens) == fits
        if not fits:
            with pytest.raises(PoolExhausted) as caught:
                self.pool.allocate(num_tokens)
            for number in (num_tokens, num_blocks, self.free_blocks, self.free_slots):
                assert str(number) in str(caught.value)
            return
        handle = self.pool.allocate(num_tokens)
        assert len(handle.blocks) == num_blocks
        assert 0 not in handle.blocks
        self.free_slots -= 1
        self.free_blocks -= num_blocks
        self.running.append(Sequence(handle, num_tokens))

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
    def finish(self, data: st.DataObject) -> None:
        self._free(data.draw(st.sampled_from(self.running)))

    @invariant()
    def every_unit_is_accounted_for(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        usage = self.pool.usage()
        assert usage.sequences == len(self.running) == usage.max_sequences - self.free_slots
        assert usage.blocks == usage.max_blocks - self.free_blocks
        assert usage.pages == sum(len(s.handle.pages) for s in self.running) <= usage.max_pages
        assert all(0 not in s.handle.pages for s in self.running)

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

    def _grow(self, data: st.DataObject) -> dict[Sequence, int]:
        """Pages for a step of any legal mix; returns where each of its sequences ends."""
        room, ends = self.max_step_tokens, dict[Sequence, int]()
        for sequence in data.draw(st.permutations(self.running)):
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
        self.free_blocks += len(sequence.handle.blocks)
        self.pool.free(sequence.handle)
        assert not sequence.handle.pages and not len(sequence.handle.blocks)


TestPoolUnderLoad = PoolUnderLoad.TestCase
TestPoolUnderLoad.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


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
    shapes = {
        AttentionKind.SWA: {"window": (pages, 4, d)},
        AttentionKind.CSA: {
            "window": (pages, 4, d),
            "entries": (blocks, 32, d),
            "index_keys": (blocks, 32, di),
            "state": (slots, 8, 4 * d),  # two windows of (c, z), each of two series
            "index_state": (slots, 8, 4 * di),
        },
        AttentionKind.HCA: {
            "window": (pages, 4, d),
            "entries": (blocks, 1, d),
            "state": (slots, 128, 2 * d),
        },
    }
    num_bytes = 0
    for layer, kind in zip(pool.layers, tiny_model.CONFIG.attention_kinds, strict=True):
        rows = {name: rows.units for name, rows in vars(layer).items()}
        assert {name: tuple(t.shape) for name, t in rows.items()} == shapes[kind]
        num_bytes += sum(4 * t.numel() for t in rows.values())
    assert usage.num_bytes == num_bytes
