"""Compressed KV entries: one for every 4 (CSA) or 128 (HCA) tokens. Spec section 2.4.

An entry is a softmax-gated mean, channel by channel, of its windows' projected rows. Everything
from the projection up to the entry's norm is float32. T tokens, C windows that close in this step,
m ratio.

What waits in the state are the rows themselves, and they are projected when their window closes:
a projection reads large float32 weights, and then does so once a window instead of once a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model1.batch import Compression
from model1.kv_arrays import KVRows
from model1.modules import CompressorWeights
from model1.numerics import linear, rms_norm
from model1.rope import Rotation, rotate_


class Compressor(NamedTuple):
    """Weights and what they make."""

    weights: CompressorWeights
    entries: KVRows


def compress(
    x: Tensor,
    compressors: Sequence[Compressor],
    plan: Compression,
    state: KVRows,
    entry_rotations: Rotation,
    eps: float,
) -> None:
    """Write each compressor's entries that close in this step, then keep the open windows' rows.

    `x [T, D]`; `state`, rows of D, and the entries are updated in place; `entry_rotations` turns
    the C entries.
    """
    if plan.num_entries:
        new = x.index_select(0, plan.new_tokens)
        rows = torch.cat([state.gather(plan.old_rows), new.float()])
        for weights, entries in compressors:
            pooled = _pooled(rows, weights, plan.sources).to(entries.dtype)
            entry = rotate_(rms_norm(pooled, weights.norm.weight, eps), entry_rotations)
            entries.write(plan.entry_rows, entry)
    state.write(plan.saved_rows, x.index_select(0, plan.saved_tokens))


def _pooled(rows: Tensor, weights: CompressorWeights, sources: Tensor) -> Tensor:
    """The means `[C, d]` of the windows that `sources` numbers in `[rows | one empty row]`."""
    projected = linear(rows, weights.wkv_gate)
    # Stands for the tokens before the first: no weight in the softmax.
    empty = torch.zeros_like(projected[:1])
    empty[:, weights.width :] = -torch.inf
    c, z = torch.cat([projected, empty])[sources].chunk(2, dim=-1)  # [C, slots, width] each
    ape: Tensor = weights.ape  # [m, width]
    if weights.num_series == 2:
        c, z, ape = _overlapped(c), _overlapped(z), _overlapped(ape.repeat(2, 1))
    return ((z + ape).softmax(dim=1) * c).sum(dim=1)


def _overlapped(series: Tensor) -> Tensor:
    """`[..., 2 * m, 2 * d] -> [..., 2 * m, d]` of CSA's two series: the window before an entry's
    own contributes the first, its own window the second.
    """
    m, d = series.shape[-2] // 2, series.shape[-1] // 2
    return torch.cat([series[..., :m, :d], series[..., m:, d:]], dim=-2)
