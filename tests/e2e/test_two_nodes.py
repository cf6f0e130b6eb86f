"""A deployment over two nodes, that is two raylets: one node's KV serves the other's worker."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

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


def kill(deployment: Served, name: str) -> None:
    [pid] = [member["pid"] for member in deployment.members() if member["name"] == name]
    os.kill(pid, signal.SIGKILL)


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
        [listed] = run_json("session", "list", "--endpoint", deployment.endpoint)["sessions"]
        assert listed["worker"] == "attention-0"
        kill(deployment, "attention-0")
        # Whoever asks first is told that the worker is gone; the session is none the worse for it.
        refused = run(
            *("generate", "x", *SESSION, "--endpoint", deployment.endpoint), *("--max-tokens", "1")
        )
        assert (refused.code, "attention-0" in refused.stderr) == (3, True)
        second = turn(deployment, (5,), *SESSION)
        assert second["token_ids"] == generated(history)
        came_from = kv_tokens(second)
        assert came_from.pop("computed_tokens") == len(history) - BLOCKS_TOKENS
        assert came_from == {"peer_tokens": BLOCKS_TOKENS}
        assert deployment.stop().code == 0
