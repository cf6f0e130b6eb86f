"""The worker's end of the stream to its node's KV store: calls and answers, the mapped arena, and
which leases this process holds.

Connects and reconnects by itself. A store that came back is another arena: the old one stays mapped
as long as somebody holds a view of it. Knows nothing of blobs.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import grpc.aio

from protos import kvstore_pb2, kvstore_pb2_grpc
from services.duplex import Duplex
from services.kvstore.arena import ArenaView
from services.kvstore.leases import ClientLock, client_path

log = logging.getLogger(__name__)

# Initial metadata of the store's stream.
ARENA_PATH_KEY = "model1-arena-path"
ARENA_IDENTITY_KEY = "model1-arena-identity-bin"


# A store that does not answer is not asked for so long.
SILENCE_SECONDS = 5.0


class Lease:
    """A span that the store will give to nobody else until it is released."""

    __slots__ = ("arena", "lease_id", "memory")

    def __init__(self, arena: ArenaView, lease_id: int, memory: memoryview) -> None:
        self.arena = arena
        self.lease_id = lease_id
        self.memory = memory  # writable


class Caller(Protocol):
    """Who waits for answers."""

    def answered(self, call_id: int, message: kvstore_pb2.StoreMessage) -> None: ...

    def lost(self, call_id: int) -> None:
        """The stream broke: nothing will be answered any more. Leases live on."""


class Attachment:
    def __init__(
        self, address: str, *, worker: str, model_digest: bytes, layout_digest: bytes
    ) -> None:
        """Call it inside the event loop. Connects in the background, for as long as it takes."""
        self.num_breaks = 0
        self._hello = kvstore_pb2.Hello(
            client_id=secrets.token_hex(16),
            worker=worker,
            model_digest=model_digest,
            layout_digest=layout_digest,
        )
        self._call_ids = itertools.count(1)
        self._callers: dict[int, Caller] = {}
        self._arena: ArenaView | None = None
        self._identity = b""
        self._lock: ClientLock | None = None
        self._held: set[int] = set()  # lease ids of the arena in use
        self._attached = asyncio.Event()
        self._silent_until_s = 0.0  # on the loop's clock
        self._stream: Duplex[kvstore_pb2.WorkerMessage, kvstore_pb2.StoreMessage] = Duplex(
            address,
            lambda channel: kvstore_pb2_grpc.KvStoreStub(channel).Attach(),
            opened=self._opened,
            receive=self._receive,
            broken=self._broken,
        )

    @property
    def connected(self) -> bool:
        """The store is there, and answers."""
        return self._can_send and self._silent_until_s <= asyncio.get_running_loop().time()

    def note_silence(self) -> None:
        """A call was not answered in time: no more of them for a while, or until the store says
        anything. It will when it goes on: that call is still on its way."""
        self._silent_until_s = asyncio.get_running_loop().time() + SILENCE_SECONDS

    @property
    def num_leases(self) -> int:
        return len(self._held)

    async def wait_connected(self) -> None:
        await self._attached.wait()

    def call(self, caller: Caller, message: kvstore_pb2.WorkerMessage) -> int | None:
        """Send a call; its id, or None when the store is away."""
        if not self.connected:
            return None
        message.call_id = next(self._call_ids)
        self._callers[message.call_id] = caller
        self._stream.send(message)
        return message.call_id

    def forget(self, call_id: int) -> None:
        """The caller waits no longer; leases in answers that still come are released."""
        self._callers.pop(call_id, None)

    def send(self, message: kvstore_pb2.WorkerMessage) -> None:
        """Something without an answer; lost when the store is away."""
        if self._can_send:
            self._stream.send(message)

    def lease(self, lease_id: int, offset: int, length: int) -> Lease:
        """Take note of a lease in an answer, which is now the caller's to release."""
        assert self._arena is not None, "an answer came from a store that was never attached"
        self._held.add(lease_id)
        return Lease(self._arena, lease_id, self._arena.view(offset, length))

    def release(self, leases: Iterable[Lease]) -> None:
        """No thread of ours touches these any more."""
        ids = [lease.lease_id for lease in leases if self.settle(lease)]
        if ids:
            self.send(kvstore_pb2.WorkerMessage(release=kvstore_pb2.Release(leases=ids)))

    def settle(self, lease: Lease) -> bool:
        """The next message ends the lease; False if the store that gave it is gone."""
        lease.memory.release()
        if lease.arena is not self._arena:
            return False
        self._held.discard(lease.lease_id)
        return True

    def discard(self, message: kvstore_pb2.StoreMessage) -> None:
        """Release the leases of an answer that nobody has taken note of."""
        unwanted = [grant.lease for grant in message.granted.grants]
        unwanted += [room.lease for room in message.reserved.rooms if room.lease]
        if unwanted:
            self.send(kvstore_pb2.WorkerMessage(release=kvstore_pb2.Release(leases=unwanted)))

    async def close(self) -> None:
        """After the last lease was released."""
        await self._stream.close()
        self._broken("closed")
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _opened(self, metadata: grpc.aio.Metadata) -> None:
        identity = metadata[ARENA_IDENTITY_KEY]
        path = Path(str(metadata[ARENA_PATH_KEY]))
        assert isinstance(identity, bytes)
        try:
            if identity != self._identity:
                self._attach(path, identity)
            if self._lock is None or not self._lock.holds(client_path(path, self._client_id)):
                self._relock(client_path(path, self._client_id))
        except OSError as error:
            # Another node's store, or a folder that is not shared: misses, and not a reason to
            # try again before the store itself comes back.
            log.error("kvstore_not_attached store=%s reason=%s", self._stream.address, error)
            return
        self._hello.held_leases[:] = self._held
        self._stream.send(kvstore_pb2.WorkerMessage(hello=self._hello))
        self._attached.set()
        log.info("kvstore_attached store=%s arena=%s", self._stream.address, path)

    @property
    def _can_send(self) -> bool:
        return self._attached.is_set() and self._stream.connected

    @property
    def _client_id(self) -> str:
        return self._hello.client_id

    def _attach(self, path: Path, identity: bytes) -> None:
        arena = ArenaView.attach(path, identity)
        if self._arena is not None:
            self._arena.close()
        self._arena, self._identity = arena, identity
        self._held.clear()

    def _relock(self, path: Path) -> None:
        lock = ClientLock(path)
        if self._lock is not None:
            self._lock.close()
        self._lock = lock

    def _receive(self, message: kvstore_pb2.StoreMessage) -> None:
        self._silent_until_s = 0.0
        caller = self._callers.get(message.call_id)
        if caller is not None:
            caller.answered(message.call_id, message)
            return
        self.discard(message)

    def _broken(self, reason: str) -> None:
        self._silent_until_s = 0.0
        if self._attached.is_set():
            self._attached.clear()
            self.num_breaks += 1
            log.warning("kvstore_lost store=%s reason=%s", self._stream.address, reason)
        callers, self._callers = self._callers, {}
        for call_id, caller in callers.items():
            caller.lost(call_id)
