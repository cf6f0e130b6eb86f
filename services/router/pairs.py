"""The arithmetic of a layer crossing: whether its experts are possible, which rows a share of the
pairs needs, where answers land, and their sum.

Pair p of a crossing of T rows with k experts each is row p // k and that row's (p % k)-th expert.
Plain functions of arrays; knows no replica. Each loop is one call: a crossing has few numbers, and
a router that was asleep pays 5 to 10 us for every call of numpy. The loops go through rows number
by number: for whole rows the compiler makes code that takes several times as long.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model1.compiled import compiled_as_written
from services.wire import FLOAT32_WORD, ExpertRows, LayerRows, Words


@compiled_as_written
def first_flaw(expert_ids: NDArray[np.int32], num_experts: int) -> int:
    """The first pair whose expert is not in [0, num_experts), or below the one before in its row;
    -1 if there is none. Expert ids [T, k]."""
    num_rows, experts_per_row = expert_ids.shape
    for row in range(num_rows):
        before = 0
        for rank in range(experts_per_row):
            expert = expert_ids[row, rank]
            if expert < before or expert >= num_experts:
                flaw: int = row * experts_per_row + rank
                return flaw
            before = expert
    return -1


@compiled_as_written
def count_experts(expert_ids: NDArray[np.int32], counts: NDArray[np.int64]) -> None:
    """Add the pairs of each expert to `counts` [num_experts]."""
    num_rows, experts_per_row = expert_ids.shape
    for row in range(num_rows):
        for rank in range(experts_per_row):
            counts[expert_ids[row, rank]] += 1


def gather(call: LayerRows, positions: NDArray[np.intp]) -> ExpertRows:
    """The pairs at `positions` (ascending), with each row that they need once."""
    needed, row_index, expert_ids, weights = _gathered(call.expert_ids, call.weights, positions)
    return ExpertRows(
        layer=call.layer,
        rows=call.rows if len(needed) == len(call.rows) else call.rows[needed],
        row_index=row_index,
        expert_ids=expert_ids,
        weights=weights,
    )


@compiled_as_written
def _gathered(
    all_expert_ids: NDArray[np.int32],
    all_weights: NDArray[np.float32],
    positions: NDArray[np.intp],
) -> tuple[NDArray[np.intp], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """The rows that are needed [N], and of each pair the index of its row among those, its expert
    and its weight [P]."""
    experts_per_row = all_expert_ids.shape[1]
    num_pairs = len(positions)
    needed = np.empty(num_pairs, dtype=np.intp)
    row_index = np.empty(num_pairs, dtype=np.int32)
    expert_ids = np.empty(num_pairs, dtype=np.int32)
    weights = np.empty(num_pairs, dtype=np.float32)
    last = -1
    for pair in range(num_pairs):
        row, rank = divmod(positions[pair], experts_per_row)
        if last < 0 or needed[last] != row:
            last += 1
            needed[last] = row
        row_index[pair] = last
        expert_ids[pair] = all_expert_ids[row, rank]
        weights[pair] = all_weights[row, rank]
    return needed[: last + 1], row_index, expert_ids, weights


@compiled_as_written
def land(
    rows: Words, positions: NDArray[np.intp], pair_rows: Words, is_answered: NDArray[np.bool_]
) -> int:
    """Put an answer's rows [N, D] at their positions of `pair_rows` [P, D] and tick them off.
    Returns how many were missing; nothing is written if none was."""
    num_new = 0
    for position in positions:
        num_new += not is_answered[position]
    if num_new:
        for index in range(len(positions)):
            position = positions[index]
            for column in range(rows.shape[1]):
                pair_rows[position, column] = rows[index, column]
            is_answered[position] = True
    return num_new


def added_in_order(pairs: Words, num_rows: int) -> NDArray[np.float32]:
    """Pair rows [T * k, D] -> [T, D]: one expert after the other, in float32.

    Bit for bit what model1.moe.combine does, so that a token does not depend on where it ran.
    """
    # One row a pair travels, not one float64 partial sum a row: measured on two cores at D = 512 in
    # bfloat16, when this was numpy, pairs are never slower (32 rows, top-4, 2 groups: 1.15 against
    # 1.67 ms; top-8 in one group, the best case for sums: 1.13 against 1.15), and float64 sums of
    # float32 rows round.
    if pairs.dtype == FLOAT32_WORD:
        return _added_float32(pairs.view(np.float32), num_rows)
    return _added_bfloat16(pairs.view(np.uint16), num_rows)


@compiled_as_written
def _added_float32(pairs: NDArray[np.float32], num_rows: int) -> NDArray[np.float32]:
    experts_per_row, hidden_size = len(pairs) // num_rows, pairs.shape[1]
    total = np.empty((num_rows, hidden_size), dtype=np.float32)
    for row in range(num_rows):
        first = row * experts_per_row
        for column in range(hidden_size):
            total[row, column] = pairs[first, column]
        for pair in range(first + 1, first + experts_per_row):
            for column in range(hidden_size):
                total[row, column] += pairs[pair, column]
    return total


@compiled_as_written
def _added_bfloat16(pairs: NDArray[np.uint16], num_rows: int) -> NDArray[np.float32]:
    experts_per_row, hidden_size = len(pairs) // num_rows, pairs.shape[1]
    total = np.empty((num_rows, hidden_size), dtype=np.float32)
    bits = np.empty(hidden_size, dtype=np.uint32)  # a bfloat16 is a float32's upper half
    wide, total_bits = bits.view(np.float32), total.view(np.uint32)
    for row in range(num_rows):
        first = row * experts_per_row
        for column in range(hidden_size):
            total_bits[row, column] = np.uint32(pairs[first, column]) << np.uint32(16)
        for pair in range(first + 1, first + experts_per_row):
            for column in range(hidden_size):
                bits[column] = np.uint32(pairs[pair, column]) << np.uint32(16)
            for column in range(hidden_size):
                total[row, column] += wide[column]
    return total
