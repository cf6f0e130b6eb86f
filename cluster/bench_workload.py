"""What both sides of `model1 bench serve` do, and how fast each did it. Plain values.

Knows neither where a side runs nor how its tokens travel.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.generation import GenerationRequest

Tokens = tuple[int, ...]
# Answers one request: tokens as they arrive.
Generate = Callable[[GenerationRequest], AsyncIterator[Iterable[int]]]


class SidesDiffer(Exception):
    """Two sides gave different tokens for the same workload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`batch` requests at once, greedy, every answer of `max_tokens` tokens."""

    batch: int = 32
    min_prompt_tokens: int = 64
    max_prompt_tokens: int = 128
    max_tokens: int = 64
    vocab_size: int = 16384

    def requests(self) -> list[GenerationRequest]:
        """The same ones every time."""
        draw = random.Random(self.batch)
        return [
            GenerationRequest(
                request_id=f"bench-{index}",
                token_ids=tuple(
                    draw.randrange(self.vocab_size)
                    for _ in range(draw.randint(self.min_prompt_tokens, self.max_prompt_tokens))
                ),
                max_tokens=self.max_tokens,
                stop_token_ids=frozenset(),
            )
            for index in range(self.batch)
        ]


class Arrival(NamedTuple):
    seconds: float
    token_id: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One side's answers to a workload, and its speed.

    The decode speed is that of the time in which every request is decoding: from the last first
    token to the first last one.
    """

    answers: tuple[Tokens, ...]
    decode_tokens_per_second: float
    tokens_per_second: float  # of the whole, prompts included in the time

    @classmethod
    def of(cls, arrivals: Sequence[Sequence[Arrival]], started: float, ended: float) -> "Measured":
        begin = max(arrived[0].seconds for arrived in arrivals)
        end = min(arrived[-1].seconds for arrived in arrivals)
        decoded = sum(begin < each.seconds <= end for arrived in arrivals for each in arrived)
        return cls(
            answers=tuple(tuple(each.token_id for each in arrived) for arrived in arrivals),
            decode_tokens_per_second=decoded / (end - begin) if end > begin else 0.0,
            tokens_per_second=sum(map(len, arrivals)) / (ended - started),
        )


async def measure(workload: Workload, generate: Generate) -> Measured:
    arrivals: list[list[Arrival]] = [[] for _ in range(workload.batch)]

    async def answer(request: GenerationRequest, arrived: list[Arrival]) -> None:
        async for token_ids in generate(request):
            now = time.perf_counter()
            arrived.extend(Arrival(now, token_id) for token_id in token_ids)

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for request, arrived in zip(workload.requests(), arrivals, strict=True):
            group.create_task(answer(request, arrived))
    ended = time.perf_counter()
    return Measured.of(arrivals, started, ended)
