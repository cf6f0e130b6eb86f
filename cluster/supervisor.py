"""Owns a deployment's running actors: ordered start, the routing table, health, ordered stop.

Reaches actors through the `Actor` protocol alone, so a test drives it without a cluster. Knows
nothing of Ray, gRPC or models; sees no token.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from cluster.members import (
    Actor,
    ActorDied,
    DeploymentError,
    Member,
    MemberState,
    Peers,
    Process,
    Redis,
    Snapshot,
    WorkerPlace,
)
from cluster.topology import ActorSpec, Role, Topology

# Of an actor to a question that it answers from memory.
ANSWER_TIMEOUT_SECONDS = 5.0
# Beyond its own grace time, for an actor to say that it has stopped.
STOP_MARGIN_SECONDS = 5.0
FIRST_EPOCH = 1
# Whoever is called comes up before its callers, and goes down after them.
START_ORDER = (Role.KVSTORE, Role.EXPERT, Role.ROUTER, Role.ATTENTION, Role.GATEWAY)


class Supervisor:
    """Every actor of one topology, from their creation to their end."""

    def __init__(
        self, topology: Topology, create: Callable[[ActorSpec], Actor], own_process: Process
    ) -> None:
        self._topology = topology
        self._own_process = own_process
        self._epoch = FIRST_EPOCH
        # Creating does not wait: all processes come up at the same time.
        self._actors = {spec.name: create(spec) for spec in topology.actors}
        self._members = {spec.name: Member(spec) for spec in topology.actors}
        self._redis: Redis | None = None

    async def start(self, timeout_seconds: float) -> str:
        """Load every role at once, then let them listen in order; returns the gateway's address.

        Ends every actor and raises `DeploymentError` if one fails.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await _all(self._load(spec) for spec in self._topology.actors)
                for role in START_ORDER:
                    await self._serve_all(self._topology.of_role(role))
                await _all(self._introduce(s) for s in self._topology.of_role(Role.KVSTORE))
        except TimeoutError:
            late = [m.spec.name for m in self._members.values() if m.state is MemberState.STARTING]
            await self.stop(0.0)
            raise DeploymentError(
                f"{', '.join(late)} did not start within {timeout_seconds:g} s"
            ) from None
        except Exception:
            await self.stop(0.0)
            raise
        return self._address(self._topology.of_role(Role.GATEWAY)[0])

    async def snapshot(self) -> Snapshot:
        """The members with fresh counts. Whoever does not answer keeps its last count."""
        await self._check_all()
        return Snapshot(self._epoch, tuple(self._members.values()), self._own_process)

    async def watch(self, interval_seconds: float) -> str:
        """Check every actor at each interval; returns why, once the living cannot serve."""
        while True:
            await self._check_all()
            members = self._members.values()
            alive = frozenset(m.spec.name for m in members if m.state is not MemberState.DEAD)
            if why := self._topology.missing(alive):
                return why
            await asyncio.sleep(interval_seconds)

    async def stop(self, grace_seconds: float) -> None:
        """Drain callers before those whom they call, then end every process. The grace time is
        that of all roles together. Whoever serves yet has a say, also while others still start:
        a KV store that is just killed leaves its shared memory behind."""
        clock = asyncio.get_running_loop().time
        gateways = self._topology.of_role(Role.GATEWAY)
        if not any(self._members[g.name].state is MemberState.READY for g in gateways):
            grace_seconds = 0.0  # nobody waits for an answer
        deadline = clock() + grace_seconds
        for role in reversed(START_ORDER):
            left_seconds = max(0.0, deadline - clock())
            await _all(self._stop(spec, left_seconds) for spec in self._topology.of_role(role))
        self.kill()

    def kill(self) -> None:
        for name, actor in self._actors.items():
            actor.kill()
            self._set(name, state=MemberState.DEAD)

    async def _load(self, spec: ActorSpec) -> None:
        process = await self._actors[spec.name].load()
        self._members[spec.name] = replace(self._members[spec.name], process=process)

    async def _serve_all(self, specs: tuple[ActorSpec, ...]) -> None:
        if specs and specs[0].role is Role.KVSTORE:
            first, *specs_after = specs  # it starts the Redis of all
            await self._serve(first)
            specs = tuple(specs_after)
        await _all(self._serve(spec) for spec in specs)

    async def _serve(self, spec: ActorSpec) -> None:
        listening = await self._actors[spec.name].serve(self._peers(spec))
        self._redis = self._redis or listening.redis
        self._members[spec.name] = replace(
            self._members[spec.name],
            address=listening.address,
            state=MemberState.READY,
            kv_tokens=listening.kv_tokens,
        )

    async def _introduce(self, store: ActorSpec) -> None:
        await self._actors[store.name].update(self._peers(store))

    def _peers(self, spec: ActorSpec) -> Peers:
        match spec.role:
            case Role.ROUTER:
                return Peers(replicas_of_expert=self._replicas_of_expert(), epoch=self._epoch)
            case Role.ATTENTION:
                store = self._topology.store_of(spec)
                return Peers(
                    router_address=self._address(self._topology.router_of(spec)),
                    store_address=self._address(store) if store else "",
                )
            case Role.GATEWAY:
                return Peers(
                    worker_addresses=tuple(
                        self._place(worker) for worker in self._topology.of_role(Role.ATTENTION)
                    ),
                    store_addresses=self._store_addresses(),
                )
            case Role.KVSTORE:
                others = tuple(row for row in self._store_addresses() if row[0] != spec.name)
                return Peers(store_addresses=others, redis=self._redis)
            case Role.EXPERT:
                return Peers()  # called by all, calls nobody

    def _place(self, worker: ActorSpec) -> WorkerPlace:
        store = self._topology.store_of(worker)
        member = self._members[worker.name]
        store_name = store.name if store else ""
        return WorkerPlace(worker.name, member.address, store_name, member.kv_tokens)

    def _store_addresses(self) -> tuple[tuple[str, str], ...]:
        """Of those that listen."""
        stores = self._topology.of_role(Role.KVSTORE)
        return tuple((store.name, self._address(store)) for store in stores if self._address(store))

    def _replicas_of_expert(self) -> tuple[tuple[str, ...], ...]:
        replicas = self._topology.of_role(Role.EXPERT)
        num_experts = max(replica.end_expert for replica in replicas)
        return tuple(
            tuple(
                self._address(replica)
                for replica in replicas
                if replica.first_expert <= expert_id < replica.end_expert
            )
            for expert_id in range(num_experts)
        )

    def _address(self, spec: ActorSpec) -> str:
        return self._members[spec.name].address

    async def _check_all(self) -> None:
        await _all(self._check(spec) for spec in self._topology.actors)

    async def _check(self, spec: ActorSpec) -> None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                count = await self._actors[spec.name].num_requests()
        except TimeoutError:
            return  # busy is not dead: a worker computes inline in its loop
        except ActorDied:
            self._set(spec.name, state=MemberState.DEAD)
            return
        member = self._members[spec.name]
        # A node that was cut off for a while brings its actors back.
        state = MemberState.READY if member.state is MemberState.DEAD else member.state
        self._members[spec.name] = replace(member, state=state, num_requests=count)

    async def _stop(self, spec: ActorSpec, grace_seconds: float) -> None:
        if self._members[spec.name].state is not MemberState.READY:
            return
        self._set(spec.name, state=MemberState.DRAINING)
        try:
            async with asyncio.timeout(grace_seconds + STOP_MARGIN_SECONDS):
                await self._actors[spec.name].stop(grace_seconds)
        except (TimeoutError, DeploymentError):
            # It is killed next; what is left of its requests ends with UNAVAILABLE at the client.
            self._set(spec.name, state=MemberState.DEAD)

    def _set(self, name: str, *, state: MemberState) -> None:
        self._members[name] = replace(self._members[name], state=state)


async def _all(steps: Iterable[Awaitable[None]]) -> None:
    """Await all; the first that fails cancels the others and its own error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for step in steps:
                group.create_task(_run(step))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def _run(step: Awaitable[None]) -> None:
    await step
