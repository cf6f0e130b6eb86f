"""A deployment whose actors live in this process and do as the test says."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from cluster.backoff import RestartPolicy
from cluster.config import AutoscaleSettings, TopologySettings
from cluster.members import (
    ActorDied,
    ChangeFailed,
    DeploymentError,
    Listening,
    Member,
    Peers,
    Process,
    Redis,
)
from cluster.supervisor import Patience, Rebalancing, Supervisor
from cluster.topology import ActorSpec, Role, Room, Topology, plan_topology
from protos.control_pb2 import RoleStats

OWN_PROCESS = Process(1, "node-0")
REDIS = Redis("redis://here:1", "hush")
TOPOLOGY = plan_topology(
    TopologySettings(attention_workers=2, expert_groups=2, expert_replicas=2),
    num_experts=4,
    rooms=[Room()] * 2,
)
EVERYBODY = sorted(spec.name for spec in TOPOLOGY.actors)
PATIENCE = Patience(
    start_seconds=30,
    drain_seconds=3,
    restart_seconds=30,
    restarts=RestartPolicy(first_delay_seconds=0.001, max_delay_seconds=0.002),
)


@dataclass
class Stage:
    """What all actors of a test share: the log of what happened, and who misbehaves. It is the
    nodes as well."""

    topology: Topology = TOPOLOGY
    patience: Patience = PATIENCE
    log: list[str] = field(default_factory=list)
    peers: dict[str, Peers] = field(default_factory=dict)
    fails_to_load: str = ""
    fails_to_serve: str = ""
    never_loads: str = ""
    never_serves: str = ""
    never_stops: str = ""
    refuses_updates: str = ""
    cannot_hold: str = ""  # other experts than it was created with
    dies_holding: str = ""  # them, once
    rebalancing: Rebalancing = field(default_factory=Rebalancing)
    stats: dict[str, RoleStats] = field(default_factory=dict)  # what each reports, if scripted
    autoscale: AutoscaleSettings | None = None
    now: float = 1000.0  # on the autoscaling loop's clock
    gentle: dict[str, bool] = field(default_factory=dict)  # how each was told to load
    busy: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)  # actors
    silent_nodes: set[int] = field(default_factory=set)
    rooms_now: tuple[Room, ...] = (Room(), Room())
    rooms_later: tuple[Room, ...] | None = None  # once somebody has waited for slots
    _actors: dict[str, list["StagedActor"]] = field(default_factory=dict)
    _happened: asyncio.Event = field(default_factory=asyncio.Event)

    def create(self, spec: ActorSpec) -> "StagedActor":
        processes = self._actors.setdefault(spec.name, [])
        processes.append(StagedActor(self, spec, number=len(processes)))
        self.note(f"create {spec.name}")
        return processes[-1]

    def supervisor(self) -> Supervisor:
        return Supervisor(
            self.topology,
            self.create,
            OWN_PROCESS,
            self,
            self.patience,
            self.autoscale,
            clock=lambda: self.now,
            rebalancing=self.rebalancing,
        )

    @asynccontextmanager
    async def started(self) -> AsyncIterator[Supervisor]:
        supervisor = self.supervisor()
        await supervisor.start()
        self.log.clear()
        yield supervisor
        await supervisor.stop()

    def note(self, event: str) -> None:
        self.log.append(event)
        self._happened.set()
        self._happened = asyncio.Event()

    async def until(self, *events: str) -> None:
        """All of these are in the log."""
        await self.until_true(lambda: set(events) <= set(self.log))

    async def until_true(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await self._happened.wait()

    def kill(self, name: str) -> None:
        """Its process is gone, as after a signal that cannot be caught."""
        self._actors[name][-1].is_gone.set()

    @property
    def killed(self) -> set[str]:
        """Whose every process has ended."""
        return {
            name
            for name, processes in self._actors.items()
            if all(process.is_gone.is_set() for process in processes)
        }

    def held(self, name: str) -> tuple[int, ...]:
        """The experts in the memory of its process."""
        return self._actors[name][-1].held

    def num_processes(self, name: str) -> int:
        return len(self._actors.get(name, ()))

    def replicas(self, group: int) -> tuple[str, ...]:
        """Where the routers are told to find the group."""
        return self.peers["router-0"].replicas_of_expert[2 * group]

    def workers(self) -> tuple[str, ...]:
        """Whom the gateway is told of."""
        return tuple(place.address for place in self.peers["gateway-0"].worker_addresses)

    async def rooms(self) -> tuple[Room, ...]:
        return self.rooms_now

    def lose(self, node: int) -> None:
        self.note(f"lose node {node}")
        rooms = list(self.rooms_now)
        rooms[node] = Room(is_alive=False)
        self.rooms_now = tuple(rooms)

    async def close(self, node: str) -> frozenset[int]:
        numbers = frozenset(n for n in range(len(self.rooms_now)) if node == f"node-{n}")
        self.rooms_now = tuple(
            replace(room, is_alive=room.is_alive and number not in numbers)
            for number, room in enumerate(self.rooms_now)
        )
        return numbers

    async def wait_for_slots(self, role: Role, num_slots: int) -> None:
        self.note(f"wait for {num_slots} {role}")
        if self.rooms_later is None:
            raise ChangeFailed(f"no node had {num_slots} more within 1 s; nothing has changed")
        self.rooms_now = self.rooms_later


@dataclass
class StagedActor:
    stage: Stage
    spec: ActorSpec
    number: int  # of this process among those of the actor
    is_gone: asyncio.Event = field(default_factory=asyncio.Event)
    held: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.held = self.spec.experts

    @property
    def name(self) -> str:
        return self.spec.name

    async def placed(self) -> Process:
        self._live()
        if self.spec.node in self.stage.silent_nodes or self.name in self.stage.silent:
            await asyncio.Event().wait()
        return Process(100 + self.number, f"node-{self.spec.node}")

    async def load(self, *, gently: bool) -> None:
        self._live()
        self.stage.gentle[self.name] = gently
        if self.name == self.stage.fails_to_load:
            self.stage.note(f"fail {self.name}")
            raise DeploymentError(f"{self.name}: no such file")
        if self.name == self.stage.never_loads:
            await self._forever()
        self.stage.note(f"load {self.name}")

    async def serve(self, peers: Peers) -> Listening:
        self._live()
        if self.name == self.stage.fails_to_serve:
            raise DeploymentError(f"{self.name}: port in use")
        if self.name == self.stage.never_serves:
            await self._forever()
        self.stage.peers[self.name] = peers
        self.stage.note(f"serve {self.name}")
        redis = REDIS if self.name == "kvstore-0" else None
        return Listening(peers.last_address or self.address, kv_tokens=77, redis=redis)

    @property
    def address(self) -> str:
        """Another one for every process."""
        return f"at-{self.name}" + (f"-again-{self.number}" if self.number else "")

    async def update(self, peers: Peers) -> None:
        self._live()
        if self.name == self.stage.refuses_updates:
            raise DeploymentError(f"{self.name}: cannot")
        self.stage.peers[self.name] = peers
        self.stage.note(f"update {self.name}")

    async def stats(self) -> RoleStats:
        self._live()
        if self.name in self.stage.busy:
            await asyncio.Event().wait()
        return self.stage.stats.get(self.name, RoleStats(requests=7))

    async def hold(self, experts: Sequence[int]) -> None:
        self._live()
        if self.name == self.stage.cannot_hold:
            self.stage.note(f"cannot hold {self.name}")
            raise DeploymentError(f"{self.name}: no such file")
        if self.name == self.stage.dies_holding:
            self.stage.dies_holding = ""
            self.is_gone.set()
            self._live()
        self.held = tuple(experts)
        self.stage.note(f"hold {self.name} {','.join(map(str, experts))}")

    async def retired(self, epoch: int) -> None:
        self._live()
        assert self.stage.peers[self.name].epoch >= epoch, "it was never told"
        self.stage.note(f"retired {self.name}")

    async def ended(self) -> str:
        await self.is_gone.wait()
        return "killed"

    async def stop(self, grace_seconds: float) -> None:
        self._live()
        self.stage.note(f"stop {self.name}")
        if self.name == self.stage.never_stops:
            await self._forever()

    def kill(self) -> None:
        if not self.is_gone.is_set():
            self.stage.note(f"kill {self.name}")
        self.is_gone.set()

    def _live(self) -> None:
        if self.is_gone.is_set():
            raise ActorDied(f"{self.name} died")

    async def _forever(self) -> None:
        await self.is_gone.wait()
        self._live()


async def state_of(supervisor: Supervisor, name: str) -> Member:
    members = (await supervisor.snapshot()).members
    return next(member for member in members if member.spec.name == name)
