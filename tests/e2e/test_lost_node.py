"""A node of two is lost, dead or silent: streams go on, and who computed there moves."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.chaos.nodes import LocalNodes, local_nodes
from protos import control_pb2
from services import rpc
from tests.e2e.command import served
from tests.e2e.streams import streaming
from tests.e2e.test_scaling import Operator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Five until the node counts as lost, the rest for processes that start on a busy machine.
MOVED_SECONDS = 120


@pytest.fixture
def nodes() -> Iterator[LocalNodes]:
    with local_nodes(2) as found:
        yield found


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_streams_go_on_without_a_node(tiny_checkpoint: Path, nodes: LocalNodes, how: str) -> None:
    flags = ("--model", tiny_checkpoint, "--ray-address", nodes.address)
    more = ("--attention-workers", "2", "--expert-replicas", "2")
    with served(*flags, *more) as deployment:
        asyncio.run(_lose(deployment.endpoint, nodes, how))
        assert deployment.stop().code == 0


async def _lose(endpoint: str, nodes: LocalNodes, how: str) -> None:
    async with rpc.channel(endpoint) as channel, streaming(channel) as streams:
        operator = Operator(channel)
        await streams.progress()
        here = (await operator.member("gateway-0")).node_id
        there = (await operator.member("attention-1")).node_id
        assert (await operator.member("expert-0-1")).node_id == there != here
        if how == "frozen":
            nodes.freeze(there)
        else:
            nodes.kill(there)
        since = time.monotonic()
        await _until_on(operator, here, "attention-1", "expert-0-1")
        print(f"moved after {time.monotonic() - since:.1f} s")
        await streams.progress()


async def _until_on(operator: Operator, node_id: str, *names: str) -> None:
    async with asyncio.timeout(MOVED_SECONDS):
        while True:
            members = [await operator.member(name) for name in names]
            if all(_serves_on(member, node_id) for member in members):
                return
            await asyncio.sleep(0.1)


def _serves_on(member: control_pb2.Member, node_id: str) -> bool:
    return member.node_id == node_id and member.state == "ready"
