"""What a worker uses of its node's KV store: finds, reads and saves blobs in shared memory.

The store is a cache: whatever happens to it, the answer is a miss and never an error. All of it
runs in a thread beside the caller's loop, which may be busy for as long as a step takes: the bytes
of blocks that are read or saved move there, and so does the conversation with the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from protos import kvstore_pb2
from services.kvstore.acquisition import Acquisition, Block, Consume, Reading, RestoreStats
from services.kvstore.attachment import Attachment
from services.kvstore.loop_thread import LoopThread
from services.kvstore.saving import Saved, SaveItem, SaveStats, Saving
from services.kvstore.tier import Tier, TierCost
from services.tls import Tls

__all__ = ["Block", "KvClient", "KvClientConfig", "RestoreStats", "SaveItem", "SaveStats", "Saved"]

log = logging.getLogger(__name__)

# Of the time that a locate may take, what the store may spend on asking others.
LOCATE_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class KvClientConfig:
    # Of the node's store.
    address: str
    # Of the worker.
    name: str
    # What its blobs carry; 16 bytes each.
    model_digest: bytes
    layout_digest: bytes
    tls: Tls | None = None
    # A locate that takes longer is a miss.
    call_timeout_seconds: float = 1.0
    # Blobs that are not saved by then are dropped; nobody waits for it.
    save_timeout_seconds: float = 10.0


class KvClient:
    """Use `open`, inside the event loop, and `close` after the last acquisition has ended."""

    def __init__(self, config: KvClientConfig, thread: LoopThread, attachment: Attachment) -> None:
        self.restored = RestoreStats()
        self.saved = SaveStats()
        self._config = config
        self._thread = thread
        self._attachment = attachment
        self._costs: dict[Tier, TierCost] = {}
        self._closed = False

    @classmethod
    async def open(cls, config: KvClientConfig) -> KvClient:
        """Does not wait for the store, nor fail without it: it connects in the background."""
        thread = LoopThread("kv-client")
        attachment = await thread.run(
            Attachment.open(
                config.address,
                worker=config.name,
                model_digest=config.model_digest,
                layout_digest=config.layout_digest,
                tls=config.tls,
            )
        )
        return cls(config, thread, attachment)

    async def close(self) -> None:
        """Idempotent."""
        if not self._closed:
            self._closed = True
            await self._thread.run(self._attachment.close())
            await self._thread.close()

    @property
    def connected(self) -> bool:
        return self._attachment.connected

    @property
    def num_breaks(self) -> int:
        """How often the store went away."""
        return self._attachment.num_breaks

    async def wait_connected(self) -> None:
        await self._thread.run(self._attachment.wait_connected())

    async def locate(self, keys: Sequence[bytes]) -> list[Tier | None]:
        """The fastest tier that has each blob. A hint: it may be gone a moment later."""
        if not self.connected:
            return [None] * len(keys)
        return await self._thread.run(self._locate(keys))

    def acquire(self, keys: Sequence[bytes], *, deadline_s: float, consume: Consume) -> Acquisition:
        """Lets `consume` have each verified payload, in another thread, as soon as it is in RAM.

        `async with` it and iterate: each key comes once. At `deadline_s`, on the loop's clock, the
        rest are misses. What `consume` raises, the iterator raises.
        """
        return Acquisition(
            self._thread,
            len(keys),
            lambda hand_over: Reading(
                self._attachment,
                self.restored,
                keys,
                consume,
                model_digest=self._config.model_digest,
                layout_digest=self._config.layout_digest,
                deadline_s=deadline_s,
                hand_over=hand_over,
            ),
        )

    async def prefetch(self, keys: Sequence[bytes]) -> None:
        """Let the store bring these into RAM; waits for nothing and leases nothing."""
        if self.connected:
            promote = kvstore_pb2.Promote(keys=b"".join(keys))
            self._thread.call(self._attachment.send, kvstore_pb2.WorkerMessage(promote=promote))

    async def save(self, items: Sequence[SaveItem]) -> Saved:
        """Returns after the last `fill` has ended, also when it is cancelled."""
        return await self._thread.run(
            Saving(
                self._attachment,
                self.saved,
                items,
                model_digest=self._config.model_digest,
                layout_digest=self._config.layout_digest,
                timeout_seconds=self._config.save_timeout_seconds,
            ).run()
        )

    def costs(self) -> dict[Tier, TierCost]:
        """As measured lately. A tier that is off, down or not measured is absent."""
        if (ram := self.restored.cost) is None:
            return self._costs
        return {Tier.RAM: ram, **self._costs}

    async def _locate(self, keys: Sequence[bytes]) -> list[Tier | None]:
        timeout_seconds = self._config.call_timeout_seconds
        question = _Question()
        locate = kvstore_pb2.Locate(
            keys=b"".join(keys), timeout_seconds=LOCATE_SHARE * timeout_seconds
        )
        call_id = self._attachment.call(question, kvstore_pb2.WorkerMessage(locate=locate))
        if call_id is None:
            return [None] * len(keys)
        try:
            async with asyncio.timeout(timeout_seconds):
                await question.settled.wait()
        except TimeoutError:
            log.warning("locate_late keys=%d", len(keys))
            self._attachment.note_silence()
        finally:
            self._attachment.forget(call_id)
        if question.answer is None:
            return [None] * len(keys)
        located = question.answer.located
        self._costs = {
            Tier(cost.tier): TierCost(cost.latency_seconds, cost.bytes_per_second)
            for cost in located.costs
        }
        return [Tier(tier) if tier else None for tier in located.tiers]


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
