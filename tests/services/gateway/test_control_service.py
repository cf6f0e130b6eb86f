"""What operators ask of a gateway, over gRPC. What it says of KV is in test_session_service.py."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from model1.errors import InvalidRequest
from protos import control_pb2
from services.errors import ChangeFailed, ChangeRefused, Unavailable, UnknownActor
from services.gateway.worker import WorkerAddress
from tests.services.gateway.deployed import Deployment, deployed, failure, frame, request


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path) as running:
        yield running


@pytest.mark.parametrize(
    ("asked", "passed_on"),
    [
        (
            control_pb2.ScaleRequest(experts=control_pb2.ScaleExperts(replicas=3)),
            ("scale_experts", 3, None),
        ),
        (
            control_pb2.ScaleRequest(experts=control_pb2.ScaleExperts(replicas=2, group=0)),
            ("scale_experts", 2, 0),
        ),
        (
            control_pb2.ScaleRequest(attention=control_pb2.ScaleAttention(replicas=4)),
            ("scale_attention", 4),
        ),
    ],
)
async def test_what_is_to_be_scaled_is_passed_on_and_what_came_of_it_is_told(
    deployment: Deployment, asked: control_pb2.ScaleRequest, passed_on: tuple[object, ...]
) -> None:
    answer = await deployment.control.Scale(asked)
    assert deployment.operations.asked == [passed_on]
    assert answer == control_pb2.ScaleResponse(
        epoch=4, added=["expert-0-1"], removed=["expert-1-1"]
    )


async def test_a_drain_is_passed_on(deployment: Deployment) -> None:
    answer = await deployment.control.Drain(control_pb2.DrainRequest(actor="expert-1-1"))
    assert deployment.operations.asked == [("drain", "expert-1-1")]
    assert answer == control_pb2.DrainResponse(
        epoch=4, added=["expert-0-1"], removed=["expert-1-1"]
    )
    await deployment.control.Drain(control_pb2.DrainRequest(node="10.0.0.7"))
    assert deployment.operations.asked[1:] == [("drain_node", "10.0.0.7")]
    with pytest.raises(grpc.aio.AioRpcError, match="set actor or node"):
        await deployment.control.Drain(control_pb2.DrainRequest())


@pytest.mark.parametrize("dry_run", [True, False])
async def test_a_rebalance_tells_its_moves_and_the_balance(
    deployment: Deployment, dry_run: bool
) -> None:
    answer = await deployment.control.Rebalance(control_pb2.RebalanceRequest(dry_run=dry_run))
    assert deployment.operations.asked == [("rebalance", dry_run)]
    load = control_pb2.ExpertMove(
        kind=control_pb2.EXPERT_MOVE_KIND_LOAD, replica="expert-0-1", expert=3
    )
    drop = control_pb2.ExpertMove(
        kind=control_pb2.EXPERT_MOVE_KIND_DROP, replica="expert-1-1", expert=3
    )
    assert answer == control_pb2.RebalanceResponse(
        epoch=4, moves=[load, drop], balance_before=0.5, balance_after=0.875
    )


@pytest.mark.parametrize(
    ("why", "status"),
    [
        (InvalidRequest("expert group 7"), grpc.StatusCode.INVALID_ARGUMENT),
        (UnknownActor("no actor"), grpc.StatusCode.NOT_FOUND),
        (ChangeRefused("the last one"), grpc.StatusCode.FAILED_PRECONDITION),
        (ChangeFailed("no free slot"), grpc.StatusCode.ABORTED),
        (Unavailable("the supervisor died"), grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_why_nothing_changed_is_told_with_its_status(
    deployment: Deployment, why: Exception, status: grpc.StatusCode
) -> None:
    deployment.operations.fails_with = why
    for call in (
        deployment.control.Drain(control_pb2.DrainRequest(actor="x")),
        deployment.control.Rebalance(control_pb2.RebalanceRequest()),
        deployment.control.Scale(
            control_pb2.ScaleRequest(attention=control_pb2.ScaleAttention(replicas=1))
        ),
    ):
        error = await failure(call)
        assert (error.code(), error.details()) == (status, str(why))


async def test_a_scale_of_nothing_is_refused(deployment: Deployment) -> None:
    error = await failure(deployment.control.Scale(control_pb2.ScaleRequest()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "set experts or attention" in str(error.details())
    assert deployment.operations.asked == []


async def test_new_requests_go_to_the_workers_of_an_update_and_old_ones_finish(
    deployment: Deployment,
) -> None:
    old = deployment.inference.GenerateStream(request("x", max_tokens=30, ignore_eos=True))
    assert (await frame(old, "accepted")).worker == "attention-0"
    second = WorkerAddress("attention-1", deployment.workers[1].address)
    await deployment.gateway.update([second], [], max_context_length=50)
    for _ in range(3):
        assert (await deployment.inference.Generate(request("y"))).worker == "attention-1"
    assert [message async for message in old][-1].WhichOneof("frame") == "final"


async def test_the_context_on_offer_follows_the_workers(deployment: Deployment) -> None:
    async def offered() -> int:
        info = await deployment.control.GetModelInfo(control_pb2.GetModelInfoRequest())
        return int(info.max_context_length)

    workers = deployment.gateway.gateway.workers.table
    for max_context_length, expected in ((50, 50), (None, 50), (10**6, 400)):
        await deployment.gateway.update(workers, [], max_context_length=max_context_length)
        assert await offered() == expected
    await deployment.gateway.update(workers, [], max_context_length=20)
    error = await failure(deployment.inference.Generate(request("x" * 30)))
    assert "the context is 20 tokens" in str(error.details())
