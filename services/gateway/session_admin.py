"""What can be done with a session between its turns: seen, pinned, moved, forgotten.

Names its KV by the chain of keys that its record starts. Whatever happens to KV costs time, never
an answer. Knows neither gRPC nor how blobs are stored.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import NamedTuple

from model1.errors import InvalidRequest
from protos import kvstore_pb2
from services.errors import SessionExists, UnknownSession
from services.gateway.admission import Admission
from services.gateway.sessions import Sessions, blob_keys, check_name, key_chain
from services.gateway.store import Store, Written
from services.gateway.workers import WorkerPool
from services.generation import check_token_ids
from services.kv_keys import BLOCK_TOKENS, KEY_BYTES
from services.kvstore.tier import Tier
from services.session_record import SessionHead, SessionName, SessionRecord

PREFETCH_TIMEOUT_SECONDS = 60.0


class Residence(NamedTuple):
    """Tokens by the fastest tier that has their KV, and those of no tier."""

    by_tier: dict[Tier, int]
    missing: int


@dataclass(frozen=True, slots=True)
class History:
    """What a session is apart from its name."""

    token_ids: tuple[int, ...]
    kv_root: bytes
    created_s: float


class SessionAdmin:
    def __init__(
        self,
        sessions: Sessions,
        workers: WorkerPool,
        admission: Admission,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sessions = sessions
        self._stores = sessions.stores
        self._workers = workers
        self._admission = admission
        self._clock = clock

    def is_in_use(self, name: SessionName) -> bool:
        return self._sessions.is_in_use(name)

    async def heads(self, cache_salt: str, max_heads: int) -> list[SessionHead]:
        """The last used first."""
        return await self._stores.heads(cache_salt, max_heads)

    async def record(self, name: SessionName) -> SessionRecord:
        """Raises `UnknownSession`."""
        check_name(name)
        record = await self._stores.load(name)
        if record is None or record.head.is_deleted:
            raise UnknownSession(f"there is no session {name.session_id!r}")
        return record

    async def residence(self, record: SessionRecord) -> Residence:
        """As the store of the last turn's node sees it."""
        keys = key_chain(record)
        tiers = await self._near(record).where(keys.body_keys)
        by_tier = {tier: BLOCK_TOKENS * tiers.count(tier) for tier in Tier}
        return Residence(by_tier, record.head.num_tokens - sum(by_tier.values()))

    async def pin(self, name: SessionName, seconds: float) -> SessionHead:
        if not 0 < seconds < float("inf"):
            raise InvalidRequest(f"seconds must be above 0, not {seconds}")
        with self._sessions.claimed(name):
            record = await self.record(name)
            until_s = self._clock() + seconds
            head = await self._rewritten(record, pinned_until_s=until_s)
            await self._stores.pin(blob_keys(record), until_s)
            return head

    async def unpin(self, name: SessionName) -> SessionHead:
        """NOTE: blocks shared with another pinned session are pinned again at its next turn."""
        with self._sessions.claimed(name):
            record = await self.record(name)
            head = await self._rewritten(record, pinned_until_s=0.0)
            await self._stores.unpin(blob_keys(record))
            return head

    async def prefetch(self, name: SessionName) -> Residence:
        """Bring it into the memory of the node of its last turn."""
        record = await self.record(name)
        near = self._near(record)
        await near.prefetch(await self._stored_keys(near, record), PREFETCH_TIMEOUT_SECONDS)
        return await self.residence(record)

    async def release(self, name: SessionName) -> int:
        """Device blocks that workers held and hold no more."""
        return await self._workers.release(key_chain(await self.record(name)).body_keys)

    async def delete(self, name: SessionName, *, with_kv: bool) -> None:
        """Forget the history; `with_kv` its blobs too, in every tier."""
        with self._sessions.claimed(name):
            record = await self.record(name)
            tombstone = SessionHead(
                name=name,
                version=record.head.version + 1,
                num_tokens=0,
                last_used_s=self._clock(),
                is_deleted=True,
            )
            await self._stores.save(SessionRecord(tombstone, ()), record.head.version)
        if record.head.pinned_until_s:
            await self._stores.unpin(blob_keys(record))
        if with_kv:
            await self._forget_kv(record)

    async def blobs(self, record: SessionRecord) -> AsyncGenerator[kvstore_pb2.BlobPart, None]:
        """All its KV that the store of the last turn's node can get hold of."""
        near = self._near(record)
        keys = await self._stored_keys(near, record)
        async with aclosing(near.read(keys)) as parts:
            async for part in parts:
                yield part

    async def begin(
        self, name: SessionName, history: History, blobs: AsyncIterator[kvstore_pb2.BlobPart]
    ) -> tuple[SessionHead, Written]:
        """A session that was exported elsewhere; raises `SessionExists`."""
        self._check(history)
        with self._sessions.claimed(name):
            known = await self._stores.load(name)
            if known is not None and not known.head.is_deleted:
                raise SessionExists(f"there is a session {name.session_id!r} already")
            written = await self._stores.nearest("", name).write(blobs)
            version = known.head.version if known else 0
            head = SessionHead(
                name=name,
                version=version + 1,
                num_tokens=len(history.token_ids),
                kv_root=history.kv_root,
                created_s=history.created_s,
                last_used_s=self._clock(),
            )
            await self._stores.save(SessionRecord(head, history.token_ids), version)
            return head, written

    def _check(self, history: History) -> None:
        limits = self._admission.limits
        num_tokens = len(history.token_ids)
        if not 0 < num_tokens < limits.max_context_length:
            raise InvalidRequest(
                f"the history has {num_tokens} tokens, a session here 1 to "
                f"{limits.max_context_length - 1}"
            )
        if len(history.kv_root) not in (0, KEY_BYTES):
            raise InvalidRequest(f"kv_root has {len(history.kv_root)} bytes, not {KEY_BYTES}")
        check_token_ids(history.token_ids, limits.vocab_size, "the history")

    def _near(self, record: SessionRecord) -> Store:
        store_name = self._workers.store_of(record.head.worker)
        return self._stores.nearest(store_name, record.head.name)

    async def _stored_keys(self, store: Store, record: SessionRecord) -> list[bytes]:
        """Of the blobs that are somewhere: a tail is stored at few of the boundaries only."""
        keys = blob_keys(record)
        tiers = await store.where(keys)
        return [key for key, tier in zip(keys, tiers, strict=True) if tier is not None]

    async def _rewritten(self, record: SessionRecord, *, pinned_until_s: float) -> SessionHead:
        head = replace(record.head, version=record.head.version + 1, pinned_until_s=pinned_until_s)
        await self._stores.save(SessionRecord(head, record.token_ids), record.head.version)
        return head

    async def _forget_kv(self, record: SessionRecord) -> None:
        await self._workers.release(key_chain(record).body_keys)
        keys = blob_keys(record)
        for tier in (Tier.RAM, Tier.DISK, Tier.COLD):
            await asyncio.gather(*(_forgotten(store, keys, tier) for store in self._stores.all))


async def _forgotten(store: Store, keys: list[bytes], tier: Tier) -> None:
    try:
        await store.forget(keys, tier)
    except InvalidRequest:
        return  # it has no such tier, and so nothing in it
