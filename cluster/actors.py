"""Thin Ray wrappers: a process for each role, one for the supervisor, and the handles to them.

Every Ray call of a running deployment is here, in machines.py or in ray_session.py. Decides
nothing: what to run is topology.py's, when is supervisor.py's, what a role does is roles.py's. No
token passes here.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, TypeVar

import ray
from ray.exceptions import (
    ActorUnavailableError,
    ActorUnschedulableError,
    RayActorError,
    RayTaskError,
)

from cluster.config import ClusterSettings, Settings
from cluster.expert_shift import Shift
from cluster.machines import RayMachines, on_node
from cluster.members import (
    ActorDied,
    Change,
    DeploymentError,
    Listening,
    Peers,
    Process,
    Rebalance,
    Snapshot,
)
from cluster.priority import let_others_go_first, serve_first
from cluster.ray_session import Hosts
from cluster.roles import Place, Serve, Serving, import_role, load_role
from cluster.spares import Spares
from cluster.supervisor import Patience, Rebalancing, Supervisor
from cluster.topology import ActorSpec, Role, Topology
from model1.errors import ModelError
from protos.control_pb2 import RoleStats
from services.errors import ServiceError
from services.rpc import AddressUnavailable
from services.tls import TlsUnusable
from services.tokens import TokensUnusable

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Loaded = TypeVar("Loaded")

# Between two questions to a process that Ray cannot reach and does not know to be dead.
CUT_OFF_RETRY_SECONDS = 0.5


# What else Ray is asked for an actor of this name, so that it ends when it should.
Lifetime: TypeAlias = Callable[[str], dict[str, Any]]


def ends_with_us(_name: str) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Known:
    """What a role's process says of itself, to a supervisor that did not start it."""

    spec: ActorSpec
    process: Process
    listening: Listening | None  # None: it does not serve
    epoch: int  # of the routing table that it was told of


