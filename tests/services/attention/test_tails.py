"""Slots of tails: never two owners of one, never one lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.attention.tails import Tail, TailCache

NUM_SLOTS = 3


def _put(cache: TailCache, key: bytes) -> Tail:
    slot = cache.reserve()
    assert slot is not None
    slot.buffer[:] = key
    return cache.publish(slot, key)


def test_the_longest_unused_tail_gives_way() -> None:
    cache = TailCache(2, 1)
    for key in (b"a", b"b"):
        cache.release(_put(cache, key))
    found = cache.find(b"a")
    assert found is not None
    cache.release(found)
    cache.release(_put(cache, b"c"))
    assert b"a" in cache and b"b" not in cache
    cache.check()


def test_a_superseded_tail_gives_way_first() -> None:
    cache = TailCache(2, 1)
    cache.release(_put(cache, b"a"))
    cache.supersede(_put(cache, b"b"))
    cache.release(_put(cache, b"c"))
    assert b"a" in cache and b"b" not in cache
    cache.check()


def test_when_all_slots_are_held_there_is_none() -> None:
    cache = TailCache(1, 1)
    held = _put(cache, b"a")
    assert cache.reserve() is None
    cache.release(held)
    assert cache.reserve() is not None
    assert b"a" not in cache


def test_what_is_forgotten_gives_its_slot_back_unless_it_is_held() -> None:
    cache = TailCache(3, 1)
    held = _put(cache, b"a")
    cache.release(_put(cache, b"b"))
    assert cache.forget([b"a", b"b", b"c", b"b"]) == 1
    assert b"a" in cache and b"b" not in cache
    cache.check()
    cache.release(held)
    assert cache.forget([b"a", b"a"]) == 1
    cache.check()


class TailCacheMachine(RuleBasedStateMachine):
    """Random use against a list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = TailCache(NUM_SLOTS, 1)
        self.held: list[Tail] = []

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d", b"e"]))
    def fill(self, key: bytes) -> None:
        slot = self.cache.reserve()
        if slot is None:
            assert len({id(tail) for tail in self.held}) == NUM_SLOTS
            return
        assert slot not in self.held
        slot.buffer[:] = key
        self.held.append(self.cache.publish(slot, key))

    @rule()
    def give_up_filling(self) -> None:
        slot = self.cache.reserve()
        if slot is not None:
            self.cache.release(slot)

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d", b"e"]))
    def find(self, key: bytes) -> None:
        assert (key in self.cache) >= (key in [tail.key for tail in self.held])
        tail = self.cache.find(key)
        if tail is not None:
            self.held.append(tail)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["release", "supersede", "hold"]))
    def change(self, data: st.DataObject, how: str) -> None:
        tail = data.draw(st.sampled_from(self.held))
        if how == "hold":
            self.cache.hold(tail)
            self.held.append(tail)
            return
        self.held.remove(tail)
        if how == "release":
            self.cache.release(tail)
        else:
            self.cache.supersede(tail)

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d", b"e"]))
    def forget(self, key: bytes) -> None:
        self.cache.forget([key])
        assert (key in self.cache) == (key in [tail.key for tail in self.held])

    @invariant()
    def whole(self) -> None:
        self.cache.check()
        assert self.cache.num_held == len({id(tail) for tail in self.held})
        for tail in self.held:
            assert tail.key == bytes(tail.buffer)


TestTailCache = TailCacheMachine.TestCase
TestTailCache.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def test_a_load_into_a_slot_is_not_found_before_it_is_published() -> None:
    cache = TailCache(2, 1)
    slot = cache.reserve()
    assert slot is not None
    assert cache.find(b"a") is None
    with pytest.raises(AssertionError):
        cache.publish(_put(cache, b"b"), b"c")  # it has a key
    assert cache.publish(slot, b"a").key == b"a"
    cache.check()
