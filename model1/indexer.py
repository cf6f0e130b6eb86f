"""The lightning indexer of a CSA layer: which compressed entries a query attends to.

Spec section 2.5. Only the order of the scores matters. Ties go to the lowest entry (trap T16),
and the chosen entries come in ascending order, so what is attended to, and in which order, is a
function of the query alone.
"""

import math

import torch
from torch import Tensor

from model1.batch import Tile
from model1.config import ModelConfig
from model1.kv_arrays import KVRows
from model1.modules import IndexerWeights
from model1.numerics import bmm, linear
from model1.rope import Rotation, rotate_

_ENTRIES_AT_ONCE = 4096  # bounds the per-head scores, not part of the result
# Scores are computed for a multiple of so many entries: torch's products and sums round the
# entries left over after its vectors differently (measured: fewer than 8 and 32 of them), so an
# entry's score would depend on how many others the tile sees.
_ENTRY_GROUP = 32


class IndexQueries:
    """Index queries `[T, heads, d_index]` and head weights `[T, heads]` of one layer's step."""

    def __init__(
        self,
        x: Tensor,
        q_latent: Tensor,
        weights: IndexerWeights,
        by: Rotation,
        config: ModelConfig,
    ) -> None:
        heads, dim = config.index_n_heads, config.index_head_dim
        q = linear(q_latent, weights.wq_b.weight).unflatten(-1, (heads, dim))
        self._q = rotate_(q, by).float()
        self._head_weights = linear(x, weights.weights_proj.weight).float()
        self._head_weights = self._head_weights * (dim * heads) ** -0.5

    def select(self, tile: Tile, index_keys: KVRows, topk: int) -> Tensor:
        """Entry numbers `[G, R, topk]` int64, ascending; numbers the query cannot see come last.

        `index_keys` are rows of d_index. Needs more than topk entries in the tile.
        """
        scores = self._scores(tile, index_keys)
        number = torch.arange(scores.shape[-1], device=scores.device)
        scores = scores.masked_fill(number >= tile.num_csa.unsqueeze(-1), -torch.inf)
        chosen = (_ordered_bits(scores) - number).topk(topk, dim=-1, sorted=False).indices
        return chosen.sort(dim=-1).values

    def _scores(self, tile: Tile, index_keys: KVRows) -> Tensor:
        """`I[t, w] = sum_h a[t, h] * relu(q[t, h] . k[w])` -> float32 `[G, R, entries]`."""
        g, per_block = tile.num_sequences, index_keys.per_unit
        _, heads, dim = self._q.shape
        q = self._q[tile.start : tile.end].reshape(g, -1, dim)  # [G, R*heads, d]
        a = self._head_weights[tile.start : tile.end].view(g, -1, heads, 1)
        group = _ENTRY_GROUP // math.gcd(_ENTRY_GROUP, per_block)  # blocks; divides ENTRY_TILE
        num_blocks = -(-tile.max_csa // (per_block * group)) * group
        step = max(1, _ENTRIES_AT_ONCE // (per_block * group)) * group
        parts = []
        for first in range(0, num_blocks, step):
            blocks = tile.entry_blocks[:, first : min(first + step, num_blocks)]
            keys = index_keys.gather_units(blocks)  # [G, E, d]
            dots = bmm(q, keys.mT).relu_().view(g, -1, heads, keys.shape[1])
            parts.append((dots * a).sum(dim=2))
        return torch.cat(parts, dim=-1)


def _ordered_bits(scores: Tensor) -> Tensor:
    """float32 -> int64 in the same order, spaced 2^32 apart, so that ties can be broken."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: minus zero ties with zero
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits.long() << 32
