"""Write-back: finished blocks and tails leave for the block store, behind the steps.

Bounded: what does not fit the queue is refused at once, and counted. While something waits here,
its block is pinned or its tail held. Knows no sequence.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import NamedTuple

from model1.kv_pool import KVPool
from services.attention.block_store import BlockStore
from services.attention.stats import KvCounters
from services.attention.tails import Tail, TailCache
from services.kvstore.blob import BlobKind
from services.kvstore.client import SaveItem

log = logging.getLogger(__name__)

# Blobs a message: enough to hide the round trip, few enough to unpin soon.
MAX_BATCH_BLOBS = 16


class _Waiting(NamedTuple):
    item: SaveItem
    let_go: Callable[[], None]


class WriteBack:
    """Owner of the queue. `run` empties it; `on_room` is called when pinned blocks were let go."""

    def __init__(
        self,
        store: BlockStore,
        pool: KVPool,
        tails: TailCache,
        counters: KvCounters,
        *,
        max_bytes: int,
        on_room: Callable[[], None],
    ) -> None:
        self._store = store
        self._pool = pool
        self._tails = tails
        self._counters = counters
        self._max_bytes = max_bytes
        self._on_room = on_room
        self._waiting: dict[bytes, _Waiting] = {}  # in order of arrival; those being saved too
        self._num_bytes = 0
        self._wake = asyncio.Event()
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    @property
    def num_waiting(self) -> int:
        """Blobs that are not saved yet."""
        return len(self._waiting)

    def offer_body(self, key: bytes, block: int, index: int) -> bool:
        """Save the complete block number `index` of some sequence; False if there is no room."""
        tokens = self._pool.layout.block_tokens
        item = SaveItem(
            key=key,
            kind=BlobKind.BODY,
            start=index * tokens,
            end=(index + 1) * tokens,
            nbytes=self._pool.body_nbytes,
            fill=partial(self._pool.read_body, block),
        )
        return self._offer(item, partial(self._pool.pin, block), partial(self._pool.unpin, block))

    def offer_tail(self, tail: Tail, position: int) -> bool:
        """Save a tail that the caller holds and that has its key; False if there is no room."""
        assert tail.key is not None
        item = SaveItem(
            key=tail.key,
            kind=BlobKind.TAIL,
            start=position,
            end=position,
            nbytes=len(tail.buffer),
            fill=partial(_copy, tail.buffer),
        )
        return self._offer(
            item, partial(self._tails.hold, tail), partial(self._tails.release, tail)
        )

    async def run(self) -> None:
        """Save until cancelled; then let go of what still waits."""
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                while batch := list(islice(self._waiting.values(), MAX_BATCH_BLOBS)):
                    await self._save(batch)
        finally:
            self._counters.dropped_blobs += len(self._waiting)
            self._let_go(list(self._waiting.values()))

    async def flush(self) -> None:
        """Wait until nothing waits any more."""
        await self._is_empty.wait()

    def _offer(self, item: SaveItem, hold: Callable[[], None], let_go: Callable[[], None]) -> bool:
        if item.key in self._waiting:
            return True
        if not self._store.connected or self._num_bytes + item.nbytes > self._max_bytes:
            return False
        hold()
        self._waiting[item.key] = _Waiting(item, let_go)
        self._num_bytes += item.nbytes
        self._is_empty.clear()
        self._wake.set()
        return True

    async def _save(self, batch: list[_Waiting]) -> None:
        try:
            saved = await self._store.save([waiting.item for waiting in batch])
        except Exception:
            log.exception("write_back_failed blobs=%d", len(batch))
            self._counters.dropped_blobs += len(batch)
        else:
            self._counters.saved_blobs += saved.stored + saved.present
            self._counters.dropped_blobs += saved.dropped
        self._let_go(batch)

    def _let_go(self, batch: list[_Waiting]) -> None:
        for waiting in batch:
            del self._waiting[waiting.item.key]
            self._num_bytes -= waiting.item.nbytes
            waiting.let_go()
        if not self._waiting:
            self._is_empty.set()
        self._on_room()


def _copy(buffer: memoryview, out: memoryview) -> None:
    out[:] = buffer
