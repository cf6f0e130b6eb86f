"""The arithmetic of a layer crossing: which rows a share of the pairs needs, and their sum.

Pair p of a crossing of T rows with k experts each is row p // k and that row's (p % k)-th expert.
Plain functions of arrays; knows no replica.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.wire import ExpertRows, LayerRows, Words, widened


def gather(call: LayerRows, positions: NDArray[np.intp]) -> ExpertRows:
    """The pairs at `positions` (ascending), with each row that they need once."""
    num_rows, experts_per_row = call.expert_ids.shape
    row_of_pair = positions // experts_per_row  # [P], ascending
    opens_row = np.empty(len(positions), dtype=bool)
    opens_row[0] = True
    np.not_equal(row_of_pair[1:], row_of_pair[:-1], out=opens_row[1:])
    needed = row_of_pair[opens_row]  # [N]
    return ExpertRows(
        layer=call.layer,
        rows=call.rows if len(needed) == num_rows else call.rows[needed],
        row_index=np.cumsum(opens_row, dtype=np.int32) - np.int32(1),
        expert_ids=call.expert_ids.reshape(-1)[positions],
        weights=call.weights.reshape(-1)[positions],
    )


def added_in_order(pairs: Words, num_rows: int) -> NDArray[np.float32]:
    """Pair rows [T * k, D] -> [T, D]: one expert after the other, in float32.

    Bit for bit what model1.moe.combine does, so that a token does not depend on where it ran.
    """
    # One row a pair travels, not one float64 partial sum a row: measured on two cores at D = 512 in
    # bfloat16, pairs are never slower (32 rows, top-4, 2 groups: 1.15 against 1.67 ms; top-8 in one
    # group, the best case for sums: 1.13 against 1.15), and float64 sums of float32 rows round.
    by_row = pairs.reshape(num_rows, -1, pairs.shape[1])  # [T, k, D]
    total = widened(by_row[:, 0]).copy() if by_row.dtype == np.float32 else widened(by_row[:, 0])
    for rank in range(1, by_row.shape[1]):
        total += widened(by_row[:, rank])
    return total
