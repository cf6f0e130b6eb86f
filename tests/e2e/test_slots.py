"""A cluster whose nodes say for how many of each role they have room, and that grows."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.e2e.command import MODEL1, ROOT, Served, run, run_json, served
from tests.services import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = tiny_model.prompt(12)
MEMORY_BYTES = 2**27


@contextmanager
def cluster(**slots: int) -> Iterator[Cluster]:
    """One node that was told of these slots."""
    arguments = {
        "num_cpus": 8,
        "resources": slots,
        "include_dashboard": False,
        "object_store_memory": MEMORY_BYTES,
    }
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        yield cluster
    finally:
        cluster.shutdown()


def experts_by_node(deployment: Served) -> dict[str, int]:
    nodes: dict[str, int] = {}
    for member in deployment.members():
        if member["role"] == "expert":
            nodes[member["node_id"]] = nodes.get(member["node_id"], 0) + 1
    return nodes


def answer(deployment: Served) -> Any:
    prompt = ",".join(map(str, PROMPT))
    flags = ("--max-tokens", "8", "--endpoint", deployment.endpoint)
    return run_json("generate", "--token-ids", prompt, *flags)["token_ids"]


def test_scaling_waits_for_a_node_with_slots_and_fails_when_none_comes(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL1_CLUSTER__SLOT_TIMEOUT_SECONDS", "10")
    with (
        cluster(attention_slot=1, expert_slot=2) as ray,
        served("--model", tiny_checkpoint, "--ray-address", ray.address) as deployment,
    ):
        scale = ("scale", "experts", "--replicas", "2", "--endpoint", deployment.endpoint)
        failed = run(*scale)
        assert failed.code == 1
        assert "ABORTED: no node had 2 more expert_slot within 10 s" in failed.stderr
        growing = subprocess.Popen([*MODEL1, *scale], stdout=subprocess.PIPE, text=True, cwd=ROOT)
        ray.add_node(num_cpus=4, resources={"expert_slot": 2}, object_store_memory=MEMORY_BYTES)
        told, _ = growing.communicate(timeout=120)
        assert growing.returncode == 0
        assert told.startswith("added expert-0-1, expert-1-1; routing epoch 2\n")
        assert sorted(experts_by_node(deployment).values()) == [2, 2]
        assert answer(deployment) == tiny_model.model().generate(PROMPT, 8)
        assert deployment.stop().code == 0


def test_a_cluster_with_too_few_slots_or_one_kind_alone_is_refused(tiny_checkpoint: Path) -> None:
    with cluster(expert_slot=3) as ray:
        serve = ("serve", "--port", "0", "--model", tiny_checkpoint, "--ray-address", ray.address)
        refused = run(*serve)
        assert (refused.code, refused.stdout) == (1, "")
        assert "has nodes with expert_slot and none with attention_slot" in refused.stderr
        ray.add_node(num_cpus=4, resources={"attention_slot": 1}, object_store_memory=MEMORY_BYTES)
        refused = run(*serve, "--expert-replicas", "2")
        assert (refused.code, refused.stdout) == (2, "")
        assert "no node has a free expert_slot, and 4 more of role expert" in refused.stderr
