"""A small deployment in real Ray processes, used through the command line alone."""

import asyncio
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

from protos import attention_pb2, attention_pb2_grpc, inference_pb2, inference_pb2_grpc
from services import rpc
from tests.e2e.command import (
    MODEL1,
    ROOT,
    START_TIMEOUT_SECONDS,
    STOP_TIMEOUT_SECONDS,
    commands,
    process_tree,
    run,
    run_json,
    served,
    wait_until_gone,
)
from tests.services import tiny_model
from tests.services.gateway.scraped import scraped

pytestmark = pytest.mark.timeout(300)


def test_a_deployment_answers_like_the_model_and_leaves_nothing(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL1_GATEWAY__METRICS_PORT", "0")
    prompt = tiny_model.prompt(20)
    expected = tiny_model.model().generate(prompt, max_tokens=12)
    as_ids = ",".join(map(str, prompt))
    with served("--model", tiny_checkpoint, "--expert-groups", "2") as deployment:
        endpoint = ("--endpoint", deployment.endpoint)
        answer = run_json("generate", "--token-ids", as_ids, "--max-tokens", "12", *endpoint)
        assert answer["token_ids"] == expected
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (20, len(expected))

        text = run("generate", "Hello", "--max-tokens", "5", *endpoint)
        assert (text.code, "prompt 6 tokens, answer 5 tokens" in text.stderr) == (0, True)
        refused = run("generate", "--token-ids", "3,9999", *endpoint)
        assert (refused.code, "9999" in refused.stderr) == (2, True)

        members = deployment.members()
        assert sorted(member["role"] for member in members) == [
            *("attention", "expert", "expert", "gateway", "kvstore", "router", "supervisor")
        ]
        pids = [member["pid"] for member in members]
        assert len(set(pids)) == len(pids)
        idle = [m["role"] for m in members if int(m["requests"]) == 0]
        assert sorted(idle) in (["supervisor"], ["kvstore", "supervisor"])

        _tops(deployment.endpoint)

        metrics = scraped(run_json("status", *endpoint)["server"]["metrics_url"])
        for member in members:
            assert metrics("model1_up", role=member["role"], name=member["name"]) == 1
        assert metrics("model1_requests_ended_total", outcome="finished") == 2
        assert metrics("model1_requests_ended_total", outcome="rejected") == 1
        assert metrics("model1_worker_crossing_seconds_count", worker="attention-0") > 0
        assert metrics("model1_router_answer_seconds_count", router="router-0") > 0
        assert metrics("model1_replica_compute_seconds_count", replica="expert-1-0") > 0

        stopping = _drains_while_a_request_streams(deployment.endpoint, deployment.process)
        assert stopping
        stopped = deployment.wait()
        assert (stopped.code, stopped.stdout, stopped.stderr) == (0, "", "")
        wait_until_gone([*pids, deployment.process.pid])


def _tops(endpoint: str) -> None:
    """Two requests were served and nothing happens now."""
    text = run("top", "--once", "--interval", "0.2", "--endpoint", endpoint)
    assert (text.code, text.stderr) == (0, "")
    for name in ("gateway-0", "attention-0", "router-0", "expert-1-0", "kvstore-0"):
        assert name in text.stdout
    look = run_json("top", "--once", "--interval", "0.2", "--endpoint", endpoint)
    (gateway,), (worker,) = look["gateways"], look["workers"]
    assert (gateway["finished"], gateway["rejected"], gateway["active"]) == (2, 1, 0)
    assert (gateway["requests_per_second"], worker["in_steps_share"]) == (0, 0)
    since_the_start = run_json("status", "--endpoint", endpoint)["figures"]
    assert since_the_start["gateways"][0]["first_token"]["p50"] > 0
    assert since_the_start["routers"][0]["answer"]["p99"] > 0
    assert 0 < since_the_start["experts"]["balance"] <= 1


def _drains_while_a_request_streams(endpoint: str, process: "subprocess.Popen[str]") -> bool:
    """The request that was under way when SIGTERM came ends whole."""
    request = inference_pb2.GenerateRequest(
        text="x", stopping=inference_pb2.StoppingParams(max_tokens=150, ignore_eos=True)
    )
    with grpc.insecure_channel(endpoint) as channel:
        stream = inference_pb2_grpc.InferenceStub(channel).GenerateStream(request)
        frames = [next(stream).WhichOneof("frame") for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        frames.extend(frame.WhichOneof("frame") for frame in stream)
    return frames[-1] == "final"


@pytest.mark.slow
def test_a_signal_during_the_start_stops_everything(tiny_checkpoint: Path) -> None:
    with subprocess.Popen(
        [*MODEL1, "serve", "--port", "0", "--model", str(tiny_checkpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            started = _until_ray_starts(process)
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=STOP_TIMEOUT_SECONDS)
        finally:
            process.kill()
    assert (process.returncode, stdout, stderr) == (0, "", "")
    wait_until_gone(started)


def _until_ray_starts(process: "subprocess.Popen[str]") -> list[int]:
    """The processes of the command when the first of Ray's is there, long before all are."""
    give_up_at = time.monotonic() + START_TIMEOUT_SECONDS
    while "gcs_server" not in commands(tree := process_tree(process.pid)):
        assert process.poll() is None and time.monotonic() < give_up_at
        time.sleep(0.02)
    return tree


@pytest.mark.slow
def test_a_deployment_that_cannot_get_its_experts_back_says_so_and_ends(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL1_CLUSTER__RESTART_TIMEOUT_SECONDS", "3")
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with served("--model", tmp_path, "--expert-groups", "2") as deployment:
        members = deployment.members()
        victim = next(m for m in members if m["name"] == "expert-1-0")
        (tmp_path / "config.json").unlink()
        os.kill(victim["pid"], signal.SIGKILL)
        ended = deployment.wait()
    assert ended.code == 1
    assert ended.stdout == ""
    assert "no replica of expert group 1 is alive" in ended.stderr.splitlines()[-1]
    wait_until_gone([member["pid"] for member in members])


@pytest.mark.slow
def test_demo_shows_the_actors_that_served_and_leaves_nothing(tiny_checkpoint: Path) -> None:
    result = run("demo", "--model", tiny_checkpoint)
    assert result.code == 0, result.stderr
    for name in ("gateway-0", "attention-0", "router-0", "kvstore-0", "expert-0-0", "expert-1-0"):
        assert name in result.stdout
    assert "tokens/s" in result.stdout
    assert "all 7 processes have ended" in result.stdout


@pytest.mark.slow
def test_a_role_that_cannot_load_is_named_in_one_line(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["moe_intermediate_size"] *= 2
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("serve", "--port", "0", "--model", tmp_path)
    assert (result.code, result.stdout) == (1, "")
    assert "Traceback" not in result.stderr
    assert "wrongly shaped" in result.stderr


@pytest.mark.slow
def test_requests_that_go_wrong_end_with_their_status_and_hold_nothing(
    tiny_checkpoint: Path,
) -> None:
    with served("--model", tiny_checkpoint) as deployment:
        asyncio.run(_tour_of_wrong_requests(deployment.endpoint))
        address = next(m["address"] for m in deployment.members() if m["role"] == "attention")
        assert asyncio.run(_live_sequences(address)) == 0
        assert deployment.stop().code == 0


async def _tour_of_wrong_requests(endpoint: str) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    async with rpc.channel(endpoint) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for request, words in (
            (_request(), "no prompt"),
            (_request(text=""), "empty"),
            (_request(text="x" * 400), "401 tokens"),
            (_request(token_ids=inference_pb2.TokenIds(ids=[272])), "272"),
            (_request(text="x", sampling=inference_pb2.SamplingParams(temperature=-1)), "-1"),
        ):
            status, told = await _refusal(stub, request)
            assert (status, words in told) == (invalid, True), told
        status, _ = await _refusal(stub, _request(text="x"), timeout_seconds=0.001)
        assert status is grpc.StatusCode.DEADLINE_EXCEEDED

        first = stub.GenerateStream(_request(text="x", request_id="same"))
        assert (await first.read()).WhichOneof("frame") == "accepted"
        status, told = await _refusal(stub, _request(text="x", request_id="same"))
        assert (status, "'same'" in told) == (grpc.StatusCode.ALREADY_EXISTS, True), told
        first.cancel()  # the client leaves in the middle of its answer


def _request(
    *,
    text: str | None = None,
    token_ids: inference_pb2.TokenIds | None = None,
    sampling: inference_pb2.SamplingParams | None = None,
    request_id: str = "",
) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        text=text,
        token_ids=token_ids,
        sampling=sampling,
        stopping=inference_pb2.StoppingParams(max_tokens=300, ignore_eos=True),
    )


async def _refusal(
    stub: inference_pb2_grpc.InferenceStub,
    request: inference_pb2.GenerateRequest,
    timeout_seconds: float | None = None,
) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(request, timeout=timeout_seconds)
    return caught.value.code(), caught.value.details() or ""


async def _live_sequences(address: str) -> int:
    """What the attention worker still holds, once it had a moment to let go."""
    async with rpc.channel(address) as channel:
        stub = attention_pb2_grpc.AttentionStub(channel)
        give_up_at = time.monotonic() + 30
        while True:
            stats = await stub.Stats(attention_pb2.AttentionStatsRequest())
            live = stats.waiting_sequences + stats.running_sequences
            if not live or time.monotonic() > give_up_at:
                return int(live)
            await asyncio.sleep(0.05)
