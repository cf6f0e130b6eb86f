"""The batching loop on a real tiny model, with experts that can be made to fail or to wait."""

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable

import pytest
from torch import Tensor

from model1.errors import InvalidRequest
from model1.kv_pool import KVPool
from model1.moe import ExpertCall
from services.attention.engine import Engine, EngineConfig
from services.attention.local import LocalExperts
from services.attention.overlap import OverlapPolicy
from services.attention.scheduler import SchedulerLimits
from services.attention.stream import TokenStream
from services.errors import (
    DeadlineExceeded,
    Draining,
    DuplicateRequest,
    ExpertsUnavailable,
    InternalFailure,
    QueueFull,
    RequestCancelled,
    UnknownRequest,
)
from services.generation import FinishReason, GenerationRequest
from tests.services import tiny_model

LIMITS = SchedulerLimits(max_batch_tokens=24, max_sequences=6, max_waiting=8)


class ControlledExperts:
    """Local experts behind a gate that can be shut, and an error that can be set."""

    def __init__(self) -> None:
        self.timeouts: list[float] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.errors_at: dict[int, Exception] = {}  # by the number of the call
        self.num_calls = 0
        self._local = LocalExperts(tiny_model.model().experts)

    async def submit(self, call: ExpertCall, timeout_seconds: float) -> asyncio.Future[Tensor]:
        self.num_calls += 1
        self.timeouts.append(timeout_seconds)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if self.num_calls in self.errors_at:
            raise self.errors_at[self.num_calls]
        return await self._local.submit(call, timeout_seconds)


@contextlib.asynccontextmanager
async def running_engine(
    experts: ControlledExperts,
    pool: KVPool | None = None,
    limits: SchedulerLimits = LIMITS,
    crossing_timeout_s: float = 30.0,
    micro_batches: int | None = None,
) -> AsyncIterator[Engine]:
    """Checks pool and scheduler when the engine is idle at the end."""
    config = EngineConfig(limits=limits, crossing_timeout_s=crossing_timeout_s)
    overlap = OverlapPolicy(micro_batches)
    engine = Engine(
        tiny_model.model().trunk, pool or tiny_model.pool(), experts, config, overlap=overlap
    )
    running = asyncio.create_task(engine.run())
    try:
        yield engine
    finally:
        engine.close()
        await running
    engine.check()
    counters = engine.stats().counters
    assert counters.accepted == counters.finished + counters.cancelled + counters.failed


def request(
    name: str, num_prompt: int = 5, max_tokens: int = 8, temperature: float = 0.0
) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        token_ids=tiny_model.prompt(num_prompt),
        max_tokens=max_tokens,
        stop_token_ids=frozenset({tiny_model.EOS_ID}),
        temperature=temperature,
        seed=num_prompt,
    )


def oracle(asked: GenerationRequest) -> list[int]:
    return tiny_model.model().generate(
        asked.token_ids, asked.max_tokens, temperature=asked.temperature, seed=asked.seed
    )


async def collect(engine: Engine, asked: GenerationRequest) -> tuple[list[int], FinishReason]:
    token_ids: list[int] = []
    reason: FinishReason | None = None
    with engine.submit(asked) as stream:
        async for event in stream:
            assert reason is None
            token_ids += event.token_ids
            reason = event.finish_reason
    assert reason is not None
    return token_ids, reason


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 the engine has no event for what tests ask
            await asyncio.sleep(0)


async def first_token(stream: TokenStream) -> None:
    async for event in stream:
        if event.token_ids:
            return


async def test_a_crowd_gets_the_tokens_that_each_would_get_alone() -> None:
    crowd = [
        request("short", 1, 20),
        request("chunked", 150, 10),
        request("sampled", 9, 16, temperature=0.9),
        request("window", 33, 1),
        request("long answer", 3, 60),
        request("waits for a place", 40, 5, temperature=0.5),
        request("waits too", 129, 5),
    ]
    async with running_engine(ControlledExperts()) as engine:
        answers = await asyncio.gather(*(collect(engine, asked) for asked in crowd))
        stats = engine.stats()
    for asked, (token_ids, reason) in zip(crowd, answers, strict=True):
        assert token_ids == oracle(asked), asked.request_id
        stopped = token_ids[-1] == tiny_model.EOS_ID
        assert reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
    assert stats.counters.finished == len(crowd)
    assert stats.counters.largest_batch_tokens == LIMITS.max_batch_tokens
    assert stats.counters.prompt_tokens == sum(len(asked.token_ids) for asked in crowd)
    assert stats.counters.completion_tokens == sum(len(tokens) for tokens, _ in answers)
    assert stats.counters.layer_crossings == 3 * stats.counters.steps
    crossing, wait = stats.counters.crossing_times()
    assert crossing.p99 >= crossing.p50 > 0
    assert wait.p50 <= crossing.p50


