"""A deployment over two nodes, that is two raylets: one node's KV serves the other's worker."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from services.kvstore.valkey import EmbeddedValkey
from tests.e2e.command import Served, run, run_json, served
from tests.e2e.turns import BLOCKS_TOKENS, PROMPT, SESSION, generated, kv_tokens, turn

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def ray_address() -> Iterator[str]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 8, "include_dashboard": False, "object_store_memory": 2**27},
    )
    try:
        cluster.add_node(num_cpus=8, object_store_memory=2**27)
        yield cluster.address
    finally:
        cluster.shutdown()


def kill(deployment: Served, *names: str) -> None:
    pids = [member["pid"] for member in deployment.members() if member["name"] in names]
    assert len(pids) == len(names)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def drain(deployment: Served, name: str) -> None:
    """Its node goes on, and it does not come back there."""
    drained = run_json("drain", name, "--endpoint", deployment.endpoint)
    assert drained["removed"] == [name]


def test_a_session_goes_on_at_another_node(tiny_checkpoint: Path, ray_address: str) -> None:
    flags = ("--model", tiny_checkpoint, "--attention-workers", "2", "--ray-address", ray_address)
    with served(*flags) as deployment:
        members = deployment.members()
        nodes = {member["name"]: member["node_id"] for member in members}
        assert nodes["attention-0"] == nodes["kvstore-0"] == nodes["router-0"]
        assert nodes["attention-1"] == nodes["kvstore-1"] == nodes["router-1"]
        assert nodes["attention-0"] != nodes["attention-1"]

        first = turn(deployment, PROMPT, *SESSION)
        history = (*PROMPT, *first["token_ids"], 5)
        wait_until_stored(deployment, "ram")
        [listed] = run_json("session", "list", "--endpoint", deployment.endpoint)["sessions"]
        assert listed["worker"] == "attention-0"
        drain(deployment, "attention-0")
        second = turn(deployment, (5,), *SESSION)
        assert second["token_ids"] == generated(history)
        came_from = kv_tokens(second)
        assert came_from.pop("computed_tokens") == len(history) - BLOCKS_TOKENS
        assert came_from == {"peer_tokens": BLOCKS_TOKENS}
        assert deployment.stop().code == 0


def test_a_session_goes_on_from_redis_when_its_node_is_dead(
    tiny_checkpoint: Path, ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis = EmbeddedValkey(tmp_path, max_bytes=2**24)  # somebody else's, as far as anybody knows
    monkeypatch.setenv("MODEL1_KV__REDIS", redis.url)
    monkeypatch.setenv("MODEL1_KV__REDIS_PASSWORD", redis.password)
    flags = ("--model", tiny_checkpoint, "--attention-workers", "2", "--ray-address", ray_address)
    try:
        with served(*flags) as deployment:
            first = turn(deployment, PROMPT, *SESSION)
            history = (*PROMPT, *first["token_ids"], 5)
            wait_until_stored(deployment, "cold")
            drain(deployment, "attention-0")
            kill(deployment, "kvstore-0")
            second = turn(deployment, (5,), *SESSION)
            assert second["token_ids"] == generated(history)
            came_from = kv_tokens(second)
            assert came_from.pop("computed_tokens") == len(history) - BLOCKS_TOKENS
            assert came_from == {"cold_tokens": BLOCKS_TOKENS}
            told = run("status", "--endpoint", deployment.endpoint).stdout
            assert "KV store kvstore-0: " in told
            assert deployment.stop().code == 0
    finally:
        redis.stop()


def wait_until_stored(deployment: Served, name: str) -> None:
    """Two blocks, and what resuming after them needs, in some store's tier of that name."""
    deadline = time.monotonic() + 60
    while True:
        stores = run_json("kv", "stat", "--endpoint", deployment.endpoint)["stores"]
        tiers = [tier for store in stores for tier in store["stat"]["tiers"]]
        if sum(tier["stored_blobs"] for tier in tiers if tier["tier"] == name) >= 3:
            return
        assert time.monotonic() < deadline, tiers
        time.sleep(0.2)
