"""Owns the deployment's actors: which there are to be, the process of each, what is known of it,
and what it was told of the others.

Reaches actors through the `Actor` protocol alone. Decides nothing: who is to be there, and when, is
the supervisor's.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from cluster.directory import Directory
from cluster.members import (
    Actor,
    ActorDied,
    DeploymentError,
    Listening,
    Member,
    MemberState,
    Peers,
    Process,
    Redis,
)
from cluster.topology import ActorSpec, Role, Topology
from protos.control_pb2 import RoleStats

log = logging.getLogger(__name__)

# Of an actor to a question that it answers from memory.
ANSWER_TIMEOUT_SECONDS = 5.0
# Of one that is told of others, and connects to them before it says so.
TELL_TIMEOUT_SECONDS = 10.0
# Of a router, until all that it asked under an earlier table is answered: as long as pairs that no
# replica takes may wait.
RETIRE_TIMEOUT_SECONDS = 40.0
# Beyond its own grace time, for an actor to say that it has stopped.
STOP_MARGIN_SECONDS = 5.0
FIRST_EPOCH = 1
# Others hold their address for as long as the deployment lasts: gateways are known to clients,
# routers and KV stores to the workers of their nodes, stores to each other.
FOUND_WHERE_THEY_WERE = (Role.GATEWAY, Role.ROUTER, Role.KVSTORE)
# Whoever is called comes up before its callers, and goes down after them.
START_ORDER = (Role.KVSTORE, Role.EXPERT, Role.ROUTER, Role.ATTENTION, Role.GATEWAY)


@dataclass(frozen=True, slots=True)
class Adopted:
    """An actor that serves, and that another process of the supervisor started."""

    spec: ActorSpec
    actor: Actor
    process: Process
    listening: Listening
    epoch: int  # of the last routing table that it was told of; 0: none


class Roster:
    def __init__(self, topology: Topology, create: Callable[[ActorSpec], Actor]) -> None:
        self.topology = topology.without([actor.name for actor in topology.actors])
        self.epoch = FIRST_EPOCH
        self._create = create
        self._actors: dict[str, Actor] = {}
        self._members: dict[str, Member] = {}
        self._told: dict[str, Peers] = {}
        self._redis: Redis | None = None
        self._changed = asyncio.Event()
        self.add(topology.actors)

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(self._members.values())

    @property
    def ready(self) -> frozenset[str]:
        return frozenset(n for n, m in self._members.items() if m.state is MemberState.READY)

    def state(self, name: str) -> MemberState:
        return self._members[name].state

    def address(self, name: str) -> str:
        return self._members[name].address

    async def change(self) -> None:
        """Wait until a member comes, goes or changes its state."""
        await self._changed.wait()

    def add(self, specs: Iterable[ActorSpec]) -> None:
        """Creating does not wait: all processes come up at the same time."""
        specs = tuple(specs)
        self.topology = self.topology.with_actors(specs)
        for spec in specs:
            self._actors[spec.name] = self._create(spec)
            self._put(Member(spec))

    def adopt(self, found: Iterable[Adopted]) -> None:
        """Actors that serve already; what they were told of others is not known."""
        for each in found:
            self.topology = self.topology.with_actors((each.spec,))
            self._actors[each.spec.name] = each.actor
            self._redis = self._redis or each.listening.redis
            self.epoch = max(self.epoch, each.epoch)
            self._put(
                Member(
                    each.spec,
                    MemberState.READY,
                    each.listening.address,
                    each.process,
                    kv_tokens=each.listening.kv_tokens,
                )
            )

    def recreate(self, spec: ActorSpec) -> None:
        """Another process for an actor that has lost its own; it may be on another node now."""
        self._actors[spec.name].kill()
        self._told.pop(spec.name, None)
        self.topology = self.topology.with_changed(spec)
        member = self._members[spec.name]
        self._actors[spec.name] = self._create(spec)
        self._put(
            replace(member, spec=spec, state=MemberState.STARTING, restarts=member.restarts + 1)
        )

    def lose(self, name: str) -> None:
        """Whatever is left of the process ends now."""
        self._actors[name].kill()
        self._put(replace(self._members[name], state=MemberState.DEAD, stats=RoleStats()))

    def kill_node(self, node: int) -> tuple[str, ...]:
        """The node is lost, and with it whoever is there, also where Ray does not know it yet."""
        names = tuple(name for name, member in self._members.items() if member.spec.node == node)
        for name in names:
            self._actors[name].kill()
        return names

    def remove(self, names: Collection[str]) -> None:
        self.topology = self.topology.without(names)
        for name in names:
            self._actors.pop(name).kill()
            self._told.pop(name, None)
            del self._members[name]
        self._tell_of_change()

    def kill_all(self) -> None:
        for name in self._actors:
            self.lose(name)

    async def bring_up(
        self, specs: Sequence[ActorSpec], timeout_seconds: float, *, gently: bool = False
    ) -> None:
        """Load them all at once, then let them listen in order; those of one role become known to
        others together. Raises `DeploymentError`."""
        names = [spec.name for spec in specs]
        try:
            async with asyncio.timeout(timeout_seconds):
                await together(self.load(name, gently=gently) for name in names)
                for role in START_ORDER:
                    await self._serve_all([spec.name for spec in specs if spec.role is role])
                    if role is Role.KVSTORE:
                        await self.tell(role)
        except TimeoutError:
            late = [self._members[n] for n in names if self.state(n) is MemberState.STARTING]
            words = f"{', '.join(m.spec.name for m in late)} did not start within "
            words += f"{timeout_seconds:g} s"
            if nowhere := [m.spec.name for m in late if not m.process.pid]:
                words += f"; for {', '.join(nowhere)} there is no process: no node has room for it"
            raise DeploymentError(words) from None

    async def load(self, name: str, *, gently: bool = False) -> None:
        actor = self._actors[name]
        process = await actor.placed()
        self._put(replace(self._members[name], process=process))
        await actor.load(gently=gently)

    async def serve(self, name: str) -> None:
        """It listens then, and nobody knows of it before it is admitted."""
        peers = self._peers(name)
        member = self._members[name]
        keeps_its_address = member.spec.role in FOUND_WHERE_THEY_WERE
        listening = await self._actors[name].serve(
            replace(peers, last_address=member.address if keeps_its_address else "")
        )
        self._told[name] = peers
        self._redis = self._redis or listening.redis
        self._put(
            replace(self._members[name], address=listening.address, kv_tokens=listening.kv_tokens)
        )

    def admit(self, names: Iterable[str]) -> None:
        for name in names:
            self._put(replace(self._members[name], state=MemberState.READY))

    async def tell(self, *roles: Role) -> None:
        """Whoever of these roles serves and has peers that he was not told of yet. One that does
        not answer in time learns of them as soon as he can."""
        specs = [spec for role in roles for spec in self.topology.of_role(role)]
        await together(self._tell(spec.name) for spec in specs if spec.name in self.ready)

    async def tell_epoch(self) -> None:
        """The routers, of the replicas that there are now."""
        self.epoch += 1
        await self.tell(Role.ROUTER)

    def experts(self, name: str) -> frozenset[int]:
        """What an expert replica is to hold, and holds when it serves."""
        return frozenset(self._members[name].spec.experts)

    def assign(self, name: str, experts: Iterable[int]) -> None:
        """What an expert replica is to hold from now on. Its process must hold it already, or the
        routers, who are not told here, would send what it cannot compute."""
        member = self._members[name]
        spec = replace(member.spec, experts=tuple(sorted(experts)))
        self.topology = self.topology.with_changed(spec)
        self._put(replace(member, spec=spec))

    async def hold(self, name: str, experts: Iterable[int]) -> None:
        """Have the process of an expert replica hold exactly these. Raises `DeploymentError`, also
        where it did and has ended since: the next one will have started with what was assigned."""
        actor = self._actors[name]
        if self.state(name) is MemberState.READY:
            await actor.hold(tuple(sorted(experts)))
        if self._actors.get(name) is not actor or self.state(name) is not MemberState.READY:
            raise ActorDied(f"{name} was lost while experts were moved")

    async def retire_earlier_epochs(self) -> None:
        """Until no router waits for what it asked under a table from before this epoch. Raises
        `DeploymentError` if one does for long."""
        epoch = self.epoch
        routers = [spec.name for spec in self.topology.of_role(Role.ROUTER)]
        await together(self._retired(name, epoch) for name in routers if name in self.ready)

    async def check(self, name: str) -> None:
        """Ask for its counts. Whoever does not answer keeps his last ones: busy is not dead, since
        a worker computes inline in its loop."""
        if not (actor := self._actors.get(name)):
            return
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_SECONDS):
                stats = await actor.stats()
        except (TimeoutError, ActorDied):
            return
        if member := self._members.get(name):
            self._members[name] = replace(member, stats=stats)

    async def ping(self, name: str) -> None:
        """Returns once its process has answered; raises `DeploymentError`."""
        await self._actors[name].placed()

    async def ended(self, name: str) -> str:
        return await self._actors[name].ended()

    def drain(self, names: Iterable[str]) -> None:
        """Nobody is told of them any more."""
        for name in names:
            self._put(replace(self._members[name], state=MemberState.DRAINING))

    async def stop(self, name: str, grace_seconds: float) -> None:
        """Let it finish what it has. One that cannot is killed; what is left of its requests ends
        with UNAVAILABLE at whoever asked."""
        try:
            async with asyncio.timeout(grace_seconds + STOP_MARGIN_SECONDS):
                await self._actors[name].stop(grace_seconds)
        except (TimeoutError, DeploymentError) as error:
            log.warning("not_stopped name=%s why=%s", name, error or "it took too long")

    async def _serve_all(self, names: Sequence[str]) -> None:
        rest = names
        if names and not self._redis and self._members[names[0]].spec.role is Role.KVSTORE:
            await self.serve(names[0])  # it starts the Redis of all
            rest = names[1:]
        await together(self.serve(name) for name in rest)
        self.admit(names)

    async def _retired(self, name: str, epoch: int) -> None:
        try:
            async with asyncio.timeout(RETIRE_TIMEOUT_SECONDS):
                await self._actors[name].retired(epoch)
        except ActorDied:
            return  # and with it whatever it had asked
        except TimeoutError:
            raise DeploymentError(
                f"{name} needs tables from before epoch {epoch} for more than "
                f"{RETIRE_TIMEOUT_SECONDS:g} s"
            ) from None

    async def _tell(self, name: str) -> None:
        peers = self._peers(name)
        if peers == self._told.get(name):
            return
        self._told[name] = peers
        try:
            async with asyncio.timeout(TELL_TIMEOUT_SECONDS):
                await self._actors[name].update(peers)
        except TimeoutError:
            log.warning("slow_to_learn name=%s epoch=%d", name, self.epoch)  # but it will
        except DeploymentError as error:
            self._told.pop(name, None)
            log.warning("not_told name=%s epoch=%d why=%s", name, self.epoch, error)

    def _peers(self, name: str) -> Peers:
        directory = Directory(self.topology, self._members, self.epoch, self._redis)
        return directory.peers_of(self._members[name].spec)

    def _put(self, member: Member) -> None:
        self._members[member.spec.name] = member
        self._tell_of_change()

    def _tell_of_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def together(steps: Iterable[Awaitable[None]]) -> None:
    """Await all; the first that fails cancels the others and its own error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for step in steps:
                group.create_task(_run(step))
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def _run(step: Awaitable[None]) -> None:
    await step
