"""A load in which nothing is ever asked again: what the tiers cost where they can give nothing."""

import random
import statistics
from dataclasses import dataclass

from cluster.bench_kv.rig import MAX_STEP_TOKENS, Rig, p95, random_tokens, tell
from cluster.bench_workload import SidesDiffer
from model1.kv_capacity import PoolCapacity

MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 128, 640
ANSWER_TOKENS = 8


@dataclass(frozen=True, slots=True)
class NoReuse:
    """Time to first token in seconds, and the median of the pairwise ratios."""

    num_requests: int
    with_tiers_p95: float
    without_p95: float
    ratio_p95: float
    ratio_median: float


async def measure_no_reuse(rig: Rig, num_requests: int) -> NoReuse:
    """The same requests on a worker with a store and on one without, by turns.

    Raises `SidesDiffer`.
    """
    draw = random.Random("lengths")
    on: list[float] = []
    off: list[float] = []
    capacity = PoolCapacity(1, 16 * MAX_PROMPT_TOKENS, MAX_STEP_TOKENS)
    async with rig.worker(capacity) as tiered, rig.worker(capacity, with_store=False) as plain:
        for number in range(-2, num_requests):  # two to warm up
            length = draw.randint(MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS)
            prompt = random_tokens(length, rig.config.vocab_size, f"no reuse {number}")
            sides = [(tiered, on), (plain, off)]
            answers = []
            for worker, times in sides if number % 2 else sides[::-1]:
                answers.append(await worker.answer(prompt, ANSWER_TOKENS))
                if number >= 0:
                    times.append(answers[-1].first_token_seconds)
            if answers[0].token_ids != answers[1].token_ids:
                raise SidesDiffer("with and without tiers: other tokens")
            if number % 10 == 9:
                tell(f"{number + 1} of {num_requests} requests without reuse")
    return NoReuse(
        num_requests=num_requests,
        with_tiers_p95=p95(on),
        without_p95=p95(off),
        ratio_p95=p95(on) / p95(off),
        ratio_median=statistics.median(a / b for a, b in zip(on, off, strict=True)),
    )
