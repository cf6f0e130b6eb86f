import asyncio
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest

from protos import expert_pb2, expert_pb2_grpc
from services import rpc, wire
from services.duplex import CLOCK_KEY
from services.expert.replica import ExpertReplica
from services.expert.server import expert_service
from services.wire import ExpertRows
from tests.services.expert_banks import HIDDEN_SIZE, seeded_bank


@pytest.fixture
def replica() -> ExpertReplica:
    return ExpertReplica("replica-0", seeded_bank([2, 3]))


@pytest.fixture
async def server(replica: ExpertReplica) -> AsyncIterator[rpc.RunningServer]:
    async with await rpc.start_server([expert_service(replica)], "127.0.0.1:0") as server:
        yield server


@pytest.fixture
async def stub(server: rpc.RunningServer) -> AsyncIterator[expert_pb2_grpc.ExpertStub]:
    async with rpc.channel(server.address) as channel:
        yield expert_pb2_grpc.ExpertStub(channel)


def _call() -> ExpertRows:
    return ExpertRows(
        layer=0,
        rows=np.ones((1, HIDDEN_SIZE), dtype=np.float32),
        row_index=np.array([0, 0], dtype=np.int32),
        expert_ids=np.array([2, 3], dtype=np.int32),
        weights=np.array([0.5, 0.5], dtype=np.float32),
    )


def _message(call_id: int = 1, deadline_seconds: float | None = None) -> expert_pb2.ExpertRows:
    return wire.encode_expert_rows(call_id, _call(), deadline_seconds)


async def test_calls_are_answered_in_order_on_one_stream(
    stub: expert_pb2_grpc.ExpertStub, replica: ExpertReplica
) -> None:
    stream = stub.Dispatch()
    for call_id in (7, 8, 9):
        await stream.write(_message(call_id))
    expected = replica.compute(_call()).tobytes()
    for call_id in (7, 8, 9):
        answer = await stream.read()
        assert (answer.call_id, answer.pair_rows) == (call_id, expected)
    await stream.done_writing()
    assert not await stream.read()  # the end of the stream
    assert await stream.code() == grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("field", "value", "code", "words"),
    [
        ("layer", 99, grpc.StatusCode.FAILED_PRECONDITION, "layer 99"),
        ("expert_ids", b"\x05\0\0\0" * 2, grpc.StatusCode.DATA_LOSS, "checksum of the call"),
        ("dtype", 2, grpc.StatusCode.INVALID_ARGUMENT, "rows of shape"),
        ("rows", b"", grpc.StatusCode.INVALID_ARGUMENT, "got 0"),
        ("num_pairs", 3, grpc.StatusCode.INVALID_ARGUMENT, "row_index"),
        ("num_rows", 2**31, grpc.StatusCode.INVALID_ARGUMENT, "rows of shape"),
    ],
)
async def test_a_bad_call_fails_alone_and_the_stream_lives_on(
    stub: expert_pb2_grpc.ExpertStub,
    field: str,
    value: int | bytes,
    code: grpc.StatusCode,
    words: str,
) -> None:
    stream = stub.Dispatch()
    bad = _message(1)
    setattr(bad, field, value)
    await stream.write(bad)
    failed = await stream.read()
    assert (failed.call_id, failed.error.code) == (1, code.value[0])
    assert words in failed.error.message
    await stream.write(_message(2))
    answer = await stream.read()
    assert (answer.call_id, answer.HasField("error")) == (2, False)
    stream.cancel()


async def test_a_call_past_its_deadline_on_the_replicas_clock_is_not_computed(
    stub: expert_pb2_grpc.ExpertStub, replica: ExpertReplica
) -> None:
    stream = stub.Dispatch()
    clock_seconds = float(str((await stream.initial_metadata())[CLOCK_KEY]))
    await stream.write(_message(1, deadline_seconds=clock_seconds))
    await stream.write(_message(2, deadline_seconds=clock_seconds + 60))
    late, answer = await stream.read(), await stream.read()
    assert late.error.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert not answer.HasField("error")
    assert (replica.counters.calls, replica.counters.late_calls) == (1, 1)
    stream.cancel()


async def test_stats_report_the_counters(stub: expert_pb2_grpc.ExpertStub) -> None:
    stream = stub.Dispatch()
    await stream.write(_message())
    await stream.read()
    bad = _message()
    bad.layer = 99
    await stream.write(bad)
    await stream.read()
    stats = await stub.Stats(expert_pb2.ExpertStatsRequest())
    assert (stats.replica, list(stats.expert_ids)) == ("replica-0", [2, 3])
    assert (stats.calls, stats.rows, stats.pairs, stats.failed_calls) == (1, 1, 2, 1)
    assert stats.busy_seconds > 0
    stream.cancel()


async def test_draining_ends_the_streams_and_admits_no_new_one(
    server: rpc.RunningServer, stub: expert_pb2_grpc.ExpertStub
) -> None:
    stream = stub.Dispatch()
    await stream.write(_message())
    await stream.read()
    async with asyncio.timeout(30):
        await server.stop(grace_seconds=100.0)
        assert not await stream.read()  # the end of the stream
    assert await stream.code() == grpc.StatusCode.OK
    with pytest.raises(grpc.aio.AioRpcError):
        await stub.Stats(expert_pb2.ExpertStatsRequest(), timeout=1.0)


async def test_a_router_that_leaves_without_a_word_leaves_nothing_behind(
    server: rpc.RunningServer,
) -> None:
    async with rpc.channel(server.address) as channel:
        stream = expert_pb2_grpc.ExpertStub(channel).Dispatch()
        await stream.write(_message())
        await stream.read()
    async with asyncio.timeout(30):
        await server.stop(grace_seconds=100.0)  # would wait for a stream that is still there
