"""What two micro-batches are worth: steps as one batch, as two, and as the worker chooses, in turns
on the same sequences, so that whatever else the machine does falls on all three.
"""

import asyncio
import os
import random
import statistics
from dataclasses import dataclass

from cluster.bench_dispatch.rig import CpuSeconds, Rig, breathe
from cluster.bench_workload import SidesDiffer
from model1.kv_capacity import PoolCapacity
from model1.kv_pool import KVPool
from model1.trunk import Trunk
from services.attention.engine import Engine, EngineConfig
from services.attention.experts import RoutedExperts
from services.attention.overlap import MeasuredStep, OverlapPolicy, StepSize
from services.attention.scheduler import SchedulerLimits
from services.generation import GenerationRequest

MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS = 16, 32
MAX_STEP_TOKENS = 512

Answers = list[list[int]]


class TakingTurns(OverlapPolicy):
    """One batch, two, and what the usual policy wants, step after step. That one learns from its
    own steps only."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.one: list[float] = []
        self.two: list[float] = []
        self.automatic: list[float] = []
        self.num_automatic_twos = 0
        self._batch = batch
        self._number = 0

    def choose(self, size: StepSize) -> int:
        turn = self._number % 3
        return super().choose(size) if turn == 2 else turn + 1

    def observe(self, size: StepSize, step: MeasuredStep) -> None:
        turn = self._number % 3
        self._number += 1
        if turn == 2:
            super().observe(size, step)
        if step.num_tokens == self._batch and not size.has_prompts:
            (self.one, self.two, self.automatic)[turn].append(step.seconds)
            self.num_automatic_twos += turn == 2 and step.micro_batches == 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Of decode steps of `batch` sequences. Medians of seconds; the ratios are speeds over that of
    one batch, of the automatic way by the sum of all steps, its trials included."""

    batch: int
    steps: int  # of each way
    one: float
    two: float
    automatic: float
    two_ratio: float
    automatic_ratio: float
    automatic_twos: float  # share of its steps

    @classmethod
    def of(cls, batch: int, turns: TakingTurns) -> "Gain":
        count = min(map(len, (turns.one, turns.two, turns.automatic)))
        one, two = turns.one[:count], turns.two[:count]
        automatic = turns.automatic[:count]
        return cls(
            batch=batch,
            steps=count,
            one=statistics.median(one),
            two=statistics.median(two),
            automatic=statistics.median(automatic),
            two_ratio=statistics.median(one) / statistics.median(two),
            automatic_ratio=_trimmed_sum(one) / _trimmed_sum(automatic),
            automatic_twos=turns.num_automatic_twos / len(turns.automatic),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Core seconds of a step by role, and what it took; of `cores` at most so many are of use."""

    batch: int
    micro_batches: int
    seconds: float
    cpu: CpuSeconds
    wait_seconds: float  # of the worker, for rows
    cores: int

    @property
    def busy_share(self) -> float:
        return self.cpu.total / (self.seconds * self.cores)


def _trimmed_sum(seconds: list[float]) -> float:
    """Without the slowest twentieth: hiccups of the machine fall on one of the ways by chance. A
    trial of what is slower costs more steps than that or is rarer."""
    ordered = sorted(seconds)
    return sum(ordered[: len(ordered) - len(ordered) // 20])


class Decoding:
    """A worker's engine over the rig's router."""

    def __init__(self, rig: Rig, trunk: Trunk) -> None:
        self._rig = rig
        self._trunk = trunk

    async def gain(self, batch: int, num_steps: int) -> Gain:
        """`num_steps` of each way."""
        turns = TakingTurns(batch)
        await self._answers(batch, 3 * num_steps, turns)
        return Gain.of(batch, turns)

    async def costs(self, batch: int, num_steps: int) -> list[StepCost]:
        """Of one batch and of two micro-batches. Raises SidesDiffer if a token differs."""
        found: list[StepCost] = []
        answers: list[Answers] = []
        for micro_batches in (1, 2):
            await breathe()
            before = await self._rig.cpu_seconds()
            answered, engine = await self._answers(batch, num_steps, OverlapPolicy(micro_batches))
            counters = engine.stats().counters
            cpu = (await self._rig.cpu_seconds()).since(before, steps=counters.steps)
            answers.append(answered)
            found.append(
                StepCost(
                    batch=batch,
                    micro_batches=micro_batches,
                    seconds=counters.step_seconds.sum_seconds / counters.steps,
                    cpu=cpu,
                    wait_seconds=counters.crossing_wait_seconds.sum_seconds / counters.steps,
                    cores=len(os.sched_getaffinity(0)),
                )
            )
        if answers[0] != answers[1]:
            raise SidesDiffer("two micro-batches gave other tokens than one batch")
        return found

    async def _answers(
        self, batch: int, num_steps: int, overlap: OverlapPolicy
    ) -> tuple[Answers, Engine]:
        tokens = batch * (MAX_PROMPT_TOKENS + num_steps + 1)
        units = batch * self._trunk.config.max_position_embeddings
        capacity = PoolCapacity(batch, min(units, tokens + 128 * batch), MAX_STEP_TOKENS)
        pool = KVPool(self._trunk.config, capacity, self._trunk.dtype)
        limits = SchedulerLimits(max_batch_tokens=MAX_STEP_TOKENS, max_sequences=batch)
        experts = await RoutedExperts.open(self._rig.router_address)
        engine = Engine(self._trunk, pool, experts, EngineConfig(limits=limits), overlap=overlap)
        running = asyncio.create_task(engine.run())
        try:
            requests = self._requests(batch, num_steps + 1)
            answers = await asyncio.gather(*(_answer(engine, each) for each in requests))
            return list(answers), engine
        finally:
            engine.close()
            await running
            await experts.close()

    def _requests(self, batch: int, max_tokens: int) -> list[GenerationRequest]:
        draw = random.Random(batch)
        vocab_size = self._trunk.config.vocab_size
        return [
            GenerationRequest(
                request_id=f"bench-{number}",
                token_ids=tuple(
                    draw.randrange(vocab_size)
                    for _ in range(draw.randint(MIN_PROMPT_TOKENS, MAX_PROMPT_TOKENS))
                ),
                max_tokens=max_tokens,
                stop_token_ids=frozenset(),
            )
            for number in range(batch)
        ]


async def _answer(engine: Engine, request: GenerationRequest) -> list[int]:
    token_ids: list[int] = []
    with engine.submit(request) as stream:
        async for event in stream:
            token_ids += event.token_ids
    return token_ids
