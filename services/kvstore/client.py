"""What a worker uses of its node's KV store: finds, reads and saves blobs in shared memory.

The store is a cache: whatever happens to it, the answer is a miss and never an error. Knows nothing
of KV pools, nor of what lies behind the store's RAM.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from protos import kvstore_pb2
from services.kvstore.acquisition import Acquisition, Consume, RestoreStats
from services.kvstore.attachment import Attachment, Lease
from services.kvstore.blob import HEADER_BYTES, BlobHeader, BlobKind, seal_into
from services.kvstore.threads import finished
from services.kvstore.tier import Tier, TierCost

log = logging.getLogger(__name__)

# Between a reservation and its commit the worker fills so many blobs.
SAVED_TOGETHER = 16
# A timeout is waited for in so many parts.
TURNS_OF_PATIENCE = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class KvClientConfig:
    address: str
    # Of the worker.
    name: str
    # What its blobs carry; 16 bytes each.
    model_digest: bytes
    layout_digest: bytes
    # A locate that takes longer is a miss. In time that the event loop had for others, too: a loop
    # that also computes may be late by itself.
    call_timeout_seconds: float = 1.0
    # A reservation or commit that takes longer is a drop; nobody waits for it.
    save_timeout_seconds: float = 10.0
    # That verify, fill and consume.
    threads: int = 1


@dataclass(frozen=True, slots=True)
class SaveItem:
    """One blob to keep. `fill` writes exactly `nbytes` into a writable view, in a thread."""

    key: bytes
    kind: BlobKind
    start: int
    end: int
    nbytes: int
    fill: Callable[[memoryview], None]


class Saved(NamedTuple):
    stored: int  # new in the store
    present: int  # were there already, and not filled
    dropped: int  # no room now, no store now, or `fill` raised


@dataclass(slots=True)
class SaveStats:
    """Of all saves of a client."""

    stored: int = 0
    present: int = 0
    dropped: int = 0
    nbytes: int = 0


class KvClient:
    """Use `open`, inside the event loop, and `close` after the last acquisition has ended."""

    def __init__(self, config: KvClientConfig) -> None:
        self.restored = RestoreStats()
        self.saved = SaveStats()
        self._config = config
        self._threads = ThreadPoolExecutor(config.threads, thread_name_prefix="kv-client")
        self._costs: dict[Tier, TierCost] = {}
        self._attachment = Attachment(
            config.address,
            worker=config.name,
            model_digest=config.model_digest,
            layout_digest=config.layout_digest,
        )

    @classmethod
    async def open(cls, config: KvClientConfig) -> KvClient:
        """Does not wait for the store, nor fail without it: it connects in the background."""
        return cls(config)

    async def close(self) -> None:
        self._threads.shutdown()
        await self._attachment.close()

    @property
    def connected(self) -> bool:
        return self._attachment.connected

    @property
    def num_breaks(self) -> int:
        """How often the store went away."""
        return self._attachment.num_breaks

    @property
    def num_leases(self) -> int:
        """0 when nothing is under way."""
        return self._attachment.num_leases

    async def wait_connected(self) -> None:
        await self._attachment.wait_connected()

    async def locate(self, keys: Sequence[bytes]) -> list[Tier | None]:
        """The fastest tier that has each blob. A hint: it may be gone a moment later."""
        timeout_seconds = self._config.call_timeout_seconds
        locate = kvstore_pb2.Locate(keys=b"".join(keys), timeout_seconds=0.8 * timeout_seconds)
        answer = await self._ask(kvstore_pb2.WorkerMessage(locate=locate), timeout_seconds)
        if answer is None:
            return [None] * len(keys)
        self._costs = {
            Tier(cost.tier): TierCost(cost.latency_seconds, cost.bytes_per_second)
            for cost in answer.located.costs
        }
        return [Tier(tier) if tier else None for tier in answer.located.tiers]

    def acquire(
        self, keys: Sequence[bytes], *, deadline_s: float, consume: Consume | None = None
    ) -> Acquisition:
        """Verified payloads, each as soon as it is in RAM; misses for the rest at `deadline_s`.

        `async with` it and iterate; see Acquisition. The deadline is on the loop's clock. With
        `consume`, payloads go to it, in the thread that verified them, and are released after it.
        """
        return Acquisition(
            self._attachment,
            self._threads,
            self.restored,
            keys,
            model_digest=self._config.model_digest,
            layout_digest=self._config.layout_digest,
            deadline_s=deadline_s,
            consume=consume,
        )

    async def prefetch(self, keys: Sequence[bytes]) -> None:
        """Let the store bring these into RAM; waits for nothing and leases nothing."""
        promote = kvstore_pb2.Promote(keys=b"".join(keys))
        self._attachment.send(kvstore_pb2.WorkerMessage(promote=promote))

    async def save(self, items: Sequence[SaveItem]) -> Saved:
        """Returns after the last `fill` has ended, also when it is cancelled."""
        saved = Saved(0, 0, 0)
        for start in range(0, len(items), SAVED_TOGETHER):
            some = await self._save_together(items[start : start + SAVED_TOGETHER])
            saved = Saved(*(sum(pair) for pair in zip(saved, some, strict=True)))
        self.saved.stored += saved.stored
        self.saved.present += saved.present
        self.saved.dropped += saved.dropped
        return saved

    def costs(self) -> dict[Tier, TierCost]:
        """As the store measured them lately. A tier that is off, down or not measured is absent."""
        return self._costs

    async def _save_together(self, items: Sequence[SaveItem]) -> Saved:
        reserve = kvstore_pb2.Reserve(
            items=[
                kvstore_pb2.ReserveItem(key=item.key, length=HEADER_BYTES + item.nbytes)
                for item in items
            ]
        )
        answer = await self._ask(
            kvstore_pb2.WorkerMessage(reserve=reserve), self._config.save_timeout_seconds
        )
        if answer is None:
            return Saved(0, 0, len(items))
        rooms = answer.reserved.rooms
        leased = [
            (item, self._attachment.lease(room.lease, room.offset, HEADER_BYTES + item.nbytes))
            for item, room in zip(items, rooms, strict=True)
            if room.lease
        ]
        present = sum(room.present for room in rooms)
        sealed: list[Lease] = []
        try:
            if leased:
                loop = asyncio.get_running_loop()
                work = partial(self._seal_all, leased, sealed)
                await finished(loop.run_in_executor(self._threads, work))
        finally:
            unsealed = [lease for _, lease in leased if lease not in sealed]
            self._attachment.release(unsealed)
            stored = await self._commit(sealed)
        return Saved(stored, present, len(items) - present - stored)

    def _seal_all(self, leased: Sequence[tuple[SaveItem, Lease]], sealed: list[Lease]) -> None:
        """In a thread: write the blobs where the store has made room for them."""
        for item, lease in leased:
            header = BlobHeader(
                kind=item.kind,
                key=item.key,
                model_digest=self._config.model_digest,
                layout_digest=self._config.layout_digest,
                start=item.start,
                end=item.end,
                payload_nbytes=item.nbytes,
            )
            try:
                seal_into(lease.memory, header, item.fill)
            except Exception:  # whatever the pool has to say: the block is not saved, no more
                log.exception("save_failed key=%s", item.key.hex())
            else:
                sealed.append(lease)
                self.saved.nbytes += item.nbytes

    async def _commit(self, sealed: Sequence[Lease]) -> int:
        leases = [lease.lease_id for lease in sealed if self._attachment.settle(lease)]
        if not leases:
            return 0
        commit = kvstore_pb2.Commit(leases=leases)
        answer = await self._ask(
            kvstore_pb2.WorkerMessage(commit=commit), self._config.save_timeout_seconds
        )
        return answer.committed.stored if answer is not None else 0

    async def _ask(
        self, message: kvstore_pb2.WorkerMessage, timeout_seconds: float
    ) -> kvstore_pb2.StoreMessage | None:
        """None if the store is away, goes away, or takes too long."""
        question = _Question()
        call_id = self._attachment.call(question, message)
        if call_id is None:
            return None
        try:
            if not await _is_set_within(question.settled, timeout_seconds):
                log.warning("kvstore_late call=%s", message.WhichOneof("body"))
                self._attachment.note_silence()
        except asyncio.CancelledError:
            if question.answer is not None:  # it came at the very end
                self._attachment.discard(question.answer)
            raise
        finally:
            self._attachment.forget(call_id)
        return question.answer


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    """Waits in turns; one in which the loop was busy elsewhere counts for no more than another."""
    for _ in range(TURNS_OF_PATIENCE):
        try:
            async with asyncio.timeout(seconds / TURNS_OF_PATIENCE):
                await event.wait()
        except TimeoutError:
            continue
        return True
    return event.is_set()


class _Question:
    """One call with one answer."""

    def __init__(self) -> None:
        self.answer: kvstore_pb2.StoreMessage | None = None
        self.settled = asyncio.Event()

    def answered(self, call_id: int, message: kvstore_pb2.StoreMessage) -> None:
        self.answer = message
        self.settled.set()

    def lost(self, call_id: int) -> None:
        self.settled.set()
