"""Owns the gRPC edge of an expert replica: its streams, the calls waiting on each, their deadlines.

Computes inline in the event loop, because one thread owns the weights and the process has nothing
better to do meanwhile. Knows nothing of what is computed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial

import grpc.aio

from protos import expert_pb2, expert_pb2_grpc
from services import errors, rpc, wire
from services.duplex import answer
from services.expert.replica import ExpertReplica

log = logging.getLogger(__name__)

# Routers keep at most their own bound under way; this one catches a router that does not.
MAX_WAITING_CALLS = 256


@dataclass(slots=True, eq=False)
class _WaitingCall:
    message: expert_pb2.ExpertRows
    deadline: float | None  # loop time
    cancelled: bool = False


class ExpertServicer(expert_pb2_grpc.ExpertServicer):
    def __init__(self, replica: ExpertReplica, max_waiting_calls: int = MAX_WAITING_CALLS) -> None:
        self._replica = replica
        self._max_waiting_calls = max_waiting_calls
        self._draining = asyncio.Event()
        self._streams: set[_Stream] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def Dispatch(
        self,
        request_iterator: AsyncIterator[expert_pb2.ExpertRows],
        context: grpc.aio.ServicerContext[expert_pb2.ExpertRows, expert_pb2.ExpertOutputs],
    ) -> None:
        stream = _Stream(self._replica, self._max_waiting_calls)
        self._streams.add(stream)
        self._idle.clear()
        computing = asyncio.create_task(stream.compute_in_turn())
        try:
            await answer(
                request_iterator,
                context,
                stream.outbox,
                receive=stream.receive,
                settled=stream.inbox.join,
                draining=self._draining,
            )
        finally:
            computing.cancel()
            self._streams.discard(stream)
            if not self._streams:
                self._idle.set()

    async def Stats(
        self,
        request: expert_pb2.ExpertStatsRequest,
        context: grpc.aio.ServicerContext[
            expert_pb2.ExpertStatsRequest, expert_pb2.ExpertStatsResponse
        ],
    ) -> expert_pb2.ExpertStatsResponse:
        counters = self._replica.counters
        return expert_pb2.ExpertStatsResponse(
            replica=self._replica.name,
            expert_ids=self._replica.expert_ids,
            draining=self._draining.is_set(),
            calls=counters.calls,
            rows=counters.rows,
            pairs=counters.pairs,
            failed_calls=counters.failed_calls,
            skipped_calls=counters.skipped_calls,
            busy_seconds=counters.busy_seconds,
            waiting_calls=sum(stream.inbox.qsize() for stream in self._streams),
        )

    async def drain(self) -> None:
        """Answer what has arrived, then end every stream; routers send the rest elsewhere."""
        self._draining.set()
        await self._idle.wait()


class _Stream:
    """The calls of one router, computed in the order of their arrival."""

    def __init__(self, replica: ExpertReplica, max_waiting_calls: int) -> None:
        self.inbox: asyncio.Queue[_WaitingCall] = asyncio.Queue(max_waiting_calls)
        self.outbox: asyncio.Queue[expert_pb2.ExpertOutputs] = asyncio.Queue()
        self._replica = replica
        self._waiting: dict[int, _WaitingCall] = {}

    def receive(self, message: expert_pb2.ExpertRows) -> None:
        if message.cancel:
            if call := self._waiting.get(message.call_id):
                call.cancelled = True
            return
        timeout_seconds = message.timeout_seconds
        deadline = asyncio.get_running_loop().time() + timeout_seconds if timeout_seconds else None
        call = _WaitingCall(message, deadline)
        try:
            self.inbox.put_nowait(call)
        except asyncio.QueueFull:
            full = errors.QueueFull(
                f"replica {self._replica.name} has {self.inbox.maxsize} calls waiting"
            )
            self._fail(message.call_id, full)
        else:
            self._waiting[message.call_id] = call

    async def compute_in_turn(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            call = await self.inbox.get()
            self._waiting.pop(call.message.call_id, None)
            if call.cancelled:
                self._replica.counters.skipped_calls += 1
            elif call.deadline is not None and loop.time() >= call.deadline:
                self._replica.counters.skipped_calls += 1
                late = errors.DeadlineExceeded(
                    f"the deadline passed while the call waited on replica {self._replica.name}"
                )
                self.outbox.put_nowait(_failure(call.message.call_id, late))
            else:
                self._compute(call.message)
            self.inbox.task_done()
            # Computing blocks the loop: let the answer out and the next request in.
            await asyncio.sleep(0)

    def _compute(self, message: expert_pb2.ExpertRows) -> None:
        try:
            pair_rows = self._replica.compute(wire.decode_expert_rows(message))
        except (wire.MalformedCall, errors.ServiceError) as error:
            self._fail(message.call_id, error)
        except Exception:
            log.exception("expert_call_failed call_id=%d layer=%d", message.call_id, message.layer)
            unexpected = errors.InternalFailure(
                f"replica {self._replica.name} failed on layer {message.layer}; see its log"
            )
            self._fail(message.call_id, unexpected)
        else:
            self.outbox.put_nowait(wire.encode_expert_outputs(message.call_id, pair_rows))

    def _fail(self, call_id: int, error: Exception) -> None:
        self._replica.counters.failed_calls += 1
        self.outbox.put_nowait(_failure(call_id, error))


def _failure(call_id: int, error: Exception) -> expert_pb2.ExpertOutputs:
    return expert_pb2.ExpertOutputs(call_id=call_id, error=wire.encode_error(error))


def expert_service(
    replica: ExpertReplica, max_waiting_calls: int = MAX_WAITING_CALLS
) -> rpc.Service:
    """What rpc.start_server needs to serve this replica; call it inside the event loop."""
    servicer = ExpertServicer(replica, max_waiting_calls)
    return rpc.Service(
        expert_pb2.DESCRIPTOR.services_by_name["Expert"].full_name,
        partial(expert_pb2_grpc.add_ExpertServicer_to_server, servicer),
        servicer.drain,
    )
