"""Which actors a deployment consists of, and where each goes.

A pure function from what is wanted, how many experts the model has and which nodes there are to a
list of actors. Knows nothing of Ray, processes, addresses or what a role does.
"""

from dataclasses import dataclass
from enum import StrEnum

from cluster.config import TopologySettings


class TopologyError(Exception):
    """The wanted topology cannot be built; the message holds the numbers."""


class Role(StrEnum):
    GATEWAY = "gateway"
    ATTENTION = "attention"
    ROUTER = "router"
    EXPERT = "expert"
    KVSTORE = "kvstore"


@dataclass(frozen=True, slots=True)
class ActorSpec:
    """One actor to run. `node` counts into the nodes the topology was planned for."""

    name: str
    role: Role
    node: int
    # Of an expert replica: its group, its number within it, its experts [first, end).
    group: int = 0
    replica: int = 0
    first_expert: int = 0
    end_expert: int = 0

    @property
    def num_cpus(self) -> int:
        """Cores to reserve: a worker computes on one thread, the others only pass messages on."""
        return 1 if self.role in (Role.ATTENTION, Role.EXPERT) else 0


@dataclass(frozen=True, slots=True)
class Topology:
    num_groups: int
    actors: tuple[ActorSpec, ...]

    def of_role(self, role: Role) -> tuple[ActorSpec, ...]:
        return tuple(actor for actor in self.actors if actor.role is role)

    def router_of(self, worker: ActorSpec) -> ActorSpec:
        """The router on the worker's own node: they meet at a Unix socket."""
        return next(router for router in self.of_role(Role.ROUTER) if router.node == worker.node)

    def store_of(self, worker: ActorSpec) -> ActorSpec | None:
        """The KV store on the worker's own node: they meet in shared memory."""
        stores = (store for store in self.of_role(Role.KVSTORE) if store.node == worker.node)
        return next(stores, None)

    def missing(self, alive: frozenset[str]) -> str | None:
        """What keeps the living actors from serving, or None when every role is covered. KV stores
        are a cache: without one everything is computed."""
        if not any(actor.name in alive for actor in self.of_role(Role.GATEWAY)):
            return "no gateway is alive"
        served = [
            worker
            for worker in self.of_role(Role.ATTENTION)
            if worker.name in alive and self.router_of(worker).name in alive
        ]
        if not served:
            return "no attention worker with a router on its node is alive"
        groups = {actor.group for actor in self.of_role(Role.EXPERT) if actor.name in alive}
        if lost := sorted(set(range(self.num_groups)) - groups):
            return f"no replica of expert group {lost[0]} is alive"
        return None


def split_experts(num_experts: int, num_groups: int) -> tuple[range, ...]:
    """Contiguous ranges whose lengths differ by at most one, the longer ones first."""
    if num_groups > num_experts:
        raise TopologyError(
            f"expert_groups {num_groups} is more than the {num_experts} experts of the model"
        )
    short, longer = divmod(num_experts, num_groups)
    ends = [(group + 1) * short + min(group + 1, longer) for group in range(num_groups)]
    return tuple(range(begin, end) for begin, end in zip([0, *ends], ends, strict=False))


def plan_topology(
    wanted: TopologySettings,
    *,
    num_experts: int,
    num_nodes: int = 1,
    with_kv_stores: bool = True,
) -> Topology:
    """Attention workers over the nodes in turn, a router and a KV store where one is, expert
    replicas over the nodes in turn from the first node without an attention worker on."""
    workers = [
        ActorSpec(f"attention-{index}", Role.ATTENTION, index % num_nodes)
        for index in range(wanted.attention_workers)
    ]
    routers = [
        ActorSpec(f"router-{node}", Role.ROUTER, node)
        for node in sorted({worker.node for worker in workers})
    ]
    stores = [
        ActorSpec(f"kvstore-{router.node}", Role.KVSTORE, router.node)
        for router in routers
        if with_kv_stores
    ]
    experts: list[ActorSpec] = []
    # Replicas of one group come num_groups apart, so they share a node only if nodes are too few.
    for replica in range(wanted.expert_replicas):
        for group, owned in enumerate(split_experts(num_experts, wanted.expert_groups)):
            node = (len(workers) + len(experts)) % num_nodes
            name = f"expert-{group}-{replica}"
            experts.append(
                ActorSpec(name, Role.EXPERT, node, group, replica, owned.start, owned.stop)
            )
    gateway = ActorSpec("gateway-0", Role.GATEWAY, 0)
    return Topology(wanted.expert_groups, (gateway, *workers, *routers, *stores, *experts))
