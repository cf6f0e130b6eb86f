"""The device KV pool: every kind of state a sequence has, in fixed arrays handed out by index.

Three kinds of unit, each with its own free list:

* a *block* covers `hca_ratio` (128) tokens and holds what grows with the sequence: CSA entries,
  indexer keys and HCA entries. One boundary (design rule 4) ends each block.
* a *window page* covers half a sliding window (64 tokens) of roped K=V rows of every layer; pages
  that fell out of the window are given back after each step.
* a *slot* holds a sequence's compressor state: the raw (c, z) rows of the open windows, float32,
  z with ape already added (trap T17).

The pool owns all of it; sequences hold a `KVHandle`. Knows nothing of schedules or tiers.
Page 0 and block 0 are never handed out: padding in index tensors points at them, and they stay
zero.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model1.config import AttentionKind, ModelConfig
from model1.errors import PoolExhausted


@dataclass(frozen=True, slots=True)
class PoolCapacity:
    """How much the pool holds.

    `max_sequences` at once; `max_tokens` in all of them together (rounded up to blocks);
    `max_step_tokens` in one forward step.
    """

    max_sequences: int
    max_tokens: int
    max_step_tokens: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shapes of one model's KV state: rows per unit and widths, declared in this one place."""

    window: int  # W tokens
    page_tokens: int  # W / 2
    block_tokens: int  # hca_ratio
    csa_per_block: int  # CSA entries in a block
    csa_state_rows: int  # 2 * csa_ratio: previous and current window
    hca_state_rows: int  # hca_ratio
    head_dim: int
    index_dim: int
    kinds: tuple[AttentionKind, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> "KVLayout":
        return cls(
            window=config.sliding_window,
            page_tokens=config.sliding_window // 2,
            block_tokens=config.hca_ratio,
            csa_per_block=config.hca_ratio // config.csa_ratio,
            csa_state_rows=2 * config.csa_ratio,
            hca_state_rows=config.hca_ratio,
            head_dim=config.head_dim,
            index_dim=config.index_head_dim,
            kinds=config.attention_kinds,
        )


class LayerKV:
    """The arrays of one layer; which exist depends on the layer's kind.

    window `[pages, page_tokens, d]`; entries `[blocks, entries per block, d]`; index keys
    `[blocks, entries per block, d_index]`; compressor states `[slots, rows, 2 * width]` float32
    (c columns, then z columns).
    """

    def __init__(
        self,
        layout: KVLayout,
        kind: AttentionKind,
        units: "_Units",
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        d, di, f32 = layout.head_dim, layout.index_dim, torch.float32
        self.window = zeros(units.pages, layout.page_tokens, d)
        if kind is AttentionKind.CSA:
            self.entries = zeros(units.blocks, layout.csa_per_block, d)
            self.index_keys = zeros(units.blocks, layout.csa_per_block, di)
            self.state = zeros(units.slots, layout.csa_state_rows, 4 * d, dtype=f32)
            self.index_state = zeros(units.slots, layout.csa_state_rows, 4 * di, dtype=f32)
        elif kind is AttentionKind.HCA:
            self.entries = zeros(units.blocks, 1, d)
            self.state = zeros(units.slots, layout.hca_state_rows, 2 * d, dtype=f32)

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in vars(self).values())


@dataclass(frozen=True, slots=True)
class _Units:
    pages: int
    blocks: int
    slots: int


@dataclass(slots=True, eq=False)
class KVHandle:
    """What one sequence holds. Made and changed by the pool only."""

    max_tokens: int
    slot: int
    blocks: npt.NDArray[np.int64]
    num_tokens: int = 0  # [0, num_tokens) is committed
    first_page: int = 0  # number of the first page in `pages`; page p covers [p*P, (p+1)*P)
    pages: deque[int] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class PoolUsage:
    """Units held and in all, and the bytes of the arrays."""

    sequences: int
    max_sequences: int
    blocks: int
    max_blocks: int
    pages: int
    max_pages: int
    num_bytes: int


class KVPool:
    """Owner of all KV state on one device."""

    def __init__(
        self,
        config: ModelConfig,
        capacity: PoolCapacity,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layout = layout = KVLayout.of(config)
        self.capacity = capacity
        self.device = torch.device(device)
        self.max_sequence_tokens = min(config.max_position_embeddings, capacity.max_tokens)
        num_blocks = -(-capacity.max_tokens // layout.block_tokens)
        # A sequence spans at most 3 pages between steps (W tokens, unaligned) and opens at most
        # one more than its new tokens fill; see `grow_window`.
        num_pages = 4 * capacity.max_sequences + -(-capacity.max_step_tokens // layout.page_tokens)
        self._units = _Units(num_pages + 1, num_blocks + 1, capacity.max_sequences)
        self.layers = [
            LayerKV(layout, kind, self._units, dtype, self.device) for kind in layout.kinds
        ]
        self._free_pages = list(range(num_pages, 0, -1))
        self._free_blocks = list(range(num_blocks, 0, -1))
        self._free_slots = list(range(capacity.max_sequences - 1, -1, -1))
        self._held: set[KVHandle] = set()

    def can_allocate(self, num_tokens: int) -> bool:
        """Would `allocate(num_tokens)` succeed now?"""
        return bool(self._free_slots) and self._num_blocks(num_tokens) <= len(self._free_blocks)

    def allocate(self, num_tokens: int) -> KVHandle:
        """Reserve all that a sequence of at most `num_tokens` tokens can ever need.

        Raises `PoolExhausted` when there is no room now.
        """
        num_blocks = self._num_blocks(num_tokens)
        if not self.can_allocate(num_tokens):
            raise PoolExhausted(
                f"{num_tokens} tokens need {num_blocks} KV blocks and a sequence slot; free are "
                f"{len(self._free_blocks)} blocks and {len(self._free_slots)} slots"
            )
        blocks = [self._free_blocks.pop() for _ in range(num_blocks)]
        handle = KVHandle(num_tokens, self._free_slots.pop(), np.array(blocks, dtype=np.int64))
        self._held.add(handle)
        return handle

    def free(self, handle: KVHandle) -> None:
        """Give everything back; the handle is dead afterwards."""
        self._held.remove(handle)
        self._free_blocks.extend(reversed(handle.blocks.tolist()))
        self._free_slots.append(handle.slot)
        self._free_pages.extend(handle.pages)
        handle.blocks, handle.pages = np.zeros(0, dtype=np.int64), deque()

    def grow_window(self, handle: KVHandle, end: int) -> None:
        """Hold window pages for all positions in `[num_tokens, end)`."""
        assert handle in self._held and end <= handle.max_tokens
        page_tokens = self.layout.page_tokens
        while (handle.first_page + len(handle.pages)) * page_tokens < end:
            if not self._free_pages:
                raise PoolExhausted(
                    f"a step of more than {self.capacity.max_step_tokens} tokens leaves no free "
                    "window page"
                )
            handle.pages.append(self._free_pages.pop())

    def commit(self, handle: KVHandle, end: int) -> None:
        """`[0, end)` is computed: give back the pages that no later query can see."""
        handle.num_tokens = end
        first_visible = max(0, end + 1 - self.layout.window)
        while handle.pages and (handle.first_page + 1) * self.layout.page_tokens <= first_visible:
            self._free_pages.append(handle.pages.popleft())
            handle.first_page += 1

    def usage(self) -> PoolUsage:
        units = self._units
        return PoolUsage(
            sequences=len(self._held),
            max_sequences=units.slots,
            blocks=units.blocks - 1 - len(self._free_blocks),
            max_blocks=units.blocks - 1,
            pages=units.pages - 1 - len(self._free_pages),
            max_pages=units.pages - 1,
            num_bytes=sum(layer.num_bytes() for layer in self.layers),
        )

    def check(self) -> None:
        """Every unit is free or held by exactly one sequence; AssertionError otherwise."""
        held = list(self._held)
        for name, free, used, first, count in (
            ("slot", self._free_slots, [h.slot for h in held], 0, self._units.slots),
            (
                "block",
                self._free_blocks,
                [b for h in held for b in h.blocks.tolist()],
                1,
                self._units.blocks,
            ),
            ("page", self._free_pages, [p for h in held for p in h.pages], 1, self._units.pages),
        ):
            ids = sorted(free + used)
            assert ids == list(range(first, count)), f"{name}s leaked or held twice: {ids}"

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.layout.block_tokens)
