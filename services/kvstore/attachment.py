"""The worker's end of the stream to its node's KV store: calls, answers, and the mapped arena.

Connects and reconnects by itself; a store that came back is another arena. Knows nothing of blobs.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import grpc.aio

from protos import kvstore_pb2, kvstore_pb2_grpc
from services.duplex import Duplex
from services.kvstore.arena import ArenaUnavailable, ArenaView
from services.kvstore.leases import ClientLock, client_path
from services.tls import Tls

log = logging.getLogger(__name__)

# A message for each block by itself was a third of the time of a restore.
RELEASE_DELAY_SECONDS = 0.002
# A store that does not answer is not asked for so long.
SILENCE_SECONDS = 5.0
# Initial metadata of the store's stream.
ARENA_PATH_KEY = "model1-arena-path"
ARENA_IDENTITY_KEY = "model1-arena-identity-bin"


class Caller(Protocol):
    """Who waits for answers."""

    def answered(self, call_id: int, message: kvstore_pb2.StoreMessage) -> None:
        """The leases in it are the caller's to end, and their spans may be touched before this
        returns and not after: so a stream that comes back finds nobody in the middle of a copy."""

    def lost(self, call_id: int) -> None:
        """The stream broke: nothing will be answered any more."""


class Attachment:
    def __init__(
        self,
        address: str,
        *,
        worker: str,
        model_digest: bytes,
        layout_digest: bytes,
        tls: Tls | None = None,
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
        self._to_release: list[int] = []  # leases
        self._silent_until_s = 0.0  # on the monotonic clock
        self._attached = asyncio.Event()
        self._stream: Duplex[kvstore_pb2.WorkerMessage, kvstore_pb2.StoreMessage] = Duplex(
            address,
            lambda channel: kvstore_pb2_grpc.KvStoreStub(channel).Attach(),
            opened=self._opened,
            receive=self._receive,
            broken=self._broken,
            tls=tls,
        )

    @classmethod
    async def open(
        cls,
        address: str,
        *,
        worker: str,
        model_digest: bytes,
        layout_digest: bytes,
        tls: Tls | None = None,
    ) -> Attachment:
        """In the loop that runs this."""
        return cls(
            address,
            worker=worker,
            model_digest=model_digest,
            layout_digest=layout_digest,
            tls=tls,
        )

    @property
    def connected(self) -> bool:
        """The store is there, and answers. Any thread may ask."""
        can_send = self._attached.is_set() and self._stream.connected
        return can_send and self._silent_until_s <= time.monotonic()

    def note_silence(self) -> None:
        """A call was not answered in time: no more of them for a while, or until the store says
        anything. It will when it goes on: that call is still on its way."""
        self._silent_until_s = time.monotonic() + SILENCE_SECONDS

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
        """The caller waits no longer. Leases in answers that still come are released."""
        self._callers.pop(call_id, None)

    def send(self, message: kvstore_pb2.WorkerMessage) -> None:
        """Something without an answer; lost when the store is away.

        Not when it only reads nothing just now: what ends a lease has to reach it.
        """
        if self._attached.is_set():
            self._stream.send(message)

    @property
    def arena(self) -> ArenaView:
        """Where the spans lie of an answer that is being looked at."""
        assert self._arena is not None, "an answer came from a store that was never attached"
        return self._arena

    def release(self, leases: Sequence[int]) -> None:
        """We touch these no more; the message goes with others that are released soon."""
        if leases and not self._to_release:
            loop = asyncio.get_running_loop()
            loop.call_later(RELEASE_DELAY_SECONDS, self._send_releases)
        self._to_release += leases

    async def close(self) -> None:
        """After the last lease was released."""
        self._send_releases()
        self._attached.clear()
        await self._stream.close()
        self._broken("closed")
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _send_releases(self) -> None:
        leases, self._to_release = self._to_release, []
        if leases:
            self.send(kvstore_pb2.WorkerMessage(release=kvstore_pb2.Release(leases=leases)))

    def _opened(self, metadata: grpc.aio.Metadata) -> None:
        identity = metadata[ARENA_IDENTITY_KEY]
        path = Path(str(metadata[ARENA_PATH_KEY]))
        assert isinstance(identity, bytes)
        try:
            if identity != self._identity:
                self._attach(path, identity)
            if self._lock is None or not self._lock.holds(client_path(path, self._client_id)):
                self._relock(client_path(path, self._client_id))
        except (OSError, ArenaUnavailable) as error:
            # Another node's store, or a folder that is not shared: misses, and not a reason to
            # try again before the store itself comes back.
            log.error("kvstore_not_attached store=%s reason=%s", self._stream.address, error)
            return
        self._to_release.clear()  # our hello ends them all
        self._stream.send(kvstore_pb2.WorkerMessage(hello=self._hello))
        self._attached.set()
        log.info("kvstore_attached store=%s arena=%s", self._stream.address, path)

    @property
    def _client_id(self) -> str:
        return self._hello.client_id

    def _attach(self, path: Path, identity: bytes) -> None:
        arena = ArenaView.attach(path, identity)
        if self._arena is not None:
            self._arena.close()
        self._arena, self._identity = arena, identity

    def _relock(self, path: Path) -> None:
        lock = ClientLock(path)
        if self._lock is not None:
            self._lock.close()
        self._lock = lock

    def _receive(self, message: kvstore_pb2.StoreMessage) -> None:
        self._silent_until_s = 0.0
        if (caller := self._callers.get(message.call_id)) is not None:
            caller.answered(message.call_id, message)
        else:
            self.release(message.granted.leases)
            self.release([lease for lease in message.reserved.leases if lease])

    def _broken(self, reason: str) -> None:
        self._silent_until_s = 0.0
        if self._attached.is_set():
            self._attached.clear()
            self.num_breaks += 1
            log.warning("kvstore_lost store=%s reason=%s", self._stream.address, reason)
        callers, self._callers = self._callers, {}
        for call_id, caller in callers.items():
            caller.lost(call_id)
