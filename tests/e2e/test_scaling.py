"""Experts come, go and die under streams that run; whoever reads the streams notices nothing."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from protos import control_pb2, control_pb2_grpc
from services import rpc
from tests.e2e.command import run, run_json, served
from tests.e2e.streams import PROMPTS, streaming
from tests.services import tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

RECOVERY_TIMEOUT_SECONDS = 60


class Operator:
    """Whoever changes the deployment, and kills its processes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._control: Any = control_pb2_grpc.ControlStub(channel)

    async def scale_experts(self, num_replicas: int) -> control_pb2.ScaleResponse:
        wanted = control_pb2.ScaleExperts(replicas=num_replicas)
        answer: control_pb2.ScaleResponse = await self._control.Scale(
            control_pb2.ScaleRequest(experts=wanted)
        )
        return answer

    async def drain(self, name: str) -> control_pb2.DrainResponse:
        answer: control_pb2.DrainResponse = await self._control.Drain(
            control_pb2.DrainRequest(actor=name)
        )
        return answer

    async def member(self, name: str) -> control_pb2.Member:
        topology = await self._control.GetTopology(control_pb2.GetTopologyRequest())
        return next(member for member in topology.members if member.name == name)

    async def pid(self, name: str) -> int:
        return (await self.member(name)).pid

    async def kill(self, name: str) -> None:
        """Returns when another process serves under that name."""
        killed = await self.pid(name)
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(RECOVERY_TIMEOUT_SECONDS):
            while True:
                try:
                    member = await self.member(name)
                except grpc.aio.AioRpcError:
                    assert name == "gateway-0"  # it was the one to ask
                    member = control_pb2.Member()
                if member.pid != killed and member.state == "ready":
                    assert member.restarts == 1
                    return
                await asyncio.sleep(0.05)


def test_streams_notice_nothing_of_experts_that_scale_and_die(tiny_checkpoint: Path) -> None:
    with served("--model", tiny_checkpoint, "--expert-groups", "2") as deployment:
        asyncio.run(_scale_and_kill(deployment.endpoint))
        assert deployment.stop().code == 0


async def _scale_and_kill(endpoint: str) -> None:
    async with rpc.channel(endpoint) as channel, streaming(channel) as streams:
        operator = Operator(channel)
        worker_pid = await operator.pid("attention-0")
        await streams.progress()
        change = await operator.scale_experts(3)
        assert sorted(change.added) == [f"expert-{g}-{n}" for g in range(2) for n in (1, 2)]
        await streams.progress()
        assert (await operator.drain("expert-1-0")).removed == ["expert-1-0"]
        assert (await operator.scale_experts(2)).removed == ["expert-0-2"]
        await operator.kill("expert-0-1")
        await streams.progress()
        change = await operator.scale_experts(1)
        assert change.removed == ["expert-0-1", "expert-1-2"]
        await streams.progress()
        # Nobody else holds these experts, and then nobody else is a way to them.
        await operator.kill("expert-0-0")
        await streams.progress()
        await operator.kill("router-0")
        await streams.progress()
        assert await operator.pid("attention-0") == worker_pid


def test_attention_workers_come_and_go_by_command(tiny_checkpoint: Path) -> None:
    prompt = ",".join(map(str, PROMPTS[0]))
    expected = tiny_model.model().generate(PROMPTS[0], 12)
    with served("--model", tiny_checkpoint) as deployment:
        at = ("--endpoint", deployment.endpoint)
        change = run_json("scale", "attention", "--replicas", "2", *at)
        assert change == {"epoch": 1, "added": ["attention-1"], "removed": []}
        drained = run_json("drain", "attention-0", *at)
        assert drained == {"epoch": 1, "added": [], "removed": ["attention-0"]}
        refused = run("drain", "attention-1", *at)
        assert (refused.code, "is the last of the attention workers" in refused.stderr) == (1, True)
        unknown = run("scale", "experts", "--replicas", "1", "--group", "7", *at)
        assert (unknown.code, "expert group 7" in unknown.stderr) == (2, True)
        asyncio.run(_kill(deployment.endpoint, "attention-1", "gateway-0"))
        answer = run_json("generate", "--token-ids", prompt, "--max-tokens", "12", *at)
        assert answer["token_ids"] == expected
        table = run("scale", "attention", "--replicas", "1", *at)
        assert table.code == 0
        assert table.stdout.startswith("nothing to change; routing epoch 1\n")
        assert deployment.stop().code == 0


async def _kill(endpoint: str, *names: str) -> None:
    async with rpc.channel(endpoint) as channel:
        for name in names:
            await Operator(channel).kill(name)
