"""The batching loop of an attention worker.

One asyncio loop owns all state; computing happens inline in it, and others get their turn while a
layer's rows are away. A step: end what was cancelled or is late, schedule, run, hand the tokens
over. What need not be computed is the KV cache's business: sequences are in the batch when their KV
has come. Knows no gRPC and no tensor.
"""

import asyncio
import copy
import logging
import time
from collections.abc import Iterator
from collections.abc import Sequence as Several
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from model1.errors import InvalidRequest, ModelError
from model1.kv_pool import KVPool
from model1.trunk import Trunk
from services.attention.block_store import BlockStore
from services.attention.kv_cache import KvCache, KvCacheConfig
from services.attention.overlap import OverlapPolicy
from services.attention.request_kv import RequestKv
from services.attention.runner import Experts, StepRunner
from services.attention.scheduler import Scheduler, SchedulerLimits, Slice
from services.attention.sequence import Sequence
from services.attention.stats import Counters, EngineStats
from services.attention.stream import TokenStream
from services.errors import (
    DeadlineExceeded,
    Draining,
    DuplicateRequest,
    InternalFailure,
    RequestCancelled,
    ServiceError,
    UnknownRequest,
)
from services.generation import FinishReason, GenerationRequest, check_token_ids
from services.kv_keys import DIGEST_BYTES

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of a step, of the patience with the experts, and of the KV cache."""

    limits: SchedulerLimits = field(default_factory=SchedulerLimits)
    kv: KvCacheConfig = field(default_factory=KvCacheConfig)
    # A whole layer crossing; a hung router must not hold KV for ever.
    crossing_timeout_s: float = 60.0


@dataclass(slots=True, eq=False)
class _Live:
    """A request from acceptance to its one end."""

    sequence: Sequence[RequestKv]
    stream: TokenStream
    started_s: float
    deadline_s: float | None  # on the loop's clock
    has_begun: bool = False  # it was in a step
    ending: Exception | None = None  # why it ends at the next step's edge


class Engine:
    """Owner of the sequences, the KV cache and the step. `run` is its life; it starts nothing."""

    def __init__(
        self,
        trunk: Trunk,
        pool: KVPool,
        experts: Experts,
        config: EngineConfig,
        *,
        store: BlockStore | None = None,
        model_digest: bytes = bytes(DIGEST_BYTES),
        overlap: OverlapPolicy | None = None,
    ) -> None:
        """Takes over the pool; the store, in which `model_digest` tells models apart, is lent.

        `overlap` splits steps in two; the usual one does what turns out to be faster.
        """
        limits, capacity = config.limits, pool.capacity
        if limits.max_batch_tokens > capacity.max_step_tokens:
            raise ValueError(
                f"max_batch_tokens {limits.max_batch_tokens} is more than the KV pool's "
                f"max_step_tokens {capacity.max_step_tokens}"
            )
        self._vocab_size = trunk.config.vocab_size
        self._pool = pool
        self._scheduler: Scheduler[RequestKv] = Scheduler(limits)
        self._live: dict[str, _Live] = {}
        self._counters = Counters()
        self._runner = StepRunner(
            trunk,
            pool,
            experts,
            self._counters,
            crossing_timeout_s=config.crossing_timeout_s,
            overlap=overlap,
        )
        self._wake = asyncio.Event()
        self._kv = KvCache(
            pool, store, config.kv, model_digest=model_digest, on_change=self._wake.set
        )
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False
        self._is_closed = False

    @contextmanager
    def submit(
        self, request: GenerationRequest, deadline_s: float | None = None
    ) -> Iterator[TokenStream]:
        """Queue a request; leaving the block before its end cancels it.

        `deadline_s` is on the loop's clock. Raises Draining, DuplicateRequest, QueueFull or
        InvalidRequest.
        """
        live = self._accept(request, deadline_s)
        try:
            yield live.stream
        finally:
            if not live.stream.has_ended:
                self._end_soon(live, RequestCancelled("the client left"))

    def abort(self, request_id: str) -> None:
        """End a live request as cancelled within one step; raises UnknownRequest."""
        live = self._live.get(request_id)
        if live is None:
            raise UnknownRequest(f"no live request has the id {request_id!r}")
        self._end_soon(live, RequestCancelled(f"request {request_id!r} was aborted"))

    async def drain(self, grace_s: float) -> int:
        """Admit nothing more, wait until idle, abort what is left after `grace_s`.

        Returns how many were aborted.
        """
        self._is_draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            left = list(self._live.values())
            for live in left:
                self._end_soon(live, Draining("the worker shut down before the answer was done"))
            await self._idle.wait()
            return len(left)
        return 0

    def close(self) -> None:
        """Let `run` return at the next step's edge; whatever is live then ends with Draining."""
        self._is_draining = self._is_closed = True
        self._wake.set()

    def release(self, keys: Several[bytes]) -> int:
        """Give the memory of these KV bodies and tails back; how many blocks of the device that
        were. What is in use stays."""
        return self._kv.forget(keys)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Computing so many tokens of a prompt took so long: what loading is weighed against."""
        self._kv.costs.observe_step(num_tokens, seconds)

    def stats(self) -> EngineStats:
        waiting = (live for live in self._live.values() if live.sequence.is_waiting)
        oldest_s = min((live.started_s for live in waiting), default=None)
        return EngineStats(
            counters=copy.copy(self._counters),
            kv=self._kv.stats(),
            overlap=self._runner.overlap.choices,
            waiting_sequences=self._scheduler.num_waiting,
            running_sequences=self._scheduler.num_running,
            oldest_waiting_seconds=0.0 if oldest_s is None else _now_s() - oldest_s,
            draining=self._is_draining,
        )

    def check(self) -> None:
        """Assert that scheduler and KV cache are whole. Not while a step runs."""
        self._scheduler.check()
        self._kv.check(self._scheduler.num_running)

    async def run(self) -> None:
        """Step until closed. However it ends, every request ends and every claim is freed."""
        async with self._kv.running():
            try:
                await self._step_until_closed()
            finally:
                self._is_draining = self._is_closed = True
                with ExitStack() as endings:  # one that fails does not keep the others from ending
                    for live in self._live.values():
                        why = Draining("the worker shut down before the answer was done")
                        endings.callback(self._end, live, why)

    async def _step_until_closed(self) -> None:
        while not self._is_closed:
            self._end_cancelled_and_late()
            slices = self._scheduler.schedule()
            if slices:
                await self._step(slices)
                # At least one turn for the loop's servers, even when no crossing had to wait.
                await asyncio.sleep(0)
            else:
                await self._wait_for_change()

    async def _wait_for_change(self) -> None:
        """Until there may be something to do, be it only to end a request at its deadline."""
        deadlines = [live.deadline_s for live in self._live.values() if live.deadline_s is not None]
        with suppress(TimeoutError):
            async with asyncio.timeout_at(min(deadlines, default=None)):
                await self._wake.wait()
        self._wake.clear()

    def _accept(self, request: GenerationRequest, deadline_s: float | None) -> _Live:
        if self._is_draining:
            raise Draining("the worker is draining and accepts no request")
        if request.request_id in self._live:
            raise DuplicateRequest(f"request {request.request_id!r} is already being served")
        check_token_ids(request.token_ids, self._vocab_size, "the prompt")
        if request.max_total_tokens > self._pool.max_sequence_tokens:
            raise InvalidRequest(
                f"a prompt of {len(request.token_ids)} tokens and max_tokens "
                f"{request.max_tokens} are more than the {self._pool.max_sequence_tokens} tokens "
                "that this worker can hold for a sequence"
            )
        self._scheduler.require_room()  # before the prompt is hashed and looked up
        kv = self._kv.open(request)
        live = _Live(Sequence(request, kv), TokenStream(kv.root), _now_s(), deadline_s)
        self._scheduler.add(live.sequence)
        self._live[request.request_id] = live
        self._counters.accepted += 1
        self._idle.clear()
        self._wake.set()
        return live

    def _end_soon(self, live: _Live, why: Exception) -> None:
        """End at the edge of a step: the running one may be writing the sequence's KV."""
        live.ending = live.ending or why
        self._wake.set()

    def _end_cancelled_and_late(self) -> None:
        now_s = _now_s()
        for live in list(self._live.values()):
            if live.ending is not None:
                self._end(live, live.ending)
            elif live.deadline_s is not None and live.deadline_s <= now_s:
                self._end(live, _late(live))

    def _end(self, live: _Live, outcome: FinishReason | Exception) -> None:
        sequence, request = live.sequence, live.sequence.request
        del self._live[request.request_id]
        if not self._live:
            self._idle.set()
        live.stream.end(outcome)
        if isinstance(outcome, FinishReason):
            self._counters.finished += 1
        elif isinstance(outcome, RequestCancelled):
            self._counters.cancelled += 1
        else:
            self._counters.failed += 1
        log.info(
            "request_ended request_id=%s session_id=%s outcome=%s prompt_tokens=%d "
            "restored_tokens=%d completion_tokens=%d seconds=%.3f",
            request.request_id,
            request.session_id,
            outcome if isinstance(outcome, FinishReason) else type(outcome).__name__,
            sequence.num_prompt_tokens,
            sequence.num_prompt_tokens - sequence.claim.usage.computed_tokens,
            sequence.num_answer_tokens,
            _now_s() - live.started_s,
        )
        self._scheduler.end(sequence)

    async def _step(self, slices: list[Slice[RequestKv]]) -> None:
        self._begin(slices)
        start_s = time.perf_counter()
        try:
            token_ids = await self._runner.run(slices, self._last_deadline_s(slices))
        except DeadlineExceeded:  # of every request in the step: see _last_deadline_s
            for piece in slices:
                live = self._live[piece.sequence.request.request_id]
                self._end(live, live.ending or _late(live))
        except (ServiceError, ModelError) as error:
            self._fail(slices, error)
        except Exception:
            ids = [piece.sequence.request.request_id for piece in slices]
            log.exception("step_failed request_ids=%s", ids)
            self._fail(slices, InternalFailure("a step failed; see the worker's log"))
        else:
            self._count(slices, time.perf_counter() - start_s)
            for piece, token_id in zip(slices, token_ids, strict=True):
                self._hand_over(piece, token_id)

    def _begin(self, slices: list[Slice[RequestKv]]) -> None:
        for piece in slices:
            live = self._live[piece.sequence.request.request_id]
            if not live.has_begun:
                live.has_begun = True
                self._counters.queue_seconds.observe(_now_s() - live.started_s)

    def _last_deadline_s(self, slices: list[Slice[RequestKv]]) -> float | None:
        """After it the step is of use to nobody; None: there is somebody who waits for ever."""
        live = [self._live[piece.sequence.request.request_id] for piece in slices]
        deadlines = [each.deadline_s for each in live if each.deadline_s is not None]
        return max(deadlines) if len(deadlines) == len(live) else None

    def _hand_over(self, piece: Slice[RequestKv], token_id: int | None) -> None:
        finish = self._scheduler.computed(piece, token_id)
        live = self._live[piece.sequence.request.request_id]
        if token_id is None or live.ending is not None:
            return
        live.stream.put(token_id, live.sequence.claim.usage)
        if live.sequence.num_answer_tokens == 1:
            self._counters.first_token_seconds.observe(_now_s() - live.started_s)
        if finish is not None:
            self._end(live, finish)

    def _fail(self, slices: list[Slice[RequestKv]], error: Exception) -> None:
        for piece in slices:
            live = self._live[piece.sequence.request.request_id]
            self._end(live, live.ending or error)

    def _count(self, slices: list[Slice[RequestKv]], seconds: float) -> None:
        prompt_tokens = sum(piece.num_prompt_tokens for piece in slices)
        batch_tokens = sum(piece.num_tokens for piece in slices)
        limits, counters = self._scheduler.limits, self._counters
        self.observe_step(prompt_tokens, seconds)
        counters.step_seconds.observe(seconds)
        counters.filled_seconds += seconds * max(
            len(slices) / limits.max_sequences, batch_tokens / limits.max_batch_tokens
        )
        counters.stepped(
            prompt_tokens=prompt_tokens,
            completion_tokens=sum(piece.wants_token for piece in slices),
            batch_tokens=batch_tokens,
        )


def _late(live: _Live) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the deadline passed after {_now_s() - live.started_s:.3f} s with "
        f"{live.sequence.num_answer_tokens} of {live.sequence.request.max_tokens} tokens generated"
    )


def _now_s() -> float:
    return asyncio.get_running_loop().time()
