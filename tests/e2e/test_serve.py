"""A small deployment in real Ray processes, used through the command line alone."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import grpc
import pytest

from protos import inference_pb2, inference_pb2_grpc
from tests.e2e.command import MODEL1, ROOT, run, run_json, served, wait_until_gone
from tests.services import tiny_model

pytestmark = pytest.mark.timeout(300)


def test_a_deployment_answers_like_the_model_and_leaves_nothing(tiny_checkpoint: Path) -> None:
    prompt = tiny_model.prompt(20)
    expected = tiny_model.model().generate(prompt, max_tokens=12)
    as_ids = ",".join(map(str, prompt))
    with served("--model", tiny_checkpoint, "--expert-groups", "2") as deployment:
        endpoint = ("--endpoint", deployment.endpoint)
        answer = run_json("generate", "--token-ids", as_ids, "--max-tokens", "12", *endpoint)
        assert answer["token_ids"] == expected
        assert answer["usage"] == {"prompt_tokens": 20, "completion_tokens": len(expected)}

        text = run("generate", "Hello", "--max-tokens", "5", *endpoint)
        assert (text.code, "prompt 6 tokens, answer 5 tokens" in text.stderr) == (0, True)
        refused = run("generate", "--token-ids", "3,9999", *endpoint)
        assert (refused.code, "9999" in refused.stderr) == (2, True)

        members = deployment.members()
        assert sorted(member["role"] for member in members) == [
            *("attention", "expert", "expert", "gateway", "router", "supervisor")
        ]
        pids = [member["pid"] for member in members]
        assert len(set(pids)) == len(pids)
        assert all(int(m["requests"]) > 0 for m in members if m["role"] != "supervisor")

        stopping = _drains_while_a_request_streams(deployment.endpoint, deployment.process)
        assert stopping
        stopped = deployment.wait()
        assert (stopped.code, stopped.stdout, stopped.stderr) == (0, "", "")
        wait_until_gone([*pids, deployment.process.pid])


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
        time.sleep(4)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (0, "", "")


@pytest.mark.slow
def test_a_deployment_that_loses_an_expert_group_says_so_and_ends(tiny_checkpoint: Path) -> None:
    with served("--model", tiny_checkpoint, "--expert-groups", "2") as deployment:
        members = deployment.members()
        victim = next(m for m in members if m["name"] == "expert-1-0")
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
    for name in ("gateway-0", "attention-0", "router-0", "expert-0-0", "expert-1-0"):
        assert name in result.stdout
    assert "tokens/s" in result.stdout
    assert "all 6 processes have ended" in result.stdout


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