async def test_what_computing_takes_is_learnt_from_prompts_and_not_from_decoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    async with running_engine(ControlledExperts()) as engine:
        monkeypatch.setattr(engine, "observe_step", lambda tokens, seconds: seen.append(tokens))
        await asyncio.gather(*(collect(engine, request(f"{n}", n, 9)) for n in (4, 40)))
        counters = engine.stats().counters
    assert sum(seen) == counters.prompt_tokens == 44
    assert counters.completion_tokens > 9


async def test_a_stop_token_is_the_last_token() -> None:
    greedy = oracle(request("a"))
    asked = GenerationRequest(
        request_id="a",
        token_ids=tiny_model.prompt(5),
        max_tokens=8,
        stop_token_ids=frozenset({greedy[2]}),
    )
    async with running_engine(ControlledExperts()) as engine:
        token_ids, reason = await collect(engine, asked)
    assert token_ids == greedy[: greedy.index(greedy[2]) + 1]
    assert reason is FinishReason.STOP


async def test_leaving_the_stream_frees_the_kv_within_one_step() -> None:
    pool = tiny_model.pool()
    async with running_engine(ControlledExperts(), pool) as engine:
        with engine.submit(request("a", max_tokens=300)) as stream:
            await first_token(stream)
        steps_when_left = engine.stats().counters.steps
        await until(lambda: not pool.usage().sequences)
        assert engine.stats().counters.steps <= steps_when_left + 1
        assert engine.stats().counters.cancelled == 1
        pool.check()


async def test_abort_ends_a_running_and_a_waiting_request() -> None:
    one_at_a_time = SchedulerLimits(max_batch_tokens=8, max_sequences=1, max_waiting=4)
    async with running_engine(ControlledExperts(), limits=one_at_a_time) as engine:
        with (
            engine.submit(request("a", max_tokens=300)) as running,
            engine.submit(request("b")) as waiting,
        ):
            await first_token(running)
            engine.abort("b")
            with pytest.raises(RequestCancelled, match="'b' was aborted"):
                await first_token(waiting)
            engine.abort("a")
            with pytest.raises(RequestCancelled, match="'a' was aborted"):
                async for _ in running:
                    pass
            with pytest.raises(UnknownRequest, match="'a'"):
                engine.abort("a")


async def test_a_live_id_cannot_be_used_twice_and_a_past_one_can() -> None:
    async with running_engine(ControlledExperts()) as engine:
        with engine.submit(request("a", max_tokens=300)) as stream:
            await first_token(stream)
            with pytest.raises(DuplicateRequest, match="'a'"), engine.submit(request("a")):
                pass
            engine.abort("a")
        await until(lambda: not engine.stats().running_sequences)
        await collect(engine, request("a"))


async def test_a_failed_crossing_fails_only_the_requests_of_that_step() -> None:
    experts, pool = ControlledExperts(), tiny_model.pool()
    one_at_a_time = SchedulerLimits(max_batch_tokens=8, max_sequences=1, max_waiting=4)
    async with running_engine(experts, pool, one_at_a_time) as engine:
        with engine.submit(request("a", max_tokens=300)) as hit:
            await first_token(hit)
            experts.gate.clear()
            waiting = asyncio.create_task(collect(engine, request("b")))
            await asyncio.sleep(0.01)
            experts.error = ExpertsUnavailable("the router is gone")
            experts.gate.set()
            with pytest.raises(ExpertsUnavailable, match="the router is gone"):
                async for _ in hit:
                    pass
            experts.error = None
        assert (await waiting)[0] == oracle(request("b"))
        pool.check()


async def test_a_bug_in_a_step_is_an_internal_failure_and_the_engine_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    experts = ControlledExperts()
    async with running_engine(experts) as engine:
        experts.error = RuntimeError("boom")
        with pytest.raises(InternalFailure, match="see the worker's log"):
            await collect(engine, request("a"))
        experts.error = None
        assert (await collect(engine, request("b")))[0] == oracle(request("b"))
    failures = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert [record.message for record in failures] == ["step_failed request_ids=['a']"]


