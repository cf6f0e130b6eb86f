"""One KV store as a gateway sees it: its records of sessions, and what operators may ask of it.

Reports of the store are passed on as they came: the gateway has no use for them.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import grpc

from model1.errors import InvalidRequest
from protos import (
    kvstore_pb2,
    kvstore_pb2_grpc,
    session_store_pb2,
    session_store_pb2_grpc,
)
from services import rpc
from services.errors import Unavailable, from_rpc_error
from services.kvstore.tier import Tier
from services.session_record import (
    SessionHead,
    SessionName,
    SessionRecord,
    head_from_wire,
    record_from_wire,
    record_to_wire,
)
from services.tls import Tls

CALL_TIMEOUT_SECONDS = 5.0
# Reading or forgetting whatever a tier has takes as long as its disk or Redis needs.
WHOLE_TIER_TIMEOUT_SECONDS = 600.0

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """A row of the table. A store that was restarted elsewhere is another row."""

    name: str
    address: str


class Written(NamedTuple):
    """Blobs that are in the store now, and that it refused."""

    kept_blobs: int
    refused_blobs: int


class Store:
    """A channel to one KV store. Every call raises `Unavailable` when it does not answer, and
    `InvalidRequest` when it has no such tier."""

    def __init__(self, row: StoreAddress, tls: Tls | None = None) -> None:
        self.row = row
        self._channel = rpc.channel(row.address, tls)
        self._records = session_store_pb2_grpc.SessionStoreStub(self._channel)
        self._admin = kvstore_pb2_grpc.KvAdminStub(self._channel)

    async def get(self, name: SessionName, *, ask_cold: bool) -> SessionRecord | None:
        request = session_store_pb2.GetSessionRecordRequest(
            session_id=name.session_id, cache_salt=name.cache_salt, ask_cold=ask_cold
        )
        answer = await self._answer(self._records.Get(request, timeout=CALL_TIMEOUT_SECONDS))
        return record_from_wire(answer.record) if answer.HasField("record") else None

    async def put(self, record: SessionRecord, expected_version: int) -> int | None:
        """None, or the version above `expected_version` that was there already."""
        request = session_store_pb2.PutSessionRecordRequest(
            record=record_to_wire(record), expected_version=expected_version
        )
        answer = await self._answer(self._records.Put(request, timeout=CALL_TIMEOUT_SECONDS))
        return None if answer.accepted else int(answer.version)

    async def heads(self, cache_salt: str, max_heads: int) -> list[SessionHead]:
        request = session_store_pb2.ListSessionRecordsRequest(
            cache_salt=cache_salt, max_records=max_heads
        )
        answer = await self._answer(self._records.List(request, timeout=CALL_TIMEOUT_SECONDS))
        return [head_from_wire(record) for record in answer.records]

    async def where(self, keys: Sequence[bytes]) -> list[Tier | None]:
        """The fastest tier that has each blob; a hint."""
        request = kvstore_pb2.KvWhereRequest(keys=keys, timeout_seconds=CALL_TIMEOUT_SECONDS)
        answer = await self._answer(self._admin.Where(request, timeout=2 * CALL_TIMEOUT_SECONDS))
        return [Tier(tier) if tier else None for tier in answer.tiers]

    async def prefetch(self, keys: Sequence[bytes], timeout_s: float) -> None:
        """Returns when the blobs are in memory, or cannot be, or the time is over."""
        request = kvstore_pb2.KvPrefetchRequest(keys=keys, timeout_seconds=timeout_s)
        await self._answer(self._admin.Prefetch(request, timeout=timeout_s + CALL_TIMEOUT_SECONDS))

    async def pin(self, keys: Sequence[bytes], until_s: float) -> None:
        """Until that time since 1970, whether the store has the blobs now or later."""
        request = kvstore_pb2.KvPinRequest(keys=keys, until=until_s)
        await self._answer(self._admin.Pin(request, timeout=CALL_TIMEOUT_SECONDS))

    async def unpin(self, keys: Sequence[bytes]) -> None:
        request = kvstore_pb2.KvUnpinRequest(keys=keys)
        await self._answer(self._admin.Unpin(request, timeout=CALL_TIMEOUT_SECONDS))

    async def forget(self, keys: Sequence[bytes], tier: Tier) -> None:
        request = kvstore_pb2.KvEvictRequest(keys=keys, tier=kvstore_pb2.KvTier.Name(tier))
        await self._answer(self._admin.Evict(request, timeout=WHOLE_TIER_TIMEOUT_SECONDS))

    async def read(self, keys: Sequence[bytes]) -> AsyncGenerator[kvstore_pb2.BlobPart, None]:
        """Whole blobs in the order of the keys, each in parts; what the store lacks is left out."""
        call = self._admin.Read(kvstore_pb2.KvReadRequest(keys=keys))
        try:
            with self._named_failures():
                async for part in call:
                    yield part
        finally:
            call.cancel()

    async def write(self, parts: AsyncIterator[kvstore_pb2.BlobPart]) -> Written:
        answer = await self._answer(self._admin.Write(parts))
        return Written(answer.stored + answer.present, answer.refused)

    async def stat(self) -> kvstore_pb2.KvStatResponse:
        request = kvstore_pb2.KvStatRequest()
        return await self._answer(self._admin.Stat(request, timeout=CALL_TIMEOUT_SECONDS))

    async def verify(self, request: kvstore_pb2.KvVerifyRequest) -> kvstore_pb2.KvVerifyResponse:
        call = self._admin.Verify(request, timeout=WHOLE_TIER_TIMEOUT_SECONDS)
        return await self._answer(call)

    async def evict(self, request: kvstore_pb2.KvEvictRequest) -> kvstore_pb2.KvEvictResponse:
        call = self._admin.Evict(request, timeout=WHOLE_TIER_TIMEOUT_SECONDS)
        return await self._answer(call)

    async def collect(self) -> kvstore_pb2.KvGcResponse:
        call = self._admin.Gc(kvstore_pb2.KvGcRequest(), timeout=WHOLE_TIER_TIMEOUT_SECONDS)
        return await self._answer(call)

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def _answer(self, call: Awaitable[Answer]) -> Answer:
        with self._named_failures():
            return await call

    @contextmanager
    def _named_failures(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            named = from_rpc_error(error)
            kind = InvalidRequest if isinstance(named, InvalidRequest) else Unavailable
            raise kind(f"KV store {self.row.name}: {named}") from error
