"""The device KV pool: every kind of state a sequence has, in fixed arrays handed out by index.

Three kinds of unit:

* a *block* covers `hca_ratio` (128) tokens and holds what grows with the sequence: CSA entries,
  indexer keys and HCA entries. One boundary (design rule 4) ends each block. Blocks may be shared
  and may outlive their sequences (`model1.kv_blocks`).
* a *window page* covers half a sliding window (64 tokens) of roped K=V rows of every layer; pages
  that fell out of the window are given back after each step.
* a *slot* holds a sequence's compressor state: the rows of the open windows, not yet compressed.

What leaves the device and comes back is of two kinds. A *body* is one block's bytes. A *tail* is
what a sequence that stands at a boundary P needs beside the bodies of [0, P):

    window rows [P - W + 1, P)       all layers; the next query sees no older ones
    state rows [P - 4, P)            CSA layers: the next window's entry also reads the window
                                     before its own (trap T18)
    nothing of HCA layers            their window has just closed

The pool owns all of it; sequences hold a `KVHandle`. Knows nothing of schedules or tiers.
Page 0 and block 0 are never handed out: padding in index tensors points at them, and they stay
zero. Rows that a query may not see are masked, not skipped, so the arrays never hold a NaN.

Thread-safe: one other thread may read and write units while a step runs, on other sequences.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from model1.config import ModelConfig
from model1.errors import PoolExhausted
from model1.hot_entries import EntryTraffic, HotEntries
from model1.kv_arrays import LayerKV, UnitArray
from model1.kv_blocks import BlockTable
from model1.kv_bytes import KVBytes, ReadableBuffer, TailPlace, WritableBuffer, readable, writable
from model1.kv_capacity import PoolCapacity
from model1.kv_layout import KVFormat, KVLayout, Unit


@dataclass(slots=True, eq=False)
class KVHandle:
    """What one sequence holds. Made and changed by the pool only.

    The first `num_shared` of `blocks` may be others' too and are never written.
    """

    max_tokens: int
    slot: int
    blocks: npt.NDArray[np.int64]
    num_shared: int = 0
    num_tokens: int = 0  # [0, num_tokens) is committed
    first_page: int = 0  # number of the first page in `pages`; page p covers [p*P, (p+1)*P)
    pages: deque[int] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Units held and in all, and the bytes of the arrays.

    `blocks` are held by sequences or pins (`pinned_blocks` of them); `cached_blocks` are nobody's
    and give way when blocks are needed. `num_bytes` are on the device, `host_bytes` are not;
    `entries` tells what came from where, if some are.
    """

    sequences: int
    max_sequences: int
    blocks: int
    max_blocks: int
    pages: int
    max_pages: int
    num_bytes: int
    cached_blocks: int
    pinned_blocks: int
    host_bytes: int
    entries: EntryTraffic