async def test_a_hung_router_is_given_up_after_the_crossing_timeout() -> None:
    experts = ControlledExperts()
    async with running_engine(experts, crossing_timeout_s=0.3) as engine:
        experts.gate.clear()
        with pytest.raises(ExpertsUnavailable, match=r"layer 0: no sum .* within 0\.3 s"):
            await collect(engine, request("a"))
        experts.gate.set()
        await collect(engine, request("b"))


async def test_a_request_ends_at_its_deadline_waiting_or_running() -> None:
    one_at_a_time = SchedulerLimits(max_batch_tokens=8, max_sequences=1, max_waiting=4)
    async with running_engine(ControlledExperts(), limits=one_at_a_time) as engine:
        soon = asyncio.get_running_loop().time() + 0.05
        with (
            engine.submit(request("a", max_tokens=390), soon) as running,
            engine.submit(request("b", max_tokens=10), soon) as waiting,
        ):
            with pytest.raises(DeadlineExceeded, match="0 of 10 tokens generated"):
                await first_token(waiting)
            with pytest.raises(DeadlineExceeded, match="of 390 tokens generated"):
                async for _ in running:
                    pass


async def test_a_deadline_passes_though_nothing_else_happens() -> None:
    pool = tiny_model.pool(max_sequences=1)
    other = pool.allocate(1)
    async with running_engine(ControlledExperts(), pool) as engine:
        soon = asyncio.get_running_loop().time() + 0.05
        with engine.submit(request("a"), soon) as stream:
            async with asyncio.timeout(5):
                with pytest.raises(DeadlineExceeded, match="0 of 8 tokens generated"):
                    await first_token(stream)
        pool.free(other)


async def test_hung_experts_hold_a_request_no_longer_than_its_deadline() -> None:
    experts = ControlledExperts()
    pool = tiny_model.pool()
    async with running_engine(experts, pool) as engine:
        experts.gate.clear()
        soon = asyncio.get_running_loop().time() + 0.4
        async with asyncio.timeout(20):
            with (
                engine.submit(request("a"), soon - 0.1) as earlier,
                engine.submit(request("b"), soon) as later,
            ):
                for stream in (earlier, later):
                    with pytest.raises(DeadlineExceeded, match="0 of 8 tokens generated"):
                        await first_token(stream)
        assert pool.usage().sequences == 0
        assert 0 < experts.timeouts[0] <= 0.4  # the experts are told


async def test_a_request_without_a_deadline_keeps_the_step_that_it_shares() -> None:
    experts = ControlledExperts()
    async with running_engine(experts) as engine:
        experts.gate.clear()
        patient = asyncio.create_task(collect(engine, request("patient")))
        await asyncio.sleep(0)  # it is in the queue, and no step has begun
        soon = asyncio.get_running_loop().time() + 0.05
        with engine.submit(request("late"), soon) as late:
            await until(lambda: bool(experts.timeouts))
            await asyncio.sleep(0.1)
            assert experts.timeouts == [30.0]
            experts.gate.set()
            with pytest.raises(DeadlineExceeded):
                async for _ in late:
                    pass
            assert (await patient)[0] == oracle(request("patient"))


async def test_a_full_queue_refuses_and_says_how_full() -> None:
    experts = ControlledExperts()
    experts.gate.clear()
    limits = SchedulerLimits(max_batch_tokens=8, max_sequences=1, max_waiting=2)
    async with running_engine(experts, limits=limits) as engine:
        with contextlib.ExitStack() as streams:
            streams.enter_context(engine.submit(request("running")))
            await until(lambda: engine.stats().running_sequences == 1)
            for name in ("b", "c"):
                streams.enter_context(engine.submit(request(name)))
            with pytest.raises(QueueFull, match="2 requests are waiting"):
                streams.enter_context(engine.submit(request("d")))
            experts.gate.set()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            GenerationRequest(
                request_id="a",
                token_ids=(3, tiny_model.VOCAB_SIZE),
                max_tokens=1,
                stop_token_ids=frozenset(),
            ),
            "token id 272 in the prompt is outside the vocabulary of 272 tokens",
        ),
        (
            request("a", num_prompt=390, max_tokens=11),
            "a prompt of 390 tokens and max_tokens 11 are more than the 400 tokens",
        ),
    ],
)
async def test_what_can_never_run_is_refused_at_once(asked: GenerationRequest, words: str) -> None:
    async with running_engine(ControlledExperts()) as engine:
        with pytest.raises(InvalidRequest, match=words), engine.submit(asked):
            pass
        assert engine.stats().counters.accepted == 0