class SupervisorHandle:
    """The supervisor's process, as the command line and the gateways see it."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @classmethod
    def create(cls, topology: Topology, settings: Settings, hosts: Hosts) -> "SupervisorHandle":
        """Start the process; `topology` was planned for these hosts."""
        remote: Any = ray.remote(num_cpus=0, max_restarts=0)(SupervisorProcess)
        on_first = remote.options(scheduling_strategy=on_node(hosts.nodes[0]))
        return cls(on_first.remote(topology, settings, hosts))

    async def start(self) -> str:
        return await answer("supervisor", self._handle.start.remote())

    async def snapshot(self) -> Snapshot:
        return await answer("supervisor", self._handle.snapshot.remote())

    async def watch(self) -> str:
        return await answer("supervisor", self._handle.watch.remote())

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change:
        return await answer("supervisor", self._handle.scale_experts.remote(num_replicas, group))

    async def scale_attention(self, num_workers: int) -> Change:
        return await answer("supervisor", self._handle.scale_attention.remote(num_workers))

    async def drain(self, name: str) -> Change:
        return await answer("supervisor", self._handle.drain.remote(name))

    async def drain_node(self, node: str) -> Change:
        return await answer("supervisor", self._handle.drain_node.remote(node))

    async def rebalance(self, dry_run: bool) -> Rebalance:
        return await answer("supervisor", self._handle.rebalance.remote(dry_run))

    async def shifts(self) -> tuple[Shift, ...]:
        """The last moves of experts, the oldest first."""
        return await answer("supervisor", self._handle.shifts.remote())

    async def stop(self) -> None:
        await answer("supervisor", self._handle.stop.remote())


class SupervisorProcess:
    """Runs in a process of its own and creates all the others, so they end with it."""

    def __init__(
        self,
        topology: Topology,
        settings: Settings,
        hosts: Hosts,
        lifetime: Lifetime = ends_with_us,
    ) -> None:
        log_to_stderr()
        serve_first()
        own_handle = SupervisorHandle(ray.get_runtime_context().current_actor)
        cluster = settings.cluster
        machines = RayMachines(hosts, cluster.slot_timeout_seconds)
        start = partial(RemoteActor.start, settings, machines, own_handle, lifetime)
        # An actor with a name of Ray's is that actor for good.
        may_spare = lifetime is ends_with_us
        spares = Spares(_spare_roles(cluster) if may_spare else (), partial(_waiting, start))
        self._supervisor = Supervisor(
            topology,
            partial(RemoteActor.create, start, spares),
            _own_process(),
            machines,
            Patience(
                start_seconds=cluster.start_timeout_seconds,
                drain_seconds=cluster.drain_seconds,
                restart_seconds=cluster.restart_timeout_seconds,
                node_seconds=cluster.node_timeout_seconds,
            ),
            settings.autoscale if settings.autoscale.enabled else None,
            rebalancing=Rebalancing(
                redundancy=cluster.expert_redundancy, every_seconds=cluster.rebalance_seconds
            ),
        )
        self._machines = machines

    async def start(self) -> str:
        return await self._supervisor.start()

    async def snapshot(self) -> Snapshot:
        return await self._supervisor.snapshot()

    async def watch(self) -> str:
        return await self._supervisor.watch()

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change:
        return await self._supervisor.scale_experts(num_replicas, group)

    async def scale_attention(self, num_workers: int) -> Change:
        return await self._supervisor.scale_attention(num_workers)

    async def drain(self, name: str) -> Change:
        return await self._supervisor.changes.drain(name)

    async def drain_node(self, node: str) -> Change:
        return await self._supervisor.changes.drain_node(node)

    async def rebalance(self, dry_run: bool) -> Rebalance:
        return await self._supervisor.changes.rebalance(dry_run=dry_run)

    async def shifts(self) -> tuple[Shift, ...]:
        return tuple(self._supervisor.changes.shift.made)

    async def stop(self) -> None:
        await self._supervisor.stop()


class RemoteActor:
    """A role's process as the supervisor sees it: the `Actor` protocol over a Ray handle."""

    def __init__(self, name: str, handle: Any, serves: Callable[[], None] = lambda: None) -> None:
        """`serves` is called once it does."""
        self._name = name
        self._handle = handle
        self._serves = serves
        self._was_killed = asyncio.Event()

    @classmethod
    def create(
        cls, start: Callable[[ActorSpec], Any], spares: Spares, spec: ActorSpec
    ) -> "RemoteActor":
        handle = spares.take(spec)
        if handle is None:
            handle = start(spec)
        else:
            handle.become.remote(spec)  # the calls of one caller begin in their order
        return cls(spec.name, handle, serves=partial(spares.replenish, spec))

    @staticmethod
    def start(
        settings: Settings,
        machines: RayMachines,
        supervisor: SupervisorHandle,
        lifetime: Lifetime,
        spec: ActorSpec,
    ) -> Any:
        remote: Any = ray.remote(max_restarts=0)(RoleProcess)
        place = machines.node(spec.node).place
        options = {**machines.options(spec), **lifetime(spec.name)}
        return remote.options(**options).remote(spec, settings, place, supervisor)

    async def known(self) -> Known:
        return await answer(self._name, self._handle.known.remote())

    async def placed(self) -> Process:
        return await answer(self._name, self._handle.process.remote())

    async def load(self, *, gently: bool) -> None:
        await answer(self._name, self._handle.load.remote(gently))

    async def serve(self, peers: Peers) -> Listening:
        listening: Listening = await answer(self._name, self._handle.serve.remote(peers))
        self._serves()
        return listening

    async def update(self, peers: Peers) -> None:
        await answer(self._name, self._handle.update.remote(peers))

    async def stats(self) -> RoleStats:
        return await answer(self._name, self._handle.stats.remote())

    async def hold(self, experts: Sequence[int]) -> None:
        await answer(self._name, self._handle.hold.remote(tuple(experts)))

    async def retired(self, epoch: int) -> None:
        await answer(self._name, self._handle.retired.remote(epoch))

    async def ended(self) -> str:
        """Also of one whose node is cut off: Ray would wait for what its process says."""
        ends = [asyncio.create_task(end) for end in (self._process_ended(), self._killed())]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        return done.pop().result()

    async def _killed(self) -> str:
        await self._was_killed.wait()
        return "it was killed by us"

    async def _process_ended(self) -> str:
        while True:
            try:
                await self._handle.ended.remote()  # never returns
            except ActorUnavailableError:
                await asyncio.sleep(CUT_OFF_RETRY_SECONDS)
            except RayActorError as error:
                return _why(error)
            except ActorUnschedulableError as error:
                return str(error)

    async def stop(self, grace_seconds: float) -> None:
        await answer(self._name, self._handle.stop.remote(grace_seconds))

    def kill(self) -> None:
        self._was_killed.set()
        ray.kill(self._handle)


