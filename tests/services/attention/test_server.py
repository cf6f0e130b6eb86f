"""The worker's gRPC edge: a real server, a real stub, the tiny model."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model1.kv_pool import KVHandle, KVPool
from protos import attention_pb2, attention_pb2_grpc, inference_pb2
from services import rpc
from services.attention.engine import EngineConfig
from services.attention.local import LocalExperts
from services.attention.scheduler import SchedulerLimits
from services.attention.server import AttentionWorker, AttentionWorkerConfig
from tests.services import tiny_model

LIMITS = SchedulerLimits(max_batch_tokens=16, max_sequences=1, max_waiting=1)


@pytest.fixture
def pool() -> KVPool:
    return tiny_model.pool()


@pytest.fixture
async def worker(pool: KVPool) -> AsyncIterator[AttentionWorker]:
    model = tiny_model.model()
    config = AttentionWorkerConfig(name="attention-7", engine=EngineConfig(limits=LIMITS))
    worker = await AttentionWorker.open(model.trunk, pool, LocalExperts(model.experts), config)
    yield worker
    await worker.stop(grace_s=0)
    worker.engine.check()
    assert pool.usage().sequences == 0


@pytest.fixture
async def stub(worker: AttentionWorker) -> AsyncIterator[attention_pb2_grpc.AttentionStub]:
    async with rpc.channel(worker.address) as channel:
        yield attention_pb2_grpc.AttentionStub(channel)


def request(name: str, max_tokens: int = 6) -> attention_pb2.AttentionGenerateRequest:
    return attention_pb2.AttentionGenerateRequest(
        request_id=name, token_ids=tiny_model.prompt(20), top_p=1.0, max_tokens=max_tokens
    )


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in call:
            pass
    return raised.value


async def accepted(call: Any) -> None:
    assert (await anext(aiter(call))).WhichOneof("event") == "accepted"


async def test_a_stream_is_accepted_then_tokens_then_final(stub) -> None:
    events = [event async for event in stub.Generate(request("a"))]
    assert events[0].WhichOneof("event") == "accepted"
    assert {event.WhichOneof("event") for event in events[1:-1]} == {"tokens"}
    assert events[-1].final.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    token_ids = [token for event in events for token in event.tokens.token_ids]
    model = tiny_model.model()
    assert token_ids == model.generate(tiny_model.prompt(20), 6)


async def test_the_limits_of_the_worker_are_statuses(stub) -> None:
    running = stub.Generate(request("running", max_tokens=300))
    await accepted(running)
    await anext(aiter(running))
    waiting = stub.Generate(request("waiting"))
    await accepted(waiting)
    again = await failure(stub.Generate(request("waiting")))
    assert (again.code(), again.details()) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "request 'waiting' is already being served",
    )
    full = await failure(stub.Generate(request("c")))
    assert full.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert full.details() == "1 requests are waiting, the queue holds no more"
    running.cancel()
    assert [event async for event in waiting][-1].WhichOneof("event") == "final"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"token_ids": []}, "the prompt is empty"),
        (
            {"token_ids": [999]},
            "token id 999 in the prompt is outside the vocabulary of 272 tokens",
        ),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"temperature": -1.0}, "temperature must be between 0 and 100, not -1.0"),
        ({"request_id": ""}, "request_id must have 1 to 128 characters, not 0"),
    ],
)
async def test_a_malformed_request_is_refused_though_a_gateway_should_have(
    stub, changes: dict[str, Any], words: str
) -> None:
    message = request("a")
    for field in changes:
        message.ClearField(field)
    message.MergeFrom(attention_pb2.AttentionGenerateRequest(**changes))
    error = await failure(stub.Generate(message))
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, words)


async def test_dropping_the_stream_frees_the_kv(stub, pool: KVPool) -> None:
    call = stub.Generate(request("a", max_tokens=370))
    await accepted(call)
    await anext(aiter(call))
    assert pool.usage().sequences == 1
    call.cancel()
    async with asyncio.timeout(30):
        while pool.usage().sequences:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert (await stub.Stats(attention_pb2.AttentionStatsRequest())).cancelled_requests == 1


@pytest.mark.parametrize("timeout_s", [0.001, 0.1])
async def test_a_deadline_ends_the_request(stub, pool: KVPool, timeout_s: float) -> None:
    error = await failure(stub.Generate(request("a", max_tokens=380), timeout=timeout_s))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(30):
        while pool.usage().sequences:  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_abort_ends_the_stream_as_cancelled(stub) -> None:
    call = stub.Generate(request("a", max_tokens=370))
    await accepted(call)
    await stub.Abort(attention_pb2.AttentionAbortRequest(request_id="a"))
    error = await failure(call)
    assert (error.code(), error.details()) == (
        grpc.StatusCode.CANCELLED,
        "request 'a' was aborted",
    )
    with pytest.raises(grpc.aio.AioRpcError) as unknown:
        await stub.Abort(attention_pb2.AttentionAbortRequest(request_id="a"))
    assert unknown.value.code() is grpc.StatusCode.NOT_FOUND


async def test_stats_count_what_happened(stub) -> None:
    async for _ in stub.Generate(request("a")):
        pass
    stats = await stub.Stats(attention_pb2.AttentionStatsRequest())
    assert stats.worker == "attention-7"
    assert (stats.accepted_requests, stats.finished_requests, stats.failed_requests) == (1, 1, 0)
    assert (stats.prompt_tokens, stats.completion_tokens) == (20, 6)
    assert (stats.steps, stats.largest_batch_tokens) == (7, 16)
    assert stats.layer_crossings == 7 * 3
    assert stats.crossing_seconds_p99 >= stats.crossing_seconds_p50 > 0


async def test_crossing_times_can_be_asked_for_one_batch_size(stub) -> None:
    async for _ in stub.Generate(request("a")):
        pass
    decode = await stub.Stats(attention_pb2.AttentionStatsRequest(crossing_rows=1))
    none = await stub.Stats(attention_pb2.AttentionStatsRequest(crossing_rows=7))
    assert decode.crossing_seconds_p50 >= decode.crossing_wait_seconds_p50 > 0
    assert none.crossing_seconds_p99 == 0


async def test_drain_aborts_after_the_grace_time_and_admits_nothing_more(stub) -> None:
    call = stub.Generate(request("a", max_tokens=370))
    await accepted(call)
    drained = await stub.Drain(attention_pb2.AttentionDrainRequest(grace_seconds=0.01))
    assert drained.aborted_requests == 1
    error = await failure(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "the worker shut down before the answer was done"
    refused = await failure(stub.Generate(request("b")))
    assert refused.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("grace_seconds", [float("nan"), -1.0])
async def test_a_grace_time_that_is_none_drains_nothing(stub, grace_seconds: float) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="grace_seconds") as refused:
        await stub.Drain(attention_pb2.AttentionDrainRequest(grace_seconds=grace_seconds))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not (await stub.Stats(attention_pb2.AttentionStatsRequest())).draining


async def test_stopping_lets_a_stream_finish_within_the_grace_time(
    worker: AttentionWorker, stub
) -> None:
    call = stub.Generate(request("a", max_tokens=40))
    await accepted(call)
    stopping = asyncio.create_task(worker.stop(grace_s=20))
    events = [event async for event in call]
    assert events[-1].final.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    await stopping


async def test_the_worker_reports_its_health(worker: AttentionWorker) -> None:
    async with rpc.channel(worker.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="model1.v1.Attention"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


class LeakyPool(KVPool):
    """A pool with a bug: it cannot take anything back."""

    def free(self, handle: KVHandle) -> None:
        raise RuntimeError("boom")


async def test_a_bug_in_the_loop_ends_every_request_and_shows_in_health() -> None:
    model, pool = tiny_model.model(), LeakyPool(tiny_model.CONFIG, tiny_model.pool().capacity)
    limits = SchedulerLimits(max_batch_tokens=16, max_sequences=2)
    config = AttentionWorkerConfig(name="a", engine=EngineConfig(limits=limits))
    worker = await AttentionWorker.open(model.trunk, pool, LocalExperts(model.experts), config)
    async with rpc.channel(worker.address) as channel:
        stub = attention_pb2_grpc.AttentionStub(channel)
        calls = []
        for name in ("a", "b", "c"):  # one after the other: a is in the batch, c waits
            calls.append(stub.Generate(request(name, max_tokens=370)))
            await accepted(calls[-1])
        await anext(aiter(calls[0]))  # a token: it holds KV, which the pool will not take back
        calls[0].cancel()
        for call in calls[1:]:
            assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    await worker.stop(grace_s=0)
