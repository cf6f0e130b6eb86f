"""A worker's way to keep blobs: room from the store, filled and sealed in place, then committed.

Runs in the client's thread. Without room, without a store, or when a block cannot be read, the blob
is dropped and counted; nobody waits for that and nothing fails.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protos import kvstore_pb2
from services.kvstore.attachment import Attachment
from services.kvstore.blob import HEADER_BYTES, BlobHeader, BlobKind, seal_into

log = logging.getLogger(__name__)

# Of one reservation: what the store sets aside before anything is filled, and how long the client's
# thread is away from its messages.
MAX_BATCH_BLOBS = 64
MAX_BATCH_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SaveItem:
    """One blob to keep. `fill` writes exactly `nbytes` into a writable view, in another thread."""

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
    """Of all that a client saved."""

    stored: int = 0
    present: int = 0
    dropped: int = 0
    nbytes: int = 0

    def add(self, saved: Saved) -> None:
        self.stored += saved.stored
        self.present += saved.present
        self.dropped += saved.dropped


class Saving:
    """Of `items`, once. A batch that gets no answer in `timeout_seconds` is dropped."""

    def __init__(
        self,
        attachment: Attachment,
        stats: SaveStats,
        items: Sequence[SaveItem],
        *,
        model_digest: bytes,
        layout_digest: bytes,
        timeout_seconds: float,
    ) -> None:
        self._attachment = attachment
        self._stats = stats
        self._items = items
        self._model_digest = model_digest
        self._layout_digest = layout_digest
        self._timeout_seconds = timeout_seconds
        self._batch: Sequence[SaveItem] = ()
        self._num_present = 0
        self._num_stored = 0
        self._calls: list[int] = []
        self._settled = asyncio.Event()  # the batch

    async def run(self) -> Saved:
        for batch in _batches(self._items):
            self._batch = batch
            self._settled.clear()
            reserve = kvstore_pb2.Reserve(
                keys=b"".join(item.key for item in batch),
                lengths=[HEADER_BYTES + item.nbytes for item in batch],
            )
            self._call(kvstore_pb2.WorkerMessage(reserve=reserve))
            try:
                async with asyncio.timeout(self._timeout_seconds):
                    await self._settled.wait()
            except TimeoutError:
                log.warning("save_late blobs=%d", len(batch))
                self._attachment.note_silence()
            finally:
                for call_id in self._calls:
                    self._attachment.forget(call_id)
                self._calls.clear()
        num_dropped = len(self._items) - self._num_present - self._num_stored
        saved = Saved(self._num_stored, self._num_present, num_dropped)
        self._stats.add(saved)
        return saved

    # --- what the attachment calls

    def answered(self, call_id: int, message: kvstore_pb2.StoreMessage) -> None:
        if message.HasField("committed"):
            self._num_stored += message.committed.stored
            self._settled.set()
            return
        reserved = message.reserved
        self._num_present += sum(reserved.present)
        sealed: list[int] = []
        unsealed: list[int] = []
        for item, lease, offset in zip(self._batch, reserved.leases, reserved.offsets, strict=True):
            if lease:
                (sealed if self._seal(item, offset) else unsealed).append(lease)
        self._attachment.release(unsealed)
        if sealed:
            commit = kvstore_pb2.Commit(leases=sealed)
            self._call(kvstore_pb2.WorkerMessage(commit=commit))
        else:
            self._settled.set()

    def lost(self, call_id: int) -> None:
        self._settled.set()

    # ---

    def _call(self, message: kvstore_pb2.WorkerMessage) -> None:
        call_id = self._attachment.call(self, message)
        if call_id is None:
            self._settled.set()
        else:
            self._calls.append(call_id)

    def _seal(self, item: SaveItem, offset: int) -> bool:
        header = BlobHeader(
            kind=item.kind,
            key=item.key,
            model_digest=self._model_digest,
            layout_digest=self._layout_digest,
            start=item.start,
            end=item.end,
            payload_nbytes=item.nbytes,
        )
        memory = self._attachment.arena.view(offset, header.nbytes)
        try:
            seal_into(memory, header, item.fill)
        except Exception:  # whatever the caller's pool has to say: this block is not saved, no more
            log.exception("save_failed key=%s", item.key.hex())
            return False
        self._stats.nbytes += item.nbytes
        return True


def _batches(items: Sequence[SaveItem]) -> Iterator[Sequence[SaveItem]]:
    start = nbytes = 0
    for end, item in enumerate(items):
        if end - start == MAX_BATCH_BLOBS or (
            end > start and nbytes + item.nbytes > MAX_BATCH_BYTES
        ):
            yield items[start:end]
            start, nbytes = end, 0
        nbytes += item.nbytes
    if start < len(items):
        yield items[start:]
