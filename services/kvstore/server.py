"""The gRPC edge of a node's KV store, and its life from listening to closed.

Knows the wire, the store and its parts; nothing of what a block means.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial

import grpc.aio

from model1.errors import InvalidRequest
from protos import kvstore_pb2, kvstore_pb2_grpc
from services import rpc
from services.duplex import answer
from services.errors import ending_with_status
from services.kvstore.admin import Admin
from services.kvstore.admin_server import KvAdminService
from services.kvstore.arena import FILE_SUFFIX, Arena, remove_dead_arenas
from services.kvstore.attached import AttachedWorker
from services.kvstore.attached_peer import AttachedPeer
from services.kvstore.attachment import ARENA_IDENTITY_KEY, ARENA_PATH_KEY
from services.kvstore.blocking import Cold, Disk
from services.kvstore.cold_records import ColdRecords
from services.kvstore.config import KvStoreConfig
from services.kvstore.leases import LeaseBook, remove_dead_clients
from services.kvstore.peers import Peers
from services.kvstore.pins import Pins
from services.kvstore.s3_fifo import S3Fifo
from services.kvstore.session_service import SessionStoreService, session_service
from services.kvstore.sessions import SessionTable
from services.kvstore.store import TieredStore
from services.kvstore.tier import Below, KeptTier

log = logging.getLogger(__name__)

# How often the store looks after what nobody asks it to do.
TICK_SECONDS = 1.0


class KvStoreService(kvstore_pb2_grpc.KvStoreServicer):
    """model1.v1.KvStore over a store that someone else opens and closes."""

    def __init__(self, store: TieredStore, leases: LeaseBook) -> None:
        self.num_requests = 0
        self._store = store
        self._leases = leases
        self._draining = asyncio.Event()

    async def Attach(
        self,
        request_iterator: AsyncIterator[kvstore_pb2.WorkerMessage],
        context: grpc.aio.ServicerContext[kvstore_pb2.WorkerMessage, kvstore_pb2.StoreMessage],
    ) -> None:
        worker = AttachedWorker(self._store, self._leases)
        arena = self._store.ram.arena

        def receive(message: kvstore_pb2.WorkerMessage) -> None:
            self.num_requests += 1
            worker.receive(message)

        async with ending_with_status(context):
            try:
                await answer(
                    request_iterator,
                    context,
                    worker.outbox,
                    receive=receive,
                    settled=_at_once,
                    draining=self._draining,
                    metadata=(
                        (ARENA_PATH_KEY, str(arena.path)),
                        (ARENA_IDENTITY_KEY, arena.identity),
                    ),
                )
            except* InvalidRequest as refused:
                raise refused.exceptions[0] from None
            finally:
                worker.abandon()

    async def Exchange(
        self,
        request_iterator: AsyncIterator[kvstore_pb2.PeerRequest],
        context: grpc.aio.ServicerContext[kvstore_pb2.PeerRequest, kvstore_pb2.PeerResponse],
    ) -> None:
        peer = AttachedPeer(self._store)
        async with ending_with_status(context):
            try:
                await answer(
                    request_iterator,
                    context,
                    peer.outbox,
                    receive=peer.receive,
                    settled=_at_once,
                    draining=self._draining,
                )
            except* InvalidRequest as refused:
                raise refused.exceptions[0] from None
            finally:
                peer.abandon()

    async def drain(self) -> None:
        """End the workers' streams: from now on everything is a miss to them."""
        self._draining.set()


async def _at_once() -> None:
    """Whoever asks takes what it has not got for a miss when its stream ends."""


