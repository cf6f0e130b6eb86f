"""The KV stores a gateway can use: their channels, and where the records of sessions are.

Every store is asked for a record and the highest version wins; a write goes to the stores of the
session's own order, the first of which decides who was first. Knows no turn and no worker.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

import grpc

from protos import session_store_pb2, session_store_pb2_grpc
from services import rpc
from services.errors import SessionChanged, SessionsOff, Unavailable, from_rpc_error
from services.session_record import (
    SessionHead,
    SessionName,
    SessionRecord,
    head_from_wire,
    record_from_wire,
    record_to_wire,
)

log = logging.getLogger(__name__)

CALL_TIMEOUT_SECONDS = 5.0
# Of each record, so that one store may be lost.
NUM_COPIES = 2

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """A row of the table. A store that was restarted elsewhere is another row."""

    name: str
    address: str


class Store:
    """A channel to one KV store. Every call raises `Unavailable` when it does not answer."""

    def __init__(self, row: StoreAddress) -> None:
        self.row = row
        self._channel = rpc.channel(row.address)
        self._records = session_store_pb2_grpc.SessionStoreStub(self._channel)

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

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def _answer(self, call: Awaitable[Answer]) -> Answer:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"KV store {self.row.name}: {from_rpc_error(error)}") from error


class StoreSet:
    """Owner of the channels to all stores of the table."""

    def __init__(self) -> None:
        self._stores: dict[StoreAddress, Store] = {}

    async def update(self, table: Iterable[StoreAddress]) -> None:
        """Use exactly these stores from now on."""
        rows = tuple(table)
        gone = [store for row, store in self._stores.items() if row not in rows]
        self._stores = {row: self._stores.get(row) or Store(row) for row in rows}
        await asyncio.gather(*(store.close() for store in gone))

    async def close(self) -> None:
        await self.update(())

    async def load(self, name: SessionName) -> SessionRecord | None:
        """The newest record, or what a deleted session left. Raises `Unavailable` if so many stores
        are away that one of them may be the only one to know."""
        found, num_away = await self._ask_all(lambda store: store.get(name, ask_cold=False))
        if num_away or not any(found):
            copies, _ = await self._ask_all(lambda store: store.get(name, ask_cold=True))
            found += copies
        records = [record for record in found if record is not None]
        if not records and num_away >= min(NUM_COPIES, len(self._stores)):
            raise Unavailable(
                f"{num_away} KV stores that may know session {name.session_id!r} are away"
            )
        return max(records, key=lambda record: record.head.version, default=None)

    async def save(self, record: SessionRecord, expected_version: int) -> None:
        """Keep it in two stores, if there are two. Raises `SessionChanged` if somebody wrote a
        version above `expected_version`, `Unavailable` if no store takes it."""
        num_saved = 0
        why = None
        for store in self._in_order_of(record.head.name):
            try:
                newer = await store.put(record, expected_version)
            except Unavailable as error:
                log.warning("session_not_saved store=%s why=%s", store.row.name, error)
                why = error
                continue
            if newer is not None:
                raise SessionChanged(
                    f"session {record.head.name.session_id!r} was written by somebody else: it is "
                    f"at version {newer}, this turn went on from version {expected_version}"
                )
            num_saved += 1
            if num_saved == NUM_COPIES:
                return
        if not num_saved:
            raise why or SessionsOff("the deployment has no KV store")

    async def heads(self, cache_salt: str, max_heads: int) -> list[SessionHead]:
        """Of the sessions there are, the last used first."""
        found, num_away = await self._ask_all(lambda store: store.heads(cache_salt, max_heads))
        if num_away == len(self._stores):
            raise Unavailable("no KV store answers")
        newest: dict[SessionName, SessionHead] = {}
        for head in (head for heads in found for head in heads):
            known = newest.get(head.name)
            if known is None or known.version < head.version:
                newest[head.name] = head
        there = [head for head in newest.values() if not head.is_deleted]
        return sorted(there, key=lambda head: -head.last_used_s)[:max_heads]

    def _in_order_of(self, name: SessionName) -> list[Store]:
        def rank(store: Store) -> bytes:
            text = "\0".join((*name, store.row.name))
            return blake2b(text.encode(), digest_size=16).digest()

        return sorted(self._stores.values(), key=rank)

    async def _ask_all(self, ask: Callable[[Store], Awaitable[Answer]]) -> tuple[list[Answer], int]:
        """(the answers, how many stores gave none)"""
        if not self._stores:
            raise SessionsOff("the deployment has no KV store, and so no sessions")
        answers = await asyncio.gather(
            *(ask(store) for store in self._stores.values()), return_exceptions=True
        )
        given: list[Answer] = []
        for answer in answers:
            if isinstance(answer, Unavailable):
                log.warning("store_away why=%s", answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                given.append(answer)
        return given, len(answers) - len(given)
