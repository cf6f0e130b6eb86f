"""The gRPC edge of a session table: model1.v1.SessionStore, with a copy of each record in the cold
tier.

The copy is what a node that was lost leaves behind. It is written after the answer and may be
missing or old; whoever reads takes the highest version.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import Any, Protocol, TypeAlias, TypeVar

import grpc
import xxhash

from model1.errors import InvalidRequest
from protos import session_store_pb2, session_store_pb2_grpc
from services import rpc
from services.errors import QueueFull, Unavailable, ending_with_status
from services.kvstore.sessions import RecordsFull, RecordsUnreadable, SessionTable
from services.session_record import (
    SessionName,
    SessionRecord,
    head_to_wire,
    record_from_wire,
    record_to_wire,
    without_salt,
)

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
CHECKSUM_BYTES = 16
# Copies that wait for the cold tier; beyond that the oldest is given up until the next turn.
MAX_WAITING_COPIES = 1024

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer")


class ColdRecord(Protocol):
    @property
    def version(self) -> int: ...

    @property
    def data(self) -> bytes: ...


class ColdRecords(Protocol):
    """Where copies go. Each call blocks; what cannot be reached is as if it were not there."""

    def get_record(self, name: str) -> ColdRecord | None: ...

    def put_record(self, name: str, data: bytes, expected_version: int, new_version: int) -> bool:
        """Unless the version there is another one."""
        ...


class SessionStoreService(session_store_pb2_grpc.SessionStoreServicer):
    """Over a table and cold records that stay the caller's."""

    def __init__(self, table: SessionTable, cold: ColdRecords | None) -> None:
        self._table = table
        self._cold = cold
        # One thread each: a slow Redis holds up copies, and nobody who waits for the disk.
        self._disk_thread = ThreadPoolExecutor(1, "sessions")
        self._cold_thread = ThreadPoolExecutor(1, "session-copies")
        self._waiting: dict[SessionName, SessionRecord] = {}
        self._wake = asyncio.Event()
        self._background = [asyncio.create_task(self._tick())]
        if cold is not None:
            self._background.append(asyncio.create_task(self._copy(cold)))

    async def close(self) -> None:
        """What waits to be copied is copied first; call it once nobody puts any more."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._cold is not None:
            for record in self._waiting.values():
                await self._copy_one(self._cold, record)
        self._disk_thread.shutdown()
        self._cold_thread.shutdown()

    async def Get(
        self, request: session_store_pb2.GetSessionRecordRequest, context: Context
    ) -> session_store_pb2.GetSessionRecordResponse:
        name = SessionName(request.session_id, request.cache_salt)
        async with _ending_with_status(context):
            record = await self._in_thread(self._disk_thread, partial(self._table.get, name))
            if request.ask_cold and self._cold is not None:
                read = partial(_copy_back, self._cold, name)
                copy = await self._in_thread(self._cold_thread, read)
                record = _newest(record, copy)
        if record is None:
            return session_store_pb2.GetSessionRecordResponse()
        return session_store_pb2.GetSessionRecordResponse(record=record_to_wire(record))

    async def Put(
        self, request: session_store_pb2.PutSessionRecordRequest, context: Context
    ) -> session_store_pb2.PutSessionRecordResponse:
        async with _ending_with_status(context):
            try:
                record = record_from_wire(request.record)
            except ValueError as error:
                raise InvalidRequest(str(error)) from error
            version, expected_version = record.head.version, request.expected_version
            if version <= expected_version:
                raise InvalidRequest(f"version {version} cannot follow {expected_version}")
            put = partial(self._table.put, record, expected_version)
            accepted, version = await self._in_thread(self._disk_thread, put)
        if accepted and self._cold is not None:
            self._waiting[record.head.name] = record
            while len(self._waiting) > MAX_WAITING_COPIES:
                del self._waiting[next(iter(self._waiting))]
            self._wake.set()
        return session_store_pb2.PutSessionRecordResponse(accepted=accepted, version=version)

    async def List(
        self, request: session_store_pb2.ListSessionRecordsRequest, context: Context
    ) -> session_store_pb2.ListSessionRecordsResponse:
        async with _ending_with_status(context):
            read = partial(self._table.heads, request.cache_salt, request.max_records)
            heads = await self._in_thread(self._disk_thread, read)
        return session_store_pb2.ListSessionRecordsResponse(
            records=[head_to_wire(head) for head in heads]
        )

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            try:
                await self._in_thread(self._disk_thread, self._table.tick)
            except Exception:  # a bug; without the rim a disk that failed would never come back
                log.exception("session_tick_failed")

    async def _copy(self, cold: ColdRecords) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                name = next(iter(self._waiting))
                record = self._waiting[name]
                await self._copy_one(cold, record)
                if self._waiting.get(name) is record:
                    del self._waiting[name]

    async def _copy_one(self, cold: ColdRecords, record: SessionRecord) -> None:
        try:
            await self._in_thread(self._cold_thread, partial(_copy_out, cold, record))
        except Exception:  # a bug; the next copy is another matter
            log.exception("session_copy_failed session_id=%r", record.head.name.session_id)

    async def _in_thread(self, thread: ThreadPoolExecutor, call: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(thread, call)


def session_service(service: SessionStoreService) -> rpc.Service:
    return rpc.Service(
        "model1.v1.SessionStore",
        partial(session_store_pb2_grpc.add_SessionStoreServicer_to_server, service),
    )


@asynccontextmanager
async def _ending_with_status(context: Context) -> AsyncIterator[None]:
    async with ending_with_status(context):
        try:
            yield
        except RecordsUnreadable as error:
            raise Unavailable(str(error)) from error
        except RecordsFull as error:
            raise QueueFull(str(error)) from error


def _copy_out(cold: ColdRecords, record: SessionRecord) -> None:
    name = _cold_name(record.head.name)
    there = cold.get_record(name)
    version = 0 if there is None else there.version
    if version < record.head.version:
        data = record_to_wire(without_salt(record)).SerializeToString()
        cold.put_record(name, _checksum(name, data) + data, version, record.head.version)


def _copy_back(cold: ColdRecords, name: SessionName) -> SessionRecord | None:
    cold_name = _cold_name(name)
    there = cold.get_record(cold_name)
    if there is None:
        return None
    checksum, data = there.data[:CHECKSUM_BYTES], there.data[CHECKSUM_BYTES:]
    if _checksum(cold_name, data) != checksum:
        log.warning("session_copy_damaged session_id=%r", name.session_id)
        return None
    record = record_from_wire(session_store_pb2.SessionRecord.FromString(data))
    return SessionRecord(replace(record.head, name=name), record.token_ids)


def _checksum(cold_name: str, data: bytes) -> bytes:
    """Of the name too: a record says nothing of its salt, and must not be taken for another's."""
    return xxhash.xxh3_128_digest(cold_name.encode() + data)


def _cold_name(name: SessionName) -> str:
    # Neither the salt nor the id is anybody's business who can list the keys of a Redis.
    person = b"model1-session"
    parts = [blake2b(part.encode(), digest_size=16, person=person).hexdigest() for part in name]
    return "-".join(parts)


def _newest(*records: SessionRecord | None) -> SessionRecord | None:
    found = [record for record in records if record is not None]
    return max(found, key=lambda record: record.head.version, default=None)
