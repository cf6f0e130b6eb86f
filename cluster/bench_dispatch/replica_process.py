"""An expert replica of the benchmark in a process of its own, real or emulated.

Run as `python -m cluster.bench_dispatch.replica_process real|emulated CHECKPOINT FIRST END`, it
says where it listens, and answers every further line on stdin with the CPU seconds that it has
used. To an emulated one the line is a number: how many bytes of weights it reads a second.
"""

import asyncio
import math
import sys
import time
from pathlib import Path

import numpy as np

from model1.checkpoint import load_config
from model1.config import ModelConfig
from model1.moe import ExpertBank
from services import rpc
from services.expert.loading import HeldExperts
from services.expert.replica import ExpertReplica
from services.expert.server import expert_service
from services.wire import ExpertRows, Words

_MATRICES_AN_EXPERT = 3
_BFLOAT16_BYTES = 2


class EmulatedReplica(ExpertReplica):
    """Sleeps as long as reading the weights of the experts asked for takes, and answers each pair
    with its row; where that takes no time, with zeros, which are there already."""

    bytes_per_second = float("inf")

    def __init__(self, config: ModelConfig, expert_ids: range) -> None:
        super().__init__("emulated", ExpertBank(config, expert_ids))  # no memory is ever touched
        matrix_bytes = config.hidden_size * config.moe_intermediate_size * _BFLOAT16_BYTES
        self._expert_bytes = _MATRICES_AN_EXPERT * matrix_bytes
        self._zeros: dict[tuple[int, int], Words] = {}  # by shape

    def compute(self, call: ExpertRows) -> Words:
        if math.isinf(self.bytes_per_second):
            shape = (len(call.row_index), call.rows.shape[1])
            if shape not in self._zeros:
                self._zeros[shape] = np.zeros(shape, dtype=call.rows.dtype)
            return self._zeros[shape]
        num_bytes = len(set(call.expert_ids.tolist())) * self._expert_bytes
        time.sleep(num_bytes / self.bytes_per_second)
        pair_rows: Words = call.rows[call.row_index]
        return pair_rows


def _loaded(kind: str, checkpoint: Path, expert_ids: range) -> ExpertReplica:
    if kind == "emulated":
        return EmulatedReplica(load_config(checkpoint), expert_ids)
    held = HeldExperts(
        checkpoint, name="real", expert_ids=expert_ids, dtype="bfloat16", device="cpu"
    )
    return held.replica


async def _serve(replica: ExpertReplica) -> None:
    server = await rpc.start_server([expert_service(replica)], "127.0.0.1:0")
    print(server.address, flush=True)
    while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
        if isinstance(replica, EmulatedReplica):
            replica.bytes_per_second = float(line)
        print(time.process_time(), flush=True)
    await server.stop(grace_seconds=1.0)


if __name__ == "__main__":
    _, _kind, _checkpoint, _first, _end = sys.argv
    asyncio.run(_serve(_loaded(_kind, Path(_checkpoint), range(int(_first), int(_end)))))
