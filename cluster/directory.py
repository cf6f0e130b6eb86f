"""Who is told what of whom: a deployment's members as each of them needs to know the others.

Pure: a topology, its members and an epoch in, `Peers` out. Knows neither when they are told nor
how.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.members import Member, MemberState, Peers, Redis, WorkerPlace
from cluster.topology import ActorSpec, Role, Topology


@dataclass(frozen=True, slots=True)
class Directory:
    topology: Topology
    members: Mapping[str, Member]
    epoch: int
    redis: Redis | None

    def peers_of(self, spec: ActorSpec) -> Peers:
        match spec.role:
            case Role.ROUTER:
                return Peers(replicas_of_expert=self._replicas_of_expert(), epoch=self.epoch)
            case Role.ATTENTION:
                store = self.topology.store_of(spec)
                return Peers(
                    router_address=self._address(self.topology.router_of(spec)),
                    store_address=self._address(store) if store else "",
                )
            case Role.GATEWAY:
                workers = self._ready(Role.ATTENTION)
                return Peers(
                    worker_addresses=tuple(self._place(worker) for worker in workers),
                    lost_workers=self._lost_workers(),
                    store_addresses=self._store_addresses(),
                )
            case Role.KVSTORE:
                others = tuple(row for row in self._store_addresses() if row[0] != spec.name)
                return Peers(store_addresses=others, redis=self.redis)
            case Role.EXPERT:
                return Peers()  # called by all, calls nobody

    def _place(self, worker: ActorSpec) -> WorkerPlace:
        store = self.topology.store_of(worker)
        member = self.members[worker.name]
        store_name = store.name if store else ""
        return WorkerPlace(worker.name, member.address, store_name, member.kv_tokens)

    def _lost_workers(self) -> frozenset[str]:
        """Where those listened who are gone, and not because they drain."""
        gone = (MemberState.DEAD, MemberState.STARTING)
        workers = (self.members[spec.name] for spec in self.topology.of_role(Role.ATTENTION))
        return frozenset(each.address for each in workers if each.address and each.state in gone)

    def _store_addresses(self) -> tuple[tuple[str, str], ...]:
        """Of those that listen, or did: that one with records is away must not be forgotten."""
        stores = self.topology.of_role(Role.KVSTORE)
        return tuple((store.name, self._address(store)) for store in stores if self._address(store))

    def _replicas_of_expert(self) -> tuple[tuple[str, ...], ...]:
        holders: list[list[str]] = [[] for _ in range(self.topology.num_experts)]
        for replica in self._ready(Role.EXPERT):
            for expert in replica.experts:
                holders[expert].append(self._address(replica))
        return tuple(map(tuple, holders))

    def _ready(self, role: Role) -> tuple[ActorSpec, ...]:
        return tuple(
            spec
            for spec in self.topology.of_role(role)
            if self.members[spec.name].state is MemberState.READY
        )

    def _address(self, spec: ActorSpec) -> str:
        return self.members[spec.name].address
