"""One request's stream of tokens as if one worker served it that cannot be lost.

A worker that is lost in the middle of it (its process, its connection, or it drains) costs a pause:
the next one is asked to go on from the prompt and the tokens that have come. A draw depends on seed
and position alone, and a token not on how its prompt was cut into steps, so it is the same answer.
Knows neither clients nor text nor sessions.

A request waits while nobody takes it, within `patience_s`. It is never lost to a queue that is full
once a worker had it. One that ends whoever computes it must not end all workers for ever: without a
token in between it goes on `MAX_LOSSES` times, and as often as it is lost within `patience_s`, for
it may have stood in their queues only.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

from services.errors import (
    DuplicateRequest,
    InternalFailure,
    ModelMismatch,
    QueueFull,
    ServiceError,
    Unavailable,
    WorkerUnavailable,
)
from services.gateway.counters import CountedRequest
from services.gateway.watched_worker import WatchedWorker
from services.gateway.worker import (
    Worker,
    WorkerAccepted,
    WorkerAddress,
    WorkerFinal,
    WorkerTokens,
)
from services.gateway.workers import WorkerPool
from services.generation import FinishReason, GenerationRequest, KvUsage

log = logging.getLogger(__name__)

MAX_LOSSES = 4
# Before the same worker is asked again, doubled each time.
FIRST_PAUSE_SECONDS = 0.1
LAST_PAUSE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Queued:
    """A worker has the request; told once."""

    worker: str


@dataclass(frozen=True, slots=True)
class Completed:
    """All tokens have come. `kv` is None where no worker could say."""

    finish_reason: FinishReason
    kv: KvUsage | None
    kv_root: bytes
    worker: WorkerAddress  # gave the last token


# Queued, tokens as they come, completed.
ContinuedEvent: TypeAlias = Queued | tuple[int, ...] | Completed


class Continuation:
    """Where one request is: who had it, what has come of it, who is asked next and when."""

    def __init__(
        self,
        request: GenerationRequest,
        workers: WorkerPool,
        counted: CountedRequest,
        *,
        last_worker: str,
        deadline_s: float | None,
        patience_s: float,
    ) -> None:
        """`last_worker` served the turn before; `deadline_s` is on the loop's clock."""
        self._request = request
        self._workers = workers
        self._counted = counted
        self._last_worker = last_worker
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._token_ids: list[int] = []
        self._kv: KvUsage | None = None
        self._kv_root: bytes | None = None  # None: no worker has queued it yet
        self._had_it: set[WorkerAddress] = set()
        # In a row: queued, and lost before a token came.
        self._num_losses = 0
        self._first_loss_s = 0.0
        # While no worker has it: why the last one does not, and how long to look for the next.
        self._why: ServiceError | None = None
        self._give_up_at_s: float | None = None
        self._has_waited = False
        self._pause_s = FIRST_PAUSE_SECONDS
        self._ask_again_s: dict[WorkerAddress, float] = {}

    async def events(self) -> AsyncGenerator[ContinuedEvent, None]:
        """Raises what ended the request; closing the iterator early cancels it at its worker."""
        while True:
            watched = await self._next_worker()
            row = watched.worker.row
            try:
                async with watched.in_use() as worker, aclosing(self._asked(worker)) as events:
                    async for event in events:
                        yield event
                return
            except (Unavailable, QueueFull, DuplicateRequest) as error:
                await self._lost(watched, error)
            if (finish_reason := self._finish_reason()) is not None:
                yield self._completed(finish_reason, row)
                return

    async def _asked(self, worker: Worker) -> AsyncGenerator[ContinuedEvent, None]:
        """What this worker makes of the rest of the request."""
        rest = replace(
            self._request,
            token_ids=(*self._request.token_ids, *self._token_ids),
            max_tokens=self._request.max_tokens - len(self._token_ids),
        )
        is_first = self._kv_root is None
        async with aclosing(worker.generate(rest, self._left_s())) as events:
            async for event in events:
                match event:
                    case WorkerAccepted():
                        self._queued(worker, event.kv_root)
                        if is_first:
                            yield Queued(worker.row.name)
                    case WorkerTokens():
                        self._came(event, is_first=is_first)
                        yield event.token_ids
                    case WorkerFinal():
                        yield self._completed(event.finish_reason, worker.row)
                        return
        raise InternalFailure(f"attention worker {worker.row.name} ended without a finish reason")

    async def _next_worker(self) -> WatchedWorker:
        """Waits for one; raises why there is none when the patience is over."""
        now_s = asyncio.get_running_loop().time
        if self._give_up_at_s is None:
            self._give_up_at_s = now_s() + self._patience_s
        while (chosen := self._choose(now_s())) is None:
            if now_s() >= self._give_up_at_s:
                raise self._nobody()
            if not self._has_waited:
                self._has_waited = True
                self._counted.waited()
            until_s = min([self._give_up_at_s, *self._ask_again_s.values()])
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until_s):
                    await self._workers.wait_for_change()
        return chosen

    def _choose(self, now_s: float) -> WatchedWorker | None:
        self._ask_again_s = {
            row: again_s for row, again_s in self._ask_again_s.items() if again_s > now_s
        }
        return self._workers.choose(
            self._request, last_worker=self._last_worker, passed_over=self._ask_again_s
        )

    def _queued(self, worker: Worker, kv_root: bytes) -> None:
        if self._kv_root is None:
            self._kv_root = kv_root
        elif kv_root != self._kv_root:
            raise ModelMismatch(
                f"attention worker {worker.row.name} holds another model or KV layout than the one "
                "that began the answer"
            )
        else:
            self._counted.continued()
        self._had_it.add(worker.row)
        self._give_up_at_s = self._why = None
        self._has_waited = False

    def _came(self, tokens: WorkerTokens, *, is_first: bool) -> None:
        if tokens.kv is not None:
            if not self._token_ids:
                self._kv = tokens.kv
            if not is_first:
                self._counted.recomputed(tokens.kv.computed_tokens)
        self._token_ids += tokens.token_ids
        self._num_losses = 0
        self._pause_s = FIRST_PAUSE_SECONDS

    async def _lost(self, watched: WatchedWorker, error: ServiceError) -> None:
        """Raises the error if the request ends with it."""
        worker, was_queued = watched.worker, self._give_up_at_s is None
        now_s = asyncio.get_running_loop().time()
        if isinstance(error, Unavailable):
            watched.failed()
        elif self._kv_root is None:
            raise error  # nothing is lost by telling the client
        elif isinstance(error, DuplicateRequest) and worker.row in self._had_it:
            # It has not noticed yet that its stream to us is gone.
            with suppress(Unavailable):
                await worker.abort(self._request.request_id)
        if was_queued:
            log.warning(
                "request_lost request_id=%s completion_tokens=%d why=%s",
                self._request.request_id,
                len(self._token_ids),
                error,
            )
            self._num_losses += 1
            if self._num_losses == 1:
                self._first_loss_s = now_s
            if self._num_losses >= MAX_LOSSES and now_s - self._first_loss_s >= self._patience_s:
                raise WorkerUnavailable(
                    f"{error}; {self._num_losses} workers in a row were lost before they gave a "
                    f"token, within {now_s - self._first_loss_s:.1f} s"
                ) from error
        self._why = error
        self._ask_again_s[worker.row] = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LAST_PAUSE_SECONDS)

    def _nobody(self) -> ServiceError:
        why = self._why or self._workers.why_nobody()
        kind = QueueFull if isinstance(why, QueueFull) else WorkerUnavailable
        return kind(f"{why}; no attention worker took the request within {self._patience_s:g} s")

    def _finish_reason(self) -> FinishReason | None:
        """Set if the tokens that have come are all there are: only the last word was lost."""
        if self._token_ids and self._token_ids[-1] in self._request.stop_token_ids:
            return FinishReason.STOP
        if len(self._token_ids) == self._request.max_tokens:
            return FinishReason.LENGTH
        return None

    def _completed(self, finish_reason: FinishReason, row: WorkerAddress) -> Completed:
        return Completed(finish_reason, self._kv, self._kv_root or b"", row)

    def _left_s(self) -> float | None:
        if self._deadline_s is None:
            return None
        return max(0.0, self._deadline_s - asyncio.get_running_loop().time())
