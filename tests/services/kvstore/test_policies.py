"""What every eviction policy must do, and what each is for."""

from collections.abc import Callable
from hashlib import blake2b

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

from services.kvstore.ram import EvictionPolicy
from services.kvstore.s3_fifo import S3Fifo
from services.kvstore.simulate import POLICIES, hit_rates
from services.kvstore.tiny_lfu import Sketch, TinyLfu
from services.kvstore.traces import loop, multi_turn, scan, zipf

NUMBERS = {blake2b(b"%d" % number, digest_size=32).digest(): number for number in range(5000)}
KEYS = list(NUMBERS)

EVERY = pytest.mark.parametrize("build", POLICIES.values(), ids=POLICIES)


def _filled(build: Callable[[], EvictionPolicy], num_blobs: int) -> EvictionPolicy:
    policy = build()
    for number in range(num_blobs):
        policy.insert(KEYS[number], 100, 0.0)
    return policy


def _evicted(policy: EvictionPolicy, num_blobs: int) -> list[int]:
    keys = [policy.evict(0.0, lambda key: True) for _ in range(num_blobs)]
    return [NUMBERS[key] for key in keys if key is not None]


@EVERY
def test_everything_leaves_in_the_end_and_once(build: Callable[[], EvictionPolicy]) -> None:
    policy = _filled(build, 50)
    for number in range(0, 50, 3):
        policy.touch(KEYS[number], 0.0)
    assert sorted(_evicted(policy, 60)) == list(range(50))


@EVERY
def test_what_may_not_leave_stays_and_does_not_stand_in_the_way(
    build: Callable[[], EvictionPolicy],
) -> None:
    policy = _filled(build, 20)
    kept = {KEYS[number] for number in range(0, 20, 2)}
    left = [policy.evict(0.0, lambda key: key not in kept) for _ in range(15)]
    assert set(left[:10]) == {KEYS[number] for number in range(1, 20, 2)}
    assert left[10:] == [None] * 5
    assert sorted(_evicted(policy, 20)) == list(range(0, 20, 2))


@EVERY
def test_a_removed_blob_is_forgotten(build: Callable[[], EvictionPolicy]) -> None:
    policy = _filled(build, 5)
    policy.touch(KEYS[1], 0.0)
    policy.remove(KEYS[1])
    policy.remove(KEYS[4])
    assert sorted(_evicted(policy, 5)) == [0, 2, 3]


@EVERY
def test_a_popular_blob_outlives_the_rest(build: Callable[[], EvictionPolicy]) -> None:
    policy = _filled(build, 20)
    for _ in range(3):
        policy.touch(KEYS[0], 0.0)
    assert 0 not in _evicted(policy, 19)


@pytest.mark.parametrize("build", [S3Fifo, TinyLfu])
def test_popular_blobs_outlive_a_scan(build: Callable[[], EvictionPolicy]) -> None:
    """A hundred blobs that are used, then ten times as many that never are again."""
    policy = _filled(build, 100)
    for _ in range(2):
        for number in range(100):
            policy.touch(KEYS[number], 0.0)
    held = set(range(100))
    for number in range(1000, 2000):
        held -= set(_evicted(policy, 1))
        policy.insert(KEYS[number], 100, 0.0)
        held.add(number)
    assert len(held & set(range(100))) >= 60


def test_s3_fifo_remembers_what_it_evicted_too_early() -> None:
    policy = _filled(S3Fifo, 10)
    assert _evicted(policy, 1) == [0]
    policy.insert(KEYS[0], 100, 0.0)  # a ghost: straight to the main queue
    assert _evicted(policy, 9) == list(range(1, 10))


def test_what_s3_fifo_remembers_is_bounded() -> None:
    policy = _filled(S3Fifo, 10)
    for number in range(10, 5000):
        policy.evict(0.0, lambda key: True)
        policy.insert(KEYS[number], 100, 0.0)
    assert isinstance(policy, S3Fifo)
    assert len(policy._ghosts.blobs) <= 10


def test_tiny_lfu_forgets_what_was_popular_long_ago() -> None:
    sketch = Sketch(width=512)
    for _ in range(20):
        sketch.add(KEYS[0])
    assert sketch.count(KEYS[0]) == 15
    for number in range(12_000):  # halved twice meanwhile
        sketch.add(KEYS[1 + number % 50])
    assert sketch.count(KEYS[0]) < 8 < sketch.count(KEYS[1])


def test_the_default_policy_beats_lru_on_popular_blobs_and_scans_and_keeps_up_on_chats() -> None:
    """The reason why it is the default; figures of `model1 kv simulate`."""
    for trace, margin in ((zipf(8000), 0.05), (scan(8000), 0.03), (multi_turn(1500), -0.03)):
        s3_fifo, lru = (hit_rates(POLICIES[name](), trace, 0.05) for name in ("s3-fifo", "lru"))
        assert s3_fifo.resumable >= lru.resumable + margin, trace.name


def test_only_frequency_helps_when_a_loop_is_larger_than_the_cache() -> None:
    rates = {name: hit_rates(build(), loop(8000), 0.3).hit for name, build in POLICIES.items()}
    assert rates["lru"] == 0
    assert rates["w-tinylfu"] > 0.1


class AnyUseOfAPolicy(RuleBasedStateMachine):
    """Against a set: a policy knows what was inserted and neither left nor was removed."""

    build: Callable[[], EvictionPolicy]

    def __init__(self) -> None:
        super().__init__()
        self.policy = type(self).build()
        self.held: set[bytes] = set()
        self.kept: set[bytes] = set()

    @rule(number=st.integers(0, 15), nbytes=st.integers(1, 1000))
    def insert_or_touch(self, number: int, nbytes: int) -> None:
        key = KEYS[number]
        if key in self.held:
            self.policy.touch(key, 0.0)
        else:
            self.policy.insert(key, nbytes, 0.0)
            self.held.add(key)

    @rule(number=st.integers(0, 15))
    def pin(self, number: int) -> None:
        self.kept ^= {KEYS[number]}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        self.policy.remove(key)
        self.held.remove(key)

    @rule()
    def evict(self) -> None:
        key = self.policy.evict(0.0, lambda key: key not in self.kept)
        if key is None:
            assert not self.held - self.kept
        else:
            assert key in self.held - self.kept
            self.held.remove(key)

    def teardown(self) -> None:
        """All the rest can leave."""
        left = {self.policy.evict(0.0, lambda key: True) for _ in range(len(self.held))}
        assert left == self.held
        assert self.policy.evict(0.0, lambda key: True) is None


@EVERY
def test_any_use_of_a_policy(build: Callable[[], EvictionPolicy]) -> None:
    machine = type("Machine", (AnyUseOfAPolicy,), {"build": staticmethod(build)})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None)
    )
