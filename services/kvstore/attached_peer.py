"""Owns the conversation with one other node's store: what it asks, from this node's RAM and disk.

Blobs go out in parts, a few at a time, so that a peer that reads slowly holds neither memory nor
RAM's blobs without bound.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from model1.errors import InvalidRequest
from protos import kvstore_pb2
from services.kv_keys import KEY_BYTES
from services.kvstore.attached import split_keys
from services.kvstore.peers import MAX_PART_BYTES
from services.kvstore.store import TieredStore

# That are read and sent at the same time.
MAX_BLOBS = 4
# Written to the stream before the next part is read.
MAX_PARTS = 8


class AttachedPeer:
    """One stream of a peer. `outbox` is what `duplex.answer` writes."""

    def __init__(self, store: TieredStore) -> None:
        self.outbox: asyncio.Queue[kvstore_pb2.PeerResponse] = asyncio.Queue(MAX_PARTS)
        self._store = store
        self._blob_slots = asyncio.Semaphore(MAX_BLOBS)
        self._tasks: set[asyncio.Task[None]] = set()

    def receive(self, message: kvstore_pb2.PeerRequest) -> None:
        """Raises InvalidRequest for what no store of ours sends: then the stream has to end."""
        match message.WhichOneof("body"):
            case "contains":
                self._run(self._contains(message.call_id, split_keys(message.contains)))
            case "fetch":
                self._run(self._send(message.call_id, _one_key(message.fetch)))
            case "suspect":
                self._run(self._store.suspect(_one_key(message.suspect)))
            case other:
                raise InvalidRequest(f"not a message of a store: {other}")

    def abandon(self) -> None:
        """The stream is over."""
        for task in self._tasks:
            task.cancel()

    async def _contains(self, call_id: int, keys: list[bytes]) -> None:
        presence = bytes(self._store.holds(key) for key in keys)
        await self.outbox.put(kvstore_pb2.PeerResponse(call_id=call_id, presence=presence))

    async def _send(self, call_id: int, key: bytes) -> None:
        async with self._blob_slots:
            # Only what is here: two stores that ask each other must come to an end.
            found = await self._store.obtain(key) if self._store.holds(key) else None
            if found is None:
                await self.outbox.put(kvstore_pb2.PeerResponse(call_id=call_id, absent=True))
                return
            try:
                blob = self._store.ram.arena.view(found.resident.span)
                for offset in range(0, len(blob), MAX_PART_BYTES):
                    part = kvstore_pb2.BlobPart(
                        total_bytes=len(blob),
                        offset=offset,
                        data=bytes(blob[offset : offset + MAX_PART_BYTES]),
                    )
                    await self.outbox.put(kvstore_pb2.PeerResponse(call_id=call_id, part=part))
            finally:
                self._store.ram.let_go(found.resident)

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _one_key(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise InvalidRequest(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    return key
