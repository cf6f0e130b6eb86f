"""The KV stores a gateway can use, and which of them have the records of sessions.

Every store is asked for a record and the highest version wins; a write goes to the stores of the
session's own order, the first of which decides who was first. Knows no turn and no worker.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from hashlib import blake2b
from typing import TypeVar

from services.errors import SessionChanged, SessionsOff, Unavailable
from services.gateway.store import Store, StoreAddress
from services.session_record import SessionHead, SessionName, SessionRecord
from services.tls import Tls

log = logging.getLogger(__name__)

# Of each record, so that one store may be lost.
NUM_COPIES = 2

Answer = TypeVar("Answer")


class StoreSet:
    """Owner of the channels to all stores of the table."""

    def __init__(self, tls: Tls | None = None) -> None:
        self._tls = tls
        self._stores: dict[StoreAddress, Store] = {}

    async def update(self, table: Iterable[StoreAddress]) -> None:
        """Use exactly these stores from now on."""
        rows = tuple(table)
        gone = [store for row, store in self._stores.items() if row not in rows]
        self._stores = {row: self._stores.get(row) or Store(row, self._tls) for row in rows}
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

    @property
    def all(self) -> tuple[Store, ...]:
        return tuple(self._stores.values())

    def nearest(self, store_name: str, name: SessionName) -> Store:
        """The store of that name, or the first in the session's own order."""
        stores = self._in_order_of(name)
        if not stores:
            raise SessionsOff("the deployment has no KV store, and so no sessions")
        return next((store for store in stores if store.row.name == store_name), stores[0])

    async def pin(self, keys: Sequence[bytes], until_s: float) -> None:
        """On every node. A store that does not answer is passed over: it has lost its pins."""
        await self._tell_all(lambda store: store.pin(keys, until_s))

    async def unpin(self, keys: Sequence[bytes]) -> None:
        await self._tell_all(lambda store: store.unpin(keys))

    def _in_order_of(self, name: SessionName) -> list[Store]:
        def rank(store: Store) -> bytes:
            text = "\0".join((*name, store.row.name))
            return blake2b(text.encode(), digest_size=16).digest()

        return sorted(self._stores.values(), key=rank)

    async def _tell_all(self, tell: Callable[[Store], Awaitable[None]]) -> None:
        await asyncio.gather(*(_told(store, tell) for store in self._stores.values()))

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


async def _told(store: Store, tell: Callable[[Store], Awaitable[None]]) -> None:
    try:
        await tell(store)
    except Unavailable as error:
        log.warning("store_away why=%s", error)
