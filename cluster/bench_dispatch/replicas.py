"""What more replicas of the same experts are worth: crossings a second that a router gets through
while many are under way, with emulated expert time.
"""

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from cluster.bench_dispatch.rig import Rig, breathe
from model1.bench import random_call
from model1.moe import ExpertCall
from services.attention.experts import RoutedExperts

NUM_STREAMS = 4
CALLS_A_STREAM = 4


@dataclass(frozen=True, slots=True)
class Throughput:
    """Crossings a second, the median of the rounds. `of_linear`: over so many times one's."""

    num_replicas: int
    crossings_per_second: float
    of_linear: float


async def measure_replicas(
    rig: Rig, num_rows: int, counts: Sequence[int], *, speed: float, rounds: int, seconds: float
) -> list[Throughput]:
    """`counts` begins with 1. The counts take turns, round by round."""
    call = random_call(rig.config, num_rows)
    rates: dict[int, list[float]] = {count: [] for count in counts}
    async with AsyncExitStack() as stack:
        streams: list[RoutedExperts] = []
        for _ in range(NUM_STREAMS):
            experts = await RoutedExperts.open(rig.router_address)
            stack.push_async_callback(experts.close)
            streams.append(experts)
        for _ in range(rounds):
            for count in counts:
                await rig.use_emulated(rig.copied(count), speed)
                await _rate(streams, call, seconds / 5)  # every stream opened, times known
                await breathe()
                rates[count].append(await _rate(streams, call, seconds))
    alone = statistics.median(rates[1])
    return [
        Throughput(count, rate, rate / (count * alone))
        for count, rate in ((count, statistics.median(rates[count])) for count in counts)
    ]


async def _rate(streams: Sequence[RoutedExperts], call: ExpertCall, seconds: float) -> float:
    """Of the crossings that end within the time; what is under way then is waited for."""
    started = time.perf_counter()
    end = started + seconds

    async def cross_again_and_again(experts: RoutedExperts) -> int:
        count = 0
        while time.perf_counter() < end:
            await (await experts.submit(call))
            count += time.perf_counter() < end
        return count

    counts = await asyncio.gather(
        *(cross_again_and_again(each) for each in streams for _ in range(CALLS_A_STREAM))
    )
    return sum(counts) / seconds
