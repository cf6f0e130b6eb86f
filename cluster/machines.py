"""The nodes of the Ray cluster while a deployment runs: their numbers, their room, and what Ray is
asked for an actor. Decides nothing: which node an actor belongs to is topology.py's.
"""

import asyncio
import logging
import time
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.members import ChangeFailed
from cluster.ray_session import Hosts, Node, living_nodes
from cluster.topology import SLOTS, ActorSpec, Role, Room

log = logging.getLogger(__name__)

# After a node fell silent. With Ray's defaults it is a minute before Ray agrees; a node that Ray
# still knows after that was cut off only for a moment.
DISTRUSTED_SECONDS = 90.0


class RayMachines:
    def __init__(self, hosts: Hosts, slot_timeout_seconds: float) -> None:
        self._hosts = hosts
        self._slot_timeout_seconds = slot_timeout_seconds
        self._distrusted_until: dict[str, float] = {}  # by id, on the monotonic clock
        self._closed: set[str] = set()  # ids

    def number_of(self, node_id: str) -> int | None:
        """None of a node that this does not know."""
        ids = [node.node_id for node in self._hosts.nodes]
        return ids.index(node_id) if node_id in ids else None

    def node(self, number: int) -> Node:
        return self._hosts.nodes[number]

    async def rooms(self) -> tuple[Room, ...]:
        """As they are now. A node keeps its number; new ones come last."""
        if self._hosts.are_ours_alone:
            first = self._hosts.nodes[0]
            is_alive = first.node_id not in self._closed
            return tuple(replace(room, is_alive=is_alive) for room in self._hosts.rooms)
        living = {node.node_id: node for node in await asyncio.to_thread(living_nodes)}
        known = {node.node_id for node in self._hosts.nodes}
        new = (node for node_id, node in living.items() if node_id not in known)
        self._hosts = replace(self._hosts, nodes=(*self._hosts.nodes, *new))
        return tuple(
            replace(room, is_alive=node.node_id in living and self._is_open(node.node_id))
            for room, node in zip(self._hosts.rooms, self._hosts.nodes, strict=True)
        )

    def lose(self, node: int) -> None:
        until = time.monotonic() + DISTRUSTED_SECONDS
        self._distrusted_until[self.node(node).node_id] = until

    def _is_open(self, node_id: str) -> bool:
        is_trusted = self._distrusted_until.get(node_id, 0.0) <= time.monotonic()
        return is_trusted and node_id not in self._closed

    async def close(self, node: str) -> frozenset[int]:
        """A pod that comes back has another node's id, if the same address."""
        await self.rooms()
        numbers = frozenset(
            number
            for number, each in enumerate(self._hosts.nodes)
            if node in (each.node_id, each.place.bind_host)
        )
        self._closed |= {self.node(number).node_id for number in numbers}
        return numbers

    async def wait_for_slots(self, role: Role, num_slots: int) -> None:
        """Until so many are free. That somebody waits for them is what an autoscaler acts on.
        Raises `ChangeFailed`."""
        cores, slots = self._asked(role)
        log.info("waiting_for_slots resource=%s num=%d", SLOTS[role], num_slots)
        group = ray.util.placement_group([{"CPU": cores, **slots}] * num_slots)
        try:
            async with asyncio.timeout(self._slot_timeout_seconds):
                await group.ready()
        except TimeoutError:
            raise ChangeFailed(
                f"no node had {num_slots} more {SLOTS[role]} within "
                f"{self._slot_timeout_seconds:g} s; nothing has changed"
            ) from None
        finally:
            ray.util.remove_placement_group(group)

    def options(self, spec: ActorSpec) -> dict[str, Any]:
        """What Ray is asked for an actor."""
        cores, slots = self._asked(spec.role)
        on = on_node(self.node(spec.node))
        return {"num_cpus": cores, "resources": slots, "scheduling_strategy": on}

    def _asked(self, role: Role) -> tuple[int, dict[str, float]]:
        """Cores and slots: for who computes, which takes a thread; the others pass messages on."""
        if role not in SLOTS:
            return 0, {}
        cores = 0 if self._hosts.are_ours_alone else 1
        return cores, {SLOTS[role]: 1} if self._hosts.have_slots else {}


def on_node(node: Node) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node.node_id, soft=False)