class RoleProcess:
    """Runs in a process of its own and holds one role there, loaded and then serving."""

    def __init__(
        self, spec: ActorSpec, settings: Settings, place: Place, supervisor: SupervisorHandle
    ) -> None:
        log_to_stderr()
        self._spec = spec
        self._settings = settings
        self._place = place
        self._supervisor = supervisor
        self._serve: Serve | None = None
        self._serving: Serving | None = None
        self._epoch = 0

    async def process(self) -> Process:
        return _own_process()

    async def prepare(self) -> None:
        """Whatever can be done before it is known who dies."""
        await self._load(partial(import_role, self._spec.role), gently=True)

    async def become(self, spec: ActorSpec) -> None:
        self._spec = spec

    async def known(self) -> Known:
        listening = self._serving.listening if self._serving else None
        return Known(self._spec, _own_process(), listening, self._epoch)

    async def load(self, gently: bool) -> None:
        load = partial(
            load_role, self._spec, self._settings, place=self._place, supervisor=self._supervisor
        )
        self._serve = await self._load(load, gently=gently)

    async def _load(self, load: Callable[[], Loaded], *, gently: bool) -> Loaded:
        if not gently:
            serve_first()
        # A thread of its own, since its priority may not be raised again.
        initializer = let_others_go_first if gently else None
        with (
            _one_line_failures(self._spec.name),
            ThreadPoolExecutor(1, initializer=initializer) as thread,
        ):
            return await asyncio.get_running_loop().run_in_executor(thread, load)

    async def serve(self, peers: Peers) -> Listening:
        assert self._serve is not None, "load comes first"
        with _one_line_failures(self._spec.name):
            serve_first()
            self._serving = await self._serve(peers)
            self._epoch = peers.epoch
        return self._serving.listening

    async def update(self, peers: Peers) -> None:
        assert self._serving is not None, "serve comes first"
        with _one_line_failures(self._spec.name):
            await self._serving.update(peers)
            self._epoch = max(self._epoch, peers.epoch)

    async def stats(self) -> RoleStats:
        return self._serving.report() if self._serving else RoleStats()

    async def hold(self, experts: Sequence[int]) -> None:
        assert self._serving is not None, "serve comes first"
        with _one_line_failures(self._spec.name):
            await self._serving.hold(experts)
            self._spec = replace(self._spec, experts=tuple(experts))

    async def retired(self, epoch: int) -> None:
        assert self._serving is not None, "serve comes first"
        with _one_line_failures(self._spec.name):
            await self._serving.retired(epoch)

    async def ended(self) -> None:
        """Never returns: the call fails when the process ends, which is how others know of it."""
        await asyncio.Event().wait()

    async def stop(self, grace_seconds: float) -> None:
        if self._serving:
            await self._serving.stop(grace_seconds)


def _spare_roles(cluster: ClusterSettings) -> set[Role]:
    wanted = {Role.ROUTER: cluster.spare_routers, Role.EXPERT: cluster.spare_experts}
    return {role for role, is_wanted in wanted.items() if is_wanted}


def _waiting(start: Callable[[ActorSpec], Any], spec: ActorSpec) -> Any:
    handle = start(spec)
    handle.prepare.remote()
    return handle


def _own_process() -> Process:
    return Process(os.getpid(), ray.get_runtime_context().get_node_id())


async def answer(name: str, reply: Awaitable[Answer]) -> Answer:
    """The reply of a call to an actor, or one of our errors in one line instead of Ray's page."""
    try:
        return await reply
    except RayActorError as error:
        raise ActorDied(f"{name} died: {_why(error)}") from None
    except ActorUnschedulableError as error:
        raise ActorDied(f"{name} found no place: {error}") from None
    except RayTaskError as error:
        if isinstance(error.cause, DeploymentError):
            raise error.cause from None
        raise DeploymentError(f"{name}: {error.cause!r}") from None


@contextmanager
def _one_line_failures(name: str) -> Iterator[None]:
    """Any failure of a role becomes one that other processes can unpickle; the log has the page."""
    try:
        yield
    except DeploymentError:
        raise
    except (ModelError, ServiceError, AddressUnavailable, TlsUnusable, TokensUnusable) as error:
        raise DeploymentError(f"{name}: {error}") from None
    except Exception as error:
        log.exception("role_failed name=%s", name)
        raise DeploymentError(f"{name}: {type(error).__name__}: {error}") from None


def _why(error: RayActorError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray's report is a page; the line on how the process ended is the one that helps.
    return next(
        (line for line in lines if "exit" in line), lines[0] if lines else "no reason given"
    )


def log_to_stderr() -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
