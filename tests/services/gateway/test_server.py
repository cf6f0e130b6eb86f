"""The gateway's gRPC edge: real servers all the way to a tiny model, and a tour of bad input."""

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import control_pb2, inference_pb2, inference_pb2_grpc
from services import rpc
from services.errors import DeadlineExceeded
from services.gateway.admission import AskedRequest
from services.gateway.answer import Frame
from services.gateway.server import GatewayConfig, GatewayServer
from services.gateway.worker import WorkerAddress
from tests.services import tiny_model
from tests.services.gateway.deployed import (
    MAX_ACTIVE,
    Deployment,
    StagedOperations,
    deployed,
    failure,
    frame,
    request,
    topology,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    async with deployed(tmp_path) as running:
        yield running


async def test_a_stream_is_accepted_numbered_deltas_and_final(deployment: Deployment) -> None:
    call = deployment.inference.GenerateStream(request("once upon", "mine", max_tokens=30))
    frames = [message async for message in call]
    assert frames[0].accepted == inference_pb2.Accepted(request_id="mine", worker="attention-0")
    deltas = [message.delta for message in frames[1:-1]]
    assert [delta.sequence_number for delta in deltas] == list(range(len(deltas)))
    prompt_ids = deployment.tokenizer.encode("once upon")
    expected = tiny_model.model().generate(prompt_ids, 30)
    token_ids = [token for delta in deltas for token in delta.token_ids]
    assert token_ids == expected
    assert "".join(delta.text for delta in deltas) == deployment.tokenizer.decode(expected)
    usage = inference_pb2.Usage(
        prompt_tokens=len(prompt_ids),
        completion_tokens=len(expected),
        kv=inference_pb2.KvUsage(computed_tokens=len(prompt_ids)),
    )
    stopped = expected[-1] in tiny_model.model().config.eos_token_ids
    reason = inference_pb2.FINISH_REASON_STOP if stopped else inference_pb2.FINISH_REASON_LENGTH
    assert frames[-1].final == inference_pb2.Final(finish_reason=reason, usage=usage)


async def test_the_unary_answer_is_the_stream_put_together(deployment: Deployment) -> None:
    asked = request("once upon", "mine", max_tokens=30)
    asked.sampling.temperature, asked.sampling.seed = 0.7, 5
    answer = await deployment.inference.Generate(asked)
    prompt_ids = deployment.tokenizer.encode("once upon")
    expected = tiny_model.model().generate(prompt_ids, 30, temperature=0.7, seed=5)
    assert list(answer.token_ids) == expected
    assert answer.text == deployment.tokenizer.decode(expected)
    assert (answer.request_id, answer.worker) == ("mine", "attention-0")
    assert answer.usage.prompt_tokens == len(prompt_ids)
    assert answer.usage.completion_tokens == len(expected)


async def test_a_stop_token_ends_the_answer_and_is_not_text(deployment: Deployment) -> None:
    expected = tiny_model.model().generate((5, 6, 7), 10)
    stop = expected[3]
    answer = await deployment.inference.Generate(request(max_tokens=10, stop_token_ids=[stop]))
    assert list(answer.token_ids) == expected[: expected.index(stop) + 1]
    assert answer.finish_reason == inference_pb2.FINISH_REASON_STOP
    assert answer.text == deployment.tokenizer.decode(expected[: expected.index(stop)])


async def test_requests_go_to_the_least_loaded_worker(deployment: Deployment) -> None:
    calls = [
        deployment.inference.GenerateStream(request(max_tokens=200)) for _ in range(MAX_ACTIVE)
    ]
    names = [(await frame(call, "accepted")).worker for call in calls]
    assert sorted(names) == ["attention-0", "attention-0", "attention-1", "attention-1"]
    for call in calls:
        call.cancel()


BAD_REQUESTS = [
    (inference_pb2.GenerateRequest(), "the request has no prompt: set text or token_ids"),
    (request(""), "the prompt is empty"),
    (inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds()), "the prompt is empty"),
    (
        request((5, 4096)),
        "token id 4096 in the prompt is outside the vocabulary of 272 tokens",
    ),
    (request(tiny_model.prompt(401)), "the prompt has 401 tokens, the context is 400 tokens"),
    (
        request(tiny_model.prompt(300), max_tokens=101),
        "max_tokens 101 and a prompt of 300 tokens exceed the context of 400 tokens",
    ),
    (request(max_tokens=0), "max_tokens must be at least 1, not 0"),
    (
        inference_pb2.GenerateRequest(
            text="a", sampling=inference_pb2.SamplingParams(temperature=-1)
        ),
        "temperature must be between 0 and 100, not -1.0",
    ),
    (
        inference_pb2.GenerateRequest(text="a", sampling=inference_pb2.SamplingParams(top_p=0)),
        "top_p must be above 0 and at most 1, not 0.0",
    ),
]


