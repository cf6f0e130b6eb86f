"""What can be done to a deployment on this machine: real signals to its processes, and scaling.

Which fault and whom it hits is drawn from the seed. Knows nothing of the traffic.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.chaos.plan import Fault
from cluster.client import Client, RequestFailed, Unreachable, named_failures
from cluster.topology import Role
from protos import control_pb2, control_pb2_grpc

READY = "ready"
POLL_SECONDS = 0.1
STOPPED_SECONDS = (1.0, 10.0)
SLOWED_SECONDS = 5.0
# Of each slice of time that a slowed process may use: a tenth.
SLOWED_RUNS_SECONDS, SLOWED_RESTS_SECONDS = 0.005, 0.045
REPLICAS = (1, 4)


class NotRecovered(Exception):
    """The deployment is not whole again, or not what it should be; the message says why."""


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that happened. Times in seconds on `time.monotonic`."""

    fault: Fault
    target: str
    at: float
    recovered: float  # when every member was ready again


class Injector:
    """Does faults, one after the other, and waits until the deployment is whole again."""

    def __init__(self, client: Client, *, seed: int, patience_seconds: float) -> None:
        self._client = client
        self._draw = random.Random(f"faults {seed}")
        self._patience_seconds = patience_seconds

    async def inject(self, fault: Fault) -> Injected:
        """Raises `NotRecovered`."""
        begun = time.monotonic()
        target = await self._do(fault)
        recovered = await self._whole_again()
        return Injected(fault, target, begun, recovered)

    async def _do(self, fault: Fault) -> str:
        """To whom, and how much of it."""
        match fault:
            case Fault.KILL_EXPERT:
                return await self._kill(Role.EXPERT)
            case Fault.KILL_ROUTER:
                return await self._kill(Role.ROUTER)
            case Fault.KILL_ATTENTION:
                return await self._kill(Role.ATTENTION)
            case Fault.KILL_REDIS:
                return await self._kill_redis()
            case Fault.STOP_EXPERT:
                return await self._stop_expert()
            case Fault.SLOW_EXPERT:
                return await self._slow_expert()
            case Fault.SCALE_EXPERTS:
                return await self._scale_experts()

    async def _kill(self, role: Role) -> str:
        member = await self._drawn(role)
        _signal(member.pid, signal.SIGKILL)
        return member.name

    async def _kill_redis(self) -> str:
        """The server that a KV store started: its child, which it starts again."""
        member = await self._drawn(Role.KVSTORE)
        killed = await self._child_of(member)
        _signal(killed, signal.SIGKILL)
        await self._child_of(member, other_than=killed)
        return f"{member.name}'s Redis"

    async def _child_of(self, member: control_pb2.Member, *, other_than: int = 0) -> int:
        deadline = time.monotonic() + self._patience_seconds
        while time.monotonic() < deadline:
            for pid in _children(member.pid):
                if pid != other_than:
                    return pid
            await asyncio.sleep(POLL_SECONDS)
        raise NotRecovered(
            f"{member.name} runs no Redis of its own after {self._patience_seconds:g} s"
        )

    async def _stop_expert(self) -> str:
        member = await self._drawn(Role.EXPERT)
        seconds = self._draw.uniform(*STOPPED_SECONDS)
        _signal(member.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            _signal(member.pid, signal.SIGCONT)
        return f"{member.name} for {seconds:.1f} s"

    async def _slow_expert(self) -> str:
        """A tenth of its speed, in small slices."""
        member = await self._drawn(Role.EXPERT)
        until = time.monotonic() + SLOWED_SECONDS
        while time.monotonic() < until:
            _signal(member.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(SLOWED_RESTS_SECONDS)
            finally:
                _signal(member.pid, signal.SIGCONT)
            await asyncio.sleep(SLOWED_RUNS_SECONDS)
        return member.name

    async def _scale_experts(self) -> str:
        members = await self._members(Role.EXPERT)
        group = self._draw.choice(sorted({member.expert_group for member in members}))
        now = sum(member.expert_group == group for member in members)
        replicas = self._draw.choice([n for n in range(REPLICAS[0], REPLICAS[1] + 1) if n != now])
        workers = {member.name: member.pid for member in await self._members(Role.ATTENTION)}
        wanted = control_pb2.ScaleExperts(replicas=replicas, group=group)
        with named_failures(self._client.endpoint):
            control: Any = control_pb2_grpc.ControlStub(self._client.channel)
            await control.Scale(control_pb2.ScaleRequest(experts=wanted))
        for member in await self._members(Role.ATTENTION):
            if member.pid != workers.get(member.name):
                raise NotRecovered(f"scaling experts replaced {member.name}")
        return f"group {group}: {now} to {replicas}"

    async def _drawn(self, role: Role) -> control_pb2.Member:
        return self._draw.choice(await self._members(role))

    async def _members(self, role: Role) -> Sequence[control_pb2.Member]:
        """By name, those that are ready."""
        topology = await self._client.topology()
        found = [each for each in topology.members if each.role == role and each.state == READY]
        if not found:
            raise NotRecovered(f"no {role} is ready")
        return sorted(found, key=lambda member: member.name)

    async def _whole_again(self) -> float:
        """Every member lives and is ready; the time at which that was seen."""
        deadline = time.monotonic() + self._patience_seconds
        why = ""
        while time.monotonic() < deadline:
            try:
                topology = await self._client.topology()
            except (Unreachable, RequestFailed) as error:
                why = str(error)
            else:
                missing = [each for each in topology.members if not _is_whole(each)]
                if not missing:
                    return time.monotonic()
                why = ", ".join(f"{each.name} is {each.state}" for each in missing)
            await asyncio.sleep(POLL_SECONDS)
        raise NotRecovered(f"not whole again after {self._patience_seconds:g} s: {why}")


def _is_whole(member: control_pb2.Member) -> bool:
    """Ready, and so is its process: a death is not noticed at once."""
    return member.state == READY and Path(f"/proc/{member.pid}").exists()


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            yield from map(int, (task / "children").read_text().split())


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have died meanwhile
        os.kill(pid, number)
