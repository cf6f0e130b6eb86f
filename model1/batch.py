"""One forward step's tokens and where their state lies, as index tensors made once per step.

Tokens are flat `[T]`: chunks of several sequences one after the other, no padding. A chunk of a
prompt and a decode step are the same thing; chunks of one token are put first, so that they can
be attended to together.

Attention works on *tiles*. A tile's queries lie in one window page, hence their sliding windows
lie in that page and the two before it. The keys of a query thus always stand in the same order at
the same offsets, however the prompt was cut: this, with products over fixed-size key tiles, is
what makes a row's bits independent of chunking and of its neighbours (design rule 3).

Knows the pool's units and layout, not its tensors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model1.config import AttentionKind
from model1.kv_layout import KVLayout
from model1.kv_pool import KVHandle, KVPool

ENTRY_TILE = 64
"""Compressed entries are attended to this many at a time; part of the numeric contract."""

_WINDOW_PAGES = 3

_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """New tokens of one sequence, which follow directly on what is committed.

    Logits are wanted for the last `num_logits` of them (0 for a chunk inside a prompt).
    """

    handle: KVHandle
    start: int
    token_ids: Sequence[int]
    num_logits: int

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Tile:
    """G x R queries, flat rows `[start, end)`: R consecutive ones of each of G sequences.

    `window_pages [G, 3]`; `window_bias [G, R, 3 * page_tokens]` float32, 0 or -inf;
    `entry_blocks [G, B]` blocks whose entries the queries may see, padded with block 0 to whole
    ENTRY_TILEs of HCA entries; `num_csa [G, R]` CSA entries that each query sees, and `hca_bias
    [G, R, B]` float32 for the HCA entries, one a block.
    """

    start: int
    end: int
    num_sequences: int
    window_pages: Tensor
    window_bias: Tensor
    entry_blocks: Tensor
    num_csa: Tensor
    max_csa: int
    max_hca: int
    hca_bias: Tensor


@dataclass(frozen=True, slots=True)
class Compression:
    """Which windows close in this step, for layers of one kind.

    `old_rows [O]` state rows and `new_tokens [N]` of this step that closing windows read;
    `sources [C, slots]` the rows of each closing window, numbered in `[O old rows | N new rows |
    one empty row]`; `entry_rows [C]` entry rows to write; `entry_positions [C]` rotary position of
    each entry (its first token: trap T7); `saved_tokens [S]` -> `saved_rows [S]` the step's tokens
    to keep in the state.
    """

    old_rows: Tensor
    new_tokens: Tensor
    sources: Tensor
    entry_rows: Tensor
    entry_positions: Tensor
    saved_tokens: Tensor
    saved_rows: Tensor

    @property
    def num_entries(self) -> int:
        return self.entry_rows.shape[0]


@dataclass(frozen=True, slots=True)
class Batch:
    """See the module. `positions [T]`, `token_ids [T]`, `window_rows [T]` flat page rows."""

    chunks: tuple[Chunk, ...]
    token_ids: Tensor
    positions: Tensor
    window_rows: Tensor
    tiles: tuple[Tile, ...]
    csa: Compression
    hca: Compression
    logit_rows: Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @staticmethod
    def build(pool: KVPool, chunks: Sequence[Chunk]) -> "Batch":
        """Index tensors for one step; takes the window pages that the new tokens need.

        Logit rows come in the order of `chunks`, ascending positions within a chunk.
        Raises `PoolExhausted` when the step has more tokens than the pool was built for.
        """
        assert chunks and all(chunk.token_ids for chunk in chunks)
        assert len({chunk.handle.slot for chunk in chunks}) == len(chunks), "one chunk a sequence"
        ordered = sorted(chunks, key=lambda chunk: len(chunk.token_ids) > 1)
        first_row: dict[int, int] = {}
        row = 0
        for chunk in ordered:
            assert chunk.start == chunk.handle.num_tokens, "a chunk must follow what is committed"
            pool.grow_window(chunk.handle, chunk.end)
            first_row[id(chunk)] = row
            row += len(chunk.token_ids)

        def tensor(values: _Ints | list[int]) -> Tensor:
            array = np.asarray(values, dtype=np.int64)
            return torch.from_numpy(array).to(pool.device, non_blocking=True)

        layout = pool.layout
        positions = [np.arange(c.start, c.end) for c in ordered]
        logit_rows = [
            first_row[id(c)] + np.arange(len(c.token_ids) - c.num_logits, len(c.token_ids))
            for c in chunks
        ]
        return Batch(
            chunks=tuple(ordered),
            token_ids=tensor([t for c in ordered for t in c.token_ids]),
            positions=tensor(np.concatenate(positions)),
            window_rows=tensor(
                np.concatenate([_window_rows(layout, c) for c in ordered]),
            ),
            tiles=_tiles(layout, ordered, pool.device),
            csa=_compression(layout, ordered, AttentionKind.CSA, tensor),
            hca=_compression(layout, ordered, AttentionKind.HCA, tensor),
            logit_rows=tensor(np.concatenate(logit_rows)),
        )


def _window_rows(layout: KVLayout, chunk: Chunk) -> _Ints:
    positions = np.arange(chunk.start, chunk.end)
    pages = np.array(chunk.handle.pages, dtype=np.int64)
    page_of = pages[positions // layout.page_tokens - chunk.handle.first_page]
    return page_of * layout.arrays["window"].unit_rows + positions % layout.page_tokens


def _tiles(layout: KVLayout, chunks: Sequence[Chunk], device: torch.device) -> tuple[Tile, ...]:
    singles = [c for c in chunks if len(c.token_ids) == 1]
    tiles = []
    if singles:
        tiles.append(_tile(layout, 0, singles, [c.start for c in singles], 1, device))
    row = len(singles)
    for chunk in chunks[len(singles) :]:
        start = chunk.start
        while start < chunk.end:
            end = min(chunk.end, (start // layout.page_tokens + 1) * layout.page_tokens)
            tiles.append(_tile(layout, row, [chunk], [start], end - start, device))
            row += end - start
            start = end
    return tuple(tiles)


def _tile(
    layout: KVLayout,
    row: int,
    chunks: Sequence[Chunk],
    starts: Sequence[int],
    num_queries: int,
    device: torch.device,
) -> Tile:
    page_tokens = layout.page_tokens
    queries = np.array(starts)[:, None] + np.arange(num_queries)  # [G, R]
    num_csa = (queries + 1) // layout.csa_ratio
    num_hca = (queries + 1) // layout.hca_state_rows
    blocks_needed = [-(-int(n) // layout.csa_per_block) for n in num_csa[:, -1]]
    padded = -(-max(blocks_needed) // ENTRY_TILE) * ENTRY_TILE
    pages = np.zeros((len(chunks), _WINDOW_PAGES), dtype=np.int64)
    blocks = np.zeros((len(chunks), padded), dtype=np.int64)
    for g, chunk in enumerate(chunks):
        handle = chunk.handle
        last = starts[g] // page_tokens
        for i, page in enumerate(range(last - _WINDOW_PAGES + 1, last + 1)):
            if page >= handle.first_page:
                pages[g, i] = handle.pages[page - handle.first_page]
        blocks[g, : blocks_needed[g]] = handle.blocks[: blocks_needed[g]]

    def tensor(array: _Ints) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    def bias(visible: npt.NDArray[np.bool_]) -> Tensor:
        array = np.where(visible, np.float32(0), np.float32(-np.inf))
        return torch.from_numpy(array).to(device, non_blocking=True)

    first_key = (np.array(starts) // page_tokens - _WINDOW_PAGES + 1) * page_tokens  # [G]
    keys = first_key[:, None, None] + np.arange(_WINDOW_PAGES * page_tokens)
    t = queries[:, :, None]
    return Tile(
        start=row,
        end=row + queries.size,
        num_sequences=len(chunks),
        window_pages=tensor(pages),
        window_bias=bias((keys >= 0) & (keys > t - layout.window) & (keys <= t)),
        entry_blocks=tensor(blocks),
        num_csa=tensor(num_csa),
        max_csa=int(num_csa.max()),
        max_hca=int(num_hca.max()),
        hca_bias=bias(np.arange(padded) < num_hca[:, :, None]),
    )


def _compression(
    layout: KVLayout,
    chunks: Sequence[Chunk],
    kind: AttentionKind,
    tensor: Callable[[_Ints], Tensor],
) -> Compression:
    if kind is AttentionKind.CSA:  # an entry also reads the window before its own
        ratio, windows_read = layout.csa_ratio, 2
        entries, state = layout.arrays["csa_entries"], layout.arrays["csa_state"]
    else:
        ratio, windows_read = layout.hca_state_rows, 1
        entries, state = layout.arrays["hca_entries"], layout.arrays["hca_state"]
    per_block = layout.block_tokens // ratio
    state_rows = ratio * windows_read
    old_rows: list[_Ints] = []
    new_tokens: list[_Ints] = []
    # Positions [C, slots], start of the chunk, and what position 0 would be among old and new rows.
    closing: list[tuple[_Ints, int, int, int]] = []
    entry_rows: list[_Ints] = []
    entry_positions: list[_Ints] = []
    saved_tokens: list[_Ints] = []
    saved_rows: list[_Ints] = []
    row = num_old = num_new = 0
    for chunk in chunks:
        handle, start, end = chunk.handle, chunk.start, chunk.end
        windows = np.arange(start // ratio, end // ratio)
        if windows.size:
            slots = (windows[:, None] - windows_read + 1) * ratio + np.arange(state_rows)
            first = max(0, int(slots[0, 0]))
            old = np.arange(first, start)
            old_rows.append(handle.slot * state.unit_rows + old % state_rows)
            new = np.arange(start, end // ratio * ratio)
            new_tokens.append(row + new - start)
            closing.append((slots, start, num_old - first, num_new - start))
            num_old += old.size
            num_new += new.size
            block = handle.blocks[windows // per_block]
            entry_rows.append(block * entries.unit_rows + windows % per_block)
            entry_positions.append(windows * ratio)
        kept = np.arange(max(start, (end // ratio - windows_read + 1) * ratio), end)
        saved_tokens.append(row + kept - start)
        saved_rows.append(handle.slot * state.unit_rows + kept % state_rows)
        row += end - start
    sources = [
        np.where(p < 0, num_old + num_new, np.where(p < start, p + base, p + num_old + new_base))
        for p, start, base, new_base in closing
    ]
    return Compression(
        old_rows=tensor(_joined(old_rows)),
        new_tokens=tensor(_joined(new_tokens)),
        sources=tensor(np.concatenate([np.zeros((0, state_rows), np.int64), *sources])),
        entry_rows=tensor(_joined(entry_rows)),
        entry_positions=tensor(_joined(entry_positions)),
        saved_tokens=tensor(_joined(saved_tokens)),
        saved_rows=tensor(_joined(saved_rows)),
    )


def _joined(parts: Sequence[_Ints]) -> _Ints:
    return np.concatenate([np.zeros(0, np.int64), *parts])
