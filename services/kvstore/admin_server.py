"""The gRPC edge of what operators and gateways ask of a store: model1.v1.KvAdmin."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc.aio

from model1.errors import InvalidRequest
from protos import kvstore_pb2, kvstore_pb2_grpc
from services.errors import ending_with_status
from services.kv_keys import KEY_BYTES
from services.kvstore.admin import Admin, TierIsOff
from services.kvstore.attached import MAX_KEYS_PER_CALL, TIER_TO_WIRE
from services.kvstore.blob import Damaged
from services.kvstore.leases import LeaseBook
from services.kvstore.peer_link import MAX_PART_BYTES
from services.kvstore.peers import Peers
from services.kvstore.sessions import SessionTable
from services.kvstore.store import TieredStore
from services.kvstore.tier import NoRoom, Tier

log = logging.getLogger(__name__)

# Of one blob that comes from outside.
MAX_BLOB_BYTES = 256 * 1024 * 1024

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class KvAdminService(kvstore_pb2_grpc.KvAdminServicer):
    def __init__(
        self,
        store: TieredStore,
        leases: LeaseBook,
        peers: Peers,
        sessions: SessionTable,
        *,
        name: str,
        ttl_seconds: float | None,
    ) -> None:
        self._store = store
        self._leases = leases
        self._peers = peers
        self._sessions = sessions
        self._name = name
        self._ttl_seconds = ttl_seconds
        self._admin = Admin(store, leases)
        self._opened_at = time.monotonic()

    async def Stat(
        self, request: kvstore_pb2.KvStatRequest, context: Context
    ) -> kvstore_pb2.KvStatResponse:
        store = self._store
        stat = kvstore_pb2.KvStatResponse(
            store=self._name,
            uptime_seconds=time.monotonic() - self._opened_at,
            workers=self._leases.num_clients,
            leases=self._leases.num_leases,
            loads=len(store.loads),
            loads_without_room=store.loads.num_without_room,
            refused_reservations=store.ram.counts.refused_reservations,
            pinned_keys=len(store.pins),
            sessions=kvstore_pb2.KvSessionsStat(
                degraded=self._sessions.degraded or "",
                waiting=self._sessions.num_held,
                damaged=self._sessions.num_damaged,
            ),
        )
        async with ending_with_status(context):
            for tier in store.stats:
                stat.tiers.append(await self._tier_stat(tier))
        return stat

    async def Where(
        self, request: kvstore_pb2.KvWhereRequest, context: Context
    ) -> kvstore_pb2.KvWhereResponse:
        where = kvstore_pb2.KvWhereResponse()
        async with ending_with_status(context):
            tiers = await self._store.locate(_keys(request.keys), _seconds(request.timeout_seconds))
            where.tiers.extend(
                TIER_TO_WIRE[tier] if tier is not None else kvstore_pb2.KV_TIER_UNSPECIFIED
                for tier in tiers
            )
        return where

    async def Prefetch(
        self, request: kvstore_pb2.KvPrefetchRequest, context: Context
    ) -> kvstore_pb2.KvPrefetchResponse:
        async with ending_with_status(context):
            keys = _keys(request.keys)
            resident = await self._store.bring(keys, _seconds(request.timeout_seconds))
        return kvstore_pb2.KvPrefetchResponse(resident=resident)

    async def Pin(
        self, request: kvstore_pb2.KvPinRequest, context: Context
    ) -> kvstore_pb2.KvPinResponse:
        async with ending_with_status(context):
            self._store.pins.pin(_keys(request.keys), _seconds(request.until))
        return kvstore_pb2.KvPinResponse()

    async def Unpin(
        self, request: kvstore_pb2.KvUnpinRequest, context: Context
    ) -> kvstore_pb2.KvUnpinResponse:
        async with ending_with_status(context):
            unpinned = self._store.pins.unpin(_keys(request.keys))
        return kvstore_pb2.KvUnpinResponse(unpinned=unpinned)

    async def Evict(
        self, request: kvstore_pb2.KvEvictRequest, context: Context
    ) -> kvstore_pb2.KvEvictResponse:
        evicted = kvstore_pb2.KvEvictResponse()
        async with _ending_with_status(context):
            tier = _tier(request.tier)
            if request.keys:
                evicted.blobs = await self._admin.drop(tier, _keys(request.keys))
            else:
                evicted.freed_bytes = await self._admin.evict(tier, request.bytes)
        return evicted

    async def Verify(
        self, request: kvstore_pb2.KvVerifyRequest, context: Context
    ) -> kvstore_pb2.KvVerifyResponse:
        async with _ending_with_status(context):
            report = await self._admin.verify(_tier(request.tier), repair=request.repair)
        damaged = {str(reason): num_blobs for reason, num_blobs in report.damaged.items()}
        return kvstore_pb2.KvVerifyResponse(blobs=report.num_blobs, damaged=damaged)

    async def Gc(
        self, request: kvstore_pb2.KvGcRequest, context: Context
    ) -> kvstore_pb2.KvGcResponse:
        async with ending_with_status(context):
            before = self._store.ram.used_bytes
            blobs, leases = self._admin.collect(self._ttl_seconds)
            freed = max(0, before - self._store.ram.used_bytes)
        return kvstore_pb2.KvGcResponse(dropped_blobs=blobs, freed_bytes=freed, ended_leases=leases)

    async def Read(self, request: kvstore_pb2.KvReadRequest, context: Context) -> None:
        async with (
            ending_with_status(context),
            aclosing(self._admin.read(_keys(request.keys))) as blobs,
        ):
            async for blob in blobs:
                for part in parts_of(blob):
                    await context.write(part)

    async def Write(
        self, request_iterator: AsyncIterator[kvstore_pb2.BlobPart], context: Context
    ) -> kvstore_pb2.KvWriteResponse:
        written = kvstore_pb2.KvWriteResponse()
        async with ending_with_status(context):
            async for blob in _whole_blobs(request_iterator):
                try:
                    if await self._admin.write(blob):
                        written.stored += 1
                    else:
                        written.present += 1
                except (Damaged, NoRoom) as refusal:
                    log.warning("blob_refused reason=%s", refusal)
                    written.refused += 1
        return written

    async def SetPeers(
        self, request: kvstore_pb2.KvSetPeersRequest, context: Context
    ) -> kvstore_pb2.KvSetPeersResponse:
        async with ending_with_status(context):
            await self._peers.set_addresses(request.addresses)
        return kvstore_pb2.KvSetPeersResponse()

    async def _tier_stat(self, tier: Tier) -> kvstore_pb2.KvTierStat:
        store = self._store
        stats = store.stats[tier]
        below = next((each for each in store.below.tiers if each.tier is tier), None)
        stat = kvstore_pb2.KvTierStat(
            tier=TIER_TO_WIRE[tier],
            degraded=(below.degraded or "") if below is not None else "",
            hits=stats.hits,
            misses=stats.misses,
            hit_tokens=stats.hit_tokens,
            loaded_bytes=stats.loaded_bytes,
            load_seconds_p50=stats.latency_seconds(0.5),
            load_seconds_p99=stats.latency_seconds(0.99),
            bytes_per_second=stats.cost.bytes_per_second if stats.cost is not None else 0.0,
            damaged=stats.damaged,
        )
        if tier is not Tier.PEER:
            usage = await self._admin.usage(tier)
            stat.blobs, stat.used_bytes = usage.num_blobs, usage.used_bytes
            stat.budget_bytes, stat.evicted_blobs = usage.max_bytes, usage.evicted_blobs
            stat.failures.update(usage.failures)
        if tier is Tier.RAM:
            counts = store.ram.counts
            stat.stored_blobs, stat.stored_bytes = counts.inserted_blobs, counts.inserted_bytes
            stat.lost_blobs = counts.lost_blobs
            stat.lifetime_seconds = counts.lifetime_seconds / max(1, counts.evicted_blobs)
            stat.reuse_gap_seconds = counts.reuse_gap_seconds / max(1, counts.reuses)
        elif (write_back := store.write_backs.get(tier)) is not None:
            written = write_back.counts
            stat.stored_blobs, stat.stored_bytes = written.written_blobs, written.written_bytes
            stat.waiting_blobs = write_back.num_waiting
            stat.dropped_blobs, stat.refused_blobs = written.dropped_blobs, written.refused_blobs
        return stat


def parts_of(blob: memoryview) -> Iterator[kvstore_pb2.BlobPart]:
    for offset in range(0, len(blob), MAX_PART_BYTES):
        data = bytes(blob[offset : offset + MAX_PART_BYTES])
        yield kvstore_pb2.BlobPart(total_bytes=len(blob), offset=offset, data=data)


async def _whole_blobs(parts: AsyncIterator[kvstore_pb2.BlobPart]) -> AsyncIterator[bytearray]:
    """Raises InvalidRequest for parts that are no whole."""
    blob, total_bytes = bytearray(), 0
    async for part in parts:
        if not blob:
            total_bytes = part.total_bytes
        if (
            total_bytes > MAX_BLOB_BYTES
            or not part.data
            or part.offset != len(blob)
            or part.total_bytes != total_bytes
            or len(blob) + len(part.data) > total_bytes
        ):
            raise InvalidRequest("the parts of a blob come in order, without gaps")
        blob += part.data
        if len(blob) == total_bytes:
            yield blob
            blob = bytearray()
    if blob:
        raise InvalidRequest("the last blob is not complete")


@asynccontextmanager
async def _ending_with_status(context: Context) -> AsyncIterator[None]:
    async with ending_with_status(context):
        try:
            yield
        except TierIsOff as error:
            raise InvalidRequest(str(error)) from error


def _keys(keys: Sequence[bytes]) -> list[bytes]:
    if len(keys) > MAX_KEYS_PER_CALL or any(len(key) != KEY_BYTES for key in keys):
        raise InvalidRequest(f"at most {MAX_KEYS_PER_CALL} keys of {KEY_BYTES} bytes each")
    return list(keys)


def _seconds(seconds: float) -> float:
    if not 0 <= seconds < math.inf:  # NaN would disorder the timers of the whole loop
        raise InvalidRequest(f"{seconds} is not a number of seconds")
    return seconds


def _tier(tier: int) -> Tier:
    try:
        return Tier(tier)
    except ValueError:
        raise InvalidRequest(f"{tier} is not a tier") from None
