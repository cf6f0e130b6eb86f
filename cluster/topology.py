"""Which actors a deployment consists of, and where each goes.

Pure functions from what is wanted, how many experts the model has and what the nodes have room for
to a list of actors, and from one such list to a longer or a shorter one. Knows nothing of Ray,
processes, addresses or what a role does.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import count

from cluster.config import TopologySettings


class TopologyError(Exception):
    """The wanted topology cannot be built; the message holds the numbers."""


class Role(StrEnum):
    GATEWAY = "gateway"
    ATTENTION = "attention"
    ROUTER = "router"
    EXPERT = "expert"
    KVSTORE = "kvstore"


# The custom resources of Ray by which a node says for how many of a role it has room, and by which
# an autoscaler knows which nodes are wanted.
SLOTS = {Role.ATTENTION: "attention_slot", Role.EXPERT: "expert_slot"}


class NoFreeSlot(TopologyError):
    """No living node has room for another actor of the role."""

    def __init__(self, role: Role, num_wanted: int) -> None:
        super().__init__(
            f"no node has a free {SLOTS[role]}, and {num_wanted} more of role {role} are wanted"
        )
        self.role = role
        self.num_wanted = num_wanted


@dataclass(frozen=True, slots=True)
class ActorSpec:
    """One actor to run. `node` counts into the nodes the topology was planned for."""

    name: str
    role: Role
    node: int
    # Of an expert replica: its group, its number within it, and the experts that it is to hold,
    # ascending: at first those of its group.
    group: int = 0
    replica: int = 0
    experts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Room:
    """What a node has room for in all. `slots` of None: as many as are wanted."""

    is_alive: bool = True  # and takes more
    slots: Mapping[Role, int] | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    experts_of_group: tuple[range, ...]
    actors: tuple[ActorSpec, ...]
    with_kv_stores: bool = field(default=True, kw_only=True)
    with_gateways: bool = field(default=False, kw_only=True)  # on each node with workers

    @property
    def num_groups(self) -> int:
        return len(self.experts_of_group)

    @property
    def num_experts(self) -> int:
        return self.experts_of_group[-1].stop

    def of_role(self, role: Role) -> tuple[ActorSpec, ...]:
        return tuple(actor for actor in self.actors if actor.role is role)

    def replicas_of(self, group: int) -> tuple[ActorSpec, ...]:
        return tuple(actor for actor in self.of_role(Role.EXPERT) if actor.group == group)

    def named(self, name: str) -> ActorSpec | None:
        return next((actor for actor in self.actors if actor.name == name), None)

    def with_actors(self, more: Iterable[ActorSpec]) -> "Topology":
        return replace(self, actors=(*self.actors, *more))

    def with_changed(self, spec: ActorSpec) -> "Topology":
        actors = tuple(spec if actor.name == spec.name else actor for actor in self.actors)
        return replace(self, actors=actors)

    def without(self, names: Collection[str]) -> "Topology":
        return replace(self, actors=tuple(a for a in self.actors if a.name not in names))

    def router_of(self, worker: ActorSpec) -> ActorSpec:
        """The router on the worker's own node: they meet at a Unix socket."""
        return next(router for router in self.of_role(Role.ROUTER) if router.node == worker.node)

    def store_of(self, worker: ActorSpec) -> ActorSpec | None:
        """The KV store on the worker's own node: they meet in shared memory."""
        stores = (store for store in self.of_role(Role.KVSTORE) if store.node == worker.node)
        return next(stores, None)

    def missing(self, alive: Collection[str]) -> str | None:
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
        living = [actor for actor in self.of_role(Role.EXPERT) if actor.name in alive]
        held = {expert for actor in living for expert in actor.experts}
        for group, owned in enumerate(self.experts_of_group):
            if lost := [expert for expert in owned if expert not in held]:
                if any(actor.group == group for actor in living):
                    return f"no living replica holds expert {lost[0]}"
                return f"no replica of expert group {group} is alive"
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


def empty_topology(
    wanted: TopologySettings, *, num_experts: int, with_kv_stores: bool = True
) -> Topology:
    """Nobody is there yet."""
    return Topology(
        split_experts(num_experts, wanted.expert_groups),
        (),
        with_kv_stores=with_kv_stores,
        with_gateways=wanted.gateways == "per_node",
    )


def plan_topology(
    wanted: TopologySettings,
    *,
    num_experts: int,
    rooms: Sequence[Room] = (Room(),),
    with_kv_stores: bool = True,
) -> Topology:
    """One gateway, unless each node with workers has one, and the rest as `with_workers` and
    `with_replicas` place them."""
    topology = empty_topology(wanted, num_experts=num_experts, with_kv_stores=with_kv_stores)
    topology = with_workers(topology, wanted.attention_workers, rooms)
    groups = range(wanted.expert_groups)
    return with_replicas(topology, wanted.expert_replicas, groups, rooms)


def with_workers(topology: Topology, num_workers: int, rooms: Sequence[Room]) -> Topology:
    """Attention workers added until there are so many, where the fewest are; a router, a KV store
    and, where each node has its own, a gateway on every node that has a worker. Raises
    `NoFreeSlot`."""
    if not topology.with_gateways and not topology.of_role(Role.GATEWAY):
        first = next((node for node, room in enumerate(rooms) if room.is_alive), 0)
        topology = _on_each(topology, Role.GATEWAY, [first])
    num_wanted = num_workers - len(topology.of_role(Role.ATTENTION))
    for _ in range(num_wanted):
        topology = topology.with_actors((_another_worker(topology, rooms, num_wanted),))
    return with_companions(topology)


