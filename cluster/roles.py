"""What each role's process runs: the role built from its own settings, with its gRPC server.

Plain asyncio, so a test can run a role without Ray. Services are imported where they are used:
torch costs seconds, and only two of the roles need it.
"""

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from cluster.access import process_tls
from cluster.config import AttentionSettings, KvSettings, Settings
from cluster.members import Change, DeploymentError, Listening, Peers, Rebalance, Snapshot
from cluster.preflight import model_directory
from cluster.topology import ActorSpec, Role
from protos.control_pb2 import RoleStats

if TYPE_CHECKING:
    from services.attention.engine import EngineConfig
    from services.tls import Tls

# A replica is published once it serves; one that died since is tried again behind the table's back.
UPDATE_CONNECT_TIMEOUT_SECONDS = 2.0


class SupervisorLink(Protocol):
    """The supervisor, as a role may ask it."""

    async def snapshot(self) -> Snapshot: ...

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change: ...

    async def scale_attention(self, num_workers: int) -> Change: ...

    async def drain(self, name: str) -> Change: ...

    async def drain_node(self, node: str) -> Change: ...

    async def rebalance(self, dry_run: bool) -> Rebalance: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a role runs: the host it listens on, and a folder for its Unix sockets."""

    bind_host: str
    runtime_dir: Path


async def _calls_nobody(_peers: Peers) -> None:
    return None


async def _holds_nothing(_expert_ids: Collection[int]) -> None:
    raise DeploymentError("only expert replicas hold experts")


async def _routes_nothing(_epoch: int) -> None:
    raise DeploymentError("only routers have routing tables")


@dataclass(frozen=True, slots=True)
class Serving:
    """A role that listens. `stop` takes the seconds that requests under way have left; `update`
    whom to call from now on. Of an expert replica, `hold` takes the experts to hold from now on; of
    a router, `retired` waits until it needs no table from before an epoch."""

    listening: Listening
    stats: Callable[[], RoleStats]
    stop: Callable[[float], Awaitable[None]]
    update: Callable[[Peers], Awaitable[None]] = _calls_nobody
    hold: Callable[[Collection[int]], Awaitable[None]] = _holds_nothing
    retired: Callable[[int], Awaitable[None]] = _routes_nothing
    since: float = field(default_factory=time.monotonic)

    def report(self) -> RoleStats:
        stats = self.stats()
        stats.seconds = time.monotonic() - self.since
        return stats


# A role that is loaded and waits for its peers' addresses.
Serve: TypeAlias = Callable[[Peers], Awaitable[Serving]]


def load_role(
    spec: ActorSpec, settings: Settings, *, place: Place, supervisor: SupervisorLink
) -> Serve:
    """Import and read what the role needs. Blocks; raises whatever keeps the role from running."""
    match spec.role:
        case Role.GATEWAY:
            from cluster.gateway_role import load_gateway

            return load_gateway(settings, supervisor, place)
        case Role.ATTENTION:
            return load_attention(spec.name, settings, place)
        case Role.ROUTER:
            return load_router(spec.name, place, process_tls(settings.tls))
        case Role.EXPERT:
            return load_expert(spec, settings, place)
        case Role.KVSTORE:
            from cluster.kv_role import load_kv_store

            return load_kv_store(spec.name, settings.kv, place, process_tls(settings.tls))


def import_role(role: Role) -> None:
    """What of `load_role` can be done before it is known which actor it is for. Blocks."""
    match role:
        case Role.ROUTER:
            import services.router.server
            from services.router.warm_up import warm_up

            warm_up()
        case Role.EXPERT:
            import services.expert.loading
            import services.expert.server
        case Role.ATTENTION:
            import services.attention.loading
            import services.attention.server  # noqa: F401


def load_attention(name: str, settings: Settings, place: Place) -> Serve:
    from model1.checkpoint import checkpoint_digest
    from model1.kv_capacity import PoolCapacity
    from services.attention.experts import RoutedExperts
    from services.attention.loading import capacity_within, load_trunk_and_pool
    from services.attention.server import AttentionWorker, AttentionWorkerConfig

    limits = settings.attention
    directory = model_directory(settings.model)
    if limits.kv_bytes is None:
        capacity = PoolCapacity(
            limits.max_sequences, limits.kv_tokens, limits.max_batch_tokens, limits.hot_entries
        )
    else:
        capacity = capacity_within(
            limits.kv_bytes,
            directory,
            dtype=settings.model.dtype,
            max_sequences=limits.max_sequences,
            max_step_tokens=limits.max_batch_tokens,
            kv_format=limits.kv_format,
            hot_entries=limits.hot_entries,
        )
    trunk, pool = load_trunk_and_pool(
        directory,
        dtype=settings.model.dtype,
        device=settings.model.device,
        capacity=capacity,
        kv_format=limits.kv_format,
    )
    model_digest = checkpoint_digest(directory)

    async def serve(peers: Peers) -> Serving:
        experts = await RoutedExperts.open(peers.router_address)
        config = AttentionWorkerConfig(
            name=name,
            address=f"{place.bind_host}:0",
            engine=engine_config(limits, settings.kv),
            kv_store_address=peers.store_address,
            model_digest=model_digest,
            tls=process_tls(settings.tls),
        )
        worker = await AttentionWorker.open(trunk, pool, experts, config)

        async def stop(grace_seconds: float) -> None:
            await worker.stop(grace_seconds)
            await experts.close()

        def stats() -> RoleStats:
            attention = worker.stats()
            return RoleStats(requests=attention.accepted_requests, attention=attention)

        return Serving(Listening(worker.address, kv_tokens=capacity.max_tokens), stats, stop)

    return serve


def engine_config(limits: AttentionSettings, kv: KvSettings) -> "EngineConfig":
    from services.attention.engine import EngineConfig
    from services.attention.kv_cache import KvCacheConfig
    from services.attention.scheduler import SchedulerLimits

    return EngineConfig(
        limits=SchedulerLimits(
            max_batch_tokens=limits.max_batch_tokens,
            max_sequences=limits.max_sequences,
            max_waiting=limits.max_waiting_requests,
        ),
        crossing_timeout_s=limits.crossing_timeout_seconds,
        kv=KvCacheConfig(
            resume_every_blocks=kv.resume_every_blocks,
            idle_seconds=kv.idle_seconds,
            load_timeout_seconds=kv.load_timeout_seconds,
            load_patience_seconds=kv.load_patience_seconds,
            staging_bytes=kv.staging_bytes,
            max_writeback_bytes=kv.max_writeback_bytes,
        ),
    )


def load_router(name: str, place: Place, tls: "Tls | None") -> Serve:
    from services import rpc
    from services.router.router import Router
    from services.router.routing import RoutingTable
    from services.router.server import router_service, router_stats
    from services.router.warm_up import warm_up

    warm_up()

    async def serve(peers: Peers) -> Serving:
        router = Router(name, tls=tls)
        table = RoutingTable.of(peers.epoch, peers.replicas_of_expert)
        if peers.last_address:
            # Some may have died as well, and whoever waits for this router need not wait for them.
            await router.update(table, UPDATE_CONNECT_TIMEOUT_SECONDS)
        elif missing := await router.update(table):
            await router.close()
            raise DeploymentError(f"{name}: no expert replica answers at {', '.join(missing)}")
        socket = _router_socket(peers.last_address, place.runtime_dir)
        server = await rpc.start_server([router_service(router)], f"unix:{socket}")

        async def stop(grace_seconds: float) -> None:
            await server.stop(grace_seconds)
            shutil.rmtree(socket.parent, ignore_errors=True)

        async def update(peers: Peers) -> None:
            if peers.epoch > router.table.epoch:  # or a later one overtook it
                await router.update(
                    RoutingTable.of(peers.epoch, peers.replicas_of_expert),
                    UPDATE_CONNECT_TIMEOUT_SECONDS,
                )

        def stats() -> RoleStats:
            return RoleStats(requests=router.counters.calls, router=router_stats(router))

        return Serving(Listening(server.address), stats, stop, update, retired=router.retired)

    return serve


def _router_socket(last_address: str, runtime_dir: Path) -> Path:
    """In a folder that nobody else may enter, since nobody else may use the experts. A router that
    comes back listens where its workers look for it."""
    if not last_address:
        return Path(tempfile.mkdtemp(prefix="router-", dir=runtime_dir)) / "grpc.sock"
    socket = Path(last_address.removeprefix("unix:"))
    socket.parent.mkdir(mode=0o700, exist_ok=True)
    found = socket.parent.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise DeploymentError(f"{socket.parent} is not a folder of this user alone")
    return socket


def load_expert(spec: ActorSpec, settings: Settings, place: Place) -> Serve:
    from services import rpc
    from services.expert.loading import HeldExperts
    from services.expert.server import expert_service, expert_stats

    model = settings.model
    experts = HeldExperts(
        model_directory(model),
        name=spec.name,
        expert_ids=spec.experts,
        dtype=model.dtype,
        device=model.device,
    )
    replica = experts.replica

    async def serve(_peers: Peers) -> Serving:
        server = await rpc.start_server(
            [expert_service(replica)], f"{place.bind_host}:0", tls=process_tls(settings.tls)
        )

        def stats() -> RoleStats:
            return RoleStats(requests=replica.counters.calls, expert=expert_stats(replica))

        return Serving(Listening(server.address), stats, server.stop, hold=experts.hold)

    return serve
