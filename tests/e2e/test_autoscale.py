"""A deployment that scales by itself: with the load up, without it down again."""

import asyncio
import json
from pathlib import Path

import pytest

from cluster.access import Access
from cluster.client import Client, connected
from protos import control_pb2
from tests.e2e.command import run, served
from tests.e2e.streams import streaming

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Another process of Ray starts meanwhile, beside those that compute.
CHANGE_TIMEOUT_SECONDS = 90
# Replicas of a tiny model are never busy by the usual measure; nor does a test have minutes.
SETTINGS = {
    "autoscale": {
        "enabled": True,
        "interval_seconds": 0.5,
        "experts": {
            "max_replicas": 2,
            "busy_share": 0.02,
            "queue_seconds": 10,
            "up_after_seconds": 1,
            "down_after_seconds": 3,
        },
        "attention": {"max_replicas": 1},
    }
}


def test_experts_become_more_under_load_and_fewer_when_it_is_over(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = tmp_path / "model1.yaml"
    config.write_text(json.dumps(SETTINGS))
    with served("--model", tiny_checkpoint, "--config", config) as deployment:
        asyncio.run(_load_comes_and_goes(deployment.endpoint))
        at = ("--endpoint", deployment.endpoint)
        refused = run("scale", "experts", "--replicas", "3", *at)
        assert (refused.code, "3 would not last" in refused.stderr) == (1, True)
        assert "2 -> 1: 0% busy (aim 2%)" in run("status", *at).stdout
        assert deployment.stop().code == 0


async def _load_comes_and_goes(endpoint: str) -> None:
    async with connected(Access(endpoint)) as client:
        before = await client.topology()
        assert _replicas(before) == [1, 1]
        async with streaming(client.channel) as streams:  # looks at every token
            await _until_replicas(client, [2, 2])
            await streams.progress()
        await _until_replicas(client, [1, 1])
        after = await client.topology()
        reasons = [each.last_change for each in after.autoscaled if each.role == "expert"]
        assert [reason[:7] for reason in reasons] == ["2 -> 1:"] * 2
        assert _worker(after).pid == _worker(before).pid


async def _until_replicas(client: Client, wanted: list[int]) -> None:
    async with asyncio.timeout(CHANGE_TIMEOUT_SECONDS):
        while _replicas(await client.topology()) != wanted:  # noqa: ASYNC110 nobody tells of it
            await asyncio.sleep(0.2)


def _replicas(topology: control_pb2.GetTopologyResponse) -> list[int]:
    """Of each group, those that are ready."""
    ready = [0, 0]
    for member in topology.members:
        if member.role == "expert" and member.state == "ready":
            ready[member.expert_group] += 1
    return ready


def _worker(topology: control_pb2.GetTopologyResponse) -> control_pb2.Member:
    return next(member for member in topology.members if member.role == "attention")