async def test_draining_finishes_what_runs_and_refuses_the_rest() -> None:
    async with running_engine(ControlledExperts()) as engine:
        answer = asyncio.create_task(collect(engine, request("a")))
        await asyncio.sleep(0)
        aborted = await engine.drain(grace_s=10)
        assert aborted == 0
        assert (await answer)[0] == oracle(request("a"))
        with pytest.raises(Draining, match="accepts no request"), engine.submit(request("b")):
            pass


async def test_draining_aborts_what_is_left_after_the_grace_time() -> None:
    async with running_engine(ControlledExperts()) as engine:
        with engine.submit(request("a", max_tokens=390)) as stream:
            assert await engine.drain(grace_s=0.01) == 1
            with pytest.raises(Draining, match="shut down before"):
                async for _ in stream:
                    pass


async def test_closing_ends_every_live_request() -> None:
    async with running_engine(ControlledExperts()) as engine:
        with engine.submit(request("a", max_tokens=390)) as stream:
            await first_token(stream)
            engine.close()
            with pytest.raises(Draining):
                async for _ in stream:
                    pass


async def test_cancelling_the_loop_mid_step_frees_everything() -> None:
    experts, pool = ControlledExperts(), tiny_model.pool()
    engine = Engine(tiny_model.model().trunk, pool, experts, EngineConfig(limits=LIMITS))
    loop = asyncio.create_task(engine.run())
    experts.gate.clear()
    with engine.submit(request("a")) as stream:
        await until(lambda: experts.num_calls > 0)
        loop.cancel()
        with pytest.raises(Draining):
            await first_token(stream)
    with pytest.raises(asyncio.CancelledError):
        await loop
    engine.check()
    assert pool.usage().sequences == 0


@pytest.mark.parametrize(("seed", "micro_batches"), [(0, 1), (1, 1), (2, 2), (3, 2)])
async def test_under_random_cancels_deadlines_and_failures_each_request_ends_once(
    seed: int, micro_batches: int, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(seed)
    experts, pool = ControlledExperts(), tiny_model.pool(max_sequences=3, max_tokens=500)
    caplog.set_level(logging.CRITICAL)  # the failures are wanted here
    shapes = [(1, 20), (20, 3), (40, 12)]
    whole = {shape: oracle(request("alone", *shape)) for shape in shapes}
    endings: list[str] = []

    async def client(number: int) -> None:
        shape = draw.choice(shapes)
        patience = draw.choice((1, 2, 1000))
        soon_s = asyncio.get_running_loop().time() + draw.choice((0.01, 1000))
        for _ in range(draw.randrange(100)):
            await asyncio.sleep(0)
        token_ids: list[int] = []
        try:
            with engine.submit(request(f"{number}", *shape), soon_s) as stream:
                async for event in stream:
                    token_ids += event.token_ids
                    if event.finish_reason is not None:
                        endings.append("finished")
                        assert token_ids == whole[shape]
                    elif len(token_ids) >= patience:
                        endings.append("left")
                        break
        except (DeadlineExceeded, ExpertsUnavailable, InternalFailure) as error:
            endings.append(type(error).__name__)
        assert token_ids == whole[shape][: len(token_ids)]

    limits = SchedulerLimits(max_batch_tokens=16, max_sequences=3, max_waiting=30)
    async with running_engine(experts, pool, limits, micro_batches=micro_batches) as engine:
        experts.errors_at = {
            call: draw.choice((ExpertsUnavailable("gone"), RuntimeError("boom")))
            for call in draw.sample(range(60), k=4)
        }
        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                tasks.create_task(client(number))
        await engine.drain(grace_s=30)
        pool.check()
        assert pool.usage().sequences == 0
        counters = engine.stats().counters
    assert len(endings) == counters.accepted == 20
    assert counters.finished == endings.count("finished")
    assert counters.cancelled == endings.count("left")


def test_steps_larger_than_the_pool_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_batch_tokens 512 is more than .* 64"):
        Engine(
            tiny_model.model().trunk,
            tiny_model.pool(),
            LocalExperts(tiny_model.model().experts),
            EngineConfig(),
        )
