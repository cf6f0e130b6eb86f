"""The serving benchmark's workload, and what it counts as decode speed."""

from collections.abc import AsyncIterator, Iterable

from cluster.bench_workload import Arrival, Measured, Workload, measure
from services.generation import GenerationRequest

WORKLOAD = Workload(batch=2, min_prompt_tokens=3, max_prompt_tokens=5, max_tokens=4, vocab_size=50)


def test_only_the_time_in_which_all_requests_decode_counts_as_decoding() -> None:
    early = [Arrival(1, 10), Arrival(2, 11), Arrival(9, 12), Arrival(10, 13)]
    late = [Arrival(6, 20), Arrival(8, 21), Arrival(10, 22), Arrival(12, 23)]
    measured = Measured.of([early, late], started=0, ended=16)
    # From 6, the late one's first token, to 10, the early one's last: 12, 13, 21, 22.
    assert measured.decode_tokens_per_second == 4 / (10 - 6)
    assert measured.tokens_per_second == 8 / 16
    assert measured.answers == ((10, 11, 12, 13), (20, 21, 22, 23))


async def test_answers_are_in_the_order_of_the_requests() -> None:
    async def answers(request: GenerationRequest) -> AsyncIterator[Iterable[int]]:
        yield request.token_ids[:1]
        yield request.token_ids[1:]

    measured = await measure(WORKLOAD, answers)
    assert measured.answers == tuple(request.token_ids for request in WORKLOAD.requests())


def test_a_workload_asks_the_same_every_time() -> None:
    first, again = WORKLOAD.requests(), WORKLOAD.requests()
    assert first == again
    assert len({request.token_ids for request in first}) == WORKLOAD.batch
    assert all(3 <= len(request.token_ids) <= 5 for request in first)
