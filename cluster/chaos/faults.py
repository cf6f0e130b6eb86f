"""What can be done to a deployment on this machine: real signals to its processes, and scaling.

Which fault and whom it hits is drawn from the seed. Knows nothing of the traffic.
"""

import asyncio
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.chaos.nodes import LocalNodes, children, send
from cluster.chaos.plan import HELD_SECONDS, NODE_FAULTS, Fault
from cluster.client import Client, RequestFailed, Unreachable, named_failures
from cluster.topology import Role
from protos import control_pb2, control_pb2_grpc

READY = "ready"
POLL_SECONDS = 0.1
STOPPED_SECONDS = (1.0, 10.0)
SLOWED_SECONDS = 15.0
# Of each slice of time that a slowed process may use: a tenth.
SLOWED_RUNS_SECONDS, SLOWED_RESTS_SECONDS = 0.005, 0.045
MIN_REPLICAS, MAX_REPLICAS = 1, 4
# For what a node still has to say that was frozen and goes on.
THAWED_SECONDS = 3.0


class NotRecovered(Exception):
    """The deployment is not whole again, or not what it should be; the message says why."""


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that happened. Times in seconds on `time.monotonic`."""

    fault: Fault
    target: str
    at: float
    # When it was over; of a node: when nobody counted on it any more.
    ended: float
    recovered: float  # when every member was ready again


class Injector:
    """Does faults, one after the other, and waits until the deployment is whole again."""

    def __init__(
        self, client: Client, nodes: LocalNodes | None, *, seed: int, patience_seconds: float
    ) -> None:
        self._client = client
        self._nodes = nodes
        self._control: Any = control_pb2_grpc.ControlStub(client.channel)
        self._grows: dict[int, bool] = {}  # expert groups
        self._draw = random.Random(f"faults {seed}")
        self._patience_seconds = patience_seconds

    async def inject(self, fault: Fault) -> Injected:
        """Raises `NotRecovered`."""
        if fault in NODE_FAULTS:
            return await self._lose_node(fault)
        if fault is Fault.HOLD_EXPERT_DEAD:
            return await self._hold_expert_dead()
        begun = time.monotonic()
        target = await self._do(fault)
        ended = time.monotonic()
        recovered = await self._until_whole(_is_whole)
        return Injected(fault, target, begun, ended, recovered)

    async def _do(self, fault: Fault) -> str:
        """To whom, and how much of it."""
        match fault:
            case Fault.KILL_EXPERT:
                return await self._kill(Role.EXPERT)
            case Fault.KILL_ROUTER:
                return await self._kill(Role.ROUTER)
            case Fault.KILL_ATTENTION:
                return await self._kill(Role.ATTENTION)
            case Fault.KILL_STORE:
                return await self._kill(Role.KVSTORE)
            case Fault.KILL_REDIS:
                return await self._kill_redis()
            case Fault.STOP_EXPERT:
                return await self._stop_expert()
            case Fault.SLOW_EXPERT:
                return await self._slow_expert()
            case Fault.SCALE_EXPERTS:
                return await self._scale_experts()
            case _:
                raise AssertionError(fault)

    async def _kill(self, role: Role) -> str:
        member = await self._drawn(role)
        send(member.pid, signal.SIGKILL)
        return member.name

    async def _kill_redis(self) -> str:
        """The server that a KV store started: its child, which it starts again."""
        member = await self._drawn(Role.KVSTORE)
        killed = await self._child_of(member)
        send(killed, signal.SIGKILL)
        await self._child_of(member, other_than=killed)
        return f"{member.name}'s Redis"

    async def _child_of(self, member: control_pb2.Member, *, other_than: int = 0) -> int:
        deadline = time.monotonic() + self._patience_seconds
        while time.monotonic() < deadline:
            for pid in children(member.pid):
                if pid != other_than:
                    return pid
            await asyncio.sleep(POLL_SECONDS)
        raise NotRecovered(
            f"{member.name} runs no Redis of its own after {self._patience_seconds:g} s"
        )

    async def _stop_expert(self) -> str:
        member = await self._drawn(Role.EXPERT)
        seconds = self._draw.uniform(*STOPPED_SECONDS)
        send(member.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            send(member.pid, signal.SIGCONT)
        return f"{member.name} for {seconds:.1f} s"

    async def _slow_expert(self) -> str:
        """A tenth of its speed, in small slices."""
        member = await self._drawn(Role.EXPERT)
        until = time.monotonic() + SLOWED_SECONDS
        while time.monotonic() < until:
            send(member.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(SLOWED_RESTS_SECONDS)
            finally:
                send(member.pid, signal.SIGCONT)
            await asyncio.sleep(SLOWED_RUNS_SECONDS)
        return member.name

    async def _scale_experts(self) -> str:
        """One step of a group's way from one replica to four and back."""
        members = await self._members(Role.EXPERT)
        group = self._draw.choice(sorted({member.expert_group for member in members}))
        now = sum(member.expert_group == group for member in members)
        if now in (MIN_REPLICAS, MAX_REPLICAS):
            self._grows[group] = now == MIN_REPLICAS
        replicas = now + 1 if self._grows.setdefault(group, True) else now - 1
        workers = {member.name: member.pid for member in await self._members(Role.ATTENTION)}
        await self._scale(group, replicas)
        for member in await self._members(Role.ATTENTION):
            if member.pid != workers.get(member.name):
                raise NotRecovered(f"scaling experts replaced {member.name}")
        return f"group {group}: {now} to {replicas}"

    async def _scale(self, group: int, replicas: int) -> None:
        wanted = control_pb2.ScaleExperts(replicas=replicas, group=group)
        with named_failures(self._client.endpoint):
            await self._control.Scale(control_pb2.ScaleRequest(experts=wanted))

    async def _hold_expert_dead(self) -> Injected:
        """Killed, and then taken out, or the supervisor would start it again at once. As long
        before that nothing happens."""
        await asyncio.sleep(HELD_SECONDS)
        experts = await self._members(Role.EXPERT)
        member = self._draw.choice(experts)
        begun = time.monotonic()
        send(member.pid, signal.SIGKILL)
        with named_failures(self._client.endpoint):
            await self._control.Drain(control_pb2.DrainRequest(actor=member.name))
        await asyncio.sleep(begun + HELD_SECONDS - time.monotonic())
        ended = time.monotonic()
        alike = sum(each.expert_group == member.expert_group for each in experts)
        await self._scale(member.expert_group, alike)
        return Injected(
            Fault.HOLD_EXPERT_DEAD, member.name, begun, ended, await self._until_whole(_is_whole)
        )

    async def _drawn(self, role: Role) -> control_pb2.Member:
        return self._draw.choice(await self._members(role))

    async def _members(self, role: Role) -> Sequence[control_pb2.Member]:
        """By name, those that are ready."""
        topology = await self._client.topology()
        found = [each for each in topology.members if each.role == role and each.state == READY]
        if not found:
            raise NotRecovered(f"no {role} is ready")
        return sorted(found, key=lambda member: member.name)

    async def _lose_node(self, fault: Fault) -> Injected:
        """One that computes, and not the first: gateway, supervisor and this command are there."""
        if self._nodes is None:
            raise NotRecovered(f"{fault} needs more than one node")
        own = {member.node_id for member in await self._members(Role.GATEWAY)}
        computing = [*await self._members(Role.EXPERT), *await self._members(Role.ATTENTION)]
        node_id = self._draw.choice(sorted({member.node_id for member in computing} - own))
        begun = time.monotonic()
        if fault is Fault.KILL_NODE:
            self._nodes.kill(node_id)
        else:
            self._nodes.freeze(node_id)
        try:
            noticed = await self._until_whole(lambda member: _has_left(member, node_id))
            recovered = await self._until_whole(lambda member: _computes_again(member, node_id))
        finally:
            self._nodes.thaw()
        await asyncio.sleep(THAWED_SECONDS)
        await asyncio.to_thread(self._nodes.replace, node_id)
        return Injected(fault, f"node {node_id[:6]}", begun, noticed, recovered)

    async def _until_whole(self, is_so: Callable[[control_pb2.Member], bool]) -> float:
        """It is so of every member; the time at which that was seen."""
        deadline = time.monotonic() + self._patience_seconds
        why = ""
        while time.monotonic() < deadline:
            try:
                topology = await self._client.topology()
            except (Unreachable, RequestFailed) as error:
                why = str(error)
            else:
                missing = [each for each in topology.members if not is_so(each)]
                if not missing:
                    return time.monotonic()
                why = ", ".join(f"{each.name} is {each.state}" for each in missing)
            await asyncio.sleep(POLL_SECONDS)
        raise NotRecovered(f"not whole again after {self._patience_seconds:g} s: {why}")


def _is_whole(member: control_pb2.Member) -> bool:
    """Ready, and so is its process: a death is not noticed at once."""
    return member.state == READY and Path(f"/proc/{member.pid}").exists()


def _has_left(member: control_pb2.Member, node_id: str) -> bool:
    return member.node_id != node_id or member.state != READY


def _computes_again(member: control_pb2.Member, node_id: str) -> bool:
    """Routers and KV stores wait for their node."""
    waits = member.role in (Role.ROUTER, Role.KVSTORE)
    return waits or (member.state == READY and member.node_id != node_id)
