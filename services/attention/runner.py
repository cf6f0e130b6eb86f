"""One step's arithmetic: slices in, drawn tokens out. The only file of the worker with tensors.

Drives the trunk's forward pass and awaits the routed experts at each layer, wherever they run.
Knows neither queues nor streams.
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from model1.batch import Batch, Chunk
from model1.kv_pool import KVHandle, KVPool
from model1.moe import ExpertCall
from model1.sampling import SamplingParams, sample
from model1.trunk import Forward, Trunk
from services.attention.scheduler import Slice
from services.attention.stats import Counters, Crossing
from services.errors import ExpertsUnavailable


class Experts(Protocol):
    """Where the routed experts run."""

    async def submit(self, call: ExpertCall) -> Awaitable[Tensor]:
        """Send the rows off; the result awaits their sum, float32 [T, D].

        Whatever keeps the sum from coming is ExpertsUnavailable. An answer that nobody awaits any
        more (the step failed or timed out) is dropped quietly.
        """
        ...


class StepRunner:
    """Borrows trunk, pool and experts from the engine; holds no state between steps."""

    def __init__(
        self,
        trunk: Trunk,
        pool: KVPool,
        experts: Experts,
        counters: Counters,
        *,
        crossing_timeout_s: float,
    ) -> None:
        self._trunk = trunk
        self._pool = pool
        self._experts = experts
        self._counters = counters
        self._crossing_timeout_s = crossing_timeout_s

    async def run(self, slices: Sequence[Slice[KVHandle]]) -> list[int | None]:
        """One token for each slice that wants one, in order.

        When it raises, the KV of all the slices' sequences is half written: free them.
        """
        chunks = [_chunk(piece) for piece in slices]
        with torch.inference_mode():
            batch = Batch.build(self._pool, chunks)
            forward = self._trunk(batch, self._pool)
        try:
            logits = await self._drive(forward)
        finally:
            forward.close()
        rows = iter(logits)
        return [_draw(piece, next(rows)) if piece.wants_token else None for piece in slices]

    async def _drive(self, forward: Forward) -> Tensor:
        """Run the pass to its end; returns its logits [num_logit_rows, vocab] float32."""
        routed: Tensor | None = None
        while True:
            try:
                call = _resume(forward, routed)
            except StopIteration as finished:
                logits: Tensor = finished.value
                return logits
            assert call is not None
            routed = await self._cross(call, forward)

    async def _cross(self, call: ExpertCall, forward: Forward) -> Tensor:
        """One layer's rows out and their sum back, the shared expert in between."""
        start_s = time.perf_counter()  # the loop's clock may count whole milliseconds
        try:
            async with asyncio.timeout(self._crossing_timeout_s):
                pending = await self._experts.submit(call)
                _resume(forward, None)
                wait_start_s = time.perf_counter()
                routed = await pending
        except TimeoutError as error:
            raise ExpertsUnavailable(
                f"layer {call.layer}: no sum of the routed experts within "
                f"{self._crossing_timeout_s:g} s"
            ) from error
        end_s = time.perf_counter()
        num_rows = len(call.rows)
        self._counters.crossed(Crossing(num_rows, end_s - start_s, end_s - wait_start_s))
        return routed


def _chunk(piece: Slice[KVHandle]) -> Chunk:
    sequence = piece.sequence
    assert sequence.claim is not None
    token_ids = sequence.token_ids[piece.start : piece.end]
    return Chunk(sequence.claim, piece.start, token_ids, num_logits=int(piece.wants_token))


def _draw(piece: Slice[KVHandle], logits: Tensor) -> int:
    request = piece.sequence.request
    params = SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
    )
    return sample(logits, params, piece.end)


@torch.inference_mode()
def _resume(forward: Forward, value: Tensor | None) -> ExpertCall | None:
    # The mode is per thread: it must not stay on while other tasks of the loop run.
    return forward.send(value)
