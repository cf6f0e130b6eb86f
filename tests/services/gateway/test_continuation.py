"""A worker that is lost in the middle of a stream costs its clients a pause, nothing else."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import control_pb2, inference_pb2
from services.gateway.counters import Outcome
from services.gateway.store import StoreAddress
from services.gateway.watched_worker import SilenceLimits
from services.gateway.worker import WorkerAddress
from tests.services import tiny_model
from tests.services.gateway.deployed import (
    Deployment,
    deployed,
    failure,
    frame,
    gateway_over,
    request,
)
from tests.services.gateway.scripted_worker import (
    Context,
    Request,
    ScriptedWorker,
    accept,
    counts_up,
    finish,
    finishes,
    give,
    refuses,
    serving,
)
from tests.services.gateway.worker_nursery import LONG_STEP, Nursery, WorkerProcess, nursery
from tests.services.session_store import session_store

LENGTH = inference_pb2.FINISH_REASON_LENGTH
STOP = inference_pb2.FINISH_REASON_STOP
CANCELLED = grpc.StatusCode.CANCELLED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
SAMPLED = dict(temperature=0.9, seed=11)


@pytest.fixture
async def workers() -> AsyncIterator[Nursery]:
    async with nursery() as running:
        yield running


def oracle(prompt: tuple[int, ...], num_tokens: int, **sampling: Any) -> list[int]:
    """As one process answers that does not stop at an end token: a draw depends on the position
    alone, so it can be asked to go on."""
    token_ids: list[int] = []
    while len(token_ids) < num_tokens:
        left = num_tokens - len(token_ids)
        token_ids += tiny_model.model().generate((*prompt, *token_ids), left, **sampling)
    return token_ids


def asked(
    prompt: tuple[int, ...] = (5, 6, 7), request_id: str = "", max_tokens: int = 6, **sampling: Any
) -> inference_pb2.GenerateRequest:
    message = request(prompt, request_id, max_tokens=max_tokens, ignore_eos=True)
    message.sampling.CopyFrom(inference_pb2.SamplingParams(**sampling))
    return message


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not is_so():  # noqa: ASYNC110 counters and foreign processes tell nobody
            await asyncio.sleep(0.005)


async def take(call: Any, num_frames: int) -> list[Any]:
    return [await anext(aiter(call)) for _ in range(num_frames)]


def token_ids_of(frames: list[Any]) -> list[int]:
    """Of a whole stream; that it is whole: accepted once, numbered, one final."""
    kinds = [message.WhichOneof("frame") for message in frames]
    assert kinds == ["accepted", *["delta"] * (len(frames) - 2), "final"]
    deltas = [message.delta for message in frames[1:-1]]
    assert [delta.sequence_number for delta in deltas] == list(range(len(deltas)))
    token_ids = [token for delta in deltas for token in delta.token_ids]
    assert frames[-1].final.usage.completion_tokens == len(token_ids)
    return token_ids


@asynccontextmanager
async def scripted(
    folder: Path, *scripts: ScriptedWorker, **settings: Any
) -> AsyncIterator[Deployment]:
    async with (
        serving(*scripts) as rows,
        gateway_over(folder, rows, **settings) as deployment,
    ):
        yield deployment


@pytest.mark.parametrize(
    "sampling",
    [pytest.param({}, id="greedy"), pytest.param(SAMPLED, id="sampled", marks=pytest.mark.slow)],
)
async def test_a_stream_goes_on_at_another_worker_with_the_same_tokens(
    tmp_path: Path, sampling: dict[str, Any]
) -> None:
    prompt = tiny_model.prompt(140)
    async with deployed(tmp_path) as deployment:
        call = deployment.inference.GenerateStream(asked(prompt, max_tokens=100, **sampling))
        frames = await take(call, 5)
        assert frames[0].accepted.worker == "attention-0"
        await deployment.workers[0].stop(grace_s=0)
        frames += [message async for message in call]
        counters = deployment.gateway.gateway.counters
    assert token_ids_of(frames) == oracle(prompt, 100, **sampling)
    text = "".join(message.delta.text for message in frames[1:-1])
    assert text == deployment.tokenizer.decode(oracle(prompt, 100, **sampling))
    usage = frames[-1].final.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (140, 100)
    assert usage.kv == inference_pb2.KvUsage(computed_tokens=140)
    assert (counters.continued, counters.waited, counters.accepted) == (1, 0, 1)
    assert 140 < counters.recomputed_tokens < 240
    assert counters.ended == {Outcome.FINISHED: 1}


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_killed_workers_cost_no_stream_and_no_token(tmp_path: Path, workers: Nursery) -> None:
    """8 streams over 2 workers; whoever is killed is replaced, as the supervisor does."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    num_streams, num_tokens, num_kills = 8, 200, 12
    prompts = [
        tiny_model.prompt(draw.randint(1, 400 - num_tokens), seed=i) for i in range(num_streams)
    ]
    samplings: list[dict[str, Any]] = [SAMPLED if i % 2 else {} for i in range(num_streams)]
    # A moment is a number of tokens that all streams have together.
    moments = sorted(draw.sample(range(1, num_streams * num_tokens * 3 // 4), num_kills))
    counts = [0] * num_streams
    living = [await workers.worker(f"attention-{i}") for i in range(2)]
    rows = [each.row for each in living]

    async with gateway_over(tmp_path, rows, max_active_requests=num_streams) as deployment:
        gateway = deployment.gateway.gateway

        async def stream(i: int) -> list[Any]:
            frames = []
            message = asked(prompts[i], max_tokens=num_tokens, **samplings[i])
            async for each in deployment.inference.GenerateStream(message):
                frames.append(each)
                counts[i] += len(each.delta.token_ids)
            return frames

        async def kill_at(moment: int, before: list[int]) -> None:
            """Not before all have gone on since the last time: one that is lost again and again
            without a token ends."""
            await until(
                lambda: (
                    sum(counts) >= moment
                    and all(
                        new > old or new == num_tokens
                        for new, old in zip(counts, before, strict=True)
                    )
                )
            )
            index = draw.randrange(2)
            living[index].kill()
            living[index] = await workers.worker(living[index].row.name)
            await gateway.workers.update([each.row for each in living])

        async def kill_all() -> None:
            before = [-1] * num_streams
            for moment in moments:
                await kill_at(moment, before)
                before = list(counts)

        killing = asyncio.create_task(kill_all())
        answers = await asyncio.gather(*map(stream, range(num_streams)))
        await killing
        assert gateway.counters.ended == {Outcome.FINISHED: num_streams}
        assert gateway.counters.continued > 0
    for prompt, sampling, frames in zip(prompts, samplings, answers, strict=True):
        assert token_ids_of(frames) == oracle(prompt, num_tokens, **sampling)
        usage = frames[-1].final.usage
        assert usage.prompt_tokens == usage.kv.computed_tokens == len(prompt)


async def test_a_stream_waits_for_its_only_worker_to_be_replaced(
    tmp_path: Path, workers: Nursery
) -> None:
    first = await workers.worker("attention-0")
    async with gateway_over(tmp_path, [first.row]) as deployment:
        gateway = deployment.gateway.gateway
        call = deployment.inference.GenerateStream(asked(max_tokens=200))
        frames = await take(call, 3)
        first.kill()
        await until(lambda: gateway.counters.waited == 1)
        # Also one that comes meanwhile.
        other = deployment.inference.GenerateStream(asked((9, 8), max_tokens=20))
        await until(lambda: gateway.counters.waited == 2)
        second = await workers.worker("attention-0")
        await gateway.workers.update([second.row])
        frames += [message async for message in call]
        others = [message async for message in other]
    assert token_ids_of(frames) == oracle((5, 6, 7), 200)
    assert token_ids_of(others) == oracle((9, 8), 20)
    assert gateway.counters.continued == 1


async def test_the_wait_ends_with_the_reason(tmp_path: Path) -> None:
    lost = ScriptedWorker("attention-0", counts_up(2, UNAVAILABLE), refuses(UNAVAILABLE))
    async with scripted(tmp_path, lost, continue_patience_seconds=0.5) as deployment:
        call = deployment.inference.GenerateStream(asked())
        error = await failure(call)
        words = "attention worker attention-0: as the script says"
        late = "; no attention worker took the request within 0.5 s"
        assert (error.code(), error.details()) == (UNAVAILABLE, words + late)
        await deployment.gateway.gateway.workers.update([])
        error = await failure(deployment.inference.Generate(asked()))
        assert error.details() == "no attention worker is ready" + late
        assert deployment.gateway.gateway.counters.ended == {Outcome.FAILED: 2}
        assert len(lost.requests) > 2  # it was asked again, and not all the time
        assert len(lost.requests) < 10


@pytest.mark.parametrize("ends_with", [[], [8]], ids=["length", "stop token"])
async def test_an_answer_that_lacks_only_its_end_is_complete(
    tmp_path: Path, ends_with: list[int]
) -> None:
    lost = ScriptedWorker("attention-0", counts_up(3, UNAVAILABLE))
    other = ScriptedWorker("attention-1", finishes())
    async with scripted(tmp_path, lost, other) as deployment:
        message = asked(max_tokens=10 if ends_with else 3)
        message.sampling.CopyFrom(inference_pb2.SamplingParams())
        message.stopping.stop_token_ids.extend([10] if ends_with else [])
        call = deployment.inference.GenerateStream(message)
        frames = [message async for message in call]
        assert token_ids_of(frames) == [8, 9, 10]
        assert frames[-1].final.finish_reason == (STOP if ends_with else LENGTH)
        assert frames[-1].final.usage.kv.computed_tokens == 3
        assert deployment.gateway.gateway.counters.continued == 0
    assert other.requests == []


async def test_the_rest_is_asked_for_and_all_else_is_the_same(tmp_path: Path) -> None:
    lost = ScriptedWorker("attention-0", counts_up(2, UNAVAILABLE))
    other = ScriptedWorker("attention-1", finishes())
    async with scripted(tmp_path, lost, other) as deployment:
        message = asked(max_tokens=6, request_id="mine", temperature=0.5, top_p=0.9, top_k=7)
        message.cache_salt = "salt"
        frames = [message async for message in deployment.inference.GenerateStream(message)]
        counters = deployment.gateway.gateway.counters
    assert token_ids_of(frames) == [8, 9, 10, 11, 12, 13]
    (first,), (rest,) = lost.requests, other.requests
    assert (list(first.token_ids), first.max_tokens) == ([5, 6, 7], 6)
    assert (list(rest.token_ids), rest.max_tokens) == ([5, 6, 7, 8, 9], 4)
    for each in (first, rest):
        each.ClearField("token_ids")
        each.ClearField("max_tokens")
    assert rest == first
    usage = frames[-1].final.usage
    assert (usage.prompt_tokens, usage.kv.computed_tokens) == (3, 3)
    assert counters.recomputed_tokens == 5


async def test_a_full_queue_loses_no_stream_that_was_accepted(tmp_path: Path) -> None:
    full = refuses(grpc.StatusCode.RESOURCE_EXHAUSTED)
    lost = ScriptedWorker("attention-0", full, counts_up(2, UNAVAILABLE), full, finishes())
    other = ScriptedWorker("attention-1", full, full, full, finishes())
    async with scripted(tmp_path, lost, other) as deployment:
        error = await failure(deployment.inference.Generate(asked()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        frames = [each async for each in deployment.inference.GenerateStream(asked())]
    assert token_ids_of(frames) == [8, 9, 10, 11, 12, 13]
    assert frames[0].accepted.worker == "attention-0"


async def test_a_cancel_that_nobody_asked_for_is_a_loss(tmp_path: Path) -> None:
    """gRPC's server answers so to a call that it has not handed over when it closes."""
    # One alone: of two, which is asked next depends on how long each is left in peace.
    worker = ScriptedWorker(
        "attention-0", refuses(CANCELLED), counts_up(2, CANCELLED), refuses(CANCELLED), finishes()
    )
    async with scripted(tmp_path, worker) as deployment:
        call = deployment.inference.GenerateStream(asked())
        assert token_ids_of([each async for each in call]) == [8, 9, 10, 11, 12, 13]
    assert len(worker.requests) == 4


async def test_a_worker_that_has_not_noticed_is_told(tmp_path: Path) -> None:
    unaware = refuses(grpc.StatusCode.ALREADY_EXISTS)
    worker = ScriptedWorker("attention-0", counts_up(2, UNAVAILABLE), unaware, finishes())
    async with scripted(tmp_path, worker) as deployment:
        call = deployment.inference.GenerateStream(asked(request_id="mine"))
        assert token_ids_of([each async for each in call]) == [8, 9, 10, 11, 12, 13]
    assert worker.aborted == ["mine"]


async def test_the_id_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    taken = refuses(grpc.StatusCode.ALREADY_EXISTS)
    lost = ScriptedWorker("attention-0", counts_up(2, UNAVAILABLE), refuses(UNAVAILABLE))
    other = ScriptedWorker("attention-1", taken, taken, finishes())
    async with scripted(tmp_path, lost, other) as deployment:
        call = deployment.inference.GenerateStream(asked(request_id="mine"))
        assert token_ids_of([each async for each in call]) == [8, 9, 10, 11, 12, 13]
    assert other.aborted == []


@pytest.mark.parametrize(
    "status",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.FAILED_PRECONDITION,
    ],
)
async def test_what_another_worker_cannot_help_ends_the_stream(
    tmp_path: Path, status: grpc.StatusCode
) -> None:
    lost = ScriptedWorker("attention-0", counts_up(2, status))
    other = ScriptedWorker("attention-1", finishes())
    async with scripted(tmp_path, lost, other) as deployment:
        error = await failure(deployment.inference.GenerateStream(asked()))
        assert (error.code(), error.details()) == (status, "as the script says")
    assert other.requests == []


@pytest.mark.parametrize("status", [UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED])
async def test_a_request_that_ends_its_workers_does_not_end_all_of_them(
    tmp_path: Path, status: grpc.StatusCode
) -> None:
    scripts = [ScriptedWorker(f"attention-{i}", counts_up(0, status)) for i in range(6)]
    async with scripted(tmp_path, *scripts, continue_patience_seconds=0) as deployment:
        error = await failure(deployment.inference.Generate(asked()))
        assert error.code() is UNAVAILABLE
        assert "4 workers in a row were lost before they gave a token" in (error.details() or "")
    assert [len(each.requests) for each in scripts] == [1, 1, 1, 1, 0, 0]


async def test_a_worker_with_another_model_does_not_go_on(tmp_path: Path) -> None:
    async def act(_request: Request, context: Context) -> None:
        await accept(context, b"another root")
        await give(context, [99])
        await finish(context)

    lost = ScriptedWorker("attention-0", counts_up(2, UNAVAILABLE))
    async with scripted(tmp_path, lost, ScriptedWorker("attention-1", act)) as deployment:
        error = await failure(deployment.inference.GenerateStream(asked()))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "attention worker attention-1 holds another model" in (error.details() or "")


@asynccontextmanager
async def _waiting_stream(folder: Path) -> AsyncIterator[tuple[Deployment, Any]]:
    """It has two tokens, and nobody goes on with it."""
    lost = ScriptedWorker("attention-0", counts_up(2, UNAVAILABLE), refuses(UNAVAILABLE))
    async with scripted(folder, lost) as deployment:
        call = deployment.inference.GenerateStream(asked(request_id="mine"))
        await frame(call, "accepted")
        await until(lambda: deployment.gateway.gateway.counters.waited == 1)
        yield deployment, call
        assert deployment.gateway.gateway.num_active == 0


async def test_a_waiting_stream_can_be_aborted(tmp_path: Path) -> None:
    async with _waiting_stream(tmp_path) as (deployment, call):
        await deployment.control.Abort(control_pb2.AbortRequest(request_id="mine"))
        error = await failure(call)
        assert (error.code(), error.details()) == (
            grpc.StatusCode.CANCELLED,
            "request 'mine' was aborted",
        )
        assert deployment.gateway.gateway.counters.ended == {Outcome.CANCELLED: 1}


async def test_the_client_of_a_waiting_stream_can_leave(tmp_path: Path) -> None:
    async with _waiting_stream(tmp_path) as (deployment, call):
        call.cancel()
        gateway = deployment.gateway.gateway
        await until(lambda: gateway.num_active == 0)
        assert gateway.counters.ended == {Outcome.CANCELLED: 1}


async def test_a_draining_gateway_ends_a_waiting_stream(tmp_path: Path) -> None:
    async with _waiting_stream(tmp_path) as (deployment, call):
        assert await deployment.gateway.gateway.drain(grace_s=0) == 1
        error = await failure(call)
        words = "the gateway shut down before the answer was done"
        assert (error.code(), error.details()) == (UNAVAILABLE, words)


async def test_a_deadline_ends_a_waiting_stream(tmp_path: Path) -> None:
    lost = ScriptedWorker("attention-0", counts_up(2, UNAVAILABLE), refuses(UNAVAILABLE))
    async with scripted(tmp_path, lost) as deployment:
        call = deployment.inference.GenerateStream(asked(), timeout=1.0)
        assert (await failure(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        gateway = deployment.gateway.gateway
        await until(lambda: gateway.num_active == 0)
        assert gateway.counters.ended == {Outcome.CANCELLED: 1}


async def test_a_stream_can_be_aborted_at_the_second_worker(tmp_path: Path) -> None:
    hangs, is_cancelled = asyncio.Event(), asyncio.Event()

    async def act(_request: Request, context: Context) -> None:
        await accept(context)
        hangs.set()
        try:
            await asyncio.Event().wait()
        finally:
            is_cancelled.set()

    lost = ScriptedWorker("attention-0", counts_up(2, UNAVAILABLE))
    async with scripted(tmp_path, lost, ScriptedWorker("attention-1", act)) as deployment:
        call = deployment.inference.GenerateStream(asked(request_id="mine"))
        await frame(call, "accepted")
        async with asyncio.timeout(60):
            await hangs.wait()
            deployment.gateway.gateway.abort("mine")
            assert (await failure(call)).code() is grpc.StatusCode.CANCELLED
            await is_cancelled.wait()


async def test_the_next_turn_of_a_session_goes_on_from_a_continued_one(tmp_path: Path) -> None:
    async with session_store("kvstore-0", tmp_path) as store, deployed(tmp_path) as deployment:
        await _use_sessions(deployment, store)
        message = asked(max_tokens=150)
        message.session_id = "tea"
        call = deployment.inference.GenerateStream(message)
        frames = await take(call, 3)
        await deployment.workers[0].stop(grace_s=0)
        frames += [message async for message in call]
        answer = token_ids_of(frames)
        assert answer == oracle((5, 6, 7), 150)

        turn = asked((9, 8), max_tokens=10)
        turn.session_id = "tea"
        next_frames = [each async for each in deployment.inference.GenerateStream(turn)]
        assert next_frames[0].accepted.worker == "attention-1"
        history = (5, 6, 7, *answer, 9, 8)
        assert token_ids_of(next_frames) == oracle(history, 10)
        assert next_frames[-1].final.usage.prompt_tokens == len(history)
        # The worker that went on has the KV of the whole turn.
        assert next_frames[-1].final.usage.kv.device_tokens == 128


async def _use_sessions(deployment: Deployment, store: StoreAddress) -> None:
    await deployment.gateway.gateway.sessions.stores.update([store])


SOON = SilenceLimits(silent_seconds=0.5, num_probes=3, probe_seconds=1.0)


@pytest.mark.slow
async def test_a_frozen_worker_is_given_up_and_has_no_stream_when_it_wakes(
    tmp_path: Path, workers: Nursery
) -> None:
    frozen, other = await _two(workers)
    async with gateway_over(tmp_path, [frozen.row, other.row], silence=SOON) as deployment:
        gateway = deployment.gateway.gateway
        call = deployment.inference.GenerateStream(asked(max_tokens=200))
        frames = await take(call, 3)
        assert frames[0].accepted.worker == "attention-0"
        frozen.signal(signal.SIGSTOP)
        frames += [message async for message in call]
        assert gateway.counters.continued == 1
        # While it is away nobody is sent to it.
        answer = await deployment.inference.Generate(asked(max_tokens=1))
        assert answer.worker == "attention-1"
        frozen.signal(signal.SIGCONT)
        stats = await gateway.workers.all[0].stats()
        while stats.running_sequences:
            stats = await gateway.workers.all[0].stats()
        assert (stats.finished_requests, stats.cancelled_requests) == (0, 1)
        await gateway.workers.update([frozen.row])
        await deployment.inference.Generate(asked(max_tokens=1))
    assert token_ids_of(frames) == oracle((5, 6, 7), 200)


@pytest.mark.slow
async def test_a_worker_in_a_long_step_is_not_given_up(tmp_path: Path, workers: Nursery) -> None:
    busy, other = await _two(workers)
    async with gateway_over(tmp_path, [busy.row, other.row], silence=SOON) as deployment:
        call = deployment.inference.GenerateStream(asked(max_tokens=100))
        frames = await take(call, 3)
        busy.signal(LONG_STEP)  # four times as long as a worker may be silent
        frames += [message async for message in call]
        assert token_ids_of(frames) == oracle((5, 6, 7), 100)
        assert deployment.gateway.gateway.counters.continued == 0


@pytest.mark.slow
async def test_the_only_worker_is_never_given_up(tmp_path: Path, workers: Nursery) -> None:
    only = await workers.worker("attention-0")
    limits = SilenceLimits(silent_seconds=0.2, num_probes=1, probe_seconds=0.2)
    async with gateway_over(tmp_path, [only.row], silence=limits) as deployment:
        gateway = deployment.gateway.gateway
        call = deployment.inference.GenerateStream(asked(max_tokens=100))
        frames = await take(call, 3)
        only.signal(signal.SIGSTOP)
        await asyncio.sleep(1.5)  # several times the silence and its probes
        only.signal(signal.SIGCONT)
        frames += [message async for message in call]
        assert token_ids_of(frames) == oracle((5, 6, 7), 100)
        assert (gateway.counters.continued, gateway.counters.waited) == (0, 0)


async def _two(workers: Nursery) -> tuple[WorkerProcess, WorkerProcess]:
    return await workers.worker("attention-0"), await workers.worker("attention-1")


async def test_a_worker_that_comes_back_where_it_was_is_used_again(tmp_path: Path) -> None:
    script = ScriptedWorker("attention-0", finishes())
    async with serving(script) as rows:
        address = rows[0].address
    async with gateway_over(tmp_path, [WorkerAddress("attention-0", address)]) as deployment:
        call = deployment.inference.GenerateStream(asked())
        await until(lambda: deployment.gateway.gateway.counters.waited == 1)
        async with serving(script, address=address):
            assert token_ids_of([each async for each in call]) == [8, 9, 10, 11, 12, 13]


async def test_a_draining_worker_is_asked_again_only_when_it_is_another(tmp_path: Path) -> None:
    draining = ScriptedWorker("attention-0", refuses(UNAVAILABLE), finishes())
    draining.is_draining = True
    async with (
        serving(draining, ScriptedWorker("attention-0", finishes())) as (old, new),
        gateway_over(tmp_path, [old]) as deployment,
    ):
        call = deployment.inference.GenerateStream(asked())
        await until(lambda: draining.num_stats >= 2)
        await deployment.gateway.gateway.workers.update([old, new])
        assert token_ids_of([each async for each in call]) == [8, 9, 10, 11, 12, 13]
    assert len(draining.requests) == 1
