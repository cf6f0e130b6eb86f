"""One step's arithmetic: slices in, drawn tokens out.

Drives the trunk's forward pass and awaits the routed experts at each layer, wherever they run; as
two micro-batches, one computes while the other's rows are away. Knows neither queues nor streams.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model1.batch import Batch, Chunk
from model1.kv_pool import KVPool
from model1.moe import ExpertCall
from model1.sampling import SamplingParams, sample
from model1.trunk import Forward, Trunk
from services.attention.overlap import MeasuredStep, OverlapPolicy, StepSize, halves
from services.attention.request_kv import RequestKv
from services.attention.scheduler import Slice
from services.attention.stats import Counters, Crossing
from services.errors import DeadlineExceeded, ExpertsUnavailable


class Experts(Protocol):
    """Where the routed experts run."""

    async def submit(self, call: ExpertCall, timeout_seconds: float) -> asyncio.Future[Tensor]:
        """Send the rows off; the result awaits their sum, float32 [T, D].

        After the timeout, or once it is cancelled, nobody wants the sum any more, here or further
        on.

        Whatever keeps the sum from coming is ExpertsUnavailable or DeadlineExceeded. An answer
        that nobody awaits any more (the step failed or timed out) is dropped quietly.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Away:
    """A micro-batch whose rows of one layer are with the experts."""

    number: int
    forward: Forward
    call: ExpertCall
    start_s: float
    timeout_s: float
    give_up_at: float  # on the loop's clock
    sums: asyncio.Future[Tensor]


class StepRunner:
    """Borrows trunk, pool and experts from the engine; of a step it keeps what it took."""

    def __init__(
        self,
        trunk: Trunk,
        pool: KVPool,
        experts: Experts,
        counters: Counters,
        *,
        crossing_timeout_s: float,
        overlap: OverlapPolicy | None = None,
    ) -> None:
        self._trunk = trunk
        self._pool = pool
        self._experts = experts
        self._counters = counters
        self._crossing_timeout_s = crossing_timeout_s
        self.overlap = overlap or OverlapPolicy()

    async def run(
        self, slices: Sequence[Slice[RequestKv]], deadline_s: float | None
    ) -> list[int | None]:
        """One token for each slice that wants one, in order.

        After `deadline_s` on the loop's clock nobody wants any of them: DeadlineExceeded.
        When it raises, the KV of all the slices' sequences is half written: free them.
        """
        num_tokens = [piece.num_tokens for piece in slices]
        size = StepSize.of(sum(num_tokens), len(slices))
        possible = halves(num_tokens)
        is_split = possible is not None and self.overlap.choose(size) == 2
        parts = possible if possible is not None and is_split else (range(len(slices)),)
        wait_before_s = self._counters.crossing_wait_seconds.sum_seconds
        start_s = time.perf_counter()
        with torch.inference_mode():
            # Both before either computes: together they have the window pages of one step.
            batches = [
                Batch.build(self._pool, [_chunk(slices[number]) for number in part])
                for part in parts
            ]
            forwards = [self._trunk(batch, self._pool) for batch in batches]
        try:
            logits = await self._drive(forwards, deadline_s)
        finally:
            for forward in forwards:
                forward.close()
        seconds = time.perf_counter() - start_s
        wait_seconds = self._counters.crossing_wait_seconds.sum_seconds - wait_before_s
        if possible is not None:
            measured = MeasuredStep(sum(num_tokens), len(parts), seconds, wait_seconds)
            self.overlap.observe(size, measured)
        self._counters.overlapped_steps += is_split
        drawn: list[int | None] = [None] * len(slices)
        for part, part_logits in zip(parts, logits, strict=True):
            rows = iter(part_logits)
            for number in part:
                if slices[number].wants_token:
                    drawn[number] = _draw(slices[number], next(rows))
        return drawn

    async def _drive(self, forwards: Sequence[Forward], deadline_s: float | None) -> list[Tensor]:
        """Run the passes to their ends, taking turns while their rows are away.

        Returns the logits of each, [num_logit_rows, vocab] float32.
        """
        logits: dict[int, Tensor] = {}
        away = deque[_Away]()
        try:
            for number, forward in enumerate(forwards):
                away.append(await self._send(number, forward, _resume(forward, None), deadline_s))
            while away:
                back = away.popleft()
                routed = await self._sums(back)
                try:
                    call = _resume(back.forward, routed)
                except StopIteration as finished:
                    logits[back.number] = finished.value
                else:
                    away.append(await self._send(back.number, back.forward, call, deadline_s))
        finally:
            for left in away:
                left.sums.cancel()
        return [logits[number] for number in range(len(forwards))]

    async def _send(
        self, number: int, forward: Forward, call: ExpertCall | None, deadline_s: float | None
    ) -> _Away:
        """One layer's rows out; then the shared expert, while they are away."""
        assert call is not None
        start_s = time.perf_counter()  # the loop's clock may count whole milliseconds
        now_s = asyncio.get_running_loop().time()
        timeout_s = self._crossing_timeout_s
        if deadline_s is not None:
            timeout_s = min(timeout_s, deadline_s - now_s)
        if timeout_s <= 0:
            raise DeadlineExceeded(f"the deadline passed before the crossing of layer {call.layer}")
        try:
            async with asyncio.timeout(timeout_s):
                sums = await self._experts.submit(call, timeout_s)
        except (TimeoutError, DeadlineExceeded) as error:
            raise self._late(call, timeout_s) from error
        try:
            _resume(forward, None)
        except BaseException:
            sums.cancel()
            raise
        return _Away(number, forward, call, start_s, timeout_s, now_s + timeout_s, sums)

    async def _sums(self, away: _Away) -> Tensor:
        """Wait for one layer's sums."""
        wait_start_s = time.perf_counter()
        try:
            async with asyncio.timeout_at(away.give_up_at):
                routed = await away.sums
        except (TimeoutError, DeadlineExceeded) as error:
            raise self._late(away.call, away.timeout_s) from error
        end_s = time.perf_counter()
        num_rows = len(away.call.rows)
        self._counters.crossed(Crossing(num_rows, end_s - away.start_s, end_s - wait_start_s))
        return routed

    def _late(self, call: ExpertCall, timeout_s: float) -> Exception:
        """Whichever hop noticed first: whose time it was decides what the clients are told."""
        if timeout_s < self._crossing_timeout_s:
            return DeadlineExceeded(
                f"the deadline passed while the routed experts of layer {call.layer} computed"
            )
        return ExpertsUnavailable(
            f"layer {call.layer}: no sum of the routed experts within "
            f"{self._crossing_timeout_s:g} s"
        )


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
