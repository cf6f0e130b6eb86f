"""The gRPC edge of a node's KV store, and its life from listening to closed.

Knows the wire, the store and its parts; nothing of what a block means.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial

import grpc.aio

from model1.errors import InvalidRequest
from protos import kvstore_pb2, kvstore_pb2_grpc
from services import rpc
from services.duplex import answer
from services.errors import ending_with_status
from services.kvstore.arena import FILE_SUFFIX, Arena, remove_dead_arenas
from services.kvstore.attached import AttachedWorker
from services.kvstore.attachment import ARENA_IDENTITY_KEY, ARENA_PATH_KEY
from services.kvstore.config import KvStoreConfig
from services.kvstore.leases import LeaseBook, remove_dead_clients
from services.kvstore.lru import Lru
from services.kvstore.ram import RamTier
from services.kvstore.store import TieredStore

log = logging.getLogger(__name__)

# How often the store looks after what nobody asks it to do.
TICK_SECONDS = 1.0


class KvStoreService(kvstore_pb2_grpc.KvStoreServicer):
    """model1.v1.KvStore over a store that someone else opens and closes."""

    def __init__(self, store: TieredStore, leases: LeaseBook, *, name: str) -> None:
        self.num_requests = 0
        self._store = store
        self._leases = leases
        self._name = name
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

    async def Stat(
        self,
        request: kvstore_pb2.KvStatRequest,
        context: grpc.aio.ServicerContext[kvstore_pb2.KvStatRequest, kvstore_pb2.KvStatResponse],
    ) -> kvstore_pb2.KvStatResponse:
        return kvstore_pb2.KvStatResponse(store=self._name)

    async def drain(self) -> None:
        """End the workers' streams: from now on everything is a miss to them."""
        self._draining.set()


async def _at_once() -> None:
    """A worker takes what it has not got for a miss when its stream ends."""


class KvStoreServer:
    """A listening store: owner of its arena, of what lies in it, and of the server."""

    def __init__(
        self,
        service: KvStoreService,
        store: TieredStore,
        leases: LeaseBook,
        server: rpc.RunningServer,
    ) -> None:
        self.address = server.address
        self.store = store
        self.leases = leases
        self._service = service
        self._server = server
        self._ticking = asyncio.create_task(self._tick(), name="kvstore tick")

    @classmethod
    async def open(cls, config: KvStoreConfig) -> KvStoreServer:
        """Listen and serve. Raises ArenaUnavailable, and rpc.AddressUnavailable."""
        config.arena_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_dead_arenas(config.arena_dir)
        remove_dead_clients(config.arena_dir)
        # A new file each time: workers still map that of a store that died.
        path = config.arena_dir / f"{secrets.token_hex(8)}{FILE_SUFFIX}"
        arena = await asyncio.to_thread(Arena.create, path, config.ram_bytes)
        try:
            ram = RamTier(arena, Lru(), time.monotonic, unsaved=lambda _key: False)
            store = TieredStore(ram, (), config.limits, clock=time.monotonic)
            leases = LeaseBook(ram)
            service = KvStoreService(store, leases, name=config.name)
            register = partial(kvstore_pb2_grpc.add_KvStoreServicer_to_server, service)
            server = await rpc.start_server(
                [rpc.Service("model1.v1.KvStore", register, service.drain)], config.address
            )
        except BaseException:
            arena.close()
            raise
        return cls(service, store, leases, server)

    @property
    def num_requests(self) -> int:
        return self._service.num_requests

    async def stop(self, grace_seconds: float) -> None:
        """End the streams, close, and give the memory back. Idempotent."""
        await self._server.stop(grace_seconds)
        self._ticking.cancel()
        await asyncio.wait([self._ticking])
        await self.store.close()
        self.leases.close()
        self.store.ram.arena.close()

    def check(self) -> None:
        self.store.check()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            if num_leases := self.leases.end_those_of_the_dead():
                log.warning("leases_of_dead_workers_ended leases=%d", num_leases)
