"""One read of many blobs by a worker: where it is waited for, and where it is done.

`Reading` lives in the client's thread: it verifies what the store has leased, lets the caller's
function have it there and gives it back. Damage costs a question to the store's next tier;
everything else that goes wrong is a miss. `Acquisition` is the caller's end, in the caller's loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from protos import kvstore_pb2
from services.kvstore.attachment import Attachment
from services.kvstore.blob import Damaged, DamageReason, open_blob
from services.kvstore.loop_thread import LoopThread
from services.kvstore.threads import finished
from services.kvstore.tier import Tier, TierCost

log = logging.getLogger(__name__)

# More copies than there are tiers cannot be damaged.
MAX_DAMAGED_COPIES = 2 * len(Tier)

# There and back between two processes that have the processor (0.4 to 0.7 ms measured).
QUESTION_SECONDS = 0.001

# Gets the index of a key and its verified payload, read-only, in the client's thread.
Consume: TypeAlias = Callable[[int, memoryview], None]


_TIERS = {int(tier): tier for tier in Tier}


@dataclass(frozen=True, slots=True)
class Block:
    """What became of one key. The tier that had it, and its payload was consumed; None: a miss."""

    index: int
    tier: Tier | None = None


@dataclass(slots=True)
class RestoreStats:
    """Of all acquisitions of a client."""

    blobs: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    nbytes: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    misses: int = 0
    damaged: Counter[str] = field(default_factory=Counter)
    # Verifying and consuming.
    seconds: float = 0.0

    def restored(self, tier: Tier, nbytes: int) -> None:
        self.blobs[tier] += 1
        self.nbytes[tier] += nbytes

    @property
    def cost(self) -> TierCost | None:
        """Of what is in RAM: a question, then verifying and consuming. None before the first."""
        if not self.seconds or not (nbytes := sum(self.nbytes.values())):
            return None
        return TierCost(QUESTION_SECONDS, nbytes / self.seconds)


class Reading:
    """Runs once, in the client's thread. `deadline_s` is on the loops' clock, the monotonic one."""

    def __init__(
        self,
        attachment: Attachment,
        stats: RestoreStats,
        keys: Sequence[bytes],
        consume: Consume,
        *,
        model_digest: bytes,
        layout_digest: bytes,
        deadline_s: float,
        hand_over: Callable[[Sequence[Block]], object],
    ) -> None:
        self._attachment = attachment
        self._stats = stats
        self._keys = keys
        self._consume = consume
        self._model_digest = model_digest
        self._layout_digest = layout_digest
        self._deadline_s = deadline_s
        self._hand_over = hand_over
        self._calls: dict[int, Sequence[int]] = {}  # call id -> index of each of its keys
        self._waiting = set(range(len(keys)))
        self._settled: list[Block] = []  # not handed over yet
        self._num_damaged: Counter[int] = Counter()  # copies of a key
        self._over = asyncio.Event()
        self._error: Exception | None = None  # of `consume`

    async def run(self) -> None:
        """Until every key is settled. Raises what `consume` raises."""
        self._ask(range(len(self._keys)))
        try:
            async with asyncio.timeout_at(self._deadline_s):
                await self._over.wait()
        except TimeoutError:
            self._miss(sorted(self._waiting))
        finally:
            self._over.set()
            self._end_calls()
        if self._error is not None:
            raise self._error

    # --- what the attachment calls

    def answered(self, call_id: int, message: kvstore_pb2.StoreMessage) -> None:
        indexes = self._calls[call_id]
        started = time.perf_counter()
        granted = message.granted
        view = self._attachment.arena.view
        over: list[int] = []  # leases
        for row, tier, lease, offset, length in zip(
            granted.indexes,
            granted.tiers,
            granted.leases,
            granted.offsets,
            granted.lengths,
            strict=True,
        ):
            index = indexes[row]
            reason = None
            if index in self._waiting and self._error is None:
                reason = self._read(index, _TIERS[tier], view(offset, length))
            if reason is None:
                over.append(lease)
            else:
                self._ask_again(index, _TIERS[tier], lease, reason)
        self._attachment.release(over)
        self._stats.seconds += time.perf_counter() - started
        self._miss([indexes[row] for row in granted.missed])

    def lost(self, call_id: int) -> None:
        self._miss(self._calls[call_id])

    # ---

    def _read(self, index: int, tier: Tier, blob: memoryview) -> DamageReason | None:
        """Verify and consume; what is wrong with the blob, if something is."""
        try:
            payload = open_blob(
                blob,
                key=self._keys[index],
                model_digest=self._model_digest,
                layout_digest=self._layout_digest,
            )
        except Damaged as damage:
            return damage.reason
        try:
            self._consume(index, payload.toreadonly())
        except Exception as error:  # the caller's, who gets it back
            self._error = error
            self._over.set()
            return None
        self._stats.restored(tier, len(payload))
        self._settle(Block(index, tier))
        return None

    def _ask(self, indexes: Sequence[int]) -> None:
        timeout_seconds = self._deadline_s - asyncio.get_running_loop().time()
        call_id = None
        if timeout_seconds > 0 and indexes:
            keys = b"".join(self._keys[index] for index in indexes)
            acquire = kvstore_pb2.Acquire(keys=keys, timeout_seconds=timeout_seconds)
            call_id = self._attachment.call(self, kvstore_pb2.WorkerMessage(acquire=acquire))
        if call_id is not None:
            self._calls[call_id] = indexes
        else:
            self._miss(indexes)

    def _ask_again(self, index: int, tier: Tier, lease: int, reason: DamageReason) -> None:
        """The store drops the copy in its RAM and looks further down."""
        self._stats.damaged[reason] += 1
        key = self._keys[index].hex()
        log.warning("damaged_blob tier=%s reason=%s key=%s", tier.name, reason, key)
        report = kvstore_pb2.ReportDamaged(lease=lease, reason=reason)
        self._attachment.send(kvstore_pb2.WorkerMessage(damaged=report))
        self._num_damaged[index] += 1
        if self._num_damaged[index] < MAX_DAMAGED_COPIES:
            self._ask([index])
        else:
            self._miss([index])

    def _miss(self, indexes: Sequence[int]) -> None:
        for index in indexes:
            if index in self._waiting:
                self._stats.misses += 1
                self._settle(Block(index))
        self._flush()

    def _settle(self, block: Block) -> None:
        self._waiting.remove(block.index)
        self._settled.append(block)

    def _flush(self) -> None:
        if self._settled:
            self._hand_over(self._settled)
            self._settled = []
        if not self._waiting:
            self._over.set()

    def _end_calls(self) -> None:
        for call_id in self._calls:
            self._attachment.forget(call_id)
            if self._waiting:
                cancel = kvstore_pb2.CancelAcquire()
                self._attachment.send(kvstore_pb2.WorkerMessage(call_id=call_id, cancel=cancel))
        self._calls.clear()


class Acquisition:
    """`async with` it, and iterate: every key comes exactly once, as soon as it can.

    Once left, nothing is consumed any more, and nothing is leased.
    """

    def __init__(
        self,
        thread: LoopThread,
        num_keys: int,
        reading: Callable[[Callable[[Sequence[Block]], object]], Reading],
    ) -> None:
        """`reading` gets where to hand over, which it calls in the thread."""
        self._thread = thread
        self._num_left = num_keys
        self._blocks: deque[Block] = deque()
        self._progress = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._reading = reading(lambda blocks: loop.call_soon_threadsafe(self._arrived, blocks))
        self._running = asyncio.create_task(self._run())

    async def __aenter__(self) -> Acquisition:
        return self

    async def __aexit__(self, *_exc_info: object) -> None:
        self._running.cancel()
        await finished(asyncio.ensure_future(asyncio.wait([self._running])))
        if not self._running.cancelled():
            self._running.exception()  # the iterator has raised it, or nobody looked

    def __aiter__(self) -> Acquisition:
        return self

    async def __anext__(self) -> Block:
        if not self._num_left:
            raise StopAsyncIteration
        while not self._blocks:
            if self._running.done():
                await self._running  # raises what `consume` raised
            self._progress.clear()
            await self._progress.wait()
        self._num_left -= 1
        return self._blocks.popleft()

    def _arrived(self, blocks: Sequence[Block]) -> None:
        self._blocks += blocks
        self._progress.set()

    async def _run(self) -> None:
        try:
            await self._thread.run(self._reading.run())
        finally:
            self._progress.set()
