"""Every process of a deployment is killed at once; another one goes on where it was.

kill -9 of the command, Ray, the gateway, workers, router, experts, the KV store and its Valkey.
"""

import asyncio
import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from model1.checkpoint import save_checkpoint
from protos import inference_pb2, inference_pb2_grpc
from services import rpc
from tests.e2e.command import (
    Served,
    commands,
    process_tree,
    run_json,
    served,
    wait_until_gone,
)
from tests.services import tiny_model
from tests.soak.resident import run_resident
from tests.soak.soak_model import CONFIG, SEED, soak_model
from tests.soak.traffic import Session, Turn, sessions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_SESSIONS = 200
LONGEST_TOKENS = 2048
CONCURRENT_SESSIONS = 32
BLOCK_TOKENS = 128
FLUSH_TIMEOUT_SECONDS = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("soak")
    tiny_model.write_model_dir(directory)  # for its tokenizer; the rest is written over
    model = tiny_model.random_model(CONFIG, SEED)
    save_checkpoint(directory, CONFIG, model.trunk, model.experts, model.trunk.dtype)
    return directory


def test_sessions_go_on_after_every_process_was_killed(checkpoint: Path, tmp_path: Path) -> None:
    played = list(_sessions())
    expected = run_resident(soak_model(), played).answers
    before = range(1)  # the turns before the kill; the others come after it
    flags = ("--model", checkpoint, "--kv-path", tmp_path / "kv")
    with served(*flags) as deployment:
        _play(deployment, played, before, expected)
        _wait_until_flushed(deployment)
        killed = process_tree(deployment.process.pid)
        assert commands(killed) >= {"valkey-server", "raylet", "gcs_server"}
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        deployment.process.wait()
    wait_until_gone(killed)

    start_seconds = time.monotonic()
    with served(*flags) as deployment:
        ready_seconds = time.monotonic() - start_seconds
        usage = _play(deployment, played, range(1, 2), expected)
        assert deployment.stop().code == 0
    flushed = sum(_num_blocks(session) for session in played)
    hit = sum(sum(_restored_tokens(each) for each in usages) for usages in usage) // BLOCK_TOKENS
    print(
        f"{len(killed)} processes killed, ready again after {ready_seconds:.1f} s; "
        f"{len(played)} sessions resumed with the right tokens; "
        f"{hit} of {flushed} flushed blocks hit ({hit / flushed:.2%})"
    )
    assert hit >= 0.99 * flushed


def _sessions() -> Iterator[Session]:
    """Of two turns, that share nothing and have a whole block after the first one."""
    chosen = 0
    for session in sessions(9, 0, 20 * NUM_SESSIONS, LONGEST_TOKENS):
        if chosen < NUM_SESSIONS and _num_blocks(session):
            chosen += 1
            yield Session(session.name, session.name, session.turns[:2])


def _num_blocks(session: Session) -> int:
    """Whole blocks that are computed in the first turn; its last token is not."""
    turn = session.turns[0]
    return (len(turn.prompt) + turn.max_tokens - 1) // BLOCK_TOKENS


def _play(
    deployment: Served,
    played: Sequence[Session],
    turns: range,
    expected: dict[tuple[str, int], tuple[int, ...]],
) -> list[list[inference_pb2.KvUsage]]:
    """These turns of all sessions, many at once; every answer must be the expected one."""

    async def play_all() -> list[list[inference_pb2.KvUsage]]:
        at_once = asyncio.Semaphore(CONCURRENT_SESSIONS)
        async with rpc.channel(deployment.endpoint) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)

            async def play(session: Session) -> list[inference_pb2.KvUsage]:
                usages = []
                async with at_once:
                    for turn in turns:
                        answer = await stub.Generate(_request(session, session.turns[turn]))
                        assert tuple(answer.token_ids) == expected[session.name, turn]
                        usages.append(answer.usage.kv)
                return usages

            return await asyncio.gather(*map(play, played))

    return asyncio.run(play_all())


def _request(session: Session, turn: Turn) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=turn.prompt),
        sampling=inference_pb2.SamplingParams(
            temperature=turn.temperature, top_p=turn.top_p, top_k=turn.top_k, seed=turn.seed
        ),
        stopping=inference_pb2.StoppingParams(max_tokens=turn.max_tokens, ignore_eos=True),
        session_id=session.name,
        cache_salt=session.cache_salt,
    )


def _restored_tokens(usage: inference_pb2.KvUsage) -> int:
    return (
        usage.device_tokens
        + usage.ram_tokens
        + usage.disk_tokens
        + usage.peer_tokens
        + usage.cold_tokens
    )


def _wait_until_flushed(deployment: Served) -> None:
    """Nothing waits in the store any more, and nothing new comes."""
    deadline = time.monotonic() + FLUSH_TIMEOUT_SECONDS
    seen, still = -1, 0
    while still < 3:
        assert time.monotonic() < deadline, "the store does not come to rest"
        stat = run_json("kv", "stat", "--endpoint", deployment.endpoint)["stores"][0]["stat"]
        tiers = {tier["tier"]: tier for tier in stat["tiers"]}
        waiting = sum(int(tier.get("waiting_blobs", 0)) for tier in tiers.values())
        stored = int(tiers["disk"]["blobs"])
        still = still + 1 if stored == seen and not waiting else 0
        seen = stored
