"""The worker's end of a layer crossing: routed rows go to the node's router, sums come back.

Owns the stream to the router and the calls under way on it. Knows nothing of experts, replicas or
tables, nor of what the worker does while its rows are away.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

import grpc.aio
import torch
from torch import Tensor

from model1.moe import ExpertCall
from protos import router_pb2, router_pb2_grpc
from services import errors, wire
from services.duplex import Duplex
from services.wire import LayerRows

# Micro-batches of one worker; two overlap attention and experts, more buy nothing.
MAX_CALLS_UNDER_WAY = 16


@dataclass(slots=True, eq=False)
class _PendingCall:
    num_rows: int
    hidden_size: int
    device: torch.device
    sums: asyncio.Future[Tensor]
    timer: asyncio.TimerHandle | None


class RoutedExperts:
    """Build it inside the event loop (it connects in the background), or use `open`."""

    def __init__(self, address: str, max_calls_under_way: int = MAX_CALLS_UNDER_WAY) -> None:
        self.address = address
        self._max_calls_under_way = max_calls_under_way
        self._last_call_id = 0
        self._pending: dict[int, _PendingCall] = {}
        self._duplex = Duplex[router_pb2.LayerRows, router_pb2.LayerSums](
            address, _open_dispatch, receive=self._receive, broken=self._break
        )

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
        self, call: ExpertCall, timeout_seconds: float | None = None
    ) -> asyncio.Future[Tensor]:
        """Send the rows. When this returns they are in gRPC's hands, and the caller may compute.

        The future yields the sums, float32 [T, D] on the device of the rows. It fails with
        ExpertsUnavailable, DeadlineExceeded, ModelMismatch or InternalFailure; cancelling it tells
        the router. Raises ExpertsUnavailable or QueueFull at once if nothing can be sent.
        """
        if not self._duplex.connected:
            raise errors.ExpertsUnavailable(f"no connection to the router at {self.address}")
        if len(self._pending) >= self._max_calls_under_way:
            raise errors.QueueFull(f"{self._max_calls_under_way} layer crossings are under way")
        loop = asyncio.get_running_loop()
        self._last_call_id += 1
        call_id = self._last_call_id
        sums: asyncio.Future[Tensor] = loop.create_future()
        sums.add_done_callback(partial(self._ended, call_id))
        timer = (
            loop.call_later(timeout_seconds, self._expire, call_id, timeout_seconds)
            if timeout_seconds is not None
            else None
        )
        num_rows, hidden_size = call.rows.shape
        self._pending[call_id] = _PendingCall(num_rows, hidden_size, call.rows.device, sums, timer)
        self._duplex.send(wire.encode_layer_rows(call_id, _layer_rows(call), timeout_seconds))
        # One turn of the loop: the stream's writer wakes up and starts the write.
        await asyncio.sleep(0)
        return sums

    async def close(self) -> None:
        await self._duplex.close()
        self._fail_all(errors.ExpertsUnavailable(f"the link to {self.address} was closed"))

    def _receive(self, message: router_pb2.LayerSums) -> None:
        pending = self._forget(message.call_id)
        if pending is None or pending.sums.done():
            return  # given up while the sums were on their way
        if message.HasField("error"):
            pending.sums.set_exception(wire.decode_error(message.error))
            return
        try:
            sums = wire.decode_sums(message, pending.num_rows, pending.hidden_size)
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
            pending.sums.set_exception(errors.DeadlineExceeded(late))

    def _give_up(self, call_id: int) -> _PendingCall | None:
        pending = self._forget(call_id)
        if pending and self._duplex.connected:
            self._duplex.send(router_pb2.LayerRows(call_id=call_id, cancel=True))
        return pending

    def _forget(self, call_id: int) -> _PendingCall | None:
        pending = self._pending.pop(call_id, None)
        if pending and pending.timer:
            pending.timer.cancel()
        return pending

    def _break(self, reason: str) -> None:
        self._fail_all(
            errors.ExpertsUnavailable(f"the stream to the router at {self.address} broke: {reason}")
        )

    def _fail_all(self, error: errors.ExpertsUnavailable) -> None:
        for call_id in tuple(self._pending):
            pending = self._forget(call_id)
            if pending and not pending.sums.done():
                pending.sums.set_exception(error)


def _layer_rows(call: ExpertCall) -> LayerRows:
    rows = call.rows.detach().cpu().contiguous()
    # numpy has no bfloat16: its words travel as uint16.
    words = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
    return LayerRows(
        layer=call.layer,
        rows=words.numpy(),
        expert_ids=call.expert_ids.cpu().contiguous().numpy(),
        weights=call.weights.detach().cpu().contiguous().numpy(),
    )


def _open_dispatch(
    channel: grpc.aio.Channel,
) -> grpc.aio.StreamStreamCall[router_pb2.LayerRows, router_pb2.LayerSums]:
    stub = router_pb2_grpc.RouterStub(channel)
    stream: grpc.aio.StreamStreamCall[router_pb2.LayerRows, router_pb2.LayerSums]
    stream = stub.Dispatch(wait_for_ready=True)
    return stream
