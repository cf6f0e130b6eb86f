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
from services.kvstore.loads import Found
from services.kvstore.peer_link import MAX_PART_BYTES
from services.kvstore.store import TieredStore
from services.kvstore.threads import finished

# That are answered at the same time.
MAX_FETCHES = 2
LOAD_TIMEOUT_SECONDS = 10.0
# Written to the stream before the next part is read.
MAX_PARTS = 8


class AttachedPeer:
    """One stream of a peer. `outbox` is what `duplex.answer` writes."""

    def __init__(self, store: TieredStore) -> None:
        self.outbox: asyncio.Queue[kvstore_pb2.PeerResponse] = asyncio.Queue(MAX_PARTS)
        self._store = store
        self._fetch_slots = asyncio.Semaphore(MAX_FETCHES)
        self._tasks: set[asyncio.Task[None]] = set()

    def receive(self, message: kvstore_pb2.PeerRequest) -> None:
        """Raises InvalidRequest for what no store of ours sends: then the stream has to end."""
        match message.WhichOneof("body"):
            case "contains":
                self._run(self._contains(message.call_id, split_keys(message.contains)))
            case "fetch":
                self._run(self._send(message.call_id, split_keys(message.fetch)))
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

    async def _send(self, call_id: int, keys: list[bytes]) -> None:
        asked_s = asyncio.get_running_loop().time()
        async with self._fetch_slots:
            # Only what is here: two stores that ask each other must come to an end. And nothing
            # that waited for so long that nobody wants it any more: behind a disk that hangs,
            # questions would pile up, and be answered all when it works again.
            waited_seconds = asyncio.get_running_loop().time() - asked_s
            is_wanted = waited_seconds < LOAD_TIMEOUT_SECONDS
            here = [i for i, key in enumerate(keys) if is_wanted and self._store.holds(key)]
            ready: asyncio.Queue[tuple[int, Found | None]] = asyncio.Queue()
            loading = asyncio.create_task(
                self._store.acquire(
                    [keys[index] for index in here],
                    lambda row, found: ready.put_nowait((here[row], found)),
                    timeout_seconds=LOAD_TIMEOUT_SECONDS,
                    identity=None,
                )
            )
            try:
                await self._send_absent(call_id, sorted({*range(len(keys))} - {*here}))
                for _ in here:
                    index, found = await ready.get()
                    if found is None:
                        await self._send_absent(call_id, [index])
                    else:
                        await self._send_blob(call_id, index, found)
            finally:
                loading.cancel()
                await finished(asyncio.ensure_future(asyncio.wait([loading])))
                while not ready.empty():
                    _, found = ready.get_nowait()
                    if found is not None:
                        self._store.ram.let_go(found.resident)

    async def _send_absent(self, call_id: int, indexes: list[int]) -> None:
        if indexes:
            absent = kvstore_pb2.Absent(indexes=indexes)
            await self.outbox.put(kvstore_pb2.PeerResponse(call_id=call_id, absent=absent))

    async def _send_blob(self, call_id: int, index: int, found: Found) -> None:
        try:
            blob = self._store.ram.arena.view(found.resident.span)
            for offset in range(0, len(blob), MAX_PART_BYTES):
                part = kvstore_pb2.PeerPart(
                    index=index,
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
