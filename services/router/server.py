"""Owns the gRPC edge of a router: the streams of its node's workers, and which crossings each of
them has under way. Knows nothing of tables, replicas or sums.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import grpc.aio
import numpy as np
from numpy.typing import NDArray

from protos import router_pb2, router_pb2_grpc
from services import rpc, wire
from services.duplex import answer
from services.router.crossing import Crossing
from services.router.router import Router


class RouterServicer(router_pb2_grpc.RouterServicer):
    def __init__(self, router: Router) -> None:
        self._router = router
        self._draining = asyncio.Event()
        self._num_streams = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def Dispatch(
        self,
        request_iterator: AsyncIterator[router_pb2.LayerRows],
        context: grpc.aio.ServicerContext[router_pb2.LayerRows, router_pb2.LayerSums],
    ) -> None:
        stream = _Stream(self._router)
        self._num_streams += 1
        self._idle.clear()
        try:
            await answer(
                request_iterator,
                context,
                stream.outbox,
                receive=stream.receive,
                settled=stream.settled.wait,
                draining=self._draining,
            )
        finally:
            stream.abandon()
            self._num_streams -= 1
            if not self._num_streams:
                self._idle.set()

    async def Stats(
        self,
        request: router_pb2.RouterStatsRequest,
        context: grpc.aio.ServicerContext[
            router_pb2.RouterStatsRequest, router_pb2.RouterStatsResponse
        ],
    ) -> router_pb2.RouterStatsResponse:
        return router_stats(self._router)

    async def drain(self) -> None:
        """Finish the crossings under way, end every stream, close the links."""
        self._draining.set()
        await self._idle.wait()
        await self._router.close()


class _Stream:
    """The crossings of one worker."""

    def __init__(self, router: Router) -> None:
        self.outbox: asyncio.Queue[router_pb2.LayerSums] = asyncio.Queue()
        self.settled = asyncio.Event()
        self.settled.set()
        self._router = router
        self._under_way: dict[int, Crossing] = {}

    def receive(self, message: router_pb2.LayerRows) -> None:
        call_id = message.call_id
        if message.cancel:
            if crossing := self._under_way.get(call_id):
                self._router.cancel(crossing)
                self._forget(call_id)
            return
        try:
            if call_id in self._under_way:
                raise wire.MalformedCall(f"call {call_id} is under way already")
            call = wire.decode_layer_rows(message)
        except wire.MalformedCall as error:
            self._reply(call_id, error)
            return
        crossing = Crossing(call, message.timeout_seconds or None, partial(self._done, call_id))
        self._under_way[call_id] = crossing
        self.settled.clear()
        self._router.start(crossing)

    def abandon(self) -> None:
        """The worker is gone: nobody wants these sums."""
        for crossing in self._under_way.values():
            self._router.cancel(crossing)
        self._under_way.clear()

    def _done(self, call_id: int, result: NDArray[np.float32] | Exception) -> None:
        self._reply(call_id, result)
        self._forget(call_id)

    def _forget(self, call_id: int) -> None:
        del self._under_way[call_id]
        if not self._under_way:
            self.settled.set()

    def _reply(self, call_id: int, result: NDArray[np.float32] | Exception) -> None:
        if isinstance(result, Exception):
            reply = router_pb2.LayerSums(call_id=call_id, error=wire.encode_error(result))
        else:
            reply = wire.encode_layer_sums(call_id, result)
        self.outbox.put_nowait(reply)


def router_service(router: Router) -> rpc.Service:
    """What rpc.start_server needs to serve this router; call it inside the event loop."""
    servicer = RouterServicer(router)
    return rpc.Service(
        router_pb2.DESCRIPTOR.services_by_name["Router"].full_name,
        partial(router_pb2_grpc.add_RouterServicer_to_server, servicer),
        servicer.drain,
    )


def router_stats(router: Router) -> router_pb2.RouterStatsResponse:
    """What it says of itself; inside its event loop."""
    now = asyncio.get_running_loop().time()
    return router_pb2.RouterStatsResponse(
        router=router.name,
        epoch=router.table.epoch,
        calls=router.counters.calls,
        rows=router.counters.rows,
        failed_calls=router.counters.failed_calls,
        resent_parts=router.counters.resent_parts,
        calls_under_way=router.num_under_way,
        calls_waiting=router.num_waiting,
        hedged_parts=router.counters.hedged_parts,
        hedges_won=router.counters.hedges_won,
        probe_parts=router.counters.probe_parts,
        expert_pairs=router.counters.expert_pairs.tolist(),
        replicas=[
            router_pb2.RouterReplicaStats(
                address=link.address,
                connected=link.connected,
                calls=link.calls,
                pairs=link.pairs,
                outstanding_pairs=link.outstanding_pairs,
                breaks=link.breaks,
                suspect=link.is_suspect(now),
                slowness=link.slowness,
                wrong_answers=link.wrong_answers,
                answer_seconds=link.answers.to_wire(),
                overdue_calls=link.overdue_calls,
            )
            for link in router.links
        ],
    )
