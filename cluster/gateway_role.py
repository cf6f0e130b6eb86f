"""What a gateway's process builds: the server, what it tells of the deployment, and its line to the
supervisor. What is asked of the supervisor is the supervisor's to judge.
"""

import importlib.metadata
from collections.abc import Awaitable
from typing import TypeVar

from cluster import members
from cluster.access import accepted_tokens, process_tls
from cluster.config import GatewaySettings, Settings
from cluster.expert_moves import MoveKind
from cluster.members import Listening, Peers, Snapshot
from cluster.preflight import model_directory
from cluster.roles import Place, Serve, Serving, SupervisorLink
from cluster.topology import Role
from model1.errors import InvalidRequest
from protos.control_pb2 import RoleStats
from services.errors import ChangeFailed, ChangeRefused, Unavailable, UnknownActor
from services.gateway.operations import Change, ExpertMove, Rebalance
from services.gateway.topology import Member, Topology

Answer = TypeVar("Answer")


def load_gateway(settings: Settings, supervisor: SupervisorLink, place: Place) -> Serve:
    from services.gateway.server import GatewayConfig, GatewayServer
    from services.gateway.store import StoreAddress
    from services.gateway.watched_worker import SilenceLimits
    from services.gateway.worker import WorkerAddress

    async def topology() -> Topology:
        return _reported(await supervisor.snapshot())

    async def serve(peers: Peers) -> Serving:
        gateway = settings.gateway
        config = GatewayConfig(
            model_dir=model_directory(settings.model),
            version=importlib.metadata.version("model1"),
            address=_where(gateway, peers.last_address),
            default_max_tokens=gateway.default_max_tokens,
            max_active_requests=gateway.max_active_requests,
            continue_patience_seconds=gateway.continue_patience_seconds,
            silence=SilenceLimits(silent_seconds=gateway.silent_worker_seconds),
            metrics_host=gateway.metrics_host,
            metrics_port=gateway.metrics_port,
            tls=process_tls(settings.tls),
            require_client_certificate=gateway.require_client_certificate,
            tokens=accepted_tokens(gateway),
        )
        server = await GatewayServer.open(config, topology, SupervisedOperations(supervisor))

        async def update(peers: Peers) -> None:
            await server.update(
                [WorkerAddress(w.name, w.address, w.store) for w in peers.worker_addresses],
                [StoreAddress(name, address) for name, address in peers.store_addresses],
                lost_workers=peers.lost_workers,
                # Whichever worker takes a request has room for it.
                max_context_length=min((w.kv_tokens for w in peers.worker_addresses), default=None),
            )

        await update(peers)

        def stats() -> RoleStats:
            gateway = server.stats()
            return RoleStats(requests=gateway.finished_requests, gateway=gateway)

        return Serving(Listening(_reachable(server.address, place)), stats, server.stop, update)

    return serve


def _where(gateway: GatewaySettings, last_address: str) -> str:
    """One that comes back listens on the port that it is known by."""
    if not last_address:
        return gateway.endpoint
    return gateway.model_copy(update={"port": int(last_address.rpartition(":")[2])}).endpoint


def _reachable(address: str, place: Place) -> str:
    """All addresses of a node are none that others could call."""
    host, _, port = address.rpartition(":")
    return f"{place.bind_host}:{port}" if host in ("0.0.0.0", "[::]") else address


class SupervisedOperations:
    """The gateway's `Operations`, done by the supervisor."""

    def __init__(self, supervisor: SupervisorLink) -> None:
        self._supervisor = supervisor

    async def scale_experts(self, num_replicas: int, group: int | None) -> Change:
        return await _done(self._supervisor.scale_experts(num_replicas, group))

    async def scale_attention(self, num_workers: int) -> Change:
        return await _done(self._supervisor.scale_attention(num_workers))

    async def drain(self, name: str) -> Change:
        return await _done(self._supervisor.drain(name))

    async def drain_node(self, node: str) -> Change:
        return await _done(self._supervisor.drain_node(node))

    async def rebalance(self, dry_run: bool) -> Rebalance:
        done = await _answered(self._supervisor.rebalance(dry_run))
        moves = tuple(
            ExpertMove(move.replica, move.expert, is_drop=move.kind is MoveKind.DROP)
            for move in done.moves
        )
        return Rebalance(done.epoch, moves, done.balance_before, done.balance_after)


async def _done(asked: Awaitable[members.Change]) -> Change:
    change = await _answered(asked)
    return Change(change.epoch, change.added, change.removed)


async def _answered(asked: Awaitable[Answer]) -> Answer:
    try:
        return await asked
    except members.ChangeInvalid as error:
        raise InvalidRequest(str(error)) from error
    except members.UnknownActor as error:
        raise UnknownActor(str(error)) from error
    except members.ChangeRefused as error:
        raise ChangeRefused(str(error)) from error
    except members.ChangeFailed as error:
        raise ChangeFailed(str(error)) from error
    except members.ActorDied as error:
        raise Unavailable(str(error)) from error


def _reported(snapshot: Snapshot) -> Topology:
    reported = [
        Member(
            name=member.spec.name,
            role=member.spec.role,
            address=member.address,
            pid=member.process.pid,
            node_id=member.process.node_id,
            state=member.state,
            requests=member.stats.requests,
            expert_group=member.spec.group if member.spec.role is Role.EXPERT else None,
            restarts=member.restarts,
            stats=member.stats,
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
    return Topology(snapshot.epoch, (*reported, supervisor), snapshot.autoscaled)
