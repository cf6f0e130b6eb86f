"""Which worker takes the next request, over plain values."""

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.placement import MAX_EXTRA_REQUESTS, Candidate, KnownPrefixes, choose

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        num_active=st.integers(0, 12),
        looks_down=st.booleans(),
        served_last_turn=st.booleans(),
        knows_prefix=st.booleans(),
    ),
    min_size=1,
    max_size=6,
)


def test_the_least_loaded_takes_what_nobody_knows() -> None:
    assert choose([Candidate(2), Candidate(1), Candidate(1)]) == 1


def test_the_last_turn_counts_more_than_a_prefix_and_that_more_than_load() -> None:
    last, knows = Candidate(3, served_last_turn=True), Candidate(2, knows_prefix=True)
    assert choose([Candidate(0), knows, last]) == 2
    assert choose([Candidate(0), knows]) == 1


def test_a_long_queue_outweighs_what_a_worker_holds() -> None:
    busy = Candidate(MAX_EXTRA_REQUESTS + 1, served_last_turn=True, knows_prefix=True)
    assert choose([busy, Candidate(0)]) == 1
    assert choose([busy, Candidate(1)]) == 0


@given(CANDIDATES)
def test_nobody_down_is_taken_while_somebody_is_up(candidates: list[Candidate]) -> None:
    chosen = candidates[choose(candidates)]
    assert not chosen.looks_down or all(each.looks_down for each in candidates)


@given(CANDIDATES)
def test_no_queue_grows_far_beyond_the_shortest(candidates: list[Candidate]) -> None:
    chosen = candidates[choose(candidates)]
    up = [each.num_active for each in candidates if not each.looks_down]
    assert chosen.num_active <= min(up, default=chosen.num_active) + MAX_EXTRA_REQUESTS


def test_the_longest_known_prefix_names_its_worker() -> None:
    known = KnownPrefixes[str]()
    first, second = tuple(range(128)), tuple(range(1000, 1128))
    known.learn("", first, "a")
    known.learn("", first + second, "b")
    known.learn("", first, "a")
    assert known.worker_of_longest("", (*first, 5, 6)) == "a"
    assert known.worker_of_longest("", (*first, *second, 5, 6)) == "b"
    assert known.worker_of_longest("", second + first) is None
    assert known.worker_of_longest("", first[:127]) is None
    assert known.worker_of_longest("other salt", first) is None


def test_the_oldest_blocks_are_forgotten() -> None:
    known = KnownPrefixes[int](max_blocks=3)
    for i in range(5):
        known.learn("", (i,) * 128, i)
    assert len(known) == 3
    assert [known.worker_of_longest("", (i,) * 128) for i in range(5)] == [None, None, 2, 3, 4]
