"""One step's arithmetic: slices in, drawn tokens out.

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
from model1.kv_pool import KVPool
from model1.moe import ExpertCall
from model1.sampling import SamplingParams, sample
from model1.trunk import Forward, Trunk
from services.attention.request_kv import RequestKv
from services.attention.scheduler import Slice
from services.attention.stats import Counters, Crossing
from services.errors import DeadlineExceeded, ExpertsUnavailable


class Experts(Protocol):
    """Where the routed experts run."""

    async def submit(self, call: ExpertCall, timeout_seconds: float) -> Awaitable[Tensor]:
        """Send the rows off; the result awaits their sum, float32 [T, D].

        After the timeout nobody wants the sum any more, here or further on.

        Whatever keeps the sum from coming is ExpertsUnavailable or DeadlineExceeded. An answer
        that nobody awaits any more (the step failed or timed out) is dropped quietly.
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

    async def run(
        self, slices: Sequence[Slice[RequestKv]], deadline_s: float | None
    ) -> list[int | None]:
        """One token for each slice that wants one, in order.

        After `deadline_s` on the loop's clock nobody wants any of them: DeadlineExceeded.
        When it raises, the KV of all the slices' sequences is half written: free them.
        """
        chunks = [_chunk(piece) for piece in slices]
        with torch.inference_mode():
            batch = Batch.build(self._pool, chunks)
            forward = self._trunk(batch, self._pool)
        try:
            logits = await self._drive(forward, deadline_s)
        finally:
            forward.close()
        rows = iter(logits)
        return [_draw(piece, next(rows)) if piece.wants_token else None for piece in slices]

    async def _drive(self, forward: Forward, deadline_s: float | None) -> Tensor:
        """Run the pass to its end; returns its logits [num_logit_rows, vocab] float32."""
        routed: Tensor | None = None
        while True:
            try:
                call = _resume(forward, routed)
            except StopIteration as finished:
                logits: Tensor = finished.value
                return logits
            assert call is not None
            routed = await self._cross(call, forward, deadline_s)

    async def _cross(self, call: ExpertCall, forward: Forward, deadline_s: float | None) -> Tensor:
        """One layer's rows out and their sum back, the shared expert in between."""
        start_s = time.perf_counter()  # the loop's clock may count whole milliseconds
        timeout_s = self._crossing_timeout_s
        if deadline_s is not None:
            timeout_s = min(timeout_s, deadline_s - asyncio.get_running_loop().time())
        if timeout_s <= 0:
            raise DeadlineExceeded(f"the deadline passed before the crossing of layer {call.layer}")
        try:
            async with asyncio.timeout(timeout_s):
                pending = await self._experts.submit(call, timeout_s)
                _resume(forward, None)
                wait_start_s = time.perf_counter()
                routed = await pending
        except (TimeoutError, DeadlineExceeded) as error:
            # Whichever hop noticed first: whose time it was decides what the clients are told.
            if timeout_s < self._crossing_timeout_s:
                raise DeadlineExceeded(
                    f"the deadline passed while the routed experts of layer {call.layer} computed"
                ) from error
            raise ExpertsUnavailable(
                f"layer {call.layer}: no sum of the routed experts within "
                f"{self._crossing_timeout_s:g} s"
            ) from error
        end_s = time.perf_counter()
        num_rows = len(call.rows)
        self._counters.crossed(Crossing(num_rows, end_s - start_s, end_s - wait_start_s))
        return routed


def _chunk(piece: Slice[RequestKv]) -> Chunk:
    sequence = piece.sequence
    token_ids = sequence.token_ids[piece.start : piece.end]
    return Chunk(sequence.claim.handle, piece.start, token_ids, num_logits=int(piece.wants_token))


def _draw(piece: Slice[RequestKv], logits: Tensor) -> int:
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
