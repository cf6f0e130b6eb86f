"""The batching policy against a pool that only counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.attention.scheduler import Scheduler, SchedulerLimits, Slice
from services.attention.sequence import Sequence, SequenceState
from services.errors import QueueFull
from services.generation import FinishReason, GenerationRequest

STOP_TOKEN = 1


class CountingCache:
    """Counts tokens: the model of a KV cache that the policy needs."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.held: dict[CountingClaim, int] = {}

    def sequence(self, name: str, num_prompt: int, max_tokens: int) -> "CountedSequence":
        request = GenerationRequest(
            request_id=name,
            token_ids=tuple(range(2, 2 + num_prompt)),
            max_tokens=max_tokens,
            stop_token_ids=frozenset({STOP_TOKEN}),
        )
        return Sequence(request, CountingClaim(self, request.max_total_tokens))


class CountingClaim:
    """Tests set what is public; a step sets `num_tokens`."""

    def __init__(self, cache: CountingCache, max_tokens: int) -> None:
        self.is_ready = True
        self.is_loading = False
        self.num_tokens = 0
        self.stop_every = 1000
        self.num_steps = 0
        self._cache = cache
        self._max_tokens = max_tokens
        self._is_back = False

    @property
    def has_room(self) -> bool:
        return sum(self._cache.held.values()) + self._max_tokens <= self._cache.max_tokens

    def take(self) -> None:
        assert self.is_ready and self.has_room and self not in self._cache.held
        self._cache.held[self] = self._max_tokens

    @property
    def next_stop(self) -> int:
        return (self.num_tokens // self.stop_every + 1) * self.stop_every

    def computed(self, token_ids: list[int]) -> None:
        assert not self.is_loading
        assert self.num_tokens <= len(token_ids)
        self.num_steps += 1

    def give_back(self) -> None:
        assert not self._is_back
        self._is_back = True
        self._cache.held.pop(self, None)


CountedSequence = Sequence[CountingClaim]


def _run(scheduler: Scheduler[CountingClaim]) -> list[Slice[CountingClaim]]:
    slices = scheduler.schedule()
    for piece in slices:
        piece.sequence.claim.num_tokens = piece.end
    return slices


def _step(scheduler: Scheduler[CountingClaim], token_id: int = 7) -> list[tuple[str, int, int]]:
    """Run one step that draws `token_id` everywhere; returns (request, start, end)."""
    slices = _run(scheduler)
    for piece in slices:
        finish = scheduler.computed(piece, token_id if piece.wants_token else None)
        if finish is not None:
            scheduler.end(piece.sequence)
    scheduler.check()
    return [(piece.sequence.request.request_id, piece.start, piece.end) for piece in slices]


def test_a_prompt_is_cut_into_chunks_and_decoding_sequences_go_first() -> None:
    limits = SchedulerLimits(max_batch_tokens=4, max_sequences=4)
    scheduler, cache = Scheduler[CountingClaim](limits), CountingCache(100)
    scheduler.add(cache.sequence("a", 2, max_tokens=5))
    assert _step(scheduler) == [("a", 0, 2)]
    scheduler.add(cache.sequence("b", 7, max_tokens=5))
    assert _step(scheduler) == [("a", 2, 3), ("b", 0, 3)]
    assert _step(scheduler) == [("a", 3, 4), ("b", 3, 6)]
    assert _step(scheduler) == [("a", 4, 5), ("b", 6, 7)]
    assert _step(scheduler) == [("a", 5, 6), ("b", 7, 8)]
    assert _step(scheduler) == [("b", 8, 9)]


def test_a_chunk_ends_where_the_cache_needs_the_state() -> None:
    limits = SchedulerLimits(max_batch_tokens=10, max_sequences=4)
    scheduler, cache = Scheduler[CountingClaim](limits), CountingCache(100)
    stopping, other = cache.sequence("a", 13, max_tokens=2), cache.sequence("b", 8, max_tokens=2)
    stopping.claim.stop_every = 4
    scheduler.add(stopping)
    scheduler.add(other)
    assert _step(scheduler) == [("a", 0, 4), ("b", 0, 6)]  # what it leaves, others use
    assert _step(scheduler) == [("a", 4, 8), ("b", 6, 8)]
    assert _step(scheduler) == [("b", 8, 9), ("a", 8, 12)]
    assert _step(scheduler) == [("a", 12, 13)]
    assert _step(scheduler) == [("a", 13, 14)]


def test_a_sequence_starts_where_the_cache_begins_and_may_jump_between_steps() -> None:
    limits = SchedulerLimits(max_batch_tokens=4, max_sequences=4)
    scheduler, cache = Scheduler[CountingClaim](limits), CountingCache(100)
    sequence = cache.sequence("a", 20, max_tokens=2)
    sequence.claim.num_tokens = 6
    scheduler.add(sequence)
    assert _step(scheduler) == [("a", 6, 10)]
    sequence.claim.num_tokens = 18
    assert _step(scheduler) == [("a", 18, 20)]


def test_others_go_ahead_while_a_sequence_is_not_ready_or_is_loading() -> None:
    limits = SchedulerLimits(max_batch_tokens=4, max_sequences=2)
    scheduler, cache = Scheduler[CountingClaim](limits), CountingCache(100)
    first, second = cache.sequence("a", 2, max_tokens=5), cache.sequence("b", 2, max_tokens=5)
    first.claim.is_ready = False
    scheduler.add(first)
    assert _step(scheduler) == []
    scheduler.add(second)
    assert _step(scheduler) == [("b", 0, 2)]
    first.claim.is_ready = first.claim.is_loading = True
    assert _step(scheduler) == [("b", 2, 3)]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 0)  # it holds its place
    first.claim.is_loading = False
    assert _step(scheduler) == [("b", 3, 4), ("a", 0, 2)]