def with_companions(topology: Topology) -> Topology:
    """A router, a KV store and, where each node has its own, a gateway on every node that has a
    worker."""
    nodes = sorted({worker.node for worker in topology.of_role(Role.ATTENTION)})
    topology = _on_each(topology, Role.ROUTER, nodes)
    if topology.with_kv_stores:
        topology = _on_each(topology, Role.KVSTORE, nodes)
    return _on_each(topology, Role.GATEWAY, nodes) if topology.with_gateways else topology


def with_replicas(
    topology: Topology, num_replicas: int, groups: Iterable[int], rooms: Sequence[Room]
) -> Topology:
    """Expert replicas added until each of the groups has so many. Raises `NoFreeSlot`.

    Replicas of one group share a node only if nodes are too few; otherwise each goes where the
    fewest actors compute.
    """
    groups = tuple(groups)
    num_wanted = sum(max(0, num_replicas - len(topology.replicas_of(g))) for g in groups)
    for num_there in range(num_replicas):
        for group in groups:
            if len(topology.replicas_of(group)) <= num_there:
                topology = topology.with_actors(
                    (_another_replica(topology, group, rooms, num_wanted),)
                )
    return topology


def elsewhere(topology: Topology, actor: ActorSpec, rooms: Sequence[Room]) -> ActorSpec:
    """The same replica or attention worker where there is room for it now. Raises `NoFreeSlot`."""
    others = topology.without((actor.name,))
    if actor.role is Role.ATTENTION:
        return replace(actor, node=_node_of_worker(others, rooms, num_wanted=1))
    return replace(actor, node=_node_of_replica(others, actor.group, rooms, num_wanted=1))


def with_replacements(
    topology: Topology,
    leaving: Iterable[ActorSpec],
    rooms: Sequence[Room],
    indispensable: Collection[str] = (),
) -> Topology:
    """One more of its kind for each of these who compute, as far as there is room. Raises
    `NoFreeSlot` for one that is indispensable."""
    for spec in leaving:
        try:
            match spec.role:
                case Role.ATTENTION:
                    num_workers = len(topology.of_role(Role.ATTENTION)) + 1
                    topology = with_workers(topology, num_workers, rooms)
                case Role.EXPERT:
                    num_replicas = len(topology.replicas_of(spec.group)) + 1
                    topology = with_replicas(topology, num_replicas, (spec.group,), rooms)
        except NoFreeSlot:
            if spec.name in indispensable:
                raise
    return topology


def surplus(
    actors: Sequence[ActorSpec], num_wanted: int, alive: Collection[str]
) -> tuple[ActorSpec, ...]:
    """Which of these are to go for so many to be left: the dead first, then the last to come."""
    # A topology lists actors in the order in which they came; sorting keeps that of equals.
    ranked = sorted(reversed(actors), key=lambda actor: actor.name in alive)
    return tuple(ranked[: max(0, len(actors) - num_wanted)])


def _on_each(topology: Topology, role: Role, nodes: Iterable[int]) -> Topology:
    """One of the role on each of these nodes, called like its node where that name is free."""
    has_one = {actor.node for actor in topology.of_role(role)}
    for node in nodes:
        if node not in has_one:
            name = _free_name(topology, role, first=node)
            topology = topology.with_actors((ActorSpec(name, role, node),))
    return topology


def _free_name(topology: Topology, role: Role, first: int = 0) -> str:
    return next(name for n in count(first) if topology.named(name := f"{role}-{n}") is None)


def _another_worker(topology: Topology, rooms: Sequence[Room], num_wanted: int) -> ActorSpec:
    node = _node_of_worker(topology, rooms, num_wanted)
    return ActorSpec(_free_name(topology, Role.ATTENTION), Role.ATTENTION, node)


def _node_of_worker(topology: Topology, rooms: Sequence[Room], num_wanted: int) -> int:
    def crowd(node: int) -> tuple[int, ...]:
        return (sum(worker.node == node for worker in topology.of_role(Role.ATTENTION)),)

    return _least_crowded(crowd, Role.ATTENTION, topology.actors, rooms, num_wanted)


def _another_replica(
    topology: Topology, group: int, rooms: Sequence[Room], num_wanted: int
) -> ActorSpec:
    taken = {actor.replica for actor in topology.replicas_of(group)}
    number = next(number for number in count() if number not in taken)
    owned = topology.experts_of_group[group]
    return ActorSpec(
        f"expert-{group}-{number}",
        Role.EXPERT,
        _node_of_replica(topology, group, rooms, num_wanted),
        group,
        number,
        tuple(owned),
    )


def _node_of_replica(topology: Topology, group: int, rooms: Sequence[Room], num_wanted: int) -> int:
    def crowd(node: int) -> tuple[int, ...]:
        same = sum(actor.node == node for actor in topology.replicas_of(group))
        return same, sum(actor.node == node for actor in topology.actors if actor.role in SLOTS)

    return _least_crowded(crowd, Role.EXPERT, topology.actors, rooms, num_wanted)


def _least_crowded(
    crowd: Callable[[int], tuple[int, ...]],
    role: Role,
    actors: Sequence[ActorSpec],
    rooms: Sequence[Room],
    num_wanted: int,
) -> int:
    """The living node with a free slot where `crowd` is least; the first of equals."""
    free = [
        node
        for node, room in enumerate(rooms)
        if room.is_alive
        and (
            room.slots is None
            or sum(a.role is role and a.node == node for a in actors) < room.slots.get(role, 0)
        )
    ]
    if not free:
        raise NoFreeSlot(role, num_wanted)
    return min(free, key=crowd)
