"""One read of many blobs by a worker: leased by the store, verified here, handed over one by one.

Ends with every lease released and no thread of ours in the arena, however it ends. Damage costs a
question to the store's next tier; everything else that goes wrong is a miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeAlias

from protos import kvstore_pb2
from services.kvstore.attachment import Attachment, Lease
from services.kvstore.blob import Damaged, DamageReason, open_blob
from services.kvstore.threads import finished
from services.kvstore.tier import Tier

log = logging.getLogger(__name__)

# Verified in one go of a thread: long enough to be worth the way there, short enough that the first
# ones are copied while the next ones are verified.
VERIFIED_TOGETHER = 16
# More copies than there are tiers cannot be damaged.
MAX_DAMAGED_COPIES = 2 * len(Tier)

# Gets the index of a key and its payload, in a thread.
Consume: TypeAlias = Callable[[int, memoryview], None]


@dataclass(slots=True)
class RestoreStats:
    """Of all acquisitions of a client."""

    blobs: Counter[Tier] = field(default_factory=Counter)
    nbytes: Counter[Tier] = field(default_factory=Counter)
    misses: int = 0
    damaged: Counter[str] = field(default_factory=Counter)
    # In the threads that verify, and consume where the caller asked for it.
    thread_seconds: float = 0.0


class Block:
    """The answer to one key. `payload` is read-only and may be used until `release`."""

    __slots__ = ("_attachment", "_lease", "index", "payload", "tier")

    def __init__(
        self,
        index: int,
        tier: Tier | None = None,
        payload: memoryview | None = None,
        *,
        attachment: Attachment | None = None,
        lease: Lease | None = None,
    ) -> None:
        self.index = index
        self.tier = tier
        self.payload = payload
        self._attachment = attachment
        self._lease = lease

    def release(self) -> None:
        """No thread of the caller looks at the payload any more. Idempotent."""
        lease, self._lease = self._lease, None
        if lease is None:
            return
        assert self._attachment is not None
        if self.payload is not None:
            with contextlib.suppress(BufferError):  # an array over it is still referenced
                self.payload.release()
            self.payload = None
        self._attachment.release([lease])


@dataclass(frozen=True, slots=True)
class _Granted:
    index: int
    tier: Tier
    lease: Lease


class Acquisition:
    """`async with` it, and iterate: every key comes exactly once, as soon as it can."""

    def __init__(
        self,
        attachment: Attachment,
        threads: Executor,
        stats: RestoreStats,
        keys: Sequence[bytes],
        *,
        model_digest: bytes,
        layout_digest: bytes,
        deadline_s: float,
        consume: Consume | None,
    ) -> None:
        self._attachment = attachment
        self._threads = threads
        self._stats = stats
        self._keys = keys
        self._digests = (model_digest, layout_digest)
        self._deadline_s = deadline_s
        self._consume = consume
        self._calls: dict[int, Sequence[int]] = {}  # call id -> index of each of its keys
        self._waiting = set(range(len(keys)))  # for the store
        self._damaged_copies: Counter[int] = Counter()
        self._granted: deque[_Granted] = deque()
        self._wake = asyncio.Event()
        self._ready: asyncio.Queue[Block | Exception] = asyncio.Queue()
        self._handed_over: list[Block] = []
        self._num_handed_over = 0
        self._verifying: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Acquisition:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(self._deadline_s, self._expire)
        self._verifying = asyncio.create_task(self._verify())
        self._ask(range(len(self._keys)))
        return self

    async def __aexit__(self, *_exc_info: object) -> None:
        assert self._timer is not None and self._verifying is not None
        self._timer.cancel()
        self._end_calls()
        self._verifying.cancel()
        try:
            await finished(asyncio.ensure_future(asyncio.wait([self._verifying])))
        finally:
            for block in self._handed_over:
                block.release()
            while not self._ready.empty():
                unread = self._ready.get_nowait()
                if isinstance(unread, Block):
                    unread.release()
            self._attachment.release(granted.lease for granted in self._granted)
            self._granted.clear()

    def __aiter__(self) -> Acquisition:
        return self

    async def __anext__(self) -> Block:
        if self._num_handed_over == len(self._keys):
            raise StopAsyncIteration
        block = await self._ready.get()
        if isinstance(block, Exception):
            raise block
        self._num_handed_over += 1
        self._handed_over.append(block)
        return block

    # --- what the attachment calls

    def answered(self, call_id: int, message: kvstore_pb2.StoreMessage) -> None:
        indexes = self._calls[call_id]
        for grant in message.granted.grants:
            index, tier = indexes[grant.index], Tier(grant.tier)
            lease = self._attachment.lease(grant.lease, grant.offset, grant.length)
            if index in self._waiting:
                self._waiting.remove(index)
                self._granted.append(_Granted(index, tier, lease))
                self._wake.set()
            else:  # its deadline has passed
                self._attachment.release([lease])
        for missed in message.granted.missed:
            self._miss(indexes[missed])

    def lost(self, call_id: int) -> None:
        for index in self._calls[call_id]:
            self._miss(index)

    # ---

    def _ask(self, indexes: Sequence[int]) -> None:
        timeout_seconds = self._deadline_s - asyncio.get_running_loop().time()
        acquire = kvstore_pb2.Acquire(
            keys=b"".join(self._keys[index] for index in indexes),
            timeout_seconds=timeout_seconds,
        )
        call_id = None
        if timeout_seconds > 0 and indexes:
            call_id = self._attachment.call(self, kvstore_pb2.WorkerMessage(acquire=acquire))
        if call_id is not None:
            self._calls[call_id] = indexes
        else:
            for index in indexes:
                self._miss(index)

    def _miss(self, index: int) -> None:
        if index in self._waiting:
            self._waiting.remove(index)
            self._stats.misses += 1
            self._ready.put_nowait(Block(index))

    def _expire(self) -> None:
        self._end_calls()
        for index in sorted(self._waiting):
            self._miss(index)

    def _end_calls(self) -> None:
        for call_id in self._calls:
            self._attachment.forget(call_id)
            if self._waiting:
                cancel = kvstore_pb2.CancelAcquire()
                self._attachment.send(kvstore_pb2.WorkerMessage(call_id=call_id, cancel=cancel))
        self._calls.clear()

    async def _verify(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._granted:
                num_blobs = min(VERIFIED_TOGETHER, len(self._granted))
                batch = [self._granted.popleft() for _ in range(num_blobs)]
                work = loop.run_in_executor(self._threads, self._open_all, batch)
                try:
                    payloads = await finished(work)
                except BaseException as error:
                    self._attachment.release(granted.lease for granted in batch)
                    if isinstance(error, Exception):  # of `consume`
                        self._ready.put_nowait(error)
                        return
                    raise
                for granted, payload in zip(batch, payloads, strict=True):
                    self._verified(granted, payload)

    def _open_all(self, batch: Sequence[_Granted]) -> list[memoryview | DamageReason]:
        """In a thread: the payloads, or what is wrong with them."""
        started = time.perf_counter()
        model_digest, layout_digest = self._digests
        opened: list[memoryview | DamageReason] = []
        for granted in batch:
            try:
                payload = open_blob(
                    granted.lease.memory,
                    key=self._keys[granted.index],
                    model_digest=model_digest,
                    layout_digest=layout_digest,
                ).toreadonly()
            except Damaged as damage:
                opened.append(damage.reason)
                continue
            if self._consume is not None:
                self._consume(granted.index, payload)
            opened.append(payload)
        self._stats.thread_seconds += time.perf_counter() - started
        return opened

    def _verified(self, granted: _Granted, payload: memoryview | DamageReason) -> None:
        index, tier, lease = granted.index, granted.tier, granted.lease
        if isinstance(payload, DamageReason):
            self._ask_again(granted, payload)
            return
        self._stats.blobs[tier] += 1
        self._stats.nbytes[tier] += len(payload)
        if self._consume is not None:
            self._attachment.release([lease])
            self._ready.put_nowait(Block(index, tier))
        else:
            block = Block(index, tier, payload, attachment=self._attachment, lease=lease)
            self._ready.put_nowait(block)

    def _ask_again(self, granted: _Granted, reason: DamageReason) -> None:
        """The store drops the copy in its RAM and looks further down."""
        index, tier, lease = granted.index, granted.tier, granted.lease
        self._stats.damaged[reason] += 1
        log.warning(
            "damaged_blob tier=%s reason=%s key=%s", tier.name, reason, self._keys[index].hex()
        )
        if self._attachment.settle(lease):
            report = kvstore_pb2.ReportDamaged(lease=lease.lease_id, reason=reason)
            self._attachment.send(kvstore_pb2.WorkerMessage(damaged=report))
        self._waiting.add(index)
        self._damaged_copies[index] += 1
        if self._damaged_copies[index] < MAX_DAMAGED_COPIES:
            self._ask([index])
        else:
            self._miss(index)
