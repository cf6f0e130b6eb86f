"""The attention sublayer: one shared K=V head, sliding window, compressed entries, sink.

Spec section 2.2. T tokens, H heads, d head_dim, r rotary dims, G groups of the output projection.
A CSA layer computes on the entries its indexer chose and on no others; nothing of size [T, T] or
[T, all entries] exists but the indexer's own scores.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model1.batch import ENTRY_TILE, Batch, Tile
from model1.compressor import Compressor, compress
from model1.config import AttentionKind, ModelConfig
from model1.indexer import IndexQueries
from model1.kv_arrays import LayerKV
from model1.modules import AttentionWeights
from model1.numerics import bmm, linear, rms_norm
from model1.rope import Rope, Rotation, rotate_


@dataclass(frozen=True, slots=True)
class Rotations:
    """One step's rotations, by what they turn: its tokens, and the entries that close."""

    main: Rotation  # tokens in sliding-window layers
    compress: Rotation  # tokens in CSA and HCA layers
    csa_entries: Rotation
    hca_entries: Rotation

    @classmethod
    def of(cls, batch: Batch, rope: Rope) -> "Rotations":
        return cls(
            Rotation.at(batch.positions, rope.main),
            Rotation.at(batch.positions, rope.compress),
            Rotation.at(batch.csa.entry_positions, rope.compress),
            Rotation.at(batch.hca.entry_positions, rope.compress),
        )


@dataclass(frozen=True, slots=True)
class _KeyTile:
    """Keys `[B, K, d]` and who sees them, `bias [G, R, K]`; float32.

    B is G (keys shared by a sequence's queries) or G*R (keys of one query).
    """

    keys: Tensor
    bias: Tensor


def attention(
    x: Tensor,
    weights: AttentionWeights,
    kind: AttentionKind,
    kv: LayerKV,
    batch: Batch,
    turns: Rotations,
    config: ModelConfig,
) -> Tensor:
    """`x [T, D] -> [T, D]`; writes the step's KV into `kv`."""
    eps = config.rms_norm_eps
    by = turns.main if kind is AttentionKind.SWA else turns.compress
    q_latent, row = linear(x, weights.latents).split([config.q_lora_rank, config.head_dim], dim=-1)
    q_latent = rms_norm(q_latent, weights.q_norm.weight, eps)
    q = linear(q_latent, weights.wq_b.weight).unflatten(-1, (-1, config.head_dim))  # [T, H, d]
    heads = torch.cat([q, row.unsqueeze(1)], dim=1)  # the one K=V head is treated like the queries
    heads = rotate_(rms_norm(heads, weights.head_norms, eps), by)
    q, row = heads[:, :-1], heads[:, -1]
    kv.window.write(batch.window_rows, row)

    index: IndexQueries | None = None
    if kind is AttentionKind.CSA:
        both = (
            Compressor(weights.compressor, kv.entries),
            Compressor(weights.indexer.compressor, kv.index_keys),
        )
        compress(x, both, batch.csa, kv.state, turns.csa_entries, eps)
        if any(tile.max_csa > config.index_topk for tile in batch.tiles):
            index = IndexQueries(x, q_latent, weights.indexer, by, config)
    elif kind is AttentionKind.HCA:
        one = (Compressor(weights.compressor, kv.entries),)
        compress(x, one, batch.hca, kv.state, turns.hca_entries, eps)

    parts = []
    for tile in batch.tiles:
        tiles = [_window_tile(tile, kv)]
        if kind is AttentionKind.CSA:
            tiles += _csa_tiles(tile, kv, index, config.index_topk)
        elif kind is AttentionKind.HCA:
            tiles += _hca_tiles(tile, kv)
        queries = q[tile.start : tile.end].unflatten(0, (tile.num_sequences, -1))
        parts.append(_attend(queries, tiles, weights.attn_sink).flatten(0, 1))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)  # [T, H, d] float32

    o = rotate_(out, by.inverse()).to(x.dtype)  # V carries the rotation too: turn back (trap T8)
    groups = o.flatten(1).chunk(config.o_groups, dim=-1)  # [T, H/G*d] each
    z = [linear(o_g, w) for o_g, w in zip(groups, weights.wo_a_of_group, strict=True)]
    return linear(torch.cat(z, dim=-1), weights.wo_b.weight)