@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_a_tour_of_bad_input(deployment: Deployment, method: str) -> None:
    for message, words in BAD_REQUESTS:
        error = await failure(getattr(deployment.inference, method)(message))
        assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, words)
    assert deployment.num_sequences == 0
    assert [worker.engine.stats().counters.accepted for worker in deployment.workers] == [0, 0]


async def test_two_live_requests_cannot_share_an_id(deployment: Deployment) -> None:
    first = deployment.inference.GenerateStream(request(request_id="same", max_tokens=300))
    await frame(first, "accepted")
    error = await failure(deployment.inference.Generate(request(request_id="same")))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert error.details() == "request 'same' is already being served"
    first.cancel()
    await deployment.freed()


async def test_a_client_that_leaves_mid_stream_frees_its_kv(deployment: Deployment) -> None:
    call = deployment.inference.GenerateStream(request(max_tokens=390))
    await frame(call, "accepted")
    await frame(call, "delta")
    assert deployment.num_sequences == 1
    call.cancel()
    await deployment.freed()
    assert deployment.workers[0].engine.stats().counters.cancelled == 1
    for pool in deployment.pools:
        pool.check()


@pytest.mark.parametrize("timeout_s", [0.001, 0.1])
async def test_a_deadline_ends_the_request_at_every_hop(
    deployment: Deployment, timeout_s: float
) -> None:
    call = deployment.inference.Generate(request(max_tokens=390), timeout=timeout_s)
    assert (await failure(call)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await deployment.freed()
    for worker in deployment.workers:
        worker.engine.check()


async def test_a_full_gateway_says_so_and_when_to_retry(deployment: Deployment) -> None:
    calls = [
        deployment.inference.GenerateStream(request(max_tokens=390)) for _ in range(MAX_ACTIVE)
    ]
    for call in calls:
        await frame(call, "accepted")
    error = await failure(deployment.inference.Generate(request()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "4 requests are active, the gateway takes 4 at once"
    metadata: Any = error.trailing_metadata()
    trailer = metadata["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(trailer)
    retry = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.seconds == 1
    for call in calls:
        call.cancel()
    await deployment.freed()


async def test_abort_ends_the_stream_as_cancelled(deployment: Deployment) -> None:
    call = deployment.inference.GenerateStream(request(request_id="mine", max_tokens=390))
    await frame(call, "accepted")
    await deployment.control.Abort(control_pb2.AbortRequest(request_id="mine"))
    error = await failure(call)
    assert (error.code(), error.details()) == (
        grpc.StatusCode.CANCELLED,
        "request 'mine' was aborted",
    )
    await deployment.freed()
    unknown = await failure(deployment.control.Abort(control_pb2.AbortRequest(request_id="mine")))
    assert (unknown.code(), unknown.details()) == (
        grpc.StatusCode.NOT_FOUND,
        "no live request has the id 'mine'",
    )


async def test_an_endless_id_is_unknown_and_cut_short(deployment: Deployment) -> None:
    call = deployment.control.Abort(control_pb2.AbortRequest(request_id="\N{SNOWMAN}" * 100_000))
    error = await failure(call)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "no live request has the id" in (error.details() or "")


async def test_a_message_larger_than_any_prompt_is_refused(deployment: Deployment) -> None:
    error = await failure(deployment.inference.Generate(request("a" * (17 * 1024 * 1024))))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (error.details() or "")
    await deployment.inference.Generate(request(max_tokens=1))


async def test_a_request_that_is_ending_can_be_aborted_and_drained(deployment: Deployment) -> None:
    # Its deadline has cut it short, but it has not had its turn to end yet.
    gateway = deployment.gateway.gateway
    unwinding, may_end = asyncio.Event(), asyncio.Event()

    async def emit(_frame: Frame) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            unwinding.set()
            await may_end.wait()

    asked = AskedRequest(prompt=(5, 6, 7), request_id="mine")
    ending = asyncio.create_task(gateway.generate(asked, 0.5, emit))
    async with asyncio.timeout(30):
        await unwinding.wait()
        gateway.abort("mine")
        draining = asyncio.create_task(gateway.drain(grace_s=0))
        await asyncio.sleep(0.01)
        may_end.set()
        with pytest.raises(DeadlineExceeded):
            await ending
        assert await draining == 1


async def test_a_dead_worker_is_passed_over(deployment: Deployment) -> None:
    await deployment.workers[0].stop(grace_s=0)
    for _ in range(2):
        answer = await deployment.inference.Generate(request(max_tokens=1))
        assert answer.worker == "attention-1"


async def test_a_worker_that_drains_is_passed_over(deployment: Deployment) -> None:
    await deployment.workers[0].engine.drain(grace_s=0)  # listens, and admits nothing
    answers = [await deployment.inference.Generate(request(max_tokens=1)) for _ in range(4)]
    assert [answer.worker for answer in answers] == ["attention-1"] * 4


async def test_a_worker_taken_off_the_table_finishes_its_requests(deployment: Deployment) -> None:
    workers = deployment.gateway.gateway.workers
    call = deployment.inference.GenerateStream(request(max_tokens=60))
    assert (await frame(call, "accepted")).worker == "attention-0"
    await workers.update([WorkerAddress("attention-1", deployment.workers[1].address)])
    assert (await deployment.inference.Generate(request())).worker == "attention-1"
    frames = [message async for message in call]
    assert frames[-1].final.usage.completion_tokens == 60


async def test_stopping_finishes_within_the_grace_time(deployment: Deployment) -> None:
    call = deployment.inference.GenerateStream(request(max_tokens=60))
    await frame(call, "accepted")
    stopping = asyncio.create_task(deployment.gateway.stop(grace_s=20))
    await asyncio.sleep(0)
    refused = await failure(deployment.inference.Generate(request()))
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    frames = [message async for message in call]
    assert frames[-1].final.usage.completion_tokens == 60
    await stopping


async def test_stopping_aborts_the_rest_after_the_grace_time(deployment: Deployment) -> None:
    call = deployment.inference.GenerateStream(request(max_tokens=390))
    await frame(call, "accepted")
    stopping = asyncio.create_task(deployment.gateway.stop(grace_s=0.05))
    error = await failure(call)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert error.details() == "the gateway shut down before the answer was done"
    await stopping
    await deployment.freed()


async def test_control_tells_what_is_served_and_by_whom(deployment: Deployment) -> None:
    server = await deployment.control.GetServerInfo(control_pb2.GetServerInfoRequest())
    assert (server.version, server.active_requests, server.draining) == ("1.2.3", 0, False)
    assert server.max_active_requests == MAX_ACTIVE
    model = await deployment.control.GetModelInfo(control_pb2.GetModelInfoRequest())
    assert (model.vocab_size, model.max_context_length) == (272, 400)
    assert (model.bos_token_id, list(model.eos_token_ids)) == (0, [1])
    answer = await deployment.control.GetTopology(control_pb2.GetTopologyRequest())
    assert answer.epoch == 3
    (member,) = answer.members
    assert (member.name, member.pid, member.requests) == ("expert-1-0", 17, 5)
    assert member.expert_group == 1
    assert (member.stats.seconds, member.stats.expert.busy_seconds) == (2.0, 1.5)


async def test_the_gateway_reports_the_health_of_both_services(deployment: Deployment) -> None:
    async with rpc.channel(deployment.gateway.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "model1.v1.Inference", "model1.v1.Control"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_port_in_use_is_named(deployment: Deployment, tmp_path: Path) -> None:
    config = GatewayConfig(model_dir=tmp_path, version="1", address=deployment.gateway.address)
    with pytest.raises(rpc.AddressUnavailable, match=deployment.gateway.address):
        await GatewayServer.open(config, topology, StagedOperations())


def test_the_gateway_never_imports_torch() -> None:
    statement = "import sys, services.gateway.server; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", statement], cwd=ROOT, check=True)


async def test_a_client_that_watches_health_is_never_cut_off_by_a_gateway_that_stops(
    deployment: Deployment,
) -> None:
    # gRPC's server answers CANCELLED to calls that wait to be taken when it closes.
    service_config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},
    }
    options = [("grpc.service_config", json.dumps(service_config))]
    refused: Counter[grpc.StatusCode] = Counter()
    async with grpc.aio.insecure_channel(deployment.gateway.address, options=options) as channel:
        generate = inference_pb2_grpc.InferenceStub(channel).Generate

        async def ask() -> None:
            while not refused[grpc.StatusCode.UNAVAILABLE] > 200:
                try:
                    await generate(request(max_tokens=1))
                except grpc.aio.AioRpcError as error:
                    refused[error.code()] += 1

        asking = [asyncio.create_task(ask()) for _ in range(32)]
        await asyncio.sleep(0.2)
        await deployment.gateway.stop(grace_s=5)
        await asyncio.gather(*asking)
    assert set(refused) <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