class KvStoreServer:
    """A listening store: owner of its tiers and of the server."""

    def __init__(
        self,
        store: TieredStore,
        leases: LeaseBook,
        peers: Peers,
        service: KvStoreService,
        server: rpc.RunningServer,
        parts: AsyncExitStack,
    ) -> None:
        self.address = server.address
        self.store = store
        self.leases = leases
        self.peers = peers
        self._service = service
        self._server = server
        self._parts = parts

    @classmethod
    async def open(cls, config: KvStoreConfig) -> KvStoreServer:
        """Listen and serve. Raises ArenaUnavailable, DiskInUse and rpc.AddressUnavailable; other
        troubles of the tiers below RAM degrade the tier."""
        async with AsyncExitStack() as parts:
            arena = await asyncio.to_thread(_new_arena, config)
            parts.callback(arena.close)
            pins = Pins(time.time)
            disk = None
            if config.disk is not None:
                disk = await Disk.open(config.disk, pins.__contains__)
                parts.push_async_callback(disk.close)
            peers = Peers(config.peer_limits, config.tls)
            parts.push_async_callback(peers.close)
            await peers.set_addresses(config.peers)
            cold, records = None, None
            if config.cold is not None:
                cold = Cold(config.cold, pins.__contains__)
                parts.push_async_callback(cold.close)
                records = ColdRecords(cold.link, ttl_seconds=config.cold.ttl_seconds)
            below = Below(disk=disk, peers=peers, cold=cold)
            store = TieredStore(arena, S3Fifo(), below, pins, config.limits, clock=time.monotonic)
            leases = LeaseBook(store.ram)
            # After the store: a load under way must not get the room of a worker's lease.
            parts.callback(leases.close)
            parts.push_async_callback(store.close)
            table = SessionTable(config.sessions_dir, config.sessions_durability)
            parts.callback(table.close)
            sessions = SessionStoreService(table, records)
            parts.push_async_callback(sessions.close)
            # A task each: a disk that hangs holds up neither the leases of the dead nor Redis.
            tidying = partial(_tidy_up, Admin(store, leases), config.ttl_seconds)
            for work in (tidying, *(partial(_look_after, store, tier) for tier in below.kept)):
                ticking = asyncio.create_task(_tick(work, config.name), name="kvstore tick")
                parts.push_async_callback(_cancelled, ticking)
            service = KvStoreService(store, leases)
            admin = KvAdminService(
                store, leases, peers, table, name=config.name, ttl_seconds=config.ttl_seconds
            )
            server = await rpc.start_server(
                [
                    rpc.Service(
                        kvstore_pb2.DESCRIPTOR.services_by_name["KvStore"].full_name,
                        partial(kvstore_pb2_grpc.add_KvStoreServicer_to_server, service),
                        service.drain,
                    ),
                    rpc.Service(
                        kvstore_pb2.DESCRIPTOR.services_by_name["KvAdmin"].full_name,
                        partial(kvstore_pb2_grpc.add_KvAdminServicer_to_server, admin),
                    ),
                    session_service(sessions),
                ],
                config.address,
                tls=config.tls,
            )
            return cls(store, leases, peers, service, server, parts.pop_all())
        raise AssertionError("an exit stack that swallows errors")

    @property
    def num_requests(self) -> int:
        """Messages of workers."""
        return self._service.num_requests

    async def set_peers(self, addresses: Iterable[str]) -> None:
        """These are the other nodes' stores from now on."""
        await self.peers.set_addresses(addresses)

    async def stop(self, grace_seconds: float) -> None:
        """End the streams, write back what waits until the grace time, close. Idempotent."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_seconds
        await self._server.stop(grace_seconds)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self.store.flush()
        await self._parts.aclose()

    def check(self) -> None:
        """Nothing has two owners or none. Call it while nothing is under way."""
        self.store.check()
        assert not len(self.store.loads), f"{len(self.store.loads)} loads are under way"
        uses, leases = self.store.ram.num_uses, self.leases.num_leases
        assert uses == leases, f"{uses} uses of blobs in RAM, and {leases} leases"


def _new_arena(config: KvStoreConfig) -> Arena:
    config.arena_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    remove_dead_arenas(config.arena_dir)
    remove_dead_clients(config.arena_dir)
    # A new file each time: workers still map that of a store that died.
    path = config.arena_dir / f"{secrets.token_hex(8)}{FILE_SUFFIX}"
    return Arena.create(path, config.ram_bytes)


async def _tick(work: Callable[[], Awaitable[None]], store_name: str) -> None:
    """What nobody asks for and time demands."""
    while True:
        await asyncio.sleep(TICK_SECONDS)
        try:
            await work()
        except Exception:  # a bug; without the rim a degraded tier would never come back
            log.exception("tick_failed store=%s", store_name)


async def _tidy_up(admin: Admin, ttl_seconds: float | None) -> None:
    num_blobs, num_leases = admin.collect(ttl_seconds)
    if num_blobs or num_leases:
        log.info("collected blobs=%d leases_of_dead_workers=%d", num_blobs, num_leases)


async def _look_after(store: TieredStore, tier: KeptTier) -> None:
    await tier.tick()
    await store.measure(tier)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])
