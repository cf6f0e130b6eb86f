"""What the supervisor knows of a deployment's actors, and what it tells them of each other.

Plain values, and the surface of an actor. Knows neither Ray nor what a role does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from cluster.expert_moves import Move
from cluster.topology import ActorSpec, Role, Room
from protos.control_pb2 import Autoscaled, RoleStats


class DeploymentError(Exception):
    """The deployment cannot start or cannot go on; the message is one line and names the actor."""


class ActorDied(DeploymentError):
    """The process of an actor is gone."""


class ChangeInvalid(DeploymentError):
    """A change of the deployment that names something that cannot be."""


class UnknownActor(DeploymentError):
    """The deployment has no actor of this name."""


class ChangeRefused(DeploymentError):
    """The deployment could not serve any more after this change, or is in no state for it."""


class ChangeFailed(DeploymentError):
    """The change could not be made; the deployment is as it was."""


class MemberState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Process:
    """Where an actor runs."""

    pid: int
    node_id: str


@dataclass(frozen=True, slots=True)
class Redis:
    """A Redis that one of our roles runs, and which: it starts another when it comes back."""

    url: str
    password: str = field(repr=False)
    run_by: str = ""


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """Where an attention worker is, as a gateway needs it."""

    name: str
    address: str
    store: str  # name of its node's KV store; empty: none
    kv_tokens: int


@dataclass(frozen=True, slots=True)
class Peers:
    """Whom an actor is to call; each role reads the fields that concern it."""

    replicas_of_expert: tuple[tuple[str, ...], ...] = ()  # addresses; of a router, with the epoch
    epoch: int = 0
    router_address: str = ""  # of an attention worker
    store_address: str = ""  # of an attention worker; empty: its node has no KV store
    worker_addresses: tuple[WorkerPlace, ...] = ()  # of a gateway
    lost_workers: frozenset[str] = frozenset()  # addresses; of a gateway: what they have is lost
    store_addresses: tuple[tuple[str, str], ...] = ()  # (name, address); of a gateway or a KV store
    redis: Redis | None = None  # of a KV store; none: as its settings say
    # Where its last process listened, of a role that is to be found there again; empty: anywhere.
    last_address: str = ""


@dataclass(frozen=True, slots=True)
class Listening:
    """What comes of serving."""

    address: str
    kv_tokens: int = 0  # that an attention worker holds
    redis: Redis | None = None  # that a KV store started, for all of them


class Actor(Protocol):
    """One process of the deployment, as the supervisor sees it. Every call raises `ActorDied` when
    the process is gone, and `DeploymentError` with the cause when the role refuses."""

    async def placed(self) -> Process:
        """Wait until there is a process, which takes a node with room for it."""
        ...

    async def load(self, *, gently: bool) -> None:
        """Import and read what the role needs; the slow part, which needs no peer. Gently: whoever
        serves on this machine already comes first."""
        ...

    async def serve(self, peers: Peers) -> Listening: ...

    async def update(self, peers: Peers) -> None:
        """Call these from now on. Returns once they are in use."""
        ...

    async def stats(self) -> RoleStats:
        """What the role counts, from memory."""
        ...

    async def hold(self, experts: Sequence[int]) -> None:
        """Of an expert replica: hold exactly these from now on. Returns once those that are new
        can be asked for and those that are gone have left memory."""
        ...

    async def retired(self, epoch: int) -> None:
        """Of a router: wait until it uses no table from before this epoch, and waits for nothing
        that it asked under one."""
        ...

    async def ended(self) -> str:
        """Wait for the end of the process, however it comes; returns what is known of it."""
        ...

    async def stop(self, grace_seconds: float) -> None:
        """Admit nothing more, finish what is under way within the grace time, stop listening."""
        ...

    def kill(self) -> None:
        """End the process now; harmless when it is gone already. It counts as ended from now on,
        also if its node cannot be reached."""
        ...


class Machines(Protocol):
    """The nodes of the deployment."""

    async def rooms(self) -> tuple[Room, ...]:
        """As they are now. A node keeps its number; new ones come last."""
        ...

    def lose(self, node: int) -> None:
        """Nobody answers there: it has room for nobody for a while, whatever Ray says."""
        ...

    async def close(self, node: str) -> frozenset[int]:
        """The numbers of the nodes that have this address or id: they take nobody any more."""
        ...

    async def wait_for_slots(self, role: Role, num_slots: int) -> None:
        """Until there are so many free ones, which a cluster that grows may take minutes for.
        Raises `ChangeFailed` when they take too long."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """What came of a change; the routing epoch once it was live."""

    epoch: int
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rebalance:
    """Moves of experts, made or only planned, and how evenly the replicas are loaded: the mean over
    the largest load, as measured of late and as expected after the moves."""

    epoch: int  # of the routing table, once the moves were live
    moves: tuple[Move, ...]
    balance_before: float
    balance_after: float


@dataclass(frozen=True, slots=True)
class Member:
    """An actor as reported to operators."""

    spec: ActorSpec
    state: MemberState = MemberState.STARTING
    address: str = ""
    process: Process = Process(0, "")
    stats: RoleStats = field(default_factory=RoleStats)  # of this process; empty: none yet
    kv_tokens: int = 0
    restarts: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    epoch: int
    members: tuple[Member, ...]
    supervisor: Process
    autoscaled: tuple[Autoscaled, ...] = ()  # empty: scaling is left to operators
