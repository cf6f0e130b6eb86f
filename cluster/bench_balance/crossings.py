"""Layer crossings at a router's socket, as an attention worker sends them, at a steady pace.

Their sums are looked at for their shape alone: that tokens are right is the streams' to show.
"""

import asyncio
import random

import grpc.aio
import numpy as np

from cluster.bench_balance.zipf import DriftingExperts
from model1.config import ModelConfig
from protos import router_pb2, router_pb2_grpc
from services import wire
from services.duplex import Duplex
from services.wire import BFLOAT16_WORD, FLOAT32_WORD, LayerRows

ROWS = 32  # of one crossing: a batch that decodes
MAX_OUT = 8
TIMEOUT_SECONDS = 60.0


class CrossingLoad:
    """Build it inside the event loop."""

    def __init__(
        self,
        router_address: str,
        model: ModelConfig,
        drawn: DriftingExperts,
        *,
        crossings_per_second: float,
        dtype: str,
        seed: int,
    ) -> None:
        self.num_answered = 0
        self.num_late = 0  # that were not sent, since the earlier ones were not answered
        self.failed: list[str] = []
        self._drawn = drawn
        self._pause_seconds = 1 / crossings_per_second
        self._num_layers = model.num_hidden_layers
        self._rng = random.Random(f"crossings {seed}")
        self._rows = _random_rows(model.hidden_size, dtype, seed)
        self._last_call_id = 0
        self._out: set[int] = set()
        self._duplex = Duplex[router_pb2.LayerRows, router_pb2.LayerSums](
            router_address, _open_dispatch, receive=self._receive, broken=self._break
        )

    async def run(self) -> None:
        """Until cancelled."""
        clock = asyncio.get_running_loop().time
        try:
            await self._duplex.wait_connected()
            due = clock()
            while True:
                await asyncio.sleep(max(0.0, due - clock()))
                due = max(due + self._pause_seconds, clock() - self._pause_seconds)
                if len(self._out) < MAX_OUT and self._duplex.connected:
                    self._send()
                else:
                    self.num_late += 1
        finally:
            await self._duplex.close()

    def _send(self) -> None:
        self._last_call_id += 1
        expert_ids = self._drawn.draw(ROWS)
        call = LayerRows(
            layer=self._rng.randrange(self._num_layers),
            rows=self._rows,
            expert_ids=expert_ids,
            weights=np.full(expert_ids.shape, 1 / expert_ids.shape[1], dtype=np.float32),
        )
        self._out.add(self._last_call_id)
        self._duplex.send(wire.encode_layer_rows(self._last_call_id, call, TIMEOUT_SECONDS))

    def _receive(self, message: router_pb2.LayerSums) -> None:
        self._out.discard(message.call_id)
        if message.HasField("error"):
            self.failed.append(message.error.message)
            return
        wire.decode_sums(message, *self._rows.shape)
        self.num_answered += 1

    def _break(self, reason: str) -> None:
        self.failed += [f"the router's stream broke: {reason}"] * len(self._out)
        self._out.clear()


def _random_rows(hidden_size: int, dtype: str, seed: int) -> wire.Words:
    values = np.random.default_rng(seed).standard_normal((ROWS, hidden_size), dtype=np.float32)
    if dtype == "float32":
        return values.astype(FLOAT32_WORD)
    return (values.view(np.uint32) >> 16).astype(BFLOAT16_WORD)  # cut off, not rounded


def _open_dispatch(
    channel: grpc.aio.Channel,
) -> grpc.aio.StreamStreamCall[router_pb2.LayerRows, router_pb2.LayerSums]:
    stub = router_pb2_grpc.RouterStub(channel)
    stream: grpc.aio.StreamStreamCall[router_pb2.LayerRows, router_pb2.LayerSums]
    stream = stub.Dispatch(wait_for_ready=True)
    return stream
