"""Makes the machine code that a crossing runs through before the first one comes: taken from the
cache of an earlier process in a quarter of a second, or else compiled, which takes five.
"""

from __future__ import annotations

import functools

import numpy as np

from services import wire
from services.router.counters import RouterCounters
from services.router.pairs import added_in_order, first_flaw, gather, land
from services.router.routing import Load, RoutingTable
from services.wire import LayerRows, Words


@functools.cache
def warm_up() -> None:
    """Once a process; blocks."""
    table = RoutingTable.of(1, [["replica"]])
    for word in (wire.BFLOAT16_WORD, wire.FLOAT32_WORD):
        asked = LayerRows(
            layer=0,
            rows=np.zeros((1, 1), dtype=word),
            expert_ids=np.zeros((1, 1), dtype=np.int32),
            weights=np.zeros((1, 1), dtype=np.float32),
        )
        # Through the wire: what arrives is read-only, and needs machine code of its own.
        call = wire.decode_layer_rows(wire.encode_layer_rows(0, asked, None))
        first_flaw(call.expert_ids, table.num_experts)
        RouterCounters().load(call, table.num_experts)
        expert_ids = call.expert_ids.reshape(-1)[np.arange(1)]
        shares = table.split(expert_ids, {"replica": Load(0, 0)}).shares
        pair_rows: Words = np.empty((1, 1), dtype=word)
        for _, positions in shares:
            answer = wire.encode_expert_outputs(0, gather(call, positions).rows)
            rows = wire.decode_pair_rows(answer, word, 1, 1)
            land(rows, positions, pair_rows, np.zeros(1, dtype=np.bool_))
        added_in_order(pair_rows, 1)
