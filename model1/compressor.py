"""Compressed KV entries: one for every 4 (CSA) or 128 (HCA) tokens. Spec section 2.4.

An entry is a softmax-gated mean, channel by channel, of its windows' rows. Everything up to the
entry's norm is float32. T tokens, C windows that close in this step, m ratio.
"""

import torch
from torch import Tensor

from model1.batch import Compression
from model1.kv_arrays import KVRows
from model1.modules import CompressorWeights
from model1.numerics import linear, rms_norm
from model1.rope import Rotation, rotate_


def compress(
    x: Tensor,
    weights: CompressorWeights,
    plan: Compression,
    state: KVRows,
    entries: KVRows,
    entry_rotations: Rotation,
    eps: float,
) -> None:
    """Write the entries that close in this step, then keep the open windows' rows.

    `x [T, D]`; `state`, rows of `2 * width` in float32, and `entries`, rows of d, are updated in
    place; `entry_rotations` turns the C entries.
    """
    rows = linear(x.float(), weights.wkv_gate)  # [T, 2*width]
    rows[:, weights.width :] += weights.ape[plan.phase]
    if plan.num_entries:
        # Stands for the tokens before the first: no weight in the softmax.
        empty = torch.zeros_like(rows[:1])
        empty[:, weights.width :] = -torch.inf
        gathered = torch.cat([state.gather(plan.old_rows), rows, empty])[plan.sources]
        c, z = gathered.chunk(2, dim=-1)  # [C, slots, num_series * d] each
        if weights.num_series == 2:
            c, z = _overlapped(c), _overlapped(z)
        pooled = (z.softmax(dim=1) * c).sum(dim=1).to(entries.dtype)
        entry = rotate_(rms_norm(pooled, weights.norm.weight, eps), entry_rotations)
        entries.write(plan.entry_rows, entry)
    state.write(plan.saved_rows, rows[plan.saved_tokens])


def _overlapped(series: Tensor) -> Tensor:
    """`[C, 2 * m, 2 * d] -> [C, 2 * m, d]` of CSA's two series: the window before an entry's own
    contributes the first, its own window the second.
    """
    m, d = series.shape[1] // 2, series.shape[2] // 2
    return torch.cat([series[:, :m, :d], series[:, m:, d:]], dim=1)
