"""The worker's end of a layer crossing: routed rows go to the node's router, sums come back.

Owns the stream to the router and the calls under way on it, which outlive the stream: when it
breaks they are sent again on the next one, for a crossing is a pure function of its rows. Knows
nothing of experts, replicas or tables, nor of what the worker does while its rows are away.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc.aio
import torch
from numpy.typing import NDArray
from torch import Tensor

from model1.moe import ExpertCall
from protos import router_pb2, router_pb2_grpc
from services import errors, wire
from services.duplex import Duplex
from services.wire import LayerRows

# Long enough for a router to be started again; a crossing is then repeated and done at once.
CROSSING_TIMEOUT_SECONDS = 60.0
# Micro-batches of one worker; two overlap attention and experts, more buy nothing.
MAX_CALLS_UNDER_WAY = 16


@dataclass(slots=True, eq=False)
class _PendingCall:
    message: router_pb2.LayerRows  # to be sent again if the stream breaks
    device: torch.device
    deadline: float  # on the loop's clock
    sums: asyncio.Future[Tensor]
    timer: asyncio.TimerHandle


class RoutedExperts:
    """Build it inside the event loop (it connects in the background), or use `open`."""

    def __init__(self, address: str, max_calls_under_way: int = MAX_CALLS_UNDER_WAY) -> None:
        self.address = address
        self._max_calls_under_way = max_calls_under_way
        self._last_call_id = 0
        self._pending: dict[int, _PendingCall] = {}
        self._duplex = Duplex[router_pb2.LayerRows, router_pb2.LayerSums](
            address,
            _open_dispatch,
            opened=self._send_pending,
            receive=self._receive,
            broken=self._break,
        )
        self._last_break = "it was never there"

    @classmethod
    async def open(cls, address: str, connect_timeout_seconds: float = 10.0) -> RoutedExperts:
        """Raises ExpertsUnavailable if the router does not answer in time."""
        experts = cls(address)
        try:
            await asyncio.wait_for(experts.wait_connected(), connect_timeout_seconds)
        except TimeoutError:
            await experts.close()
            raise errors.ExpertsUnavailable(
                f"no router answers at {address} after {connect_timeout_seconds:g} s"
            ) from None
        return experts

    @property
    def connected(self) -> bool:
        return self._duplex.connected

    async def wait_connected(self) -> None:
        await self._duplex.wait_connected()

    async def submit(
        self, call: ExpertCall, timeout_seconds: float = CROSSING_TIMEOUT_SECONDS
    ) -> asyncio.Future[Tensor]:
        """Send the rows. When this returns they are in gRPC's hands, and the caller may compute;
        without a router they are kept, and sent as soon as there is one.

        The future yields the sums, float32 [T, D] on the device of the rows. It fails with
        ExpertsUnavailable, DeadlineExceeded, ModelMismatch or InternalFailure; cancelling it tells
        the router. Raises QueueFull, or ExpertsUnavailable if the router reads nothing, at once.
        """
        if self._duplex.choked:
            raise errors.ExpertsUnavailable(f"the router at {self.address} does not read its calls")
        if len(self._pending) >= self._max_calls_under_way:
            raise errors.QueueFull(f"{self._max_calls_under_way} layer crossings are under way")
        loop = asyncio.get_running_loop()
        self._last_call_id += 1
        call_id = self._last_call_id
        message = wire.encode_layer_rows(call_id, layer_rows(call), timeout_seconds)
        sums: asyncio.Future[Tensor] = loop.create_future()
        sums.add_done_callback(partial(self._ended, call_id))
        deadline = loop.time() + timeout_seconds
        timer = loop.call_at(deadline, self._expire, call_id, timeout_seconds)
        self._pending[call_id] = _PendingCall(message, call.rows.device, deadline, sums, timer)
        if self._duplex.connected:
            self._duplex.send(message)
            # One turn of the loop: the stream's writer wakes up and starts the write.
            await asyncio.sleep(0)
        return sums

    async def close(self) -> None:
        await self._duplex.close()
        closed = errors.ExpertsUnavailable(f"the link to {self.address} was closed")
        for call_id in tuple(self._pending):
            pending = self._forget(call_id)
            if pending and not pending.sums.done():
                pending.sums.set_exception(closed)

    def _send_pending(self, _metadata: grpc.aio.Metadata) -> None:
        """The router may be another process now: it knows none of them."""
        now = asyncio.get_running_loop().time()
        for pending in self._pending.values():
            left_seconds = pending.deadline - now
            if left_seconds > 0:  # else its timer is due
                pending.message.timeout_seconds = left_seconds
                self._duplex.send(pending.message)

    def _receive(self, message: router_pb2.LayerSums) -> None:
        pending = self._forget(message.call_id)
        if pending is None or pending.sums.done():
            return  # given up while the sums were on their way
        if message.HasField("error"):
            pending.sums.set_exception(wire.decode_error(message.error))
            return
        try:
            asked = pending.message
            sums = wire.decode_sums(message, asked.num_rows, asked.hidden_size)
        except wire.MalformedCall as error:
            pending.sums.set_exception(errors.InternalFailure(f"{self.address}: {error}"))
            return
        # A copy, since what arrived is read-only memory, which torch does not know.
        pending.sums.set_result(torch.from_numpy(sums.copy()).to(pending.device))

    def _ended(self, call_id: int, sums: asyncio.Future[Tensor]) -> None:
        if sums.cancelled():
            self._give_up(call_id)
        else:
            # Looked at here, or asyncio would complain about a failure that nobody awaits any more.
            sums.exception()

    def _expire(self, call_id: int, timeout_seconds: float) -> None:
        pending = self._give_up(call_id)
        if pending and not pending.sums.done():
            late = f"no sums from the router at {self.address} within {timeout_seconds:g} s"
            if not self._duplex.connected:
                late += f" (no connection: {self._last_break})"
            pending.sums.set_exception(errors.DeadlineExceeded(late))

    def _give_up(self, call_id: int) -> _PendingCall | None:
        pending = self._forget(call_id)
        if pending and self._duplex.connected:
            self._duplex.send(router_pb2.LayerRows(call_id=call_id, cancel=True))
        return pending

    def _forget(self, call_id: int) -> _PendingCall | None:
        pending = self._pending.pop(call_id, None)
        if pending:
            pending.timer.cancel()
        return pending

    def _break(self, reason: str) -> None:
        self._last_break = reason


def layer_rows(call: ExpertCall) -> LayerRows:
    # numpy has no bfloat16: its words travel as uint16.
    rows = call.rows
    return LayerRows(
        layer=call.layer,
        rows=_array(rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows),
        expert_ids=_array(call.expert_ids),
        weights=_array(call.weights),
    )


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def _open_dispatch(
    channel: grpc.aio.Channel,
) -> grpc.aio.StreamStreamCall[router_pb2.LayerRows, router_pb2.LayerSums]:
    stub = router_pb2_grpc.RouterStub(channel)
    stream: grpc.aio.StreamStreamCall[router_pb2.LayerRows, router_pb2.LayerSums]
    stream = stub.Dispatch(wait_for_ready=True)
    return stream
