"""Sessions through the command line, over real Ray processes, and over a restart of all of them."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import inference_pb2, inference_pb2_grpc
from tests.e2e.command import Served, run, run_json, served, wait_until, wait_until_gone
from tests.e2e.turns import BLOCKS_TOKENS, PROMPT, SESSION, generated, kv_tokens, turn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_a_session_outlives_the_deployment(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flags = ("--model", tiny_checkpoint, "--kv-path", tmp_path / "kv")
    with served(*flags) as deployment:
        first = turn(deployment, PROMPT, *SESSION)
        assert first["token_ids"] == generated(PROMPT)
        assert kv_tokens(first) == {"computed_tokens": len(PROMPT)}
        history = (*PROMPT, *first["token_ids"], 5, 6, 7)
        second = turn(deployment, (5, 6, 7), *SESSION)
        assert second["token_ids"] == generated(history)
        left = len(history) - BLOCKS_TOKENS
        assert kv_tokens(second) == {"device_tokens": BLOCKS_TOKENS, "computed_tokens": left}
        history = (*history, *second["token_ids"])
        pids = [member["pid"] for member in deployment.members()]
        stopped = deployment.stop()
    assert (stopped.code, stopped.stderr) == (0, "")
    wait_until_gone(pids)

    with served(*flags) as deployment:
        third = turn(deployment, (8,), *SESSION)
        history = (*history, 8)
        assert third["token_ids"] == generated(history)
        came_from = kv_tokens(third)
        assert came_from.pop("computed_tokens") == len(history) - BLOCKS_TOKENS
        # Prefetching began when the turn arrived, so that some of it may be in memory already.
        assert set(came_from) <= {"disk_tokens", "ram_tokens"}
        assert sum(came_from.values()) == BLOCKS_TOKENS
        assert deployment.stop().code == 0


def test_serving_goes_on_without_its_kv_store(tiny_checkpoint: Path) -> None:
    with served("--model", tiny_checkpoint) as deployment:
        at = ("--endpoint", deployment.endpoint)
        turn(deployment, PROMPT, *SESSION)
        [store] = [m["pid"] for m in deployment.members() if m["role"] == "kvstore"]
        os.kill(store, signal.SIGKILL)
        wait_until_gone([store])
        again = turn(deployment, PROMPT)
        assert again["token_ids"] == generated(PROMPT)
        assert kv_tokens(again)["device_tokens"] == BLOCKS_TOKENS
        new = turn(deployment, PROMPT[::-1])
        assert new["token_ids"] == generated(PROMPT[::-1])
        # It kept its records in memory, and comes back without them.
        wait_until(lambda: _store(deployment)["restarts"] == 1)
        wait_until(lambda: _store(deployment)["state"] == "ready")
        told = run("generate", "x", *SESSION, *at)
        assert (told.code, "DATA_LOSS: session 'tea' was at version 1" in told.stderr) == (1, True)
        assert turn(deployment, PROMPT, *SESSION)["usage"]["prompt_tokens"] == len(PROMPT)
        assert deployment.stop().code == 0


def _store(deployment: Served) -> dict[str, Any]:
    [store] = [member for member in deployment.members() if member["role"] == "kvstore"]
    return store


def test_every_verb_about_sessions_and_kv(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with served("--model", tiny_checkpoint, "--kv-path", tmp_path / "kv") as deployment:
        answer = turn(deployment, PROMPT, *SESSION)
        history = (*PROMPT, *answer["token_ids"])
        is_seen(deployment, history)
        exported_and_begun_anew(deployment, tmp_path / "tea", history)
        takes_one_turn_at_a_time(deployment)
        salts_are_apart(deployment)
        is_chatted(deployment)
        assert deployment.stop().code == 0


def is_seen(deployment: Served, history: tuple[int, ...]) -> None:
    """By `session list`, `session show`, `kv stat` and `status`, for people and for programs."""
    at = ("--endpoint", deployment.endpoint)
    [listed] = run_json("session", "list", *at)["sessions"]
    assert (listed["session_id"], listed["num_tokens"]) == ("tea", len(history))
    assert "tea" in run("session", "list", *at).stdout
    shown = run_json("session", "show", "tea", "--history", *at)
    assert shown["token_ids"] == list(history)
    assert sum(shown["kv"].values()) == len(history)
    for flag in ((), ("--history",)):
        assert "in memory" in run("session", "show", "tea", *flag, *at).stdout

    tiers = [tier["tier"] for tier in run_json("kv", "stat", *at)["stores"][0]["stat"]["tiers"]]
    assert set(tiers) >= {"ram", "disk", "cold"}
    for verb in (("kv", "stat"), ("kv", "gc"), ("status",)):
        told = run(*verb, *at)
        assert (told.code, "kvstore-0" in told.stdout) == (0, True), told.stderr
    assert run("kv", "verify", "--tier", "disk", *at).code == 0
    assert run_json("kv", "evict", "--tier", "ram", "--bytes", "1KiB", *at)["stores"]
    for change in ("prefetch", "release", "unpin"):
        assert run("session", change, "tea", *at).code == 0
    assert "for 90 m" in run("session", "pin", "tea", "--for", "90m", *at).stdout


def exported_and_begun_anew(deployment: Served, file: Path, history: tuple[int, ...]) -> None:
    at = ("--endpoint", deployment.endpoint)
    assert run("session", "export", "tea", file, *at).code == 0
    again = run("session", "export", "tea", file, *at)
    assert (again.code, "is there already" in again.stderr) == (1, True)
    taken = run("session", "import", "tea", file, *at)
    assert (taken.code, "'tea' already" in taken.stderr) == (1, True)
    assert run("session", "delete", "tea", "--with-kv", *at).code == 0
    gone = run("session", "show", "tea", *at)
    assert (gone.code, gone.stderr) == (1, "model1: NOT_FOUND: there is no session 'tea'\n")
    imported = run_json("session", "import", "tea", file, *at)
    assert imported["session"]["num_tokens"] == len(history)
    assert imported["refused_blobs"] == 0
    assert run_json("session", "show", "tea", *at)["kv"]["ram_tokens"] == BLOCKS_TOKENS


def takes_one_turn_at_a_time(deployment: Served) -> None:
    request = inference_pb2.GenerateRequest(
        text="x",
        session_id="long",
        stopping=inference_pb2.StoppingParams(max_tokens=300, ignore_eos=True),
    )
    with grpc.insecure_channel(deployment.endpoint) as channel:
        stream = inference_pb2_grpc.InferenceStub(channel).GenerateStream(request)
        assert next(stream).WhichOneof("frame") == "accepted"
        refused = run("generate", "x", "--session", "long", "--endpoint", deployment.endpoint)
        stream.cancel()
    assert refused.code == 1
    assert "FAILED_PRECONDITION: session 'long' is in use" in refused.stderr


def salts_are_apart(deployment: Served) -> None:
    """No block of one serves the other, and each has its own session of the name."""
    for salt in ("mine", "yours"):
        answer = turn(deployment, PROMPT, *SESSION, "--cache-salt", salt)
        assert answer["token_ids"] == generated(PROMPT)
        assert kv_tokens(answer) == {"computed_tokens": len(PROMPT)}
    again = turn(deployment, PROMPT, "--cache-salt", "mine")
    assert kv_tokens(again)["device_tokens"] == BLOCKS_TOKENS


def is_chatted(deployment: Served) -> None:
    """Lines from a pipe are turns; without a name nothing is left of them."""
    at = ("--endpoint", deployment.endpoint, "--max-tokens", "5")
    lines = run("chat", "--format", "json", *at, stdin="Once upon\n\n a time\n")
    answers = [json.loads(line) for line in lines.stdout.splitlines()]
    assert [answer["usage"]["prompt_tokens"] for answer in answers] == [10, 10 + 5 + 7]
    named = run("chat", "--session", "talk", *at, stdin="Hello")
    assert (named.code, named.stderr) == (0, "")
    names = [each["session_id"] for each in run_json("session", "list", *at[:2])["sessions"]]
    assert sorted(names) == ["talk", "tea"]
    refused = run("chat", "--session", "talk", *at, stdin="x" * 400)
    assert (refused.code, "after" in refused.stderr) == (2, True)
