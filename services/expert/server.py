"""Owns the gRPC edge of an expert replica: its streams, and the answer to what cannot be computed.

Computes inline in the event loop, because one thread owns the weights and the process has nothing
better to do meanwhile; what waits, waits in the streams, bounded by gRPC's flow control. Knows
nothing of what is computed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from functools import partial

import grpc.aio

from protos import expert_pb2, expert_pb2_grpc
from services import errors, rpc, wire
from services.duplex import answer
from services.expert.replica import ExpertReplica

log = logging.getLogger(__name__)


class ExpertServicer(expert_pb2_grpc.ExpertServicer):
    def __init__(self, replica: ExpertReplica) -> None:
        self._replica = replica
        self._draining = asyncio.Event()
        self._num_streams = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def Dispatch(
        self,
        request_iterator: AsyncIterator[expert_pb2.ExpertRows],
        context: grpc.aio.ServicerContext[expert_pb2.ExpertRows, expert_pb2.ExpertOutputs],
    ) -> None:
        outbox: asyncio.Queue[expert_pb2.ExpertOutputs] = asyncio.Queue()
        self._num_streams += 1
        self._idle.clear()
        try:
            await answer(
                request_iterator,
                context,
                outbox,
                receive=lambda message: outbox.put_nowait(self._timed_answer(message)),
                settled=_at_once,
                draining=self._draining,
            )
        finally:
            self._num_streams -= 1
            if not self._num_streams:
                self._idle.set()

    async def Stats(
        self,
        request: expert_pb2.ExpertStatsRequest,
        context: grpc.aio.ServicerContext[
            expert_pb2.ExpertStatsRequest, expert_pb2.ExpertStatsResponse
        ],
    ) -> expert_pb2.ExpertStatsResponse:
        stats = expert_stats(self._replica)
        stats.draining = self._draining.is_set()
        return stats

    async def drain(self) -> None:
        """Write the answers that are computed, then end every stream; routers send what is left
        unanswered elsewhere."""
        self._draining.set()
        await self._idle.wait()

    def _timed_answer(self, message: expert_pb2.ExpertRows) -> expert_pb2.ExpertOutputs:
        started = time.perf_counter()
        answer = self._answer(message)
        self._replica.counters.busy_seconds += time.perf_counter() - started
        return answer

    def _answer(self, message: expert_pb2.ExpertRows) -> expert_pb2.ExpertOutputs:
        try:
            self._refuse_late(message.deadline_seconds)
            pair_rows = self._replica.compute(wire.decode_expert_rows(message))
        except errors.DeadlineExceeded as error:
            self._replica.counters.late_calls += 1
            return _failure(message.call_id, error)
        except (wire.MalformedCall, errors.ServiceError) as error:
            self._replica.counters.failed_calls += 1
            return _failure(message.call_id, error)
        except Exception:
            self._replica.counters.failed_calls += 1
            log.exception("expert_call_failed call_id=%d layer=%d", message.call_id, message.layer)
            unexpected = errors.InternalFailure(
                f"replica {self._replica.name} failed on layer {message.layer}; see its log"
            )
            return _failure(message.call_id, unexpected)
        return wire.encode_expert_outputs(message.call_id, pair_rows)

    def _refuse_late(self, deadline_seconds: float) -> None:
        late_seconds = asyncio.get_running_loop().time() - deadline_seconds
        if deadline_seconds and late_seconds >= 0:
            raise errors.DeadlineExceeded(
                f"the deadline passed {late_seconds:.3f} s before the call's turn on replica "
                f"{self._replica.name}"
            )


async def _at_once() -> None:
    """Nothing is under way between two messages: an answer is made while its call is received."""


def _failure(call_id: int, error: Exception) -> expert_pb2.ExpertOutputs:
    return expert_pb2.ExpertOutputs(call_id=call_id, error=wire.encode_error(error))


def expert_stats(replica: ExpertReplica) -> expert_pb2.ExpertStatsResponse:
    """What it says of itself."""
    counters = replica.counters
    return expert_pb2.ExpertStatsResponse(
        replica=replica.name,
        expert_ids=replica.expert_ids,
        calls=counters.calls,
        rows=counters.rows,
        pairs=counters.pairs,
        failed_calls=counters.failed_calls,
        late_calls=counters.late_calls,
        busy_seconds=counters.busy_seconds,
        compute_seconds=counters.compute_seconds.to_wire(),
    )


def expert_service(replica: ExpertReplica) -> rpc.Service:
    """What rpc.start_server needs to serve this replica; call it inside the event loop."""
    servicer = ExpertServicer(replica)
    return rpc.Service(
        expert_pb2.DESCRIPTOR.services_by_name["Expert"].full_name,
        partial(expert_pb2_grpc.add_ExpertServicer_to_server, servicer),
        servicer.drain,
    )
