"""When a step is split in two, and that nothing but its time depends on it."""

import asyncio
import random
from collections.abc import Callable

import pytest
from torch import Tensor

from model1.moe import ExpertCall
from services.attention import runner
from services.attention.engine import Engine, EngineConfig
from services.attention.local import LocalExperts
from services.attention.overlap import (
    CLEARLY_SLOWER,
    TRIAL_SHARE,
    MeasuredStep,
    OverlapPolicy,
    StepSize,
    halves,
)
from services.attention.scheduler import SchedulerLimits, Slice
from services.errors import RequestCancelled
from services.generation import GenerationRequest
from tests.services import tiny_model

DECODE_64 = StepSize.of(64, 64)


def drive(
    policy: OverlapPolicy,
    seconds: Callable[[int, int], float],  # of step number n, run as so many micro-batches
    *,
    num_steps: int,
    wait_share: float = 0.4,
    size: StepSize = DECODE_64,
) -> tuple[float, list[int]]:
    """The time that the steps took in all, and how each ran."""
    total, ways = 0.0, []
    for number in range(num_steps):
        way = policy.choose(size)
        took = seconds(number, way)
        policy.observe(size, MeasuredStep(size.max_tokens, way, took, wait_share * took))
        total += took
        ways.append(way)
    return total, ways


def test_two_are_used_where_they_are_faster() -> None:
    policy = OverlapPolicy()
    _, ways = drive(policy, lambda _, way: 1.0 if way == 1 else 0.8, num_steps=200)
    assert ways[0] == 1
    assert sum(way == 2 for way in ways) > 180
    assert policy.choices[DECODE_64].micro_batches == 2
    assert policy.choices[DECODE_64].ratio == pytest.approx(0.8)


@pytest.mark.parametrize("ratio", [1.01, 1.05, 1.2, 1.6, 2.0])
def test_trying_what_is_slower_costs_a_fixed_share_of_the_time(ratio: float) -> None:
    num_steps = 1000
    policy = OverlapPolicy()
    total, ways = drive(policy, lambda _, way: 1.0 if way == 1 else ratio, num_steps=num_steps)
    assert policy.choices[DECODE_64].micro_batches == 1
    first_trial_steps = max(ratio - 1, 3 * (CLEARLY_SLOWER - 1))
    assert total <= num_steps * (1 + TRIAL_SHARE) + first_trial_steps
    assert 2 in ways


def test_nothing_is_tried_where_nothing_is_waited_for() -> None:
    policy = OverlapPolicy()
    _, ways = drive(policy, lambda _, way: 1.0, num_steps=500, wait_share=0.02)
    assert set(ways) == {1}


def test_a_change_of_what_is_faster_is_noticed_both_ways() -> None:
    policy = OverlapPolicy()
    drive(policy, lambda _, way: 1.0 if way == 1 else 0.8, num_steps=100)
    assert policy.choose(DECODE_64) == 2
    drive(policy, lambda _, way: 0.8 if way == 1 else 1.0, num_steps=400)
    assert policy.choices[DECODE_64].micro_batches == 1
    drive(policy, lambda _, way: 1.0 if way == 1 else 0.8, num_steps=400)
    assert policy.choices[DECODE_64].micro_batches == 2


def test_a_step_ten_times_as_long_decides_nothing() -> None:
    policy = OverlapPolicy()
    drive(policy, lambda _, way: 1.0 if way == 1 else 0.8, num_steps=100)
    slow = {2: 10.0}  # the first pair of the next trial
    drive(policy, lambda number, way: slow.pop(way, 1.0 if way == 1 else 0.8), num_steps=200)
    assert policy.choose(DECODE_64) == 2


@pytest.mark.parametrize("ratio", [0.85, 1.0, 1.1, 1.3])
def test_on_a_noisy_machine_little_is_lost_against_the_better_way(ratio: float) -> None:
    """Whatever the noise does to a choice, on average over many machines."""
    num_machines, num_steps = 40, 1000
    total = 0.0
    for seed in range(num_machines):
        draw = random.Random(seed)

        def seconds(number: int, way: int, draw: random.Random = draw) -> float:
            noise = draw.uniform(0.8, 1.25) * (4.0 if draw.random() < 0.02 else 1.0)
            return (1.0 + number / num_steps) * (1.0 if way == 1 else ratio) * noise

        total += drive(OverlapPolicy(), seconds, num_steps=num_steps)[0]
        draw.seed(seed)
        total -= min(1.0, ratio) * sum(seconds(number, 1) for number in range(num_steps))
    mean_step = 1.5 * min(1.0, ratio)
    assert total / (num_machines * num_steps) <= 0.03 * mean_step


def test_sizes_are_told_apart() -> None:
    policy = OverlapPolicy()
    small = StepSize.of(8, 8)
    drive(policy, lambda _, way: 1.0 if way == 1 else 0.8, num_steps=50)
    drive(policy, lambda _, way: 1.0 if way == 1 else 1.3, num_steps=50, size=small)
    assert (policy.choose(DECODE_64), policy.choose(small)) == (2, 1)
    assert StepSize.of(33, 33) == StepSize.of(64, 64) != StepSize.of(65, 65)
    assert StepSize.of(64, 3).has_prompts
    assert StepSize.of(1, 1) == StepSize(1, has_prompts=False)


def test_what_is_forced_is_done() -> None:
    for way in (1, 2):
        _, ways = drive(OverlapPolicy(way), lambda _, way: float(way), num_steps=100)
        assert set(ways) == {way}
    with pytest.raises(ValueError, match="1 or 2 micro-batches, not 3"):
        OverlapPolicy(3)


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        ([1], None),
        ([1, 1], ([0], [1])),
        ([1, 1, 1, 1, 1], ([0, 2, 4], [1, 3])),
        ([1, 1, 1, 500], None),
        ([1, 1, 30, 20], ([2], [0, 1, 3])),
    ],
)
def test_a_step_is_halved_by_tokens_or_not_at_all(
    num_tokens: list[int], expected: tuple[list[int], list[int]] | None
) -> None:
    assert halves(num_tokens) == expected