class KVPool:
    """Owner of all KV state on one device. `clock` tells seconds, for `forget_idle`."""

    def __init__(
        self,
        config: ModelConfig,
        capacity: PoolCapacity,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        clock: Callable[[], float] = time.monotonic,
        *,
        kv_format: KVFormat = KVFormat.NATIVE,
    ) -> None:
        self.layout = layout = KVLayout.of(config, dtype, kv_format)
        self.capacity = capacity
        self.device = torch.device(device)
        self.max_sequence_tokens = min(config.max_position_embeddings, capacity.max_tokens)
        self._num_units = units = capacity.num_units(layout)
        num_hot = capacity.num_hot(layout)
        places = {name: self.device for name in layout.arrays}
        if num_hot:
            places["csa_entries"] = torch.device("cpu")
        arrays = {
            name: UnitArray(spec, units[spec.unit], places[name])
            for name, spec in layout.arrays.items()
        }
        self._hot = HotEntries(arrays["csa_entries"], num_hot, self.device) if num_hot else None
        csa_entries = (self._hot or arrays["csa_entries"]).rows_of
        self.layers = [
            LayerKV(layer, kind, arrays, dtype, csa_entries)
            for layer, kind in enumerate(layout.kinds)
        ]
        self.layout_digest = layout.digest(self.device)
        self._bytes = KVBytes(layout, arrays)
        self._lock = threading.Lock()  # of all that follows
        self._free_pages = list(range(units[Unit.PAGE] - 1, 0, -1))
        self._free_slots = list(range(units[Unit.SLOT] - 1, -1, -1))
        self._blocks = BlockTable(units[Unit.BLOCK] - 1, clock)
        self._held: set[KVHandle] = set()

    @property
    def body_nbytes(self) -> int:
        return self._bytes.body_nbytes

    @property
    def tail_nbytes(self) -> int:
        return self._bytes.tail_nbytes

    def can_allocate(self, num_tokens: int, shared: Sequence[int] = ()) -> bool:
        """Would `allocate(num_tokens, shared)` succeed now?"""
        with self._lock:
            num_blocks = self._num_blocks(num_tokens) - len(shared)
            return bool(self._free_slots) and num_blocks <= self._blocks.num_available(shared)

    def allocate(self, num_tokens: int, shared: Sequence[int] = ()) -> KVHandle:
        """Reserve all that a sequence of at most `num_tokens` tokens can ever need.

        `shared`, from `lookup`, become its first blocks: the sequence goes on from a tail at their
        end or later. Raises `PoolExhausted` when there is no room now.
        """
        with self._lock:
            num_blocks = self._num_blocks(num_tokens) - len(shared)
            assert num_blocks >= 0, "shared blocks beyond the sequence's end"
            available = self._blocks.num_available(shared)
            if num_blocks > available or not self._free_slots:
                raise PoolExhausted(
                    f"{num_tokens} tokens need {num_blocks} KV blocks and a sequence slot; free "
                    f"are {available} blocks and {len(self._free_slots)} slots"
                )
            blocks = np.array(self._blocks.claim(num_blocks, shared), dtype=np.int64)
            handle = KVHandle(num_tokens, self._free_slots.pop(), blocks, len(shared))
            self._held.add(handle)
            return handle

    def free(self, handle: KVHandle) -> None:
        """Give everything back; the handle is dead afterwards. Named blocks stay cached."""
        with self._lock:
            self._held.remove(handle)
            self._blocks.release(handle.blocks.tolist())
            self._free_slots.append(handle.slot)
            self._free_pages.extend(handle.pages)
            handle.blocks, handle.pages = np.zeros(0, dtype=np.int64), deque()

    def grow_window(self, handle: KVHandle, end: int) -> None:
        """Hold window pages for all positions in `[num_tokens, end)`."""
        with self._lock:
            assert handle in self._held and end <= handle.max_tokens
            assert handle.num_tokens >= handle.num_shared * self.layout.block_tokens, (
                "a step would write into shared blocks"
            )
            self._grow(handle, end)

    def commit(self, handle: KVHandle, end: int) -> None:
        """`[0, end)` is computed: give back the pages that no later query can see."""
        with self._lock:
            handle.num_tokens = end
            first_visible = self._first_visible(end)
            page_tokens = self.layout.page_tokens
            while handle.pages and (handle.first_page + 1) * page_tokens <= first_visible:
                self._free_pages.append(handle.pages.popleft())
                handle.first_page += 1

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Named blocks of the longest known run from the first key.

        They are whose names say until the next call that may evict them (`allocate`, `forget`,
        `forget_idle`): share or `pin` them before.
        """
        with self._lock:
            return self._blocks.lookup(keys)

    def name(self, handle: KVHandle, index: int, key: bytes) -> None:
        """Let `lookup` find the sequence's block `index`, which is committed, by `key`.

        The first block of a key keeps it.
        """
        with self._lock:
            assert (index + 1) * self.layout.block_tokens <= handle.num_tokens, "not complete"
            self._blocks.name(int(handle.blocks[index]), key)

    def pin(self, block: int) -> None:
        """Keep a block as it is, whatever becomes of its sequence, until `unpin`."""
        with self._lock:
            self._blocks.pin(block)

    def unpin(self, block: int) -> None:
        with self._lock:
            self._blocks.unpin(block)

    def forget(self, keys: Iterable[bytes]) -> int:
        """Free the cached blocks of these names, held ones excepted; how many there were."""
        with self._lock:
            return self._blocks.forget(keys)

    def forget_idle(self, older_than_s: float) -> int:
        """Free the blocks that have been nobody's for more than so long; how many there were."""
        with self._lock:
            return self._blocks.forget_idle(older_than_s)

    def read_body(self, block: int, out: WritableBuffer) -> None:
        """Copy a complete block's bytes to `out`, `body_nbytes` long."""
        self._bytes.read_body(block, writable(out, self.body_nbytes))

    def write_body(self, block: int, data: ReadableBuffer) -> None:
        """The counterpart of `read_body`, into a block that one handle alone holds, unnamed."""
        with self._lock:
            assert self._blocks.is_private(block), f"block {block} is not its writer's alone"
        self._bytes.write_body(block, readable(data, self.body_nbytes))
        if self._hot is not None:
            self._hot.forget_unit(block)

    def read_tail(self, handle: KVHandle, out: WritableBuffer) -> None:
        """Copy the tail at `handle.num_tokens`, a boundary, to `out`, `tail_nbytes` long.

        NOTE: before the sequence's next step, which overwrites it.
        """
        tail = self._tail_of(handle, handle.num_tokens)
        self._bytes.read_tail(tail, writable(out, self.tail_nbytes))

    def write_tail(self, handle: KVHandle, position: int, data: ReadableBuffer) -> None:
        """Let the sequence go on from boundary `position`, ahead of what it has committed.

        The bodies of all blocks before it are the caller's business.
        """
        buffer = readable(data, self.tail_nbytes)
        with self._lock:
            assert handle in self._held and handle.num_tokens < position <= handle.max_tokens
            self._free_pages.extend(handle.pages)
            handle.pages = deque()
            handle.first_page = self._first_visible(position) // self.layout.page_tokens
            self._grow(handle, position)
        self._bytes.write_tail(self._tail_of(handle, position), buffer)
        handle.num_tokens = position

    def usage(self) -> PoolUsage:
        with self._lock:
            units = self._num_units
            return PoolUsage(
                sequences=len(self._held),
                max_sequences=units[Unit.SLOT],
                blocks=self._blocks.num_held,
                max_blocks=units[Unit.BLOCK] - 1,
                pages=units[Unit.PAGE] - 1 - len(self._free_pages),
                max_pages=units[Unit.PAGE] - 1,
                num_bytes=self.capacity.num_bytes(self.layout),
                cached_blocks=self._blocks.num_cached,
                pinned_blocks=self._blocks.num_pinned,
                host_bytes=self.capacity.num_host_bytes(self.layout),
                entries=EntryTraffic() if self._hot is None else self._hot.traffic,
            )

    def check(self) -> None:
        """Every unit is free, cached, or counts who holds it; AssertionError otherwise."""
        with self._lock:
            held, units = list(self._held), self._num_units
            self._blocks.check(block for h in held for block in h.blocks.tolist())
            slots = sorted(self._free_slots + [h.slot for h in held])
            assert slots == list(range(units[Unit.SLOT])), f"slots leaked or held twice: {slots}"
            pages = sorted(self._free_pages + [page for h in held for page in h.pages])
            assert pages == list(range(1, units[Unit.PAGE])), f"pages leaked or held twice: {pages}"

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.layout.block_tokens)

    def _first_visible(self, position: int) -> int:
        """The first position that the window of a query at `position` covers."""
        return max(0, position + 1 - self.layout.window)

    def _grow(self, handle: KVHandle, end: int) -> None:
        page_tokens = self.layout.page_tokens
        while (handle.first_page + len(handle.pages)) * page_tokens < end:
            if not self._free_pages:
                raise PoolExhausted(
                    f"a step of more than {self.capacity.max_step_tokens} tokens leaves no free "
                    "window page"
                )
            handle.pages.append(self._free_pages.pop())

    def _tail_of(self, handle: KVHandle, position: int) -> TailPlace:
        assert position > 0 and position % self.layout.block_tokens == 0, "not a boundary"
        num_pages = -(-position // self.layout.page_tokens) - handle.first_page
        pages = tuple(handle.pages)[:num_pages]
        return TailPlace(position, handle.slot, handle.first_page, pages)
