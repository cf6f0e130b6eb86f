"""The batching policy against a pool that only counts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.attention.scheduler import Scheduler, SchedulerLimits
from services.attention.sequence import Sequence, SequenceState
from services.errors import QueueFull
from services.generation import FinishReason, GenerationRequest

STOP_TOKEN = 1


class CountingPool:
    """Claims are (id, size); the model of a pool that the policy needs."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.held: dict[int, int] = {}
        self._next_id = 0

    def can_allocate(self, num_tokens: int) -> bool:
        return sum(self.held.values()) + num_tokens <= self.num_tokens

    def allocate(self, num_tokens: int) -> int:
        assert self.can_allocate(num_tokens)
        self._next_id += 1
        self.held[self._next_id] = num_tokens
        return self._next_id

    def free(self, handle: int) -> None:
        del self.held[handle]


def _sequence(name: str, num_prompt: int, max_tokens: int) -> Sequence[int]:
    return Sequence(
        GenerationRequest(
            request_id=name,
            token_ids=tuple(range(2, 2 + num_prompt)),
            max_tokens=max_tokens,
            stop_token_ids=frozenset({STOP_TOKEN}),
        )
    )


def _step(scheduler: Scheduler[int], token_id: int = 7) -> list[tuple[str, int, int]]:
    """Run one step that draws `token_id` everywhere; returns (request, start, end)."""
    slices = scheduler.schedule()
    for piece in slices:
        finish = scheduler.computed(piece, token_id if piece.wants_token else None)
        if finish is not None:
            scheduler.end(piece.sequence)
    scheduler.check()
    return [(piece.sequence.request.request_id, piece.start, piece.end) for piece in slices]


def test_a_prompt_is_cut_into_chunks_and_decoding_sequences_go_first() -> None:
    limits = SchedulerLimits(max_batch_tokens=4, max_sequences=4)
    scheduler = Scheduler(limits, CountingPool(100))
    scheduler.add(_sequence("a", 2, max_tokens=5))
    assert _step(scheduler) == [("a", 0, 2)]
    scheduler.add(_sequence("b", 7, max_tokens=5))
    assert _step(scheduler) == [("a", 2, 3), ("b", 0, 3)]
    assert _step(scheduler) == [("a", 3, 4), ("b", 3, 6)]
    assert _step(scheduler) == [("a", 4, 5), ("b", 6, 7)]
    assert _step(scheduler) == [("a", 5, 6), ("b", 7, 8)]
    assert _step(scheduler) == [("b", 8, 9)]


def test_a_sequence_waits_until_the_pool_can_hold_all_it_can_become() -> None:
    pool = CountingPool(10)
    scheduler = Scheduler(SchedulerLimits(), pool)
    scheduler.add(_sequence("a", 2, max_tokens=4))
    scheduler.add(_sequence("b", 2, max_tokens=3))
    assert _step(scheduler) == [("a", 0, 2)]
    assert scheduler.num_waiting == 1
    assert _step(scheduler, token_id=STOP_TOKEN) == [("a", 2, 3)]
    assert _step(scheduler) == [("b", 0, 2)]
    assert sum(pool.held.values()) == 5


def test_a_small_request_does_not_overtake_a_large_one() -> None:
    scheduler = Scheduler(SchedulerLimits(), CountingPool(10))
    for name, num_prompt in (("a", 2), ("large", 7), ("small", 1)):
        scheduler.add(_sequence(name, num_prompt, max_tokens=2))
    assert _step(scheduler) == [("a", 0, 2)]
    assert scheduler.num_waiting == 2


def test_a_full_queue_refuses() -> None:
    scheduler = Scheduler(SchedulerLimits(max_waiting=1), CountingPool(10))
    scheduler.add(_sequence("a", 1, max_tokens=1))
    with pytest.raises(QueueFull, match="1 requests are waiting"):
        scheduler.add(_sequence("b", 1, max_tokens=1))


def test_a_stop_token_ends_before_max_tokens() -> None:
    scheduler = Scheduler(SchedulerLimits(), CountingPool(10))
    sequence = _sequence("a", 1, max_tokens=5)
    scheduler.add(sequence)
    (piece,) = scheduler.schedule()
    assert scheduler.computed(piece, STOP_TOKEN) is FinishReason.STOP


def test_limits_that_could_starve_a_decoding_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="max_sequences 9"):
        SchedulerLimits(max_batch_tokens=8, max_sequences=9)


ARRIVAL = st.tuples(st.just("arrive"), st.integers(1, 30), st.integers(1, 10))
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 1000), st.just(0))
STEP = st.tuples(st.just("step"), st.integers(0, 9), st.just(0))


@given(
    operations=st.lists(st.one_of(ARRIVAL, CANCEL, STEP, STEP), max_size=60),
    max_batch_tokens=st.integers(3, 20),
    max_sequences=st.integers(1, 3),
)
@settings(deadline=None, max_examples=200)
def test_random_arrivals_and_cancels_keep_budgets_and_end_each_request_once(
    operations: list[tuple[str, int, int]], max_batch_tokens: int, max_sequences: int
) -> None:
    limits = SchedulerLimits(
        max_batch_tokens=max_batch_tokens, max_sequences=max_sequences, max_waiting=5
    )
    pool = CountingPool(60)
    scheduler = Scheduler(limits, pool)
    live: list[Sequence[int]] = []
    ended: list[str] = []

    def end(sequence: Sequence[int]) -> None:
        scheduler.end(sequence)
        live.remove(sequence)
        ended.append(sequence.request.request_id)
        assert sequence.state is SequenceState.ENDED

    def step(salt: int) -> None:
        slices = scheduler.schedule()
        assert bool(slices) == bool(live)
        assert sum(piece.end - piece.start for piece in slices) <= max_batch_tokens
        assert len({id(piece.sequence) for piece in slices}) == len(slices)
        decoding = [sequence for sequence in live if sequence.is_decoding]
        assert [piece.sequence for piece in slices[: len(decoding)]] == decoding
        for piece in slices:
            token_id = None
            if piece.wants_token:
                token_id = STOP_TOKEN if (piece.end + salt) % 7 == 0 else 5
            if scheduler.computed(piece, token_id) is not None:
                end(piece.sequence)

    num_arrived = 0
    for kind, first, second in operations:
        if kind == "arrive":
            sequence = _sequence(str(num_arrived), first, max_tokens=second)
            try:
                scheduler.add(sequence)
            except QueueFull:
                assert scheduler.num_waiting == 5
            else:
                num_arrived += 1
                live.append(sequence)
        elif kind == "cancel" and live:
            end(live[first % len(live)])
        elif kind == "step":
            step(first)
        scheduler.check()
        assert sum(pool.held.values()) <= pool.num_tokens
        assert len(pool.held) == scheduler.num_running <= max_sequences
    for _ in range(10_000):
        if not live:
            break
        step(0)
    assert sorted(ended, key=int) == [str(number) for number in range(num_arrived)]
    assert not pool.held
