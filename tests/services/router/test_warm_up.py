"""In a process of its own: others have compiled for arrays that never come from the wire."""

import asyncio
import subprocess
import sys

import numpy as np
import pytest

from protos import expert_pb2
from services import wire
from services.router import pairs, routing
from services.router.crossing import Crossing
from services.router.routing import Load, RoutingTable
from services.router.warm_up import warm_up
from services.wire import LayerRows, Words

COMPILED = {
    f"{module.__name__}.{name}": value
    for module in (pairs, routing)
    for name, value in vars(module).items()
    if hasattr(value, "signatures") and value.__module__ == module.__name__
}


def made() -> dict[str, list[object]]:
    return {name: list(function.signatures) for name, function in COMPILED.items()}


def cross(word: np.dtype[np.generic]) -> Words:
    """What a router does with a crossing of two rows and its answers from two replicas."""
    asked = LayerRows(
        layer=0,
        rows=np.arange(8, dtype=np.uint32).astype(word).reshape(2, 4),
        expert_ids=np.array([[0, 1], [1, 2]], dtype=np.int32),
        weights=np.ones((2, 2), dtype=np.float32),
    )
    message = wire.encode_layer_rows(1, asked, 1.0)
    call = wire.decode_layer_rows(type(message).FromString(message.SerializeToString()))
    assert pairs.first_flaw(call.expert_ids, 3) == -1
    pairs.count_experts(call.expert_ids, np.zeros(3, dtype=np.int64))
    crossing = Crossing(call, None, lambda _: None)
    table = RoutingTable.of(1, [["a"], ["a", "b"], ["b"]])
    ids = call.expert_ids.reshape(-1)[np.arange(4)]
    for _, positions in table.split(ids, {"a": Load(0, 0), "b": Load(0, 0)}).shares:
        lost = crossing.uncovered(positions, 0.0)
        rows = pairs.gather(call, np.arange(4)[lost])
        output = wire.encode_expert_outputs(1, rows.rows[rows.row_index])
        answer = expert_pb2.ExpertOutputs.FromString(output.SerializeToString())
        crossing.store(lost, wire.decode_pair_rows(answer, word, len(lost), 4))
    assert not crossing.missing_pairs
    return pairs.added_in_order(crossing.pair_rows, 2)


async def _main() -> None:
    warm_up()
    before = made()
    assert len(before) >= 8 and all(before.values()), before
    for word in (wire.BFLOAT16_WORD, wire.FLOAT32_WORD):
        cross(word)
    after = made()
    assert after == before, {name: after[name] for name in after if after[name] != before[name]}


@pytest.mark.timeout(120)  # on a machine that has compiled none of it
def test_after_it_a_crossing_compiles_nothing() -> None:
    done = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    asyncio.run(_main())