def _attend(q: Tensor, tiles: list[_KeyTile], sink: Tensor) -> Tensor:
    """Softmax over all tiles' keys plus the sink: `q [G, R, H, d]` -> float32, same shape.

    All in float32: torch's own bfloat16 products are slow on a CPU without a unit for them. Tiles
    are added one after the other; one that a query sees nothing of adds exact zeros.
    """
    g, r, heads, d = q.shape
    q = q.float() * d**-0.5
    scores = []
    for tile in tiles:
        dots = bmm(q.view(len(tile.keys), -1, d), tile.keys.mT)
        scores.append(dots.view(g, r, heads, -1).add_(tile.bias.unsqueeze(2)))
    peak = scores[0].amax(dim=-1, keepdim=True)  # a query always sees itself: finite
    for s in scores[1:]:
        peak = torch.maximum(peak, s.amax(dim=-1, keepdim=True))
    total = torch.exp(sink.unsqueeze(-1) - peak)  # [G, R, H, 1]
    out: Tensor | None = None
    for tile, s in zip(tiles, scores, strict=True):
        p = s.sub_(peak).exp_()
        total += p.sum(dim=-1, keepdim=True)
        keys = tile.keys
        part = bmm(p.view(len(keys), -1, keys.shape[1]), keys).view(g, r, heads, d)
        out = part if out is None else out.add_(part)
    assert out is not None
    return out.div_(total)


def _window_tile(tile: Tile, kv: LayerKV) -> _KeyTile:
    return _KeyTile(kv.window.gather_units(tile.window_pages), tile.window_bias)


def _hca_tiles(tile: Tile, kv: LayerKV) -> list[_KeyTile]:
    return [
        _KeyTile(
            kv.entries.gather_units(tile.entry_blocks[:, first : first + ENTRY_TILE]),
            tile.hca_bias[:, :, first : first + ENTRY_TILE],
        )
        for first in range(0, tile.max_hca, ENTRY_TILE)
    ]


def _csa_tiles(tile: Tile, kv: LayerKV, index: IndexQueries | None, topk: int) -> list[_KeyTile]:
    if tile.max_csa == 0:
        return []
    per_block, block_stride = kv.entries.per_unit, kv.entries.unit_stride
    device = tile.num_csa.device
    if tile.max_csa <= topk:  # every visible entry is chosen: the queries share their keys
        number = torch.arange(-(-tile.max_csa // ENTRY_TILE) * ENTRY_TILE, device=device)
        block = tile.entry_blocks[:, number // per_block]
        rows = (block * block_stride + number % per_block).unsqueeze(1)  # [G, 1, K]
        visible = number < tile.num_csa.unsqueeze(-1)
    else:
        assert index is not None
        number = index.select(tile, kv.index_keys, topk)  # [G, R, topk]
        visible = number < tile.num_csa.unsqueeze(-1)
        block = tile.entry_blocks.gather(1, (number // per_block).flatten(1)).view(number.shape)
        rows = F.pad(block * block_stride + number % per_block, (0, -topk % ENTRY_TILE))
        visible = F.pad(visible, (0, -topk % ENTRY_TILE))
    bias = torch.zeros(visible.shape, device=device).masked_fill_(~visible, -torch.inf)
    rows_of_tile = rows.flatten(0, 1).unflatten(1, (-1, ENTRY_TILE)).transpose(0, 1)
    keys = kv.entries.gather(rows_of_tile)  # [tiles, G or G*R, ENTRY_TILE, d]
    return [_KeyTile(k, b) for k, b in zip(keys, bias.split(ENTRY_TILE, dim=-1), strict=True)]
