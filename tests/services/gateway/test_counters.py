"""Every request is counted once when it comes and once when it ends, however that is."""

import asyncio
from pathlib import Path

import pytest

from model1.errors import InvalidRequest
from protos import control_pb2
from services.errors import (
    STATUS,
    DeadlineExceeded,
    Draining,
    InternalFailure,
    QueueFull,
    RequestCancelled,
    SessionChanged,
    WorkerUnavailable,
)
from services.gateway.admission import AskedRequest
from services.gateway.answer import Final, Frame
from services.gateway.counters import Outcome, RequestCounters
from services.generation import FinishReason, KvUsage
from tests.services.gateway.deployed import (
    MAX_ACTIVE,
    Deployment,
    deployed,
    failure,
    frame,
    request,
)


@pytest.mark.parametrize("is_accepted", [False, True])
@pytest.mark.parametrize("kind", [*STATUS, asyncio.CancelledError, RuntimeError, SystemExit])
def test_whatever_ends_a_request_is_one_outcome(
    kind: type[BaseException], is_accepted: bool
) -> None:
    counters = RequestCounters()
    with pytest.raises(kind), counters.request() as counted:
        if is_accepted:
            counted.accepted()
        raise kind
    assert (counters.received, counters.accepted) == (1, is_accepted)
    assert list(counters.ended.values()) == [1]
    assert not counters.ended[Outcome.FINISHED]
    if is_accepted:
        assert not counters.ended[Outcome.REJECTED]


@pytest.mark.parametrize(
    ("kind", "waiting", "accepted"),
    [
        (asyncio.CancelledError, Outcome.CANCELLED, Outcome.CANCELLED),
        (RequestCancelled, Outcome.CANCELLED, Outcome.CANCELLED),
        (DeadlineExceeded, Outcome.CANCELLED, Outcome.CANCELLED),
        (InvalidRequest, Outcome.REJECTED, Outcome.FAILED),
        (QueueFull, Outcome.REJECTED, Outcome.FAILED),
        (Draining, Outcome.REJECTED, Outcome.FAILED),
        (WorkerUnavailable, Outcome.FAILED, Outcome.FAILED),
        (SessionChanged, Outcome.FAILED, Outcome.FAILED),
        (InternalFailure, Outcome.FAILED, Outcome.FAILED),
    ],
)
def test_only_what_no_worker_has_queued_can_be_rejected(
    kind: type[BaseException], waiting: Outcome, accepted: Outcome
) -> None:
    for is_accepted, outcome in ((False, waiting), (True, accepted)):
        counters = RequestCounters()
        with pytest.raises(kind), counters.request() as counted:
            if is_accepted:
                counted.accepted()
            raise kind
        assert dict(counters.ended) == {outcome: 1}


def test_the_sources_of_a_finished_prompt_add_up_to_it() -> None:
    counters = RequestCounters()
    kv = KvUsage(
        device_tokens=1,
        ram_tokens=2,
        disk_tokens=4,
        peer_tokens=8,
        cold_tokens=16,
        computed_tokens=32,
    )
    for usage in (kv, None):
        with counters.request() as counted:
            counted.accepted()
            counted.answered(Final(FinishReason.STOP, 63, 5, usage))
    by_source = dict(device=1, ram=2, disk=4, peer=8, cold=16, computed=32, unknown=63)
    assert dict(counters.prompt_tokens) == by_source
    assert dict(counters.ended) == {Outcome.FINISHED: 2}


async def test_a_gateway_counts_each_of_its_requests_once(tmp_path: Path) -> None:
    async with deployed(tmp_path, continue_patience_seconds=0) as deployment:
        gateway, inference = deployment.gateway.gateway, deployment.inference
        counters = gateway.counters
        expected = {outcome: 0 for outcome in Outcome}

        async def ended(outcome: Outcome, times: int = 1) -> None:
            """As many more, and no other; and nothing is forgotten."""
            expected[outcome] += times
            async with asyncio.timeout(30):
                while counters.ended.total() < sum(expected.values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            assert {each: counters.ended[each] for each in Outcome} == expected
            assert counters.received == gateway.num_active + counters.ended.total()

        answer = await inference.Generate(request(max_tokens=6))
        await ended(Outcome.FINISHED)
        assert counters.generated_tokens == len(answer.token_ids)
        assert dict(counters.prompt_tokens)["computed"] == counters.prompt_tokens.total() == 3

        await failure(inference.Generate(request("")))
        await ended(Outcome.REJECTED)

        aborted = inference.GenerateStream(request(request_id="mine", max_tokens=390))
        await frame(aborted, "accepted")
        await failure(inference.Generate(request(request_id="mine")))
        await ended(Outcome.REJECTED)
        await deployment.control.Abort(control_pb2.AbortRequest(request_id="mine"))
        await failure(aborted)
        await ended(Outcome.CANCELLED)

        calls = [inference.GenerateStream(request(max_tokens=390)) for _ in range(MAX_ACTIVE)]
        for call in calls:
            await frame(call, "accepted")
        await failure(inference.Generate(request()))
        await ended(Outcome.REJECTED)
        for call in calls:
            call.cancel()
        await ended(Outcome.CANCELLED, MAX_ACTIVE)

        with pytest.raises(DeadlineExceeded):
            await gateway.generate(AskedRequest(prompt=(5, 6, 7)), 0.05, _never)
        await ended(Outcome.CANCELLED)

        accepted = counters.accepted
        await _lose_a_request_and_all_workers(deployment)
        await ended(Outcome.FAILED)
        assert counters.accepted == accepted + 1
        await gateway.workers.update([])
        await failure(inference.Generate(request()))
        await ended(Outcome.FAILED)
        assert counters.accepted == accepted + 1

        await gateway.drain(grace_s=0)
        await failure(inference.Generate(request()))
        await ended(Outcome.REJECTED)


async def _never(_frame: Frame) -> None:
    await asyncio.Event().wait()


async def _lose_a_request_and_all_workers(deployment: Deployment) -> None:
    call = deployment.inference.GenerateStream(request(max_tokens=390))
    await frame(call, "accepted")
    await asyncio.gather(*(worker.stop(grace_s=0) for worker in deployment.workers))
    await failure(call)
