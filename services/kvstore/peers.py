"""The other nodes' stores, asked like one tier: a stream to each, blobs in bounded parts.

Whatever comes is verified here. A peer that is away or slow is a miss; one that has answered well
for a key is asked for it first. Knows nothing of what the peers do among themselves.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from protos import kvstore_pb2, kvstore_pb2_grpc
from services.duplex import Duplex
from services.kvstore.blob import Damaged, DamageReason, check_blob
from services.kvstore.threads import finished, in_parallel
from services.kvstore.tier import Loaded, Rooms, Tier

log = logging.getLogger(__name__)

MAX_PART_BYTES = 256 * 1024
# Of one load.
FETCHED_AT_ONCE = 8
# Where each of so many keys was seen last.
MAX_REMEMBERED_KEYS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLimits:
    # A peer that answers later has not got the blob.
    contains_timeout_seconds: float = 0.25
    # From the question to the last part.
    fetch_timeout_seconds: float = 10.0


class Peers:
    """Call it inside the event loop."""

    tier = Tier.PEER

    def __init__(self, limits: PeerLimits) -> None:
        self._limits = limits
        self._links: dict[str, _PeerLink] = {}
        self._seen_at: OrderedDict[bytes, str] = OrderedDict()

    @property
    def addresses(self) -> list[str]:
        return list(self._links)

    @property
    def degraded(self) -> str | None:
        away = [link.address for link in self._links.values() if not link.connected]
        return f"not connected: {', '.join(sorted(away))}" if away else None

    async def set_addresses(self, addresses: Iterable[str]) -> None:
        """These are the other stores from now on."""
        wanted = dict.fromkeys(addresses)
        gone = [self._links.pop(address) for address in list(self._links) if address not in wanted]
        for address in wanted:
            if address not in self._links:
                self._links[address] = _PeerLink(address)
        for link in gone:
            await link.close()

    def has(self, key: bytes) -> bool:
        return False

    async def contains(self, keys: Sequence[bytes]) -> Sequence[bool]:
        found = [False] * len(keys)

        async def ask(link: _PeerLink) -> None:
            there = await link.contains(keys, self._limits.contains_timeout_seconds)
            for index, has_it in enumerate(there):
                if has_it:
                    found[index] = True
                    self._remember(keys[index], link.address)

        async with asyncio.TaskGroup() as tasks:
            for link in self._links.values():
                if link.connected:
                    tasks.create_task(ask(link))
        return found

    async def load(self, keys: Sequence[bytes], rooms: Rooms) -> AsyncGenerator[Loaded]:
        calls = [partial(self._load, key, rooms) for key in keys]
        fetching = in_parallel(calls, at_once=FETCHED_AT_ONCE)
        async with aclosing(fetching):
            async for loaded in fetching:
                yield loaded

    async def drop(self, keys: Sequence[bytes]) -> int:
        """What peers keep is theirs."""
        return 0

    async def close(self) -> None:
        await self.set_addresses(())

    async def _load(self, key: bytes, rooms: Rooms) -> Loaded:
        for link in self._in_order(key):
            if not link.connected:
                continue
            try:
                async with asyncio.timeout(self._limits.fetch_timeout_seconds):
                    memory = await link.fetch(key, rooms)
                if memory is None:
                    continue
                work = asyncio.get_running_loop().run_in_executor(None, check_blob, memory, key)
                header = await finished(work)
            except TimeoutError:
                log.warning("peer_late peer=%s key=%s", link.address, key.hex())
                continue
            except Damaged as damage:
                link.suspect(key)
                self._seen_at.pop(key, None)
                return key, damage
            self._remember(key, link.address)
            return key, header
        return key, None

    def _in_order(self, key: bytes) -> list[_PeerLink]:
        first = self._seen_at.get(key)
        return sorted(self._links.values(), key=lambda link: link.address != first)

    def _remember(self, key: bytes, address: str) -> None:
        self._seen_at[key] = address
        self._seen_at.move_to_end(key)
        if len(self._seen_at) > MAX_REMEMBERED_KEYS:
            self._seen_at.popitem(last=False)


class _PeerLink:
    """The stream to one peer, and the questions under way on it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._call_ids = itertools.count(1)
        # What came for each call; None at the end of it when the stream breaks.
        self._answers: dict[int, asyncio.Queue[kvstore_pb2.PeerResponse | None]] = {}
        self._stream: Duplex[kvstore_pb2.PeerRequest, kvstore_pb2.PeerResponse] = Duplex(
            address,
            lambda channel: kvstore_pb2_grpc.KvStoreStub(channel).Exchange(),
            receive=self._receive,
            broken=self._broken,
        )

    @property
    def connected(self) -> bool:
        return self._stream.connected

    async def contains(self, keys: Sequence[bytes], timeout_seconds: float) -> bytes:
        """One byte a key; none at all if the peer does not answer."""
        question = kvstore_pb2.PeerRequest(contains=b"".join(keys))
        call_id, answers = self._ask(question)
        try:
            async with asyncio.timeout(timeout_seconds):
                answer = await answers.get()
        except TimeoutError:
            return b""
        finally:
            del self._answers[call_id]
        return answer.presence if answer is not None else b""

    async def fetch(self, key: bytes, rooms: Rooms) -> memoryview | None:
        """Its room with the bytes of the blob as they came; None if the peer has not got it.

        Raises Damaged when the parts are not one whole, and NoRoom.
        """
        call_id, answers = self._ask(kvstore_pb2.PeerRequest(fetch=key))
        memory: memoryview | None = None
        num_bytes = 0
        try:
            while memory is None or num_bytes < len(memory):
                answer = await answers.get()
                if answer is None or answer.absent:
                    return None
                part = answer.part
                if memory is None:
                    memory = await rooms.wait_for(key, part.total_bytes)
                end = num_bytes + len(part.data)
                if part.offset != num_bytes or not part.data or end > len(memory):
                    raise Damaged(DamageReason.TRUNCATED)
                memory[num_bytes:end] = part.data
                num_bytes = end
        finally:
            del self._answers[call_id]
        return memory

    def suspect(self, key: bytes) -> None:
        if self.connected:
            self._stream.send(kvstore_pb2.PeerRequest(suspect=key))

    async def close(self) -> None:
        await self._stream.close()
        self._broken("closed")

    def _ask(
        self, question: kvstore_pb2.PeerRequest
    ) -> tuple[int, asyncio.Queue[kvstore_pb2.PeerResponse | None]]:
        question.call_id = next(self._call_ids)
        answers: asyncio.Queue[kvstore_pb2.PeerResponse | None] = asyncio.Queue()
        self._answers[question.call_id] = answers
        if self.connected:
            self._stream.send(question)
        else:
            answers.put_nowait(None)
        return question.call_id, answers

    def _receive(self, message: kvstore_pb2.PeerResponse) -> None:
        if (answers := self._answers.get(message.call_id)) is not None:
            answers.put_nowait(message)

    def _broken(self, reason: str) -> None:
        log.info("peer_lost peer=%s reason=%s", self.address, reason)
        for answers in self._answers.values():
            answers.put_nowait(None)
