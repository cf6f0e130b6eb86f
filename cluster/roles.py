"""What each role's process runs: the role built from its own settings, with its gRPC server.

Plain asyncio, so a test can run a role without Ray. Services are imported where they are used:
torch costs seconds, and only two of the roles need it.
"""

import importlib.metadata
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from cluster.config import (
    AttentionSettings,
    GatewaySettings,
    KvSettings,
    ModelSettings,
    Settings,
)
from cluster.members import DeploymentError, Listening, Peers, Snapshot
from cluster.preflight import model_directory
from cluster.topology import ActorSpec, Role

if TYPE_CHECKING:
    from services.attention.engine import EngineConfig
    from services.gateway.topology import Topology

SnapshotSource: TypeAlias = Callable[[], Awaitable[Snapshot]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a role runs: the host it listens on, and a folder for its Unix sockets."""

    bind_host: str
    runtime_dir: Path


async def _calls_nobody(_peers: Peers) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Serving:
    """A role that listens. `stop` takes the seconds that requests under way have left; `update`
    whom to call from now on."""

    listening: Listening
    num_requests: Callable[[], int]
    stop: Callable[[float], Awaitable[None]]
    update: Callable[[Peers], Awaitable[None]] = _calls_nobody


# A role that is loaded and waits for its peers' addresses.
Serve: TypeAlias = Callable[[Peers], Awaitable[Serving]]


def load_role(
    spec: ActorSpec, settings: Settings, *, place: Place, snapshot: SnapshotSource
) -> Serve:
    """Import and read what the role needs. Blocks; raises whatever keeps the role from running."""
    match spec.role:
        case Role.GATEWAY:
            return load_gateway(settings.model, settings.gateway, snapshot)
        case Role.ATTENTION:
            return load_attention(spec.name, settings, place)
        case Role.ROUTER:
            return load_router(spec.name, place)
        case Role.EXPERT:
            expert_ids = range(spec.first_expert, spec.end_expert)
            return load_expert(spec.name, expert_ids, settings.model, place)
        case Role.KVSTORE:
            from cluster.kv_role import load_kv_store

            return load_kv_store(spec.name, settings.kv, place)


def load_gateway(
    model: ModelSettings, settings: GatewaySettings, snapshot: SnapshotSource
) -> Serve:
    from services.gateway.counters import Outcome
    from services.gateway.server import GatewayConfig, GatewayServer
    from services.gateway.store import StoreAddress
    from services.gateway.watched_worker import SilenceLimits
    from services.gateway.worker import WorkerAddress

    async def topology() -> "Topology":
        return _reported(await snapshot())

    async def serve(peers: Peers) -> Serving:
        config = GatewayConfig(
            model_dir=model_directory(model),
            version=importlib.metadata.version("model1"),
            address=settings.endpoint,
            # Whichever worker takes a request has room for it.
            max_context_length=min((w.kv_tokens for w in peers.worker_addresses), default=None),
            default_max_tokens=settings.default_max_tokens,
            max_active_requests=settings.max_active_requests,
            continue_patience_seconds=settings.continue_patience_seconds,
            silence=SilenceLimits(silent_seconds=settings.silent_worker_seconds),
            metrics_host=settings.metrics_host,
            metrics_port=settings.metrics_port,
        )
        server = await GatewayServer.open(config, topology)
        workers = [WorkerAddress(w.name, w.address, w.store) for w in peers.worker_addresses]
        stores = [StoreAddress(name, address) for name, address in peers.store_addresses]
        await server.gateway.workers.update(workers)
        await server.gateway.sessions.stores.update(stores)
        counters = server.gateway.counters
        return Serving(
            Listening(server.address), lambda: counters.ended[Outcome.FINISHED], server.stop
        )

    return serve


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
        )
        worker = await AttentionWorker.open(trunk, pool, experts, config)

        async def stop(grace_seconds: float) -> None:
            await worker.stop(grace_seconds)
            await experts.close()

        return Serving(
            Listening(worker.address, kv_tokens=capacity.max_tokens),
            lambda: worker.engine.stats().counters.accepted,
            stop,
        )

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


def load_router(name: str, place: Place) -> Serve:
    from services import rpc
    from services.router.router import Router
    from services.router.routing import RoutingTable
    from services.router.server import router_service

    async def serve(peers: Peers) -> Serving:
        router = Router(name)
        missing = await router.update(RoutingTable.of(peers.epoch, peers.replicas_of_expert))
        if missing:
            await router.close()
            raise DeploymentError(f"{name}: no expert replica answers at {', '.join(missing)}")
        # Nobody else may use the experts: mkdtemp makes the folder 0700.
        socket_dir = tempfile.mkdtemp(prefix="router-", dir=place.runtime_dir)
        server = await rpc.start_server([router_service(router)], f"unix:{socket_dir}/grpc.sock")

        async def stop(grace_seconds: float) -> None:
            await server.stop(grace_seconds)
            shutil.rmtree(socket_dir, ignore_errors=True)

        return Serving(Listening(server.address), lambda: router.counters.calls, stop)

    return serve


def load_expert(name: str, expert_ids: range, model: ModelSettings, place: Place) -> Serve:
    from services import rpc
    from services.expert.loading import load_replica
    from services.expert.server import expert_service

    replica = load_replica(
        model_directory(model),
        name=name,
        expert_ids=expert_ids,
        dtype=model.dtype,
        device=model.device,
    )

    async def serve(_peers: Peers) -> Serving:
        server = await rpc.start_server([expert_service(replica)], f"{place.bind_host}:0")
        return Serving(Listening(server.address), lambda: replica.counters.calls, server.stop)

    return serve


def _reported(snapshot: Snapshot) -> "Topology":
    from services.gateway.topology import Member, Topology

    members = [
        Member(
            name=member.spec.name,
            role=member.spec.role,
            address=member.address,
            pid=member.process.pid,
            node_id=member.process.node_id,
            state=member.state,
            requests=member.num_requests,
            expert_group=member.spec.group if member.spec.role is Role.EXPERT else None,
        )
        for member in snapshot.members
    ]
    supervisor = Member(
        name="supervisor",
        role="supervisor",
        address="",
        pid=snapshot.supervisor.pid,
        node_id=snapshot.supervisor.node_id,
        state="ready",
        requests=0,
    )
    return Topology(snapshot.epoch, (*members, supervisor))
