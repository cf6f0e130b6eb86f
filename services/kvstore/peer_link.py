"""Owns the stream to one other node's store, and the questions under way on it.

Blobs come in bounded parts, and whatever comes is verified here. Connects and reconnects by itself;
while the peer is away everything is a miss.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from protos import kvstore_pb2, kvstore_pb2_grpc
from services.duplex import Duplex
from services.kvstore.blob import Damaged, DamageReason, check_blob, read_header
from services.kvstore.tier import Loaded, Rooms
from services.tls import Tls

log = logging.getLogger(__name__)

MAX_PART_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerLimits:
    # A peer that answers later has not got the blob.
    contains_timeout_seconds: float = 0.25
    # Without anything coming.
    fetch_timeout_seconds: float = 5.0


class PeerLink:
    """Call it inside the event loop."""

    def __init__(self, address: str, tls: Tls | None = None) -> None:
        self.address = address
        self._call_ids = itertools.count(1)
        # What came for each call; None at the end of it when the stream breaks.
        self._answers: dict[int, asyncio.Queue[kvstore_pb2.PeerResponse | None]] = {}
        self._stream: Duplex[kvstore_pb2.PeerRequest, kvstore_pb2.PeerResponse] = Duplex(
            address,
            lambda channel: kvstore_pb2_grpc.KvStoreStub(channel).Exchange(),
            receive=self._receive,
            broken=self._broken,
            tls=tls,
        )

    @property
    def connected(self) -> bool:
        return self._stream.connected

    async def contains(self, keys: Sequence[bytes], timeout_seconds: float) -> bytes:
        """One byte a key; none at all if the peer does not answer, or not for each key."""
        call_id, answers = self._ask(kvstore_pb2.PeerRequest(contains=b"".join(keys)))
        try:
            async with asyncio.timeout(timeout_seconds):
                answer = await answers.get()
        except TimeoutError:
            return b""
        finally:
            del self._answers[call_id]
        if answer is None or len(answer.presence) != len(keys):
            return b""
        return answer.presence

    async def fetch(
        self, keys: Sequence[bytes], rooms: Rooms, limits: PeerLimits
    ) -> AsyncGenerator[Loaded]:
        """As LowerTier.load. It ends early when the peer falls silent."""
        call_id, answers = self._ask(kvstore_pb2.PeerRequest(fetch=b"".join(keys)))
        arriving: dict[int, _Arriving] = {}
        left = set(range(len(keys)))
        try:
            while left:
                async with asyncio.timeout(limits.fetch_timeout_seconds):
                    answer = await answers.get()
                if answer is None:
                    return
                for index in left.intersection(answer.absent.indexes):
                    left.remove(index)
                    yield keys[index], None
                part = answer.part
                if not answer.HasField("part") or part.index not in left:
                    continue  # or the rest of a blob that is damaged
                key = keys[part.index]
                try:
                    if part.index not in arriving:
                        memory = await rooms.wait_for(key, _nbytes_of(key, part))
                        arriving[part.index] = _Arriving(memory)
                    if not arriving[part.index].take(part):
                        continue
                    loaded: Loaded = key, check_blob(arriving[part.index].memory, key)
                except Damaged as damage:
                    self._suspect(key)
                    loaded = key, damage
                left.remove(part.index)
                yield loaded
        except TimeoutError:
            log.warning("peer_late peer=%s blobs=%d", self.address, len(left))
        finally:
            del self._answers[call_id]

    async def close(self) -> None:
        await self._stream.close()
        self._broken("closed")

    def _suspect(self, key: bytes) -> None:
        """The peer may look at its own copy."""
        if self.connected:
            self._stream.send(kvstore_pb2.PeerRequest(suspect=key))

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


class _Arriving:
    """A blob of which the first bytes are there."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self._num_bytes = 0

    def take(self, part: kvstore_pb2.PeerPart) -> bool:
        """Whether it is complete now. Raises Damaged when the parts are not one whole."""
        end = self._num_bytes + len(part.data)
        if part.offset != self._num_bytes or not part.data or end > len(self.memory):
            raise Damaged(DamageReason.TRUNCATED)
        self.memory[self._num_bytes : end] = part.data
        self._num_bytes = end
        return end == len(self.memory)


def _nbytes_of(key: bytes, first: kvstore_pb2.PeerPart) -> int:
    """The length of the blob whose first part this is, so that no blob leaves RAM for a length that
    is only claimed. Raises Damaged."""
    header = read_header(memoryview(first.data))
    if header.key != key:
        raise Damaged(DamageReason.KEY)
    if first.offset or first.total_bytes != header.nbytes:
        raise Damaged(DamageReason.TRUNCATED)
    return header.nbytes