class LateExperts:
    """Local experts whose sums come a few turns of the loop later, in any order."""

    def __init__(self, seed: int) -> None:
        self.most_away = 0
        self._num_away = 0
        self._draw = random.Random(seed)
        self._local = LocalExperts(tiny_model.model().experts)

    async def submit(self, call: ExpertCall, timeout_seconds: float) -> asyncio.Future[Tensor]:
        self._num_away += 1
        self.most_away = max(self.most_away, self._num_away)
        return asyncio.ensure_future(self._sum(call, self._draw.randrange(6)))

    async def _sum(self, call: ExpertCall, turns: int) -> Tensor:
        try:
            for _ in range(turns):
                await asyncio.sleep(0)
            return await (await self._local.submit(call, 30.0))
        finally:
            self._num_away -= 1


Logits = dict[tuple[str, int], bytes]


async def logits_of_mixed_traffic(
    micro_batches: int | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[Logits, dict[str, list[int]], Engine, LateExperts]:
    """Prompts of many lengths that arrive while others decode, some of which are given up."""
    seen: Logits = {}
    draw_token = runner._draw

    def recorded(piece: Slice, logits: Tensor) -> int:
        seen[piece.sequence.request.request_id, piece.end] = logits.numpy().tobytes()
        return draw_token(piece, logits)

    monkeypatch.setattr(runner, "_draw", recorded)
    experts, pool = LateExperts(seed=3), tiny_model.pool()
    limits = SchedulerLimits(max_batch_tokens=24, max_sequences=6, max_waiting=32)
    engine = Engine(
        tiny_model.model().trunk,
        pool,
        experts,
        EngineConfig(limits=limits),
        overlap=OverlapPolicy(micro_batches),
    )
    running = asyncio.create_task(engine.run())
    answers: dict[str, list[int]] = {}

    async def client(name: str, num_prompt: int, max_tokens: int, leaves_after: int) -> None:
        asked = GenerationRequest(
            request_id=name,
            token_ids=tiny_model.prompt(num_prompt),
            max_tokens=max_tokens,
            stop_token_ids=frozenset(),
            temperature=0.7 * (num_prompt % 2),
            seed=num_prompt,
        )
        answers[name] = []
        try:
            with engine.submit(asked) as stream:
                async for event in stream:
                    answers[name] += event.token_ids
                    if len(answers[name]) >= leaves_after:
                        engine.abort(name)
        except RequestCancelled:
            assert len(answers[name]) >= leaves_after

    shapes = [(1, 30), (150, 10), (9, 16), (33, 2), (3, 50), (40, 8), (129, 6), (8, 20), (2, 40)]
    async with asyncio.timeout(60), asyncio.TaskGroup() as clients:
        for number, (num_prompt, max_tokens) in enumerate(shapes):
            patience = 5 if number % 4 == 3 else max_tokens + 1
            clients.create_task(client(f"{number}", num_prompt, max_tokens, patience))
            while engine.stats().counters.steps < 4 * number:  # noqa: ASYNC110
                await asyncio.sleep(0)
    engine.close()
    await running
    engine.check()
    pool.check()
    return seen, answers, engine, experts


async def test_one_and_two_micro_batches_give_the_same_bits_in_mixed_traffic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        whole, whole_answers, engine, experts = await logits_of_mixed_traffic(1, patched)
    assert engine.stats().counters.overlapped_steps == 0
    assert experts.most_away == 1
    with monkeypatch.context() as patched:
        split, split_answers, engine, experts = await logits_of_mixed_traffic(2, patched)
    counters = engine.stats().counters
    assert counters.overlapped_steps > counters.steps / 2
    assert experts.most_away == 2
    assert {size.has_prompts for size in engine.stats().overlap} == {True, False}
    both = whole.keys() & split.keys()
    assert len(both) > 100
    assert {each for each in both if whole[each] != split[each]} == set()
    for name, tokens in whole_answers.items():
        other = split_answers[name]
        common = min(len(tokens), len(other))  # one that is aborted may get a token more
        assert tokens[:common] == other[:common]


async def test_a_step_that_fails_takes_back_what_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[asyncio.Future[Tensor]] = []

    class OneFails:
        num_calls = 0

        async def submit(self, call: ExpertCall, timeout_seconds: float) -> asyncio.Future[Tensor]:
            self.num_calls += 1
            sums: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
            if self.num_calls == 1:
                sums.set_exception(RequestCancelled("stands for any failure"))
            else:
                cancelled.append(sums)
            return sums

    pool = tiny_model.pool()
    engine = Engine(
        tiny_model.model().trunk,
        pool,
        OneFails(),
        EngineConfig(limits=SchedulerLimits(max_batch_tokens=24, max_sequences=6)),
        overlap=OverlapPolicy(2),
    )
    asked = [
        GenerationRequest(
            request_id=name, token_ids=(5, 6, 7), max_tokens=4, stop_token_ids=frozenset()
        )
        for name in "ab"
    ]
    with engine.submit(asked[0]) as a, engine.submit(asked[1]) as b:
        running = asyncio.create_task(engine.run())
        for stream in (a, b):
            with pytest.raises(RequestCancelled, match="any failure"):
                await anext(stream)
    engine.close()
    await running
    assert [sums.cancelled() for sums in cancelled] == [True]
    assert pool.usage().sequences == 0