def test_a_sequence_waits_until_the_cache_can_hold_all_it_can_become() -> None:
    scheduler, cache = Scheduler[CountingClaim](SchedulerLimits()), CountingCache(10)
    scheduler.add(cache.sequence("a", 2, max_tokens=4))
    scheduler.add(cache.sequence("b", 2, max_tokens=3))
    assert _step(scheduler) == [("a", 0, 2)]
    assert scheduler.num_waiting == 1
    assert _step(scheduler, token_id=STOP_TOKEN) == [("a", 2, 3)]
    assert _step(scheduler) == [("b", 0, 2)]
    assert sum(cache.held.values()) == 5


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    scheduler, cache = Scheduler[CountingClaim](SchedulerLimits()), CountingCache(10)
    for name, num_prompt in (("a", 2), ("large", 7), ("small", 1)):
        scheduler.add(cache.sequence(name, num_prompt, max_tokens=2))
    assert _step(scheduler) == [("a", 0, 2)]
    assert scheduler.num_waiting == 2


def test_a_full_queue_refuses() -> None:
    scheduler = Scheduler[CountingClaim](SchedulerLimits(max_waiting=1))
    cache = CountingCache(10)
    scheduler.add(cache.sequence("a", 1, max_tokens=1))
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        scheduler.add(cache.sequence("b", 1, max_tokens=1))


def test_a_stop_token_ends_before_max_tokens() -> None:
    scheduler = Scheduler[CountingClaim](SchedulerLimits())
    scheduler.add(CountingCache(10).sequence("a", 1, max_tokens=5))
    (piece,) = _run(scheduler)
    assert scheduler.computed(piece, STOP_TOKEN) is FinishReason.STOP


def test_limits_that_could_starve_a_decoding_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="max_sequences 9"):
        SchedulerLimits(max_batch_tokens=8, max_sequences=9)


ARRIVAL = st.tuples(st.just("arrive"), st.integers(1, 30), st.integers(1, 10))
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 1000), st.just(0))
STEP = st.tuples(st.just("step"), st.integers(0, 9), st.just(0))
# What the cache may do between two steps: be looking things up or loading, or be done with it.
CACHE = st.tuples(st.just("cache"), st.integers(0, 1000), st.integers(0, 2))


@given(
    operations=st.lists(st.one_of(ARRIVAL, CANCEL, CACHE, STEP, STEP), max_size=60),
    max_batch_tokens=st.integers(3, 20),
    max_sequences=st.integers(1, 3),
    stop_every=st.integers(1, 20),
)
@settings(deadline=None, max_examples=200)
def test_random_arrivals_and_cancels_keep_budgets_and_end_each_request_once(
    operations: list[tuple[str, int, int]],
    max_batch_tokens: int,
    max_sequences: int,
    stop_every: int,
) -> None:
    limits = SchedulerLimits(
        max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, max_waiting=5
    )
    cache = CountingCache(60)
    scheduler = Scheduler[CountingClaim](limits)
    live: list[CountedSequence] = []
    ended: list[str] = []

    def end(sequence: CountedSequence) -> None:
        scheduler.end(sequence)
        live.remove(sequence)
        ended.append(sequence.request.request_id)
        assert sequence.state is SequenceState.ENDED

    def step(salt: int) -> None:
        slices = scheduler.schedule()
        could_run = [each for each in live if each.claim.is_ready and not each.claim.is_loading]
        if len(could_run) == len(live):
            assert bool(slices) == bool(live)
        assert sum(piece.end - piece.start for piece in slices) <= max_batch_tokens
        assert len({id(piece.sequence) for piece in slices}) == len(slices)
        decoding = [each for each in could_run if each.is_decoding]
        assert {piece.sequence for piece in slices[: len(decoding)]} == set(decoding)
        for piece in slices:
            claim = piece.sequence.claim
            assert piece.start == claim.num_tokens < piece.end <= claim.next_stop
            claim.num_tokens = piece.end
            token_id = None
            if piece.wants_token:
                token_id = STOP_TOKEN if (piece.end + salt) % 7 == 0 else 5
            if scheduler.computed(piece, token_id) is not None:
                end(piece.sequence)

    num_arrived = 0
    for kind, first, second in operations:
        if kind == "arrive":
            sequence = cache.sequence(str(num_arrived), first, max_tokens=second)
            sequence.claim.stop_every = stop_every
            try:
                scheduler.add(sequence)
            except QueueFull:
                assert scheduler.num_waiting == 5
            else:
                num_arrived += 1
                live.append(sequence)
        elif kind == "cancel" and live:
            end(live[first % len(live)])
        elif kind == "cache" and live:
            sequence = live[first % len(live)]
            sequence.claim.is_ready = second > 0 or sequence.state is SequenceState.RUNNING
            sequence.claim.is_loading = second == 1
        elif kind == "step":
            step(first)
        scheduler.check()
        assert sum(cache.held.values()) <= cache.max_tokens
        assert len(cache.held) == scheduler.num_running <= max_sequences
    for sequence in live:
        sequence.claim.is_ready, sequence.claim.is_loading = True, False
    for _ in range(10_000):
        if not live:
            break
        step(0)
    assert sorted(ended, key=int) == [str(number) for number in range(num_arrived)]
    assert not cache.held
