"""One client request from admission to its end: the gateway without its gRPC edge.

Owns the table of live requests. Every request that enters `generate` leaves it exactly once: with
a Final frame, or with the error that ended it. Runs on one asyncio loop.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

from services.errors import (
    DeadlineExceeded,
    Draining,
    DuplicateRequest,
    QueueFull,
    RequestCancelled,
    ServiceError,
    UnknownRequest,
)
from services.gateway.admission import Admission, AskedRequest
from services.gateway.answer import Accepted, Answer, Frame
from services.gateway.continuation import Completed, Continuation, Queued
from services.gateway.counters import CountedRequest, RequestCounters
from services.gateway.sessions import Sessions, Turn
from services.gateway.workers import WorkerPool
from services.generation import GenerationRequest
from services.session_record import SessionName

# Awaited before the next frame is made, so a slow client slows its own request only.
Emit: TypeAlias = Callable[[Frame], Awaitable[None]]


@dataclass(slots=True, eq=False)
class _Live:
    """`scope` is the request's time; cutting it short with `ending` set ends the request."""

    scope: asyncio.Timeout
    ending: ServiceError | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    """What a request brings along on its way; `turn` is None outside of sessions."""

    counted: CountedRequest
    turn: Turn | None
    deadline_s: float | None  # on the loop's clock
    emit: Emit


class Gateway:
    """Admits, places and relays; stops admitting when draining."""

    def __init__(
        self,
        admission: Admission,
        workers: WorkerPool,
        sessions: Sessions,
        *,
        max_active_requests: int,
        continue_patience_s: float,
    ) -> None:
        """`continue_patience_s`: that a request waits for a worker to take it, or to go on."""
        self.admission = admission
        self.workers = workers
        self.sessions = sessions
        self.max_active_requests = max_active_requests
        self._continue_patience_s = continue_patience_s
        self.counters = RequestCounters()
        self._live: dict[str, _Live] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_draining = False

    @property
    def num_active(self) -> int:
        return len(self._live)

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    async def generate(self, asked: AskedRequest, timeout_s: float | None, emit: Emit) -> None:
        """Emit Accepted, Deltas and Final; raises a ServiceError or InvalidRequest instead.

        Cancelling the caller's task cancels the request at its worker.
        """
        with self.counters.request() as counted:
            await self._generate(asked, timeout_s, emit, counted)

    async def _generate(
        self, asked: AskedRequest, timeout_s: float | None, emit: Emit, counted: CountedRequest
    ) -> None:
        if self._is_draining:
            raise Draining("the gateway is draining and accepts no request")
        if len(self._live) >= self.max_active_requests:
            raise QueueFull(
                f"{len(self._live)} requests are active, the gateway takes "
                f"{self.max_active_requests} at once"
            )
        asked = replace(asked, request_id=asked.request_id or uuid.uuid4().hex)
        with self._registered(asked.request_id, timeout_s) as live:
            try:
                async with live.scope, self._turn(asked) as turn:
                    await self._serve(asked, _Call(counted, turn, live.scope.when(), emit))
            except TimeoutError:
                raise live.ending or DeadlineExceeded(
                    f"the deadline of {timeout_s} s passed"
                ) from None

    def abort(self, request_id: str) -> None:
        """End a live request with RequestCancelled; raises UnknownRequest."""
        live = self._live.get(request_id)
        if live is None:
            raise UnknownRequest(f"no live request has the id {request_id!r}")
        _cut_short(live, RequestCancelled(f"request {request_id!r} was aborted"))

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
                _cut_short(live, Draining("the gateway shut down before the answer was done"))
            await self._idle.wait()
            return len(left)
        return 0

    @asynccontextmanager
    async def _turn(self, asked: AskedRequest) -> AsyncIterator[Turn | None]:
        if not asked.session_id:
            yield None
            return
        async with self.sessions.turn(SessionName(asked.session_id, asked.cache_salt)) as turn:
            yield turn

    async def _serve(self, asked: AskedRequest, call: _Call) -> None:
        request = self.admission.admit(asked, call.turn.history if call.turn else ())
        continuation = Continuation(
            request,
            self.workers,
            call.counted,
            last_worker=call.turn.last_worker if call.turn else "",
            deadline_s=call.deadline_s,
            patience_s=self._continue_patience_s,
        )
        answer = Answer(request, self.admission.tokenizer)
        async with aclosing(continuation.events()) as events:
            async for event in events:
                match event:
                    case Queued():
                        call.counted.accepted()
                        await call.emit(Accepted(request.request_id, event.worker))
                    case Completed():
                        await self._complete(request, answer, event, call)
                    case token_ids:
                        call.counted.generated(len(token_ids))
                        await call.emit(answer.delta(token_ids))

    async def _complete(
        self, request: GenerationRequest, answer: Answer, completed: Completed, call: _Call
    ) -> None:
        if rest := answer.rest():
            await call.emit(rest)
        token_ids, row = request.token_ids + answer.token_ids, completed.worker
        self.workers.learn(row, request.cache_salt, token_ids)
        if call.turn:
            await call.turn.keep(token_ids, kv_root=completed.kv_root, worker=row.name)
        final = answer.final(completed.finish_reason, completed.kv)
        await call.emit(final)
        call.counted.answered(final)

    @contextmanager
    def _registered(self, request_id: str, timeout_s: float | None) -> Iterator[_Live]:
        if request_id in self._live:
            raise DuplicateRequest(f"request {request_id!r} is already being served")
        live = self._live[request_id] = _Live(asyncio.timeout(timeout_s))
        self._idle.clear()
        try:
            yield live
        finally:
            del self._live[request_id]
            if not self._live:
                self._idle.set()


def _cut_short(live: _Live, why: ServiceError) -> None:
    if live.scope.expired():
        return  # it is ending already, and a scope on its way out cannot be changed
    live.ending = live.ending or why
    live.scope.reschedule(asyncio.get_running_loop().time())
